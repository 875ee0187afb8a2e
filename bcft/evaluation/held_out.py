"""Held-out evaluation: one function for every model, split and command, so that figures can be compared.

Greedy decoding gives one attempt a problem, sampling several. An attempt is solved when it stopped by itself and its
environment or the success function says so; what cannot be graded is counted and never solved. Where an environment
gives rewards, the return of an attempt is measured as well, and is what policies are compared by. Attempts are keyed
by their identity, so two models answer the same problems with the same noise and comparisons are paired.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bcft.config.loader import Recipe
from bcft.data.loading import Splits
from bcft.environments.single_turn import SingleTurn
from bcft.evaluation.metrics import revision
from bcft.evaluation.statistics import Paired, majority, mcnemar, mean_interval, paired, pass_at_k, verdict, wilson
from bcft.generation.hf import sampling_mode
from bcft.policy.loading import Policy
from bcft.rewards.base import Reward
from bcft.rewards.math_answers import answer_key, extract_answer
from bcft.rollout.episode import GREEDY, Attempt
from bcft.rollout.sample import played, sampling_of, share, turns_of
from bcft.runs.distributed import gather, rank
from bcft.runs.storage import read_json, read_jsonl, write_json, write_jsonl
from bcft.selection.scoring import Score, reference, refuse_failures, score
from bcft.types import IGNORED, Demonstration, Environment, Row, Sampling

HARDER_SAMPLES = 4


@dataclass(frozen=True)
class Evaluation:
    """Every attempt of an evaluation, one mapping each, and what follows from them.

    attempts: `problem_id, sample` (-1: greedy)`, prompt, completion, answer, success: yes|no|unknown, stop, tokens`;
    of an environment also `graded, return, turns, first: yes|no|unknown` (success after the first turn)`, messages`.
    """

    attempts: tuple[Mapping[str, Any], ...]

    @cached_property
    def problems(self) -> dict[str, list[Mapping[str, Any]]]:
        """The attempts of each problem, greedy first, then by sample."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for attempt in sorted(self.attempts, key=lambda a: (a["problem_id"], a["sample"])):
            found.setdefault(attempt["problem_id"], []).append(attempt)
        return found

    @cached_property
    def greedy(self) -> dict[str, bool]:
        """Whether the greedy attempt solved each problem."""
        return {key: attempts[0]["success"] == "yes" for key, attempts in self.problems.items()}

    @cached_property
    def sampled(self) -> dict[str, list[bool]]:
        """Whether each sampled attempt solved its problem."""
        return {key: [a["success"] == "yes" for a in attempts[1:]] for key, attempts in self.problems.items()}

    @property
    def rates(self) -> list[float]:
        """The share of sampled attempts that solved each problem."""
        return [sum(solved) / len(solved) for solved in self.sampled.values() if solved]

    @cached_property
    def returns(self) -> dict[str, float]:
        """The mean return of each problem's sampled attempts, of the greedy one without; empty without an environment
        that gives rewards."""
        found = {}
        for key, attempts in self.problems.items():
            given = [a["return"] for a in attempts[1:] or attempts if a.get("graded")]
            if given:
                found[key] = sum(given) / len(given)
        return found

    def summary(self) -> dict[str, Any]:
        """Return `{n, stop_rate, ungraded, greedy, sampled, return, revision}` as the files hold it, intervals at 95 %.

        Without success there is neither `greedy` nor `sampled`, without samples no `sampled`; `return` there is of an
        environment that gives rewards, `revision` of one that tells success after each of always two turns, of those
        attempts that came to both.
        """
        n, solved = len(self.problems), sum(self.greedy.values())
        found: dict[str, Any] = {
            "n": n,
            "stop_rate": sum(a["stop"] == "stop_token" for a in self.attempts) / max(len(self.attempts), 1),
            "ungraded": sum(a["success"] == "unknown" for a in self.attempts),
        }
        if self.returns:
            means = list(self.returns.values())
            low, high = mean_interval(means, scale=(min(means), max(means)))
            sampled = [a for attempts in self.problems.values() for a in attempts[1:] or attempts]
            greedy = [attempts[0]["return"] for attempts in self.problems.values() if attempts[0]["graded"]]
            found["return"] = {
                "greedy": sum(greedy) / max(len(greedy), 1),
                "mean": sum(self.returns.values()) / len(self.returns),
                "ci95": [low, high],
                "turns": sum(a["turns"] for a in sampled) / len(sampled),
            }
        whole = [a for a in self.attempts if a["success"] != "unknown" and a["stop"] != "context_full"]
        if {a.get("turns", 1) for a in whole} == {2}:
            twice = [(a["first"], a["success"]) for a in whole if a["first"] != "unknown"]
            found |= {"revision": revision(twice)} if twice else {}
        if found["ungraded"] == len(self.attempts):
            return found
        found["greedy"] = {"success": solved / n, "ci95": list(wilson(solved, n))}
        samples = min((len(solved) for solved in self.sampled.values()), default=0)
        if samples:
            k = max(samples // 2, 1)
            votes = [
                majority([answer_key(extract_answer(a["completion"])) for a in self.problems[key][1:]], solved, k)
                for key, solved in self.sampled.items()
            ]
            low, high = mean_interval(self.rates)
            found["sampled"] = {
                "n": samples,
                "k": k,
                "pass@1": sum(self.rates) / n,
                "ci95": [low, high],
                "pass@k": sum(pass_at_k(len(s), sum(s), k) for s in self.sampled.values()) / n,
                "maj@k": sum(votes) / n,
            }
        return found


def compare(base: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Return `{delta, ci95, p_value, greedy_p_value, conclusion}` of other against base, problem by problem.

    The verdict is the paired difference of sampled pass@1; without samples, of greedy; of mean returns where an
    environment gives rewards, which are then `return_delta` and `return_ci95`. With samples of both there are
    `pass@k_delta` and `pass@k_ci95` as well: a policy that narrows loses there first.
    """
    both = [key for key in base.returns if key in other.returns]
    returned = None
    if both:
        old, new = ([found.returns[key] for key in both] for found in (base, other))
        returned = paired(old, new, scale=(min(*old, *new), max(*old, *new)))
    greedy = [(base.greedy[key], other.greedy[key]) for key in base.greedy]
    before, after = base.rates, other.rates
    if not before:
        before, after = [float(a) for a, _ in greedy], [float(b) for _, b in greedy]
    difference = paired(before, after)
    wide = _wide(base, other)
    return {
        "delta": difference.delta,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
        "greedy_p_value": mcnemar(sum(a and not b for a, b in greedy), sum(b and not a for a, b in greedy)),
        "conclusion": verdict(returned or difference),
        **({"return_delta": returned.delta, "return_ci95": [returned.low, returned.high]} if returned else {}),
        **({"pass@k_delta": wide.delta, "pass@k_ci95": [wide.low, wide.high]} if wide else {}),
    }


def _wide(base: Evaluation, other: Evaluation) -> Paired | None:
    """Return the paired difference of pass@k, k half of the fewest samples of any problem; None without samples."""
    counts = [len(solved) for found in (base, other) for solved in found.sampled.values()]
    if not min(counts, default=0):
        return None
    k = max(min(counts) // 2, 1)
    before, after = (
        [pass_at_k(len(found.sampled[key]), sum(found.sampled[key]), k) for key in base.sampled]
        for found in (base, other)
    )
    return paired(before, after)


def evaluate(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    *,
    success: Reward | None,
    sampling: Sampling,
    samples: int,
    max_new_tokens: int,
    seed: int,
    phase: str,
    label: str,
    make: Callable[[], Environment] = SingleTurn,
    max_turns: int = 1,
    step_timeout: float = 60.0,
) -> Evaluation:
    """Attempt every problem once greedily and `samples` times with `sampling`; judge the attempts.

    phase: `dev` or `test`, part of the noise's identity; label: what the progress bar says; none without; make,
    max_turns, step_timeout: the environment, as `bcft.rollout.episode.play` takes them.

    Raises FaultError when too many environments failed, whatever the engine or `success` raise.
    """
    attempts = [Attempt(d.problem, 0, sample) for d in demonstrations for sample in range(GREEDY, samples)]
    begun = time.perf_counter()
    mine = list(
        played(
            policy,
            share(attempts),
            make,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            max_turns=max_turns,
            step_timeout=step_timeout,
            seed=seed,
            phase=phase,
            label=label,
        )
    )
    if label and rank() == 0:
        seconds, tokens = time.perf_counter() - begun, sum(len(turn.action_ids) for t in mine for turn in t.turns)
        print(f"{label}: {len(mine):,} attempts in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s", flush=True)
    found = {trajectory.id: trajectory for trajectory in gather(mine)}
    problems = {d.problem.id: d.problem for d in demonstrations}
    ordered = [found[f"{a.round}-{a.problem.id}-{a.sample}"] for a in attempts]
    refuse_failures(ordered)
    scores = score(ordered, problems, [], weights=[], success=success)
    asked = [d for d in demonstrations for _ in range(GREEDY, samples)]
    alone = make is SingleTurn
    return Evaluation(tuple(_attempt(policy, d, s, alone=alone) for d, s in zip(asked, scores, strict=True)))


def _attempt(policy: Policy, demonstration: Demonstration, found: Score, *, alone: bool) -> dict[str, Any]:
    """Return an attempt as `evaluation.jsonl` holds it; alone: one question and one answer, nothing of turns."""
    trajectory, prompt = found.trajectory, demonstration.problem.prompt
    line: dict[str, Any] = {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "prompt": policy.renderer.text(list(trajectory.opening) or prompt),
        "completion": trajectory.turns[-1].action if trajectory.turns else "",
        "answer": reference(demonstration.problem),
        "success": "no" if found.success == "yes" and trajectory.cut else found.success,
        "stop": next((turn.stop for turn in trajectory.turns if turn.stop != "stop_token"), "stop_token"),
        "tokens": sum(len(turn.action_ids) for turn in trajectory.turns),
    }
    if alone:
        return line
    return line | {
        "graded": trajectory.environment_reward is not None and trajectory.ended != "error",
        "return": trajectory.environment_reward or 0.0,
        "turns": len(trajectory.turns),
        "first": trajectory.turns[0].success if len(trajectory.turns) > 1 else "unknown",
        "messages": [dict(message) for message in trajectory.messages],
    }


@dataclass(frozen=True)
class Measured:
    """An evaluation and its summary, with harder problems and held-out loss; both empty without problems."""

    evaluation: Evaluation
    summary: Mapping[str, Any]


def measure(
    recipe: Recipe,
    splits: Splits,
    policy: Policy,
    *,
    success: Reward | None,
    split: str,
    rows: Sequence[Row],
    directory: Path,
    quiet: bool,
    make: Callable[[], Environment] | None = None,
) -> Measured:
    """Evaluate a policy on `dev` or `test` as the recipe says and write the result into a directory.

    success: as `success_function` returns it; rows: held-out demonstrations as rows, for their loss; may be empty;
    make: an environment in the place of the recipe's. The directory's name is what progress shows.
    """
    problems = splits.test if split == "test" else splits.dev
    told = success or recipe["environment"]
    samples = recipe["eval_test_samples" if split == "test" else "eval_dev_samples"] if told else 0
    if not problems:
        return Measured(Evaluation(()), {})
    playing = turns_of(recipe, make)

    def attempt(which: Sequence[Demonstration], most: int, name: str) -> Evaluation:
        """Evaluate some problems by the recipe, with at most so many samples each."""
        return evaluate(
            policy,
            which,
            success=success,
            sampling=sampling_of(recipe),
            samples=min(samples, most),
            max_new_tokens=recipe["max_completion_length"],
            seed=recipe["seed"],
            phase=split,
            label=name,
            **playing,
        )

    label = "" if quiet else directory.name
    evaluation = attempt(problems, samples, label)
    summary = evaluation.summary()
    if splits.harder and split == "test":
        summary["harder"] = attempt(splits.harder, HARDER_SAMPLES, label and f"{label}, harder").summary()
    if rows:
        summary["loss"] = held_out_loss(policy, rows)
    if rank() == 0:
        write_jsonl(directory / "evaluation.jsonl", evaluation.attempts)
        write_json(directory / "evaluation.json", summary)
    return Measured(evaluation, summary)


def stored(directory: Path) -> Measured | None:
    """Return what `measure` wrote into a directory, None if it did not get to the end."""
    if not (directory / "evaluation.json").is_file():
        return None
    attempts = tuple(read_jsonl(directory / "evaluation.jsonl"))
    return Measured(Evaluation(attempts), read_json(directory / "evaluation.json"))


@torch.no_grad()
def held_out_loss(policy: Policy, rows: Sequence[Row]) -> float:
    """Return the mean negative log-likelihood of the supervised tokens of held-out rows, in nats."""
    total, count = 0.0, 0
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
        for batch in _batches(sorted(rows, key=lambda row: len(row.input_ids)), most_tokens=2048):
            width = len(batch[-1].input_ids)
            device = policy.model.device
            ids = torch.tensor([(*r.input_ids, *[0] * (width - len(r.input_ids))) for r in batch], device=device)
            labels = torch.tensor([(*r.labels, *[IGNORED] * (width - len(r.labels))) for r in batch], device=device)
            mask = torch.tensor([[1] * len(r.labels) + [0] * (width - len(r.labels)) for r in batch], device=device)
            logits = policy.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total, count = total + float(loss), count + int((labels[:, 1:] != IGNORED).sum())
    return total / max(count, 1)


def _batches(rows: Sequence[Row], *, most_tokens: int) -> Iterable[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.input_ids) > most_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
