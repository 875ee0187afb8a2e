"""Small runs, whole and interrupted, and what they leave on disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bcft import filtered
from bcft.runs.storage import read_json, read_jsonl

ROOT = Path(__file__).parents[2]
TINY = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:200]",
    "num_rounds": 2, "prompts_per_round": 12, "num_generations": 3, "learning_rate": 2e-4, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "max_completion_length": 72, "eval_dev_problems": 8, "eval_dev_samples": 2,
    "eval_test_problems": 8, "eval_test_samples": 2, "eval_every": 1,
}  # fmt: skip
LLAMA = {
    "dataset_config": None, "max_completion_length": 64, "max_length": None, "learning_rate": 5e-3,
    "eval_dev_problems": 4, "eval_test_problems": 4, "eval_test_samples": 2,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
}  # fmt: skip
"""Keys that make the 3B recipes small."""
LOOP = {
    "eval_dev_samples": 2, "num_rounds": 2, "prompts_per_round": 8, "num_generations": 4, "keep_quantile": 0.5,
    "success_func": "", "early_stop": None,
}  # fmt: skip


class PowerCut(Exception):  # noqa: N818
    """What a power cut looks like from inside."""


def interrupted(monkeypatch, path, holder, name, *, when="after", times=1, run=filtered.run, **keys):
    """Run until a function is called for the given time, and end before or after it with PowerCut."""
    original, calls = getattr(holder, name), iter(range(1, 10_000))

    def cutting(*args, **kwargs):
        last = next(calls) == times
        if last and when == "before":
            raise PowerCut
        result = original(*args, **kwargs)
        if last:
            raise PowerCut
        return result

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, cutting)
        with pytest.raises(PowerCut):
            run(None, output_dir=str(path), **keys)


def of_round(path, number, name):
    """Return the content of a round's JSON file or JSON lines."""
    file = path / f"round_{number:03d}" / name
    return read_jsonl(file) if file.suffix == ".jsonl" else read_json(file)


def text(path, number, name):
    """Return a round's file as text."""
    return (path / f"round_{number:03d}" / name).read_text()


def weights(path, number):
    """Return the weights that a round saved."""
    return load_file(path / f"round_{number:03d}" / "model" / "model.safetensors")


def equal(one, two):
    """Return whether two models have the same tensors, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def torchrun(*arguments, directory):
    """Run in two processes, in a directory of its own; return what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, *arguments], cwd=directory, capture_output=True, text=True, check=False,
        env=os.environ | {
            "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done
