"""Filtered BC as a user runs it: rounds that train on sampled ids, and resume as if nothing had happened."""

import json
import math
import os
import signal

import pytest
import torch
from helpers.pages import read_page, rows_of, section
from helpers.runs import TINY, PowerCut, equal, interrupted, text, weights
from safetensors.torch import load_file

from bcft import filtered
from bcft.algorithms import filtered_bc, rounds
from bcft.config.loader import load
from bcft.errors import FaultError, UsageError
from bcft.rollout import sample
from bcft.runs.storage import Journal, committed, read_json, read_jsonl
from bcft.training import trainer
from bcft.types import IGNORED, Trajectory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("filtered")
    return path, filtered.run(None, output_dir=str(path), **TINY)


def result(path):
    """Return what must not depend on interruptions: the rows of each round, and the weights at the end."""
    files = sorted(path.glob("round_*/*.jsonl"))
    texts = {str(file.relative_to(path)): file.read_text() for file in files}
    return texts, weights(path, 2)


def assert_same_result(one, two):
    (texts, tensors), (expected_texts, expected) = result(one), result(two)
    assert texts == expected_texts
    assert equal(tensors, expected)


def test_a_run_commits_every_round_and_the_best_one_loads(finished):
    from transformers import AutoModelForCausalLM

    path, metrics = finished
    assert committed(path)
    assert read_json(path / "metrics.json") == metrics
    assert {"base", "best", "best_round", "vs_base", "conclusion"} <= metrics.keys()
    for number in (1, 2):
        place = path / f"round_{number:03d}"
        assert committed(place)
        for name in ("rollouts.jsonl", "scores.jsonl", "kept.jsonl", "evaluation.json", "metrics.json"):
            assert (place / name).is_file(), name
    assert [row["round"] for row in read_jsonl(path / "metrics.jsonl")] == [1, 2]
    AutoModelForCausalLM.from_pretrained(path / "best")
    assert "filtered behavior cloning" in (path / "best" / "README.md").read_text()


def test_a_run_leaves_a_report_and_is_compared_with_its_control_afterwards(tmp_path, finished):
    path = finished[0]
    page = read_page((path / "report.html").read_text())
    assert finished[1]["conclusion"] in page.one("header").text
    assert not page.all("section", id="beside")
    commands = [node.text for node in section(page, "repeat").all("pre")]
    assert commands[0].startswith("bcft filtered dataset_name=bcft:arithmetic 'dataset_train_split=train[:200]' ")
    control = tmp_path / "control"
    filtered.run(None, output_dir=str(control), control="random", **TINY)
    filtered.run(None, output_dir=str(path), against=str(control), **TINY)
    beside = section(read_page((path / "report.html").read_text()), "beside")
    assert rows_of(beside.all("table")[-1]) == [{"key": "control", "here": "none", "there": "random"}]
    with pytest.raises(UsageError, match="against: /nowhere is not a run of bcft filtered"):
        filtered.run(None, output_dir=str(tmp_path / "other"), against="/nowhere", **TINY)


def test_the_trained_rows_are_the_sampled_ids_with_loss_on_the_action_alone(finished):
    place = finished[0] / "round_001"
    played = {line["id"]: Trajectory.from_json(line) for line in read_jsonl(place / "rollouts.jsonl")}
    assert len(played) == 12 * 3
    kept = read_jsonl(place / "kept.jsonl")
    assert kept
    for row in kept:
        (turn,) = played[row["id"]].turns
        assert row["input_ids"] == [*turn.ids, *turn.action_ids]
        assert row["labels"] == [*[IGNORED] * len(turn.ids), *turn.action_ids]
        assert turn.stop == "stop_token"


def test_counts_add_up_and_no_failure_is_kept(finished):
    for number in (1, 2):
        place = finished[0] / f"round_{number:03d}"
        record = read_json(place / "metrics.json")
        chosen, scores = record["selection"], read_jsonl(place / "scores.jsonl")
        assert chosen["kept"] + sum(chosen["rejected"].values()) == record["rollout"]["played"] == len(scores) == 36
        kept = [row for row in scores if row["decision"] == "kept"]
        assert kept
        assert all(row["success"] == "yes" and row["reward"] >= row["cutoff"] for row in kept)
        assert record["train"]["steps"] == math.ceil(chosen["kept"] / 4)
        assert record["train"]["weights_changed"]


def test_re_running_a_finished_run_prints_its_conclusion(finished, capsys):
    path, metrics = finished
    assert filtered.run(None, output_dir=str(path), **TINY) == metrics
    assert capsys.readouterr().out.strip().splitlines()[-1] == metrics["conclusion"]


