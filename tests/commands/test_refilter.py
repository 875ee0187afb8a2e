"""Refilter asks the rewards anew, stores their answers at once, and goes on where an interruption left it."""

import pytest
import yaml

from bcft import refilter
from bcft.config.loader import load
from bcft.errors import DataError, FaultError, UsageError
from bcft.evaluation.metrics import diversity, tally
from bcft.runs import progress
from bcft.runs.storage import read_json, read_jsonl, seal, write_jsonl, write_manifest
from bcft.selection import scoring
from bcft.selection.apply import apply_filter, rule_of
from bcft.selection.saved import SavedRollouts
from bcft.selection.scoring import Scorer
from bcft.types import Problem, Trajectory, Turn

KEYS = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "success_func": ""}
PROBLEMS = [{"problem_id": f"{n:016x}", "prompt": f"{n} + 1?", "answer": str(n + 1)} for n in range(40)]
REWARDS = """
import pathlib

CALLS, LIMIT = pathlib.Path(__file__).with_name("calls"), pathlib.Path(__file__).with_name("limit")


def paid(completions, **_):
    done = CALLS.read_text().splitlines() if CALLS.exists() else []
    if LIMIT.exists() and len(done) + len(completions) > int(LIMIT.read_text()):
        raise ConnectionError("no credit left")
    CALLS.write_text("".join(line + chr(10) for line in [*done, *completions]))
    return [float(len(done) + n) for n in range(len(completions))]


def also(completions, **_):
    return [0.0] * len(completions)
"""


@pytest.fixture
def rollouts(tmp_path, monkeypatch):
    """Return the directory of a run with 320 attempts; the reward function counts its calls beside it."""
    (tmp_path / "paid_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(refilter.sys.modules, "paid_rewards", raising=False)
    run = tmp_path / "run"
    attempts = [
        Trajectory(1, row["problem_id"], n, (Turn(f"{row['answer']} {n}", (1,), (2, n), "stop_token"),), "done")
        for row in PROBLEMS
        for n in range(8)
    ]
    write_jsonl(run / "rollouts.jsonl", [attempt.to_json() for attempt in attempts])
    write_jsonl(run / "problems.jsonl", PROBLEMS)
    source = {"dataset_name": "bcft:arithmetic", "dataset_config": None, "dataset_train_split": "train"}
    config = {**source, "dataset_test_split": None, "environment": None}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    seal(run, "rollouts.jsonl")
    return run


def run(rollouts, output, **keys):
    keys = {"reward_funcs": ["paid_rewards.paid"], **KEYS, **keys}
    return refilter.run(None, rollouts=rollouts, output_dir=str(output), **keys)


@pytest.mark.parametrize("limit", [0, 128, 200, 256, 319])
def test_an_interrupted_refilter_asks_no_attempt_twice(rollouts, tmp_path, limit):
    (tmp_path / "limit").write_text(str(limit))
    with pytest.raises(FaultError, match=r"^paid raised ConnectionError: no credit left"):
        run(rollouts, tmp_path / "out")
    asked = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert len(asked) == limit // 128 * 128
    (tmp_path / "limit").unlink()
    run(rollouts, tmp_path / "out")
    asked = (tmp_path / "calls").read_text().splitlines()
    assert (len(asked), len(set(asked))) == (320, 320)
    assert sorted(line["reward"] for line in read_jsonl(tmp_path / "out" / "scores.jsonl")) == list(range(320))


def test_a_finished_refilter_asks_anew_on_purpose(rollouts, tmp_path):
    run(rollouts, tmp_path / "out")
    assert not (tmp_path / "out" / "journal").exists()
    run(rollouts, tmp_path / "out")
    assert len((tmp_path / "calls").read_text().splitlines()) == 640


def test_a_phase_is_open_in_all_that_may_take_long_and_none_with_quiet(rollouts, tmp_path, monkeypatch):
    seen = {}

    def within(holder, name):
        original = getattr(holder, name)

        def called(*args, **keys):
            seen[name] = progress._THREAD.phases[-1].label if progress._THREAD.phases else ""
            return original(*args, **keys)

        monkeypatch.setattr(holder, name, called)

    for holder, name in (
        (refilter, "trajectory_of"), (refilter.Scorer, "of"), (scoring, "ask_all"), (refilter, "stream_filter"),
        (refilter, "_write"),
    ):  # fmt: skip
        within(holder, name)
    run(rollouts, tmp_path / "out")
    phases = ["reading the rollouts", "checking references", "score", "select", "refilter, other work"]
    assert list(seen.values()) == phases
    run(rollouts, tmp_path / "out", quiet=True)
    assert list(seen.values()) == [""] * len(phases)


def test_several_rewards_without_a_success_func_are_refused_before_any_is_asked(rollouts, tmp_path):
    with pytest.raises(UsageError, match=r"add `success_func: paid_rewards.paid`"):
        run(rollouts, tmp_path / "out", reward_funcs=["paid_rewards.paid", "paid_rewards.also"], success_func=None)
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "out").exists()


