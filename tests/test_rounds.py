"""The loop's knobs as laws: where a round begins, what it selects from, when it is evaluated and when the run ends."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bcft import filtered
from bcft.algorithms import filtered_bc as rounds
from bcft.config.loader import load
from bcft.errors import DataError, FaultError, UsageError
from bcft.policy.loading import load_policy
from bcft.reporting.sanity_check import probe
from bcft.runs.clock import Clock
from bcft.runs.history import Ledger
from bcft.runs.storage import read_json, read_jsonl
from bcft.selection.scoring import Score
from bcft.training import trainer as training
from bcft.types import Problem, Row, Trajectory, Turn

KEYS = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:200]",
    "num_rounds": 2, "prompts_per_round": 16, "num_generations": 3, "learning_rate": 2e-4, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "max_completion_length": 72, "eval_dev_problems": 8, "eval_dev_samples": 2,
    "eval_test_problems": 6, "eval_test_samples": 2, "eval_every": 1,
}  # fmt: skip
RUIN = {"learning_rate": 0.5}


def run(path, **keys):
    return filtered.run(None, output_dir=str(path), **KEYS | keys)


def record(path, number):
    return read_json(path / f"round_{number:03d}" / "metrics.json")


def file(path, number, name):
    return (path / f"round_{number:03d}" / name).read_text()


def weights(path, number):
    return load_file(path / f"round_{number:03d}" / "model" / "model.safetensors")


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Power(Exception):  # noqa: N818
    """What a power cut looks like from inside."""


def cut_after_round_1(monkeypatch, path, **keys):
    commit = rounds.Rounds.commit

    def cutting(self, number):
        commit(self, number)
        raise Power

    with monkeypatch.context() as patch:
        patch.setattr(rounds.Rounds, "commit", cutting)
        with pytest.raises(Power):
            run(path, **keys)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two rounds with every knob as it is by default."""
    path = tmp_path_factory.mktemp("plain")
    run(path)
    return path


@pytest.fixture(scope="module")
def by_base(tmp_path_factory):
    """Two rounds played by the policy before any training: the first only warms up."""
    path = tmp_path_factory.mktemp("warm")
    run(path, warmup_rounds=1)
    return path


def test_a_warm_up_round_plays_and_scores_and_trains_nothing(by_base, plain):
    first, second = record(by_base, 1), record(by_base, 2)
    assert first["selection"]["kept"] > 0
    assert first["train"]["steps"] == 0
    assert "eval" not in first
    assert second["train"]["steps"] > 0
    assert file(by_base, 1, "rollouts.jsonl") == file(plain, 1, "rollouts.jsonl")
    assert file(by_base, 2, "rollouts.jsonl") != file(plain, 2, "rollouts.jsonl")


def test_history_selects_from_the_trajectories_of_earlier_rounds_too(tmp_path, by_base):
    run(tmp_path, warmup_rounds=1, history="all")
    alone = [{row["id"] for row in read_jsonl(by_base / f"round_{n:03d}" / "scores.jsonl")} for n in (1, 2)]
    scores = read_jsonl(tmp_path / "round_002" / "scores.jsonl")
    assert {row["id"] for row in scores} == alone[0] | alone[1]
    assert len(scores) == 2 * 48
    kept = {row["id"] for row in read_jsonl(tmp_path / "round_002" / "kept.jsonl")}
    assert kept & alone[0]
    assert kept & alone[1]
    chosen = record(tmp_path, 2)["selection"]
    assert chosen["kept"] + sum(chosen["rejected"].values()) == 96
    assert record(tmp_path, 2)["rollout"]["played"] == 48


@pytest.mark.slow
def test_a_resumed_run_with_history_reads_what_earlier_rounds_scored(tmp_path, monkeypatch):
    keys = {"history": 2, "num_rounds": 2}
    run(tmp_path / "whole", **keys)
    cut_after_round_1(monkeypatch, tmp_path / "cut", **keys)
    run(tmp_path / "cut", **keys)
    for name in ("scores.jsonl", "kept.jsonl"):
        assert file(tmp_path / "cut", 2, name) == file(tmp_path / "whole", 2, name)
    assert equal(weights(tmp_path / "cut", 2), weights(tmp_path / "whole", 2))


def test_a_round_from_base_is_the_base_trained_on_its_rows_alone(tmp_path):
    """One trainer for all rounds does what a new one would do from the same weights."""
    run(tmp_path, init_from="base")
    recipe = load("filtered", None, KEYS | {"output_dir": str(tmp_path)})
    policy = load_policy(recipe)
    rows = [
        Row(line["problem_id"], tuple(line["input_ids"]), tuple(line["labels"]))
        for line in read_jsonl(tmp_path / "round_002" / "kept.jsonl")
    ]
    arguments = training.training_arguments(
        {**recipe.values, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1},
        output_dir=tmp_path / "alone", autocast="no", use_cpu=True,
    )  # fmt: skip
    trainer = training.BCTrainer(
        policy.model, arguments, rows=rows, tokenizer=policy.renderer.tokenizer, checkpoints=False
    )
    training.next_round(trainer, rows, seed=rounds.training_seed(recipe, 2), learning_rate=recipe["learning_rate"])
    training.fit(trainer, rows)
    assert equal(
        weights(tmp_path, 2), {k: v for k, v in policy.model.state_dict().items() if k in weights(tmp_path, 2)}
    )