INTERRUPTIONS = {
    "journal": (Journal, "append", "after", 2), "seal": (rounds, "roll_out", "after", 2),
    "score": (filtered_bc, "score_round", "after", 1), "kept": (filtered_bc, "select_round", "after", 2),
    "trained": (trainer, "fit", "after", 2), "saved": (filtered_bc, "train_round", "after", 1),
    "evaluated": (filtered_bc, "evaluate_round", "before", 2), "committed": (filtered_bc, "commit", "after", 1),
    "conclusion": (filtered_bc, "conclude", "before", 1),
}  # fmt: skip


@pytest.mark.parametrize(
    "point",
    [pytest.param(p, marks=() if p in ("journal", "saved") else pytest.mark.slow) for p in INTERRUPTIONS],
)
def test_a_run_interrupted_anywhere_resumes_to_the_same_rows_and_weights(tmp_path, finished, monkeypatch, point):
    holder, name, when, times = INTERRUPTIONS[point]
    monkeypatch.setattr(sample, "CHUNK", 7)
    interrupted(monkeypatch, tmp_path, holder, name, when=when, times=times, **TINY)
    monkeypatch.undo()
    assert not committed(tmp_path)
    assert filtered.run(None, output_dir=str(tmp_path), **TINY) == finished[1]
    assert_same_result(tmp_path, finished[0])


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("train", signal.SIGINT),
        *(pytest.param("roll out", number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT)),
        pytest.param("train", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_signal_ends_the_run_resumably(tmp_path, finished, monkeypatch, phase, number):
    holder, name, times = (Journal, "append", 2) if phase == "roll out" else (trainer.BCTrainer, "training_step", 3)
    original, calls = getattr(holder, name), iter(range(1, 1000))

    def signalled(*args, **kwargs):
        if next(calls) == times:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    arguments = [f"{key}={value}" for key, value in (TINY | {"output_dir": tmp_path}).items()]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: a shell's background job ignores it
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "CHUNK", 7)
        patch.setattr(holder, name, signalled)
        assert filtered.main(arguments) == 75
    assert read_json(tmp_path / "status.json")["state"] == "preempted"
    assert not list(tmp_path.glob("**/checkpoint-*"))  # a round trains again from its rows
    assert filtered.main(arguments) == 0
    signal.signal(signal.SIGTERM, before[0])
    assert signal.getsignal(signal.SIGINT) == before[1]
    assert_same_result(tmp_path, finished[0])


@pytest.mark.slow
def test_rollouts_of_another_recipe_are_not_mixed_in(tmp_path, monkeypatch):
    hotter = TINY | {"temperature": 1.5, "num_rounds": 1}
    filtered.run(None, output_dir=str(tmp_path / "hotter"), **hotter)
    monkeypatch.setattr(sample, "CHUNK", 7)
    interrupted(monkeypatch, tmp_path / "cut", Journal, "append", **TINY | {"num_rounds": 1})
    monkeypatch.undo()
    config = load("filtered", None, hotter | {"output_dir": str(tmp_path / "cut")}, flags={"allow-drift"})
    filtered.run_config(config)
    assert text(tmp_path / "hotter", 1, "rollouts.jsonl") == text(tmp_path / "cut", 1, "rollouts.jsonl")


def test_a_reward_function_of_ones_own_is_taken_from_python(tmp_path):
    def short(completions, **_):
        return [-float(len(text)) for text in completions]

    keys = TINY | {"num_rounds": 1, "success_func": ""}
    filtered.run(None, output_dir=str(tmp_path), reward_funcs=[short], **keys)
    scores = read_jsonl(tmp_path / "round_001" / "scores.jsonl")
    assert {row["rewards"][0]["name"] for row in scores} == {"short"}
    played = {line["id"]: line["turns"][0]["action"] for line in read_jsonl(tmp_path / "round_001" / "rollouts.jsonl")}
    assert all(row["reward"] == -len(played[row["id"]]) for row in scores)


def test_another_function_from_python_is_another_recipe(tmp_path):
    def right(completions, answer, **_):
        return [float(text.endswith(f"#### {wanted}")) for text, wanted in zip(completions, answer, strict=True)]

    keys = TINY | {"num_rounds": 1, "output_dir": str(tmp_path)}
    filtered.run(None, reward_funcs=[right], **keys)
    assert "right@" in (tmp_path / "config.yaml").read_text()
    assert filtered.run(None, reward_funcs=[right], **keys)["rounds"] == 1

    def right(completions, **_):  # the same name, and another text
        return [0.0] * len(completions)

    with pytest.raises(UsageError, match=r"was started with another recipe \(reward_funcs was"):
        filtered.run(None, reward_funcs=[right], **keys)