# Several runs

SOURCE = {"dataset_name": "bcft:arithmetic", "dataset_config": None, "dataset_train_split": "train"}
MADE = {**SOURCE, "dataset_test_split": None, "environment": None}
MATH = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "keep_quantile": 0.0}


def make_run(path, attempts, *, tokenizer="t", problems=PROBLEMS, **config):
    """Write a run of which each round has the attempts (problem, sample, what was said, tokens) that are given."""
    for number, part in enumerate(attempts, 1):
        place = path / f"round_{number:03d}"
        lines = [
            Trajectory(number, PROBLEMS[p]["problem_id"], s, (Turn(said, (1,), tuple(ids), "stop_token"),), "done")
            for p, s, said, ids in part
        ]
        write_jsonl(place / "rollouts.jsonl", [line.to_json() for line in lines])
        write_manifest(place, [place / "rollouts.jsonl"], about={"tokenizer": tokenizer})
    write_jsonl(path / "problems.jsonl", problems)
    (path / "config.yaml").write_text(yaml.safe_dump(MADE | config))
    return path


ONE = [
    [(0, 0, "#### 1", [5, 6]), (0, 1, "#### 9", [9, 6]), (1, 0, "so #### 2", [7, 7, 6])],
    [(0, 0, "so #### 1", [7, 5, 6])],
]
TWO = [[(0, 0, "#### 1", [5, 6]), (1, 0, "#### 2", [8, 6]), (2, 0, "#### 3", [4, 6])]]


@pytest.fixture
def two_runs(tmp_path):
    return make_run(tmp_path / "one", ONE, num_rounds=2), make_run(tmp_path / "two", TWO)


def test_runs_are_pooled_and_equal_ids_do_not_collide(two_runs, tmp_path, capsys):
    metrics = refilter.run(None, rollouts=[*map(str, two_runs)], output_dir=str(tmp_path / "out"), **MATH)
    decisions = {line["id"]: line["decision"] for line in read_jsonl(tmp_path / "out" / "scores.jsonl")}
    zero, one, two = (PROBLEMS[n]["problem_id"] for n in range(3))
    assert decisions == {
        f"run1/1-{zero}-0": "kept", f"run1/1-{zero}-1": "failed", f"run1/1-{one}-0": "kept", f"run1/2-{zero}-0": "kept",
        f"run2/1-{zero}-0": "duplicate", f"run2/1-{one}-0": "kept", f"run2/1-{two}-0": "kept",
    }  # fmt: skip
    rows = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert [(row["id"], row["source"]) for row in rows] == [
        (identity, "self" if identity.startswith("run1") else "teacher")
        for identity, decision in decisions.items()
        if decision == "kept"
    ]
    assert metrics["rollout"]["played"] == 7
    assert "7 attempts of 3 rounds in " in capsys.readouterr().out
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert manifest["tokenizer"] == "t"
    assert len(manifest["rollouts"]) == 3


def test_pooled_rows_weigh_by_all_attempts_at_their_problem(two_runs, tmp_path):
    keys = MATH | {"require_success": "true", "row_weight": "maxrl"}
    refilter.run(None, rollouts=[*map(str, two_runs)], output_dir=str(tmp_path / "out"), **keys)
    weights = [row["weight"] for row in read_jsonl(tmp_path / "out" / "kept.jsonl")]
    # Three right at the first problem, two of them in the same words; two at the second; one at the third.
    assert weights == pytest.approx([w * 5 / 3 for w in (2 / 3, 1 / 2, 1 / 3, 1 / 2, 1)])