def test_from_best_a_round_that_made_things_worse_is_taken_back(tmp_path, by_base, plain):
    metrics = run(tmp_path, init_from="best", **RUIN)
    assert record(tmp_path, 1)["eval"]["sampled"]["pass@1"] < record(plain, 1)["eval"]["sampled"]["pass@1"]
    assert file(tmp_path, 2, "rollouts.jsonl") == file(by_base, 2, "rollouts.jsonl")
    assert metrics["best_round"] == 0
    assert "no round was better" in metrics["conclusion"]
    shipped = load_file(tmp_path / "best" / "model.safetensors")
    base = load_policy(load("filtered", None, KEYS)).model.state_dict()
    assert all(torch.equal(shipped[name], base[name]) for name in shipped)


@pytest.mark.slow
def test_a_carried_optimizer_goes_on_counting_and_a_resumed_run_carries_the_same(tmp_path, plain, monkeypatch):
    keys = {"reset_optimizer": False}
    run(tmp_path / "whole", **keys)
    steps = [record(tmp_path / "whole", n)["train"]["steps"] for n in (1, 2)]
    state = load_file(tmp_path / "whole" / "round_002" / "model" / "optimizer.safetensors")
    assert float(state["0.step"]) == sum(steps)
    assert file(tmp_path / "whole", 2, "rollouts.jsonl") == file(plain, 2, "rollouts.jsonl")  # round 1 is the same
    assert not equal(weights(tmp_path / "whole", 2), weights(plain, 2))
    cut_after_round_1(monkeypatch, tmp_path / "cut", **keys)
    run(tmp_path / "cut", **keys)
    assert equal(weights(tmp_path / "cut", 2), weights(tmp_path / "whole", 2))


def test_the_run_stops_early_when_dev_gets_no_better(tmp_path):
    metrics = run(tmp_path, early_stop=2, num_rounds=5, learning_rate=1e-7)
    assert metrics["rounds"] == 2
    assert metrics["stopped"] == "none of 2 evaluations after round 0 was better on dev"
    assert not (tmp_path / "round_003").exists()


def test_the_run_stops_early_when_the_policy_collapses(tmp_path):
    keys = {"eval_dev_problems": 40, "eval_dev_samples": 4}
    metrics = run(tmp_path, early_stop=5, num_rounds=5, **RUIN | keys)
    assert metrics["rounds"] == 1
    assert metrics["stopped"].startswith("collapse: ")
    assert metrics["best_round"] == 0


@pytest.mark.slow
def test_a_round_is_evaluated_in_its_turn_and_the_last_one_always(tmp_path):
    run(tmp_path, eval_every=2, num_rounds=3)
    assert ["eval" in record(tmp_path, n) for n in (1, 2, 3)] == [False, True, True]
    assert not (tmp_path / "round_001" / "model").exists()


@pytest.mark.parametrize(("evaluated", "played"), [(640, 2048), (640, 1024), (10, 1000), (1000, 10), (1, 2), (3, 2)])
def test_left_to_itself_evaluation_takes_at_most_a_third_of_all_attempts(evaluated, played):
    recipe = load("filtered", None, KEYS | {"eval_every": "auto", "num_rounds": 10_000})
    ledger = Ledger(recipe, Path("nowhere"))
    ledger.records = [{"round": 0, "eval": {}}] + [{"round": n, "train": {"steps": 1}} for n in range(1, 1001)]
    every = next(n for n in range(1, 1001) if ledger.due(n, evaluated=evaluated, played=played))
    assert evaluated <= (evaluated + every * played) / 3
    assert every == 1 or evaluated > (evaluated + (every - 1) * played) / 3


def test_warm_up_alone_is_refused(tmp_path):
    with pytest.raises(UsageError, match="warmup_rounds: warm-up rounds leave none that trains"):
        run(tmp_path, warmup_rounds=2)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"dataset_train_split": "train[5:5]"}, DataError, "no problems to attempt"),
        ({"ties": "sample", "keep_quantile": 1}, UsageError, "ties: sample with keep_quantile: 1 would keep nothing"),
    ],
)
def test_what_could_never_keep_anything_is_refused_at_once(tmp_path, keys, error, words):
    with pytest.raises(error, match=words):
        run(tmp_path / "run", **keys)


def test_as_many_weights_as_reward_functions(tmp_path):
    with pytest.raises(UsageError, match="reward_weights: 2 weights for 1 reward functions"):
        run(tmp_path, reward_weights=[1.0, 2.0])