def test_reward_functions_may_be_given_as_names_and_as_objects_at_once(tmp_path):
    def short(completions, **_):
        return [-float(len(text)) for text in completions]

    keys = TINY | {"num_rounds": 1, "success_func": "bcft.rewards.math_reward"}
    filtered.run(None, output_dir=str(tmp_path), reward_funcs=["bcft.rewards.math_reward", short], **keys)
    scores = read_jsonl(tmp_path / "round_001" / "scores.jsonl")
    assert {tuple(reward["name"] for reward in row["rewards"]) for row in scores} == {("math_reward", "short")}


def test_with_allow_drift_every_evaluation_to_compare_with_is_made_anew(tmp_path, monkeypatch):
    """Also when the drifted run is killed before it evaluates the base, and then resumed without the flag."""
    path, fewer = tmp_path / "run", TINY | {"num_rounds": 1, "eval_test_samples": 1, "eval_dev_samples": 1}
    interrupted(monkeypatch, path, filtered_bc, "conclude", when="before", **TINY | {"num_rounds": 1})
    config = load("filtered", None, fewer | {"output_dir": str(path)}, flags={"allow-drift"})
    with monkeypatch.context() as patch:
        patch.setattr(filtered_bc, "evaluate_base", raising)
        with pytest.raises(PowerCut):
            filtered.run_config(config)
    filtered.run(None, output_dir=str(path), **fewer)
    for name in ("round_000/evaluation.json", "round_000/test/evaluation.json"):
        assert read_json(path / name)["sampled"]["n"] == 1, name
    assert read_json(path / "metrics.json")["base"]["sampled"]["n"] == 1


def raising(*_, **__):
    raise PowerCut


def test_the_first_reward_function_says_what_is_solved_by_default(tmp_path):
    def tens(completions, **_):
        return [float(text.strip().endswith("0")) for text in completions]

    filtered.run(None, output_dir=str(tmp_path), reward_funcs=[tens], **TINY | {"num_rounds": 1})
    for row in read_jsonl(tmp_path / "round_001" / "scores.jsonl"):
        assert (row["success"] == "yes") == (row["reward"] >= 1.0)
    for row in read_jsonl(tmp_path / "round_000" / "evaluation.jsonl"):
        assert (row["success"] == "yes") == row["completion"].strip().endswith("0")


def test_a_round_that_keeps_nothing_is_skipped_with_its_reason_or_stops_the_run(tmp_path):
    keys = TINY | {"min_reward": 2.0, "num_rounds": 1}
    metrics = filtered.run(None, output_dir=str(tmp_path / "skip"), **keys)
    assert metrics["best_round"] == 0
    assert "no round was better" in metrics["conclusion"]
    assert read_json(tmp_path / "skip" / "round_001" / "metrics.json")["selection"]["note"]
    with pytest.raises(FaultError, match="round 1 kept nothing"):
        filtered.run(None, output_dir=str(tmp_path / "stop"), on_empty="stop", **keys)


def test_without_dev_problems_nothing_is_started_and_without_test_problems_nothing_is_claimed(tmp_path):
    with pytest.raises(UsageError, match="eval_dev_problems"):
        filtered.run(None, output_dir=str(tmp_path / "a"), **TINY | {"eval_dev_problems": 0})
    found = filtered.run(None, output_dir=str(tmp_path / "b"), **TINY | {"eval_test_problems": 0, "num_rounds": 1})
    assert "nothing was measured" in found["conclusion"]
    assert (tmp_path / "b" / "best" / "model.safetensors").is_file()


@pytest.mark.slow
def test_lora_rounds_continue_one_adapter(tmp_path):
    filtered.run(
        None, output_dir=str(tmp_path), use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=["all-linear"],
        **TINY,
    )  # fmt: skip
    first, second = (load_file(tmp_path / f"round_{n:03d}" / "model" / "adapter_model.safetensors") for n in (0, 2))
    assert first.keys() == second.keys()
    assert all(tensor.dtype == torch.float32 for tensor in second.values())
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in second.items() if "lora_B" in name)
    # Two rounds continued one adapter: its A matrices are still close to those it began with.
    begun = {name: tensor for name, tensor in first.items() if "lora_A" in name}
    assert begun
    assert all((second[name] - tensor).abs().max() < 0.1 * tensor.abs().max() for name, tensor in begun.items())
    assert json.loads((tmp_path / "round_002" / "model" / "adapter_config.json").read_text())["r"] == 4
