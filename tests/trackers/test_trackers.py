"""Trackers hear each round once, on one axis, and what they hold after a kill is what a run left alone gives them.

They run for real, without a network: TensorBoard, wandb offline, trackio on this machine. Their packages are the extra
`trackers`.
"""

import json
import os

import pytest

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
pytest.importorskip("trackio")

from helpers.runs import TINY, interrupted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from bcft import filtered, sft
from bcft.algorithms import filtered_bc, rounds
from bcft.reporting.trackers import flat
from bcft.runs.storage import read_json, read_jsonl

pytestmark = pytest.mark.slow
NAMES = ["tensorboard", "wandb", "trackio"]
KEYS = TINY | {"report_to": NAMES, "project": "tests", "run_name": "one"}


@pytest.fixture(autouse=True)
def _local(monkeypatch):
    """Everything stays on this machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def tensorboard(run):
    """Return (step, name) -> value of all files of a run; a value that comes twice must be the same."""
    values = {}
    for file in sorted((run / "tensorboard").rglob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                key = (event.step, name)
                assert values.setdefault(key, event.value) == event.value
    return values


def logged(content):
    """Yield the records of a .wandb file: LevelDB's log format in blocks of 32 KiB, behind a header of 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(content):
        if -place % 32768 < 7:  # too little is left of the block for another record
            place += -place % 32768
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def wandb(run):
    """Return (step, name) -> value of all offline directories of a run, which have one id."""
    values, ids = {}, set()
    for file in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.add(file.stem.removeprefix("run-"))
        for data in logged(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                value = json.loads(item.value_json)
                if isinstance(value, int | float) and not key.startswith(("_", "trajectories")):
                    values[record.history.step.num, key] = value
    assert len(ids) == 1
    return values


def trackio(run):
    """Return (step, name) -> value of a run in trackio's database."""
    from trackio.sqlite_storage import SQLiteStorage

    state = read_json(run / "trackers.json")["trackio"]
    logs = SQLiteStorage.get_logs("tests", f"one-{state['id']}")
    return {
        (line["step"], key): value
        for line in logs
        for key, value in line.items()
        if isinstance(value, int | float) and key != "step"
    }


READ = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


def expected(run):
    """Return (step, name) -> value as the files of a run have them."""
    values, step = {}, 0
    base = {"eval": read_json(run / "round_000" / "evaluation.json")}
    values |= {(0, name): value for name, value in flat(base).items()}
    for record in read_jsonl(run / "metrics.jsonl"):
        for line in read_jsonl(run / f"round_{record['round']:03d}" / "losses.jsonl"):
            values |= {(step + line["step"], f"step/{key}"): v for key, v in line.items() if key != "step"}
        step += record["train"]["steps"]
        values |= {(step, name): value for name, value in flat(record).items()}
    metrics = read_json(run / "metrics.json")
    test = flat({"test": {key: metrics[key] for key in ("base", "best", "vs_base")}})
    return values | {(step, name): value for name, value in test.items()}


def same(one, two, *, timed=False):
    """Compare; seconds differ from run to run, and TensorBoard has numbers of 32 bits."""
    left, right = ({k: v for k, v in values.items() if timed or "seconds" not in k[1]} for values in (one, two))
    assert left.keys() == right.keys()
    assert left == pytest.approx(right, rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run that is left alone."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run = tmp_path_factory.mktemp("alone") / "run"
    filtered.run(None, output_dir=str(run), **KEYS)
    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_holds_the_files_of_a_run_on_one_axis(alone, name):
    held = READ[name](alone)
    same(held, expected(alone), timed=True)
    steps = sorted({step for step, key in held if key == "step/loss"})
    assert steps == list(range(1, len(steps) + 1)), "losses of all rounds, one step after the other"
    assert (steps[-1], "round") in held


def cut_after_commit(monkeypatch, run):
    interrupted(monkeypatch, run, rounds, "commit_round", times=1, **KEYS)


def cut_after_a_log(monkeypatch, run):
    from bcft.reporting.trackers import Trackers

    interrupted(monkeypatch, run, Trackers, "follow", times=1, **KEYS)


def cut_in_training(monkeypatch, run):
    interrupted(monkeypatch, run, filtered_bc, "train_round", times=1, **KEYS)


def cut_before_the_end(monkeypatch, run):
    interrupted(monkeypatch, run, filtered_bc, "conclude", times=1, **KEYS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_a_run_that_is_killed_three_times_is_what_is_said_of_one_left_alone(
    alone, tmp_path, monkeypatch, name
):
    run = tmp_path / "run"
    monkeypatch.setitem(KEYS, "report_to", name)
    if name == "tensorboard":
        monkeypatch.delitem(KEYS, "project")
    for cut in (cut_after_a_log, cut_in_training, cut_before_the_end):
        cut(monkeypatch, run)
    filtered.run(None, output_dir=str(run), **KEYS)
    same(READ[name](run), READ[name](alone))
    ids = read_json(run / "trackers.json")[name]["id"]
    filtered.run(None, output_dir=str(run), **KEYS)  # finished: nothing is said again
    assert read_json(run / "trackers.json")[name]["id"] == ids
    same(READ[name](run), READ[name](alone))


def test_a_kill_between_the_commit_of_a_round_and_its_log_loses_no_round(alone, tmp_path, monkeypatch):
    monkeypatch.setitem(KEYS, "report_to", "tensorboard")
    monkeypatch.delitem(KEYS, "project")
    cut_after_commit(monkeypatch, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    filtered.run(None, output_dir=str(tmp_path / "run"), **KEYS)
    same(tensorboard(tmp_path / "run"), tensorboard(alone))


def test_a_tracker_that_fails_costs_a_line_and_no_run(tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def broken(*_args, **_keys):
        raise ConnectionError("the server is gone\nfor good")

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "log", broken)
        filtered.run(None, output_dir=str(tmp_path), **TINY | {"report_to": "tensorboard"})
    out = capsys.readouterr().out
    assert out.count("tensorboard failed and is left out") == 1
    assert "the server is gone" in out
    assert (tmp_path / "best" / "model.safetensors").is_file()
    filtered.run(None, output_dir=str(tmp_path), **TINY | {"report_to": "tensorboard"})
    same(tensorboard(tmp_path), expected(tmp_path), timed=True)


def test_plain_bc_logs_each_step_once_although_it_resumes(tmp_path):
    keys = {
        "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]",
        "learning_rate": 1e-4, "per_device_train_batch_size": 8, "num_train_epochs": 2, "eval_test_problems": 4,
        "eval_test_samples": 1, "eval_dev_problems": 0, "report_to": NAMES, "project": "tests", "run_name": "one",
        "logging_steps": 1, "output_dir": str(tmp_path),
    }  # fmt: skip
    sft.run(None, **keys)
    lines = read_jsonl(tmp_path / "losses.jsonl")
    assert len(lines) == 16
    wanted = {(line["step"], f"train/{k}"): v for line in lines for k, v in line.items() if k != "step"}
    for name in NAMES:
        held = READ[name](tmp_path)
        same({key: value for key, value in held.items() if key[1].startswith("train/")}, wanted)
        assert (16, "test/final/n") in held


def test_no_key_and_no_token_is_in_the_files(alone):
    for file in alone.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".yaml", ".jsonl"):
            assert "API_KEY" not in file.read_text(encoding="utf-8")