def test_equal_rows_make_equal_steps_in_every_round(tmp_path):
    recipe = load("filtered", None, KEYS)
    policy = load_policy(recipe)
    rows = [Row("p", (5, 6, 7, n), (-100, 6, 7, n)) for n in range(8, 21)]
    arguments = training.training_arguments(
        {**recipe.values, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"},
        output_dir=tmp_path, autocast="no", use_cpu=True,
    )  # fmt: skip
    trainer = training.BCTrainer(
        policy.model, arguments, rows=rows, tokenizer=policy.renderer.tokenizer, checkpoints=False
    )
    steps = []
    for number in range(3):
        training.next_round(trainer, rows, seed=number, learning_rate=recipe["learning_rate"])
        steps.append(training.fit(trainer, rows).steps)
        training.release(trainer)
    assert steps == [math.ceil(13 / 4)] * 3
    assert trainer.accelerator._optimizers == []


def test_a_reference_that_is_not_its_own_solution_ends_the_run_before_anything_is_played(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "Say {n}", "completion": "", "answer": "{n}"}}\n' for n in range(100))
        + '{"prompt": "Say more", "completion": "", "answer": "\\\\boxed{1"}\n'
    )
    with pytest.raises(DataError, match=r"rows.jsonl:101: math_reward does not accept the reference '.+boxed\{1'"):
        run(tmp_path / "run", dataset_name=str(tmp_path / "rows.jsonl"), dataset_train_split="train")
    assert not (tmp_path / "run" / "round_001").exists()


# The probe


def scored(n, *, reward=0.0, graded=True, success="no", stop="stop_token", said="#### 7"):
    """Return n scored attempts at a problem."""
    turn = Turn(action=said, ids=(1,), action_ids=(2, 3), stop=stop)
    played = [Trajectory(1, "p", k, (turn,), "done") for k in range(n)]
    return [Score(t, (("r", reward if graded else None),), graded, reward, success) for t in played]


NOTHING = {"n": 8, "greedy": {"success": 0.0}, "sampled": {"pass@1": 0.0}}
SOME = {"n": 8, "greedy": {"success": 0.0}, "sampled": {"pass@1": 0.1}}
ALL = {"n": 8, "greedy": {"success": 1.0}, "sampled": {"pass@1": 1.0}}


@pytest.mark.parametrize(
    ("scores", "dev", "why"),
    [
        (scored(4, graded=False, success="unknown"), {"n": 8}, "could grade"),
        (scored(4, stop="max_tokens"), SOME, "max_completion_length, 72 tokens: raise it"),
        (scored(4, reward=0.5, success="unknown"), {"n": 8}, "have the reward 0.5"),
        (
            scored(4),
            NOTHING,
            "none of 4 attempts succeeded, nor any at 8 dev problems (100.0 % have a readable answer)",
        ),
        (scored(4, said="no idea"), NOTHING, "(0.0 % have a readable answer)"),
        (scored(4, reward=1.0, success="yes"), ALL, "nothing left to learn"),
        (scored(4), SOME, ""),
        (scored(4) + scored(1, reward=1.0, success="yes"), NOTHING, ""),
        (scored(4, reward=1.0, success="yes"), SOME, ""),
        (scored(2, success="unknown") + scored(2, reward=1.0, success="unknown"), {"n": 8}, ""),
    ],
)
def test_the_probe_stops_a_run_in_which_nothing_can_be_learned_and_no_other(scores, dev, why):
    recipe = load("filtered", None, KEYS)
    found = probe(recipe, scores, {"p": Problem("p", "Say 7")}, dev)
    assert why in found.hopeless
    assert bool(found.hopeless) == bool(why)
    assert "Say 7 -> " in found.lines[1]


def test_a_hopeless_run_ends_before_its_first_round(tmp_path):
    with pytest.raises(FaultError, match="nothing can be learned: all of 48 attempts were cut"):
        run(tmp_path, max_completion_length=4)
    assert not (tmp_path / "round_001" / "rollouts.jsonl").exists()


def test_what_the_probe_played_is_not_played_again(tmp_path, monkeypatch):
    from bcft.rollout import sample as rollouts

    asked = []
    original = rollouts.played

    def counting(policy, attempts, *args, **kwargs):
        asked.append(len(attempts))
        return original(policy, attempts, *args, **kwargs)

    monkeypatch.setattr(rollouts, "played", counting)
    run(tmp_path, num_rounds=1, prompts_per_round=20)
    assert asked == [16 * 3, 4 * 3]


# Time


def test_every_moment_belongs_to_one_phase(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("bcft.runs.clock.time.perf_counter", lambda: float(next(now)))
    clock = Clock()  # 0
    with clock.phase("rollout"):  # 1
        with clock.phase("other"):  # 2
            pass  # 3
        with pytest.raises(KeyError), clock.phase("score"):  # 4, and 5 whatever happens inside
            raise KeyError
    # 6
    assert clock.lap() == {"rollout": 3.0, "score": 1.0, "select": 0.0, "train": 0.0, "evaluate": 0.0, "other": 3.0}
    assert sum(clock.lap().values()) == 1.0


def test_scores_come_back_from_their_line_as_they_were():
    (score,) = scored(1, reward=0.5)
    assert Score.from_json(score.to_json("kept", 0.5), score.trajectory) == score
    unknown = replace(score, rewards=(("r", None), ("s", 0.5)), success="unknown")
    assert Score.from_json(unknown.to_json("failed", 0.5), unknown.trajectory) == unknown
