"""The loop's settings as laws: where a round begins, what it selects from, when it is evaluated and when it ends."""

import math

import pytest
import torch
from helpers.runs import equal, interrupted, of_round, text, weights
from safetensors.torch import load_file

from bcft import filtered
from bcft.algorithms import filtered_bc
from bcft.algorithms.learner import training_seed
from bcft.config.loader import load
from bcft.errors import DataError, FaultError, UsageError
from bcft.policy.loading import load_policy
from bcft.rollout import sample
from bcft.runs.storage import read_jsonl
from bcft.training import trainer as training
from bcft.types import TrainingExample

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
    return of_round(path, number, "metrics.json")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two rounds with default settings."""
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
    assert text(by_base, 1, "rollouts.jsonl") == text(plain, 1, "rollouts.jsonl")
    assert text(by_base, 2, "rollouts.jsonl") != text(plain, 2, "rollouts.jsonl")


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
    interrupted(monkeypatch, tmp_path / "cut", filtered_bc, "commit", **KEYS | keys)
    run(tmp_path / "cut", **keys)
    for name in ("scores.jsonl", "kept.jsonl"):
        assert text(tmp_path / "cut", 2, name) == text(tmp_path / "whole", 2, name)
    assert equal(weights(tmp_path / "cut", 2), weights(tmp_path / "whole", 2))


@pytest.mark.slow
def test_a_round_from_base_is_the_base_trained_on_its_rows_alone(tmp_path):
    """One trainer for all rounds does what a new one would do from the same weights."""
    run(tmp_path, init_from="base")
    config = load("filtered", None, KEYS | {"output_dir": str(tmp_path)})
    policy = load_policy(config.model.model_name_or_path, config.model)
    rows = [TrainingExample.from_json(line) for line in of_round(tmp_path, 2, "kept.jsonl")]
    arguments = training.training_arguments(
        config.training, output_dir=tmp_path / "alone", autocast="no", use_cpu=True,
        disable_tqdm=True, save_strategy="no", eval_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = training.BCTrainer(
        policy.model, arguments, examples=rows, tokenizer=policy.renderer.tokenizer, checkpoints=False
    )
    training.next_round(
        trainer,
        rows,
        seed=training_seed(config.training.seed, 2),
        learning_rate=config.training.learning_rate,
    )
    training.fit(trainer, rows)
    assert equal(
        weights(tmp_path, 2), {k: v for k, v in policy.model.state_dict().items() if k in weights(tmp_path, 2)}
    )


@pytest.mark.slow
def test_from_best_a_round_that_made_things_worse_is_undone(tmp_path, by_base, plain):
    metrics = run(tmp_path, init_from="best", **RUIN)
    assert record(tmp_path, 1)["eval"]["sampled"]["pass@1"] < record(plain, 1)["eval"]["sampled"]["pass@1"]
    assert text(tmp_path, 2, "rollouts.jsonl") == text(by_base, 2, "rollouts.jsonl")
    assert metrics["best_round"] == 0
    assert "no round was better" in metrics["conclusion"]
    shipped = load_file(tmp_path / "best" / "model.safetensors")
    base = load_policy(KEYS["model_name_or_path"], load("filtered", None, KEYS).model).model.state_dict()
    assert all(torch.equal(shipped[name], base[name]) for name in shipped)


@pytest.mark.slow
def test_a_carried_optimizer_goes_on_counting_and_a_resumed_run_carries_the_same(tmp_path, plain, monkeypatch):
    keys = {"reset_optimizer": False}
    run(tmp_path / "whole", **keys)
    steps = [record(tmp_path / "whole", n)["train"]["steps"] for n in (1, 2)]
    state = load_file(tmp_path / "whole" / "round_002" / "model" / "optimizer.safetensors")
    assert float(state["0.step"]) == sum(steps)
    assert text(tmp_path / "whole", 2, "rollouts.jsonl") == text(plain, 2, "rollouts.jsonl")  # round 1 is the same
    assert not equal(weights(tmp_path / "whole", 2), weights(plain, 2))
    interrupted(monkeypatch, tmp_path / "cut", filtered_bc, "commit", **KEYS | keys)
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
def test_settings_that_could_never_keep_anything_are_refused_at_once(tmp_path, keys, error, words):
    with pytest.raises(error, match=words):
        run(tmp_path / "run", **keys)


def test_as_many_weights_as_reward_functions(tmp_path):
    with pytest.raises(UsageError, match="reward_weights: 2 weights for 1 reward functions"):
        run(tmp_path, reward_weights=[1.0, 2.0])


def test_equal_rows_make_equal_steps_in_every_round(tmp_path):
    config = load("filtered", None, KEYS)
    policy = load_policy(config.model.model_name_or_path, config.model)
    rows = [TrainingExample(f"{n}", "p", (5, 6, 7, n), (-100, 6, 7, n)) for n in range(8, 21)]
    arguments = training.training_arguments(
        config.training, output_dir=tmp_path, autocast="no", use_cpu=True,
        disable_tqdm=True, save_strategy="no", eval_strategy="no",
    )  # fmt: skip
    trainer = training.BCTrainer(
        policy.model, arguments, examples=rows, tokenizer=policy.renderer.tokenizer, checkpoints=False
    )
    steps = []
    for number in range(3):
        training.next_round(trainer, rows, seed=number, learning_rate=config.training.learning_rate)
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


# The sanity check


def test_a_hopeless_run_ends_before_its_first_round(tmp_path):
    with pytest.raises(FaultError, match="nothing can be learned: all 48 attempts were truncated"):
        run(tmp_path, max_completion_length=4)
    assert not (tmp_path / "round_001" / "rollouts.jsonl").exists()


def test_attempts_of_the_sanity_check_are_not_played_again(tmp_path, monkeypatch):
    counts = []
    original = sample.play_attempts

    def counting(policy, attempts, *args, phase, **kwargs):
        counts.append((phase, len(attempts)))
        return original(policy, attempts, *args, phase=phase, **kwargs)

    monkeypatch.setattr(sample, "play_attempts", counting)
    run(tmp_path, num_rounds=1, prompts_per_round=20)
    assert [count for phase, count in counts if phase == "rollout"] == [16 * 3, 4 * 3]
    assert counts[0][0] == "rollout"  # it costs less than the evaluation of the base, and comes before it