def test_the_shortest_success_of_each_problem_is_kept(two_runs, tmp_path):
    keys = MATH | {"select": "shortest"}
    refilter.run(None, rollouts=[*map(str, two_runs)], output_dir=str(tmp_path / "out"), **keys)
    said = [row["completion"][0]["content"] for row in read_jsonl(tmp_path / "out" / "kept.jsonl")]
    assert said == ["#### 1", "#### 2", "#### 3"]


def test_ids_of_tokenizers_that_differ_are_not_used(two_runs, tmp_path):
    make_run(two_runs[1], TWO, tokenizer="u")
    refilter.run(None, rollouts=[*map(str, two_runs)], output_dir=str(tmp_path / "out"), **MATH)
    assert read_json(tmp_path / "out" / "manifest.json")["tokenizer"] == ""


def test_a_list_of_one_run_keeps_what_the_run_alone_keeps(two_runs, tmp_path):
    run = two_runs[0]
    rounds = [str(run / "round_001"), str(run / "round_002" / "rollouts.jsonl")]
    for name, places in (("alone", str(run)), ("list", [str(run)]), ("rounds", rounds)):
        refilter.run(None, rollouts=places, output_dir=str(tmp_path / name), **MATH)
    for file in ("scores.jsonl", "kept.jsonl"):
        whole = (tmp_path / "alone" / file).read_bytes()
        assert whole == (tmp_path / "list" / file).read_bytes() == (tmp_path / "rounds" / file).read_bytes()


def test_runs_that_cannot_be_pooled_are_refused_before_a_reward_is_asked(two_runs, tmp_path):
    one, two = map(str, two_runs)

    def refused(places, error, match):
        with pytest.raises(error, match=match):
            refilter.run(None, rollouts=places, output_dir=str(tmp_path / "out"), **MATH)
        assert not (tmp_path / "out").exists()

    refused([one, one], UsageError, "is given twice")
    refused([one, one + "/round_001"], UsageError, "is given twice")
    refused([], UsageError, "rollouts: required")
    make_run(two_runs[1], TWO, dataset_test_split="train")
    refused([one, two], UsageError, "two was made with dataset_test_split 'train'")
    make_run(two_runs[1], TWO, problems=[row | {"answer": "0"} for row in PROBLEMS])
    refused([one, two], DataError, f"problem {PROBLEMS[0]['problem_id']} has answer '0', in a run given before '1'")


def test_what_is_read_in_pieces_is_scored_and_kept_as_in_memory(tmp_path):
    """Problems recur in both rounds: their attempts are still asked for together, and reported in the files' order."""
    attempts = [
        [(p, s, f"{'so ' * (s % 3)}#### {p + (s + r) % 2}", [p, s % 3, s % 2, 6]) for p in range(40) for s in range(4)]
        for r in (1, 0)
    ]
    run = make_run(tmp_path / "run", attempts, num_rounds=2)
    metrics = refilter.run(None, rollouts=str(run), output_dir=str(tmp_path / "out"), max_per_problem=2, **MATH)
    config = load("refilter", None, MATH | {"max_per_problem": 2})
    problems = {
        row["problem_id"]: Problem(row["problem_id"], row["prompt"], {"answer": row["answer"]}) for row in PROBLEMS
    }
    lines = [line for number in (1, 2) for line in read_jsonl(run / f"round_{number:03d}" / "rollouts.jsonl")]
    scorer = Scorer.of(config.selection, list(problems.values()), environment=None)
    scores = scorer.score([Trajectory.from_json(line) for line in lines], problems)
    rule = rule_of(config.selection, seed=config.training.seed, number=2)
    filtered = apply_filter(scores, rule, problems, source="self", train_on="all_turns", check_steps=None)
    filtered.write(tmp_path / "memory")
    for file in ("scores.jsonl", "kept.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    assert metrics["rollout"] == tally(scores)
    assert metrics["diversity"] == diversity(scores)


def test_trajectories_are_read_a_batch_at_a_time(rollouts, tmp_path, monkeypatch):
    sizes, read = [], SavedRollouts.read_all

    def counted(self, numbers):
        sizes.append(len(numbers))
        return read(self, numbers)

    monkeypatch.setattr(SavedRollouts, "read_all", counted)
    run(rollouts, tmp_path / "out")
    assert (sum(sizes), max(sizes)) == (320, scoring.BATCH)
