"""Refilter asks the rewards anew, stores their answers at once, and goes on where an interruption left it."""

import pytest
import yaml

from bcft import refilter
from bcft.errors import FaultError, UsageError
from bcft.runs import progress
from bcft.runs.storage import read_jsonl, seal, write_jsonl
from bcft.selection import scoring
from bcft.types import Trajectory, Turn

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
        (refilter, "_trajectory"), (refilter.Scorer, "of"), (scoring, "ask_all"), (refilter, "stream_filter"),
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
