"""Run directories as the commands leave them, written without any training: what a report is made from."""

import yaml

from bcft.evaluation.results import Evaluation, Measured
from bcft.reporting.tables import conclusion
from bcft.runs.clock import PHASES
from bcft.runs.storage import write_json, write_jsonl, write_text
from bcft.selection.filter import REASONS

SAMPLES = 4
COMMAND = "bcft filtered recipes/filtered_bc.yaml --seed 1"


def evaluation(solved, *, n=12):
    """Return the attempts at n problems: greedy is right, and so are (solved + i) % 5 of the samples of problem i."""
    return Evaluation(
        tuple(
            {
                "problem_id": f"p{i:02d}", "sample": sample, "prompt": "<user>1 + 1", "completion": "2", "answer": "2",
                "success": "yes" if sample < (solved + i) % (SAMPLES + 1) else "no", "stop": "stop_token", "tokens": 1,
            }
            for i in range(n)
            for sample in range(-1, SAMPLES)
        )
    )  # fmt: skip


def measured(solved, *, success_known=True, n=12):
    evaluated = evaluation(solved, n=n)
    summary = evaluated.summary(None)
    return Measured(evaluated, summary if success_known else {k: summary[k] for k in ("n", "stop_rate", "ungraded")})


def line(number, *, dev=None, note="", **rejected):
    """Return a round as `metrics.jsonl` has it, with a different value for every figure."""
    record = {
        "round": number,
        "rollout": {
            "played": 100 + number, "success": 0.3 + number / 100, "unknown": 0, "reward_mean": number / 7,
            "stop_rate": 0.9 + number / 1000,
        },
        "diversity": {"unique_correct_per_problem": 1.5 + number, "distinct_2": number / 8, "completion_length": 60.5},
        "selection": {
            "requested_fraction": 0.1, "cutoff": 0.5 + number, "kept": 20 + number, "problems_covered": 9,
            "kept_fraction": 0.2 + number / 1000, "rejected": dict.fromkeys(REASONS, 0) | rejected, "note": note,
        },
        "train": {"rows": 20 + number, "tokens_supervised": 9, "steps": 3, "loss": 0.1, "weights_changed": True},
        "seconds": {phase: float(number + i) for i, phase in enumerate(PHASES)},
    }  # fmt: skip
    return record | ({"eval": dict(dev.summary)} if dev else {})


def begin(path, command, **config):
    """Write what every run writes first."""
    write_text(path / "config.yaml", yaml.safe_dump({"output_dir": str(path)} | config))
    write_json(path / "status.json", {"state": "done", "command": command, "command_line": COMMAND})
    packages = {"bcft": "0.1.0", "torch": "2.13.0", "bitsandbytes": ""}
    hardware = {"cpu": "a CPU", "cpus": 2, "gpus": [], "world_size": 2, "platform": "x"}
    write_json(path / "versions.json", {"python": "3.11", "packages": packages, **hardware, "data": "f0"})


def filtered_run(path, *, rounds, best=None, base=None, control="none", tested=None, attempts=(), **config):
    """Write the files of a run of `filtered`; with `best` it is finished. attempts: of each round, as `attempt`s."""
    base = base or measured(1)
    begin(path, "filtered", **{"num_rounds": len(rounds), "control": control, "history": 1} | config)
    write_measured(path / "round_000", base)
    write_jsonl(path / "metrics.jsonl", rounds)
    for record, made in zip(rounds, attempts, strict=False):
        place = path / f"round_{record['round']:03d}"
        write_jsonl(place / "rollouts.jsonl", [played for played, _ in made])
        write_jsonl(place / "scores.jsonl", [scored for _, scored in made])
    if best is not None:
        tested = tested or measured(3)
        for number, result in ((0, base), (best, tested)):
            write_measured(path / f"round_{number:03d}" / "test", result)
        metrics = {"base": base.summary, "best": tested.summary, "best_round": best, "rounds": len(rounds)}
        write_json(path / "metrics.json", {**metrics, **conclusion(base, tested)})
    return path


def cloned_run(path, *, rows=None, losses=(), **config):
    """Write the files of a finished run of `sft`."""
    begin(path, "sft", **config)
    base, final = measured(1), measured(3)
    write_measured(path / "base", base)
    write_measured(path / "final", final)
    train = {"rows": 7, "steps": 3, "tokens_supervised": 9, "loss_first": 1.0, "loss_last": 0.5}
    write_json(
        path / "metrics.json", {"base": base.summary, "final": final.summary, "train": train, **conclusion(base, final)}
    )
    if losses:
        write_jsonl(path / "losses.jsonl", losses)
    if rows:
        write_json(path / "rows.json", rows)
    return path


def evaluated_run(path, *, against=None, **config):
    """Write the files of an evaluation."""
    begin(path, "evaluate", **config)
    results = {"model": measured(3)} | ({"against": against} if against else {})
    for part, result in results.items():
        write_measured(path / part, result)
    words = conclusion(against, results["model"]) if against else {"conclusion": "solved some"}
    write_json(path / "metrics.json", {part: result.summary for part, result in results.items()} | words)
    return path


def write_measured(directory, result):
    write_json(directory / "evaluation.json", result.summary)
    write_jsonl(directory / "evaluation.jsonl", result.evaluation.attempts)


def attempt(number, problem, sample, *, reward=1.0, decision="kept", cutoff=0.5, turns=("2",), names=("r",), **played):
    """Return an attempt's line of `rollouts.jsonl` and that of `scores.jsonl`; an ungraded one has the reward None."""
    graded = reward is not None
    made = [
        {
            "action": text, "ids": [1, 2], "action_ids": [3], "rewritten": False, "stop": "stop_token",
            "observation": [] if i == len(turns) - 1 else [{"role": "user", "content": f"answer to {text}"}],
            "graded": False, "reward": 0.0, "success": "unknown",
        }
        for i, text in enumerate(turns)
    ]  # fmt: skip
    identity = f"{number}-{problem}-{sample}"
    line = {"id": identity, "round": number, "problem_id": problem, "sample": sample, "turns": made, "ended": "done"}
    score = {
        "id": identity, "graded": graded, "reward": reward if graded else 0.0,
        "rewards": [{"name": name, "graded": graded, "value": reward if graded else 0.0} for name in names],
        "success": "unknown" if not graded else "yes" if reward >= 1 else "no", "decision": decision, "cutoff": cutoff,
    }  # fmt: skip
    return line | {"error": "", "opening": []} | played, score


def write_problems(path, problems):
    """Write `problems.jsonl` from prompts by id."""
    rows = ({"answer": "2", "problem_id": key, "prompt": prompt} for key, prompt in problems.items())
    write_jsonl(path / "problems.jsonl", rows)
