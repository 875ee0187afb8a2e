"""Filtered BC as a user runs it: rounds that keep what was sampled, and go on after a cut as if there had been none."""

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from bcft import filtered
from bcft.algorithms import filtered_bc as rounds
from bcft.config.loader import load
from bcft.errors import FaultError, UsageError
from bcft.rollout import sample as rollouts
from bcft.runs.storage import Journal, committed, read_journal, read_json, read_jsonl
from bcft.types import IGNORED, Trajectory

KEYS = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:200]",
    "num_rounds": 2, "prompts_per_round": 12, "num_generations": 3, "learning_rate": 2e-4, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "max_completion_length": 72, "eval_dev_problems": 8, "eval_dev_samples": 2,
    "eval_test_problems": 8, "eval_test_samples": 2, "eval_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("filtered")
    return path, filtered.run(None, output_dir=str(path), **KEYS)


def what_counts(path):
    """Return what must not depend on cuts: what was played and kept in each round, and the weights at the end."""
    files = sorted(path.glob("round_*/*.jsonl"))
    texts = {str(file.relative_to(path)): file.read_text() for file in files}
    return texts, load_file(path / "round_002" / "model" / "model.safetensors")


def test_a_run_leaves_every_round_whole_and_the_best_one_to_load(finished):
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
    assert "filtered behaviour cloning" in (path / "best" / "README.md").read_text()


def test_a_run_leaves_a_report_and_is_compared_with_its_control_afterwards(tmp_path, finished):
    path = finished[0]
    assert (path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    report = (path / "report.md").read_text()
    assert finished[1]["conclusion"] in report
    assert "## Against" not in report
    control = tmp_path / "control"
    filtered.run(None, output_dir=str(control), control="random", **KEYS)
    filtered.run(None, output_dir=str(path), against=str(control), **KEYS)
    report = (path / "report.md").read_text()
    assert "## Against `control`" in report
    assert "The recipes differ in `control` (none here, random there)." in report
    with pytest.raises(UsageError, match="against: /nowhere is no run of bcft filtered"):
        filtered.run(None, output_dir=str(tmp_path / "other"), against="/nowhere", **KEYS)


def test_what_is_trained_is_what_was_sampled_with_loss_on_the_action_alone(finished):
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
        assert all(
            row["success"] == "yes" and row["reward"] >= row["cutoff"] for row in scores if row["fate"] == "kept"
        )
        assert record["train"]["steps"] == math.ceil(chosen["kept"] / 4)
        assert record["train"]["weights_changed"]


def test_the_same_command_on_a_finished_run_says_its_conclusion(finished, capsys):
    path, metrics = finished
    assert filtered.run(None, output_dir=str(path), **KEYS) == metrics
    assert capsys.readouterr().out.strip().splitlines()[-1] == metrics["conclusion"]


class Power(Exception):  # noqa: N818
    """What a power cut looks like from inside."""


CUTS = {
    "journal": ("append", "after", 2), "seal": ("roll_out", "after", 2), "score": ("score", "after", 1),
    "kept": ("select", "after", 2), "trained": ("fit", "after", 2), "saved": ("clone", "after", 1),
    "evaluated": ("_due", "before", 2), "committed": ("commit", "after", 1), "conclusion": ("conclude", "before", 1),
}  # fmt: skip


@pytest.mark.parametrize(
    "cut", [pytest.param(cut, marks=() if cut in ("journal", "saved") else pytest.mark.slow) for cut in CUTS]
)
def test_a_run_cut_anywhere_goes_on_to_the_same_rows_and_weights(tmp_path, finished, monkeypatch, cut):
    name, when, times = CUTS[cut]
    from bcft.training import trainer as training

    holder = {"append": Journal, "fit": training}.get(name, rounds.Rounds)
    original, calls = getattr(holder, name), iter(range(1, 100))

    def cutting(*args, **kwargs):
        last = next(calls) == times
        if last and when == "before":
            raise Power
        found = original(*args, **kwargs)
        if last:
            raise Power
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "CHUNK", 7)
        patch.setattr(holder, name, cutting)
        with pytest.raises(Power):
            filtered.run(None, output_dir=str(tmp_path), **KEYS)
    assert not committed(tmp_path)
    assert filtered.run(None, output_dir=str(tmp_path), **KEYS) == finished[1]
    texts, weights = what_counts(tmp_path)
    expected_texts, expected = what_counts(finished[0])
    assert texts == expected_texts
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("roll out", signal.SIGTERM), ("train", signal.SIGINT),
        pytest.param("roll out", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("train", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_signal_ends_the_run_resumably_and_the_same_command_goes_on(tmp_path, finished, monkeypatch, phase, number):
    from bcft.training import trainer as training

    holder, name, times = (
        (rollouts.Journal, "append", 2) if phase == "roll out" else (training.BCTrainer, "training_step", 3)
    )
    original, calls = getattr(holder, name), iter(range(1, 1000))

    def signalled(*args, **kwargs):
        if next(calls) == times:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    arguments = [f"{key}={value}" for key, value in (KEYS | {"output_dir": tmp_path}).items()]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: to a shell's job it is ignored
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "CHUNK", 7)
        patch.setattr(holder, name, signalled)
        assert filtered.main(arguments) == 75
    assert read_json(tmp_path / "status.json")["state"] == "preempted"
    assert not list(tmp_path.glob("**/checkpoint-*"))  # a round trains again from its rows
    assert filtered.main(arguments) == 0
    signal.signal(signal.SIGTERM, before[0])
    assert signal.getsignal(signal.SIGINT) == before[1]
    texts, weights = what_counts(tmp_path)
    expected_texts, expected = what_counts(finished[0])
    assert texts == expected_texts
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_what_another_recipe_played_of_a_round_is_not_mixed_in(tmp_path, monkeypatch):
    def cutting(self, rows):
        append(self, rows)
        raise Power

    append, hotter = Journal.append, KEYS | {"temperature": 1.5, "num_rounds": 1}
    filtered.run(None, output_dir=str(tmp_path / "hotter"), **hotter)
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "CHUNK", 7)
        patch.setattr(Journal, "append", cutting)
        with pytest.raises(Power):
            filtered.run(None, output_dir=str(tmp_path / "cut"), **KEYS | {"num_rounds": 1})
    recipe = load("filtered", None, hotter | {"output_dir": str(tmp_path / "cut")}, flags={"allow-drift"})
    filtered.improve(recipe)
    one, two = ((tmp_path / run / "round_001" / "rollouts.jsonl").read_text() for run in ("hotter", "cut"))
    assert one == two


