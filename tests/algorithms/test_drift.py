"""A run that resumes with another recipe keeps what no key that differs touches, and nothing else."""

from functools import partial

import pytest
from helpers.runs import TINY, PowerCut, equal, interrupted, text, weights

from bcft import filtered, sft
from bcft.algorithms import filtered_bc, opening
from bcft.algorithms import sft as plain_bc
from bcft.errors import FaultError, UsageError
from bcft.runs.storage import read_json

SFT = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]",
    "eval_dev_problems": 4, "eval_test_problems": 6, "eval_test_samples": 2, "max_completion_length": 48,
    "max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({"success_func": ""}, False),
        ({"success_func": "helpers.functions.even"}, False),
        ({"learning_rate": 2e-3}, True),
        ({"seed": 1}, True),
        ({"max_completion_length": 40}, False),
        ({"temperature": 0.5}, False),
        ({"environment": "bcft.environments.two_attempts.TwoAttempts"}, False),
        ({"eval_test_samples": 1}, False),
        ({"dataset_train_split": "train[:48]"}, True),
        ({"eval_test_problems": 7}, True),
    ],
    ids=str,
)
def test_with_allow_drift_weights_stay_where_no_key_that_differs_touches_them(
    tmp_path, monkeypatch, work, changed, again
):
    interrupted(monkeypatch, tmp_path, plain_bc, "measure", when="before", times=2, run=sft.run, **SFT)
    with pytest.raises(UsageError, match=f"{next(iter(changed))} was .*--allow-drift"):
        sft.run(None, output_dir=str(tmp_path), **SFT | changed)
    sft.run(None, output_dir=str(tmp_path), allow_drift=True, **SFT | changed)
    assert work["trained"] == 1 + again


OTHER = TINY | {"num_rounds": 1, "reward_funcs": "helpers.functions.odd", "success_func": ""}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run with another reward from the beginning."""
    path = tmp_path_factory.mktemp("other")
    filtered.run(None, output_dir=str(path), **OTHER)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["roll_out_round", "score_round", "select_round", "train_round", "evaluate_round"])
def test_another_reward_scores_the_same_attempts_anew(tmp_path, monkeypatch, other, work, phase):
    interrupted(monkeypatch, tmp_path, filtered_bc, phase, **TINY | {"num_rounds": 1})
    filtered.run(None, output_dir=str(tmp_path), allow_drift=True, **OTHER)
    for file in ("rollouts.jsonl", "scores.jsonl", "kept.jsonl", "evaluation.json"):
        assert text(tmp_path, 1, file) == text(other, 1, file)
    assert equal(weights(tmp_path, 1), weights(other, 1))
    assert work["played"].count("rollout") == 12 * 3


@pytest.mark.slow
def test_after_drift_the_base_is_measured_with_its_own_weights(tmp_path, monkeypatch):
    keys = TINY | {"num_rounds": 1, "learning_rate": 3e-3}
    interrupted(monkeypatch, tmp_path, filtered_bc, "conclude", when="before", **keys)
    before = text(tmp_path, 0, "evaluation.jsonl")
    assert before != text(tmp_path, 1, "evaluation.jsonl")
    filtered.run(None, output_dir=str(tmp_path), allow_drift=True, **keys | {"eval_test_samples": 3})
    assert text(tmp_path, 0, "evaluation.jsonl") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "again", "trained"),
    [
        ({"keep_quantile": 0.95}, False, 1),
        ({"learning_rate": 1e-3}, False, 1),
        ({"eval_dev_samples": 1}, False, 0),
        ({"early_stop": 7}, False, 1),
        ({"max_per_problem": 1}, False, 1),
        ({"temperature": 0.5}, True, 1),
        ({"seed": 1}, True, 1),
    ],
    ids=str,
)
def test_what_no_key_that_differs_touches_is_neither_played_nor_asked_nor_trained_again(
    tmp_path, monkeypatch, work, changed, again, trained
):
    asked = []

    def paid(completions, **_):
        asked.extend(completions)
        return [float(len(text) % 5) for text in completions]

    keys = TINY | {"num_rounds": 1, "success_func": "helpers.functions.even", "keep_quantile": 0.5}
    run = partial(filtered.run, reward_funcs=paid)
    interrupted(monkeypatch, tmp_path, filtered_bc, "evaluate_round", run=run, **keys)
    assert (work["played"].count("rollout"), len(asked), work["trained"]) == (36, 36, 1)
    run(None, output_dir=str(tmp_path), allow_drift=True, **keys | changed)
    assert (work["played"].count("rollout"), len(asked)) == (36 + 36 * again, 36 + 36 * again)
    assert work["trained"] == 1 + trained
    run(None, output_dir=str(tmp_path / "alone"), **keys | changed)
    for file in ("rollouts.jsonl", "scores.jsonl", "kept.jsonl", "evaluation.json"):
        assert text(tmp_path, 1, file) == text(tmp_path / "alone", 1, file)
    assert text(tmp_path, 0, "evaluation.json") == text(tmp_path / "alone", 0, "evaluation.json")
    assert equal(weights(tmp_path, 1), weights(tmp_path / "alone", 1))


@pytest.mark.slow
def test_an_adapter_that_no_round_was_trained_from_is_made_anew_for_another_recipe(tmp_path):
    """The adapter of the recipe before was trained, and config.yaml said otherwise."""
    keys = TINY | {"num_rounds": 1, "use_peft": True, "lora_r": 4, "success_func": "", "learning_rate": 1e-2}
    keys |= {"output_dir": str(tmp_path)}
    with pytest.raises(FaultError, match="nothing can be learned"):
        filtered.run(None, reward_funcs=lambda completions, **_: [0.0] * len(completions), **keys)
    assert read_json(tmp_path / "round_000" / "model" / "adapter_config.json")["r"] == 4
    changed = {"lora_r": 16, "reward_funcs": ["helpers.functions.brevity"]}
    filtered.run(None, allow_drift=True, **keys | changed)
    for place in ("round_000/model", "best"):
        assert read_json(tmp_path / place / "adapter_config.json")["r"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("init_from", ["best", "previous"])
def test_a_run_killed_before_its_base_was_evaluated_again_resumes(tmp_path, monkeypatch, init_from):
    keys = TINY | {"init_from": init_from, "warmup_rounds": 1}  # the first leaves the weights of the best one
    interrupted(monkeypatch, tmp_path, filtered_bc, "roll_out_round", when="before", times=2, **keys)
    other = keys | {"eval_test_samples": 3}
    cutting = partial(filtered.run, allow_drift=True)
    interrupted(monkeypatch, tmp_path, filtered_bc, "evaluate_base", when="before", run=cutting, **other)
    assert not (tmp_path / "round_000" / "evaluation.json").exists()
    metrics = filtered.run(None, output_dir=str(tmp_path), **other)
    assert metrics == filtered.run(None, output_dir=str(tmp_path / "alone"), **other)
    assert equal(weights(tmp_path, 2), weights(tmp_path / "alone", 2))


def test_nothing_is_deleted_before_every_process_has_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "load_policy", stop)
    with pytest.raises(PowerCut):
        filtered.run(None, output_dir=str(tmp_path), **TINY)
    (tmp_path / "config.yaml").write_text("temperature: 0.5\n")
    done = []
    for name in ("barrier", "discard_stale"):
        monkeypatch.setattr(opening, name, lambda *_, name=name: done.append(name))
    with pytest.raises(PowerCut):
        filtered.run(None, output_dir=str(tmp_path), allow_drift=True, **TINY)
    assert done == ["barrier", "discard_stale", "barrier"]


def stop(*_, **__):
    raise PowerCut
