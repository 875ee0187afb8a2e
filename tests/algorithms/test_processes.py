"""Two processes under torchrun do one run: the same attempts as one process, one model, one set of files."""

import json

import pytest
from helpers.runs import torchrun

from bcft import filtered, sft
from bcft.runs.storage import committed, read_json

KEYS = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]",
    "learning_rate": 1e-3, "eval_test_problems": 8, "eval_test_samples": 2, "max_completion_length": 72,
    "max_steps": 4, "train_sampling_strategy": "sequential",
}  # fmt: skip


def launch(command, keys, directory):
    """Run a command in two processes; return what it printed."""
    return torchrun("-m", f"bcft.{command}", *(f"{key}={value}" for key, value in keys.items()), directory=directory)


@pytest.mark.slow
def test_two_processes_attempt_and_train_what_one_does(tmp_path):
    alone = sft.run(None, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, **KEYS)
    keys = KEYS | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 4}
    found = launch("sft", keys, tmp_path)
    assert found.stdout.count("train: 4 steps") == 1
    together = read_json(tmp_path / "two" / "metrics.json")
    one, two = (set((tmp_path / n / "base" / "evaluation.jsonl").read_text().splitlines()) for n in ("one", "two"))
    assert one == two
    assert together["base"] == alone["base"]
    assert together["final"]["loss"] == pytest.approx(alone["final"]["loss"], rel=1e-4)
    assert committed(tmp_path / "two")


@pytest.mark.slow
def test_two_processes_play_and_keep_what_one_does(tmp_path):
    keys = {k: v for k, v in KEYS.items() if k not in ("max_steps", "train_sampling_strategy")} | {
        "num_rounds": 1, "prompts_per_round": 8, "num_generations": 3, "eval_dev_problems": 4, "eval_dev_samples": 2,
    }  # fmt: skip
    filtered.run(None, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, **keys)
    launch("filtered", keys | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 4}, tmp_path)
    for name in ("rollouts.jsonl", "scores.jsonl", "kept.jsonl"):
        one, two = ((tmp_path / run / "round_001" / name).read_text() for run in ("one", "two"))
        assert one == two, name
    assert committed(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [pytest.param(False, id="full", marks=pytest.mark.nightly), pytest.param(True, id="lora")]
)
def test_two_processes_have_the_same_weights_after_every_round(tmp_path, adapter):
    keys = {k: v for k, v in KEYS.items() if k not in ("max_steps", "train_sampling_strategy")} | {
        "num_rounds": 3, "prompts_per_round": 24, "num_generations": 3, "eval_dev_problems": 4, "eval_dev_samples": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    keys |= {"use_peft": True, "lora_target_modules": ["all-linear"]} if adapter else {}
    torchrun("-m", "helpers.ranks", str(tmp_path), json.dumps(keys), directory=tmp_path)
    one, two = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert len(set(one)) == len(one) == 3