def test_a_torn_or_damaged_chunk_of_a_journal_is_cut_away_with_what_follows_it(tmp_path):
    file = tmp_path / "journal.jsonl"
    Journal(file).append([{"id": 1}, {"id": 2}])
    whole = file.read_bytes()
    with file.open("a") as torn:
        torn.write('{"sha256": "ab", "ro')
    assert read_journal(file) == [{"id": 1}, {"id": 2}]
    assert Journal(file).rows == [{"id": 1}, {"id": 2}]
    assert file.read_bytes() == whole
    Journal(file).append([{"id": 3}])
    assert [row["id"] for row in Journal(file).rows] == [1, 2, 3]
    file.write_bytes(file.read_bytes().replace(b'"id": 2', b'"id": 7'))
    assert Journal(file).rows == []


def test_a_reward_function_of_ones_own_is_taken_from_python(tmp_path):
    def short(completions, **_):
        return [-float(len(text)) for text in completions]

    keys = KEYS | {"num_rounds": 1, "success_func": ""}
    filtered.run(None, output_dir=str(tmp_path), reward_funcs=[short], **keys)
    scores = read_jsonl(tmp_path / "round_001" / "scores.jsonl")
    assert {row["rewards"][0]["name"] for row in scores} == {"short"}
    played = {line["id"]: line["turns"][0]["action"] for line in read_jsonl(tmp_path / "round_001" / "rollouts.jsonl")}
    assert all(row["reward"] == -len(played[row["id"]]) for row in scores)


def test_another_function_from_python_is_another_recipe(tmp_path):
    def right(completions, answer, **_):
        return [float(text.endswith(f"#### {wanted}")) for text, wanted in zip(completions, answer, strict=True)]

    keys = KEYS | {"num_rounds": 1, "output_dir": str(tmp_path)}
    filtered.run(None, reward_funcs=[right], **keys)
    assert "right@" in (tmp_path / "config.yaml").read_text()
    assert filtered.run(None, reward_funcs=[right], **keys)["rounds"] == 1

    def right(completions, **_):  # the same name, and another text
        return [0.0] * len(completions)

    with pytest.raises(UsageError, match=r"was begun with another recipe \(reward_funcs was"):
        filtered.run(None, reward_funcs=[right], **keys)


def test_the_first_reward_function_says_what_is_solved_unless_told(tmp_path):
    def tens(completions, **_):
        return [float(text.strip().endswith("0")) for text in completions]

    filtered.run(None, output_dir=str(tmp_path), reward_funcs=[tens], **KEYS | {"num_rounds": 1})
    for row in read_jsonl(tmp_path / "round_001" / "scores.jsonl"):
        assert (row["success"] == "yes") == (row["reward"] >= 1.0)
    for row in read_jsonl(tmp_path / "round_000" / "evaluation.jsonl"):
        assert (row["success"] == "yes") == row["completion"].strip().endswith("0")


def test_a_round_that_keeps_nothing_is_skipped_with_its_reason_or_stops_the_run(tmp_path):
    keys = KEYS | {"min_reward": 2.0, "num_rounds": 1}
    metrics = filtered.run(None, output_dir=str(tmp_path / "skip"), **keys)
    assert metrics["best_round"] == 0
    assert "no round was better" in metrics["conclusion"]
    assert read_json(tmp_path / "skip" / "round_001" / "metrics.json")["selection"]["note"]
    with pytest.raises(FaultError, match="round 1 kept nothing"):
        filtered.run(None, output_dir=str(tmp_path / "stop"), on_empty="stop", **keys)


def test_without_dev_problems_nothing_is_begun_and_without_test_problems_nothing_is_claimed(tmp_path):
    with pytest.raises(UsageError, match="eval_dev_problems"):
        filtered.run(None, output_dir=str(tmp_path / "a"), **KEYS | {"eval_dev_problems": 0})
    found = filtered.run(None, output_dir=str(tmp_path / "b"), **KEYS | {"eval_test_problems": 0, "num_rounds": 1})
    assert "nothing was measured" in found["conclusion"]
    assert (tmp_path / "b" / "best" / "model.safetensors").is_file()


def test_lora_rounds_continue_one_adapter(tmp_path):
    metrics = filtered.run(
        None, output_dir=str(tmp_path), use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=["all-linear"],
        **KEYS,
    )  # fmt: skip
    assert metrics["best_round"] in (0, 1, 2)
    adapter = load_file(tmp_path / "round_002" / "model" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert json.loads((tmp_path / "round_002" / "model" / "adapter_config.json").read_text())["r"] == 4
