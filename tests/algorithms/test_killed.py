"""kill -9 in every phase, then the same command again: bit for bit the uninterrupted run, with LoRA on 4 bits too."""

import json
import os
import subprocess
import sys

import pytest
from helpers.runs import LLAMA, LOOP, ROOT
from helpers.tiny import gsm8k, llama_tokenizer, save_llama, write_jsonl

from bcft.runs.storage import read_json, read_jsonl

TINY = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:200]",
    "num_rounds": 2, "prompts_per_round": 20, "num_generations": 3, "learning_rate": 2e-4, "num_train_epochs": 1,
    "per_device_train_batch_size": 4, "max_completion_length": 72, "eval_dev_problems": 8, "eval_dev_samples": 2,
    "eval_test_problems": 6, "eval_test_samples": 2, "eval_every": 1,
}  # fmt: skip
FEW = [
    "in a chunk", "in storing answers", "in saving", "between two files of an evaluation", "in writing the best round",
]  # fmt: skip
"""Points for a reward that answers the same each time: the one that is paid for is killed at all others."""
OF_WEIGHTS = [
    "after a chunk", "between score batches", "in training", "after training", "in saving", "after saving",
    "before the next round", "before the round is committed", "after the round is committed", "before the test",
    "in writing the best round", "before the run is committed",
]  # fmt: skip
"""Points at which an adapter or its optimizer can be lost."""


def some(points):
    """Return parameters: these points, and all of them at night."""
    every = pytest.param([], id="every", marks=pytest.mark.nightly)
    return pytest.mark.parametrize("points", [pytest.param(points, id="some"), every])


def killed(path, recipe, keys, points=()):
    """Return what the points of tests/helpers/killed.py left behind, and how many attempts were paid for."""
    found = subprocess.run(
        [sys.executable, "-m", "helpers.killed", str(path), str(recipe), json.dumps(keys), *points],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        },
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    printed = json.loads(found.stdout)
    left = printed["digests"]
    assert set(left) == {"alone", "another seed", *points} if points else len(left) > 25
    assert {point for point, digest in left.items() if digest != left["alone"]} == {"another seed"}
    return printed["asked"]


@pytest.mark.slow
@some(FEW)
def test_a_run_killed_at_any_point_ends_in_the_same_files_and_weights(tmp_path, points):
    killed(tmp_path, "-", TINY, points)


@pytest.mark.slow
def test_of_a_run_killed_at_any_point_every_attempt_is_paid_for_once(tmp_path):
    """The reward answers differently each time: one question more would change what is kept from there on."""
    asked = killed(tmp_path, "-", TINY | {"success_func": "", "paid": True})
    metrics = read_json(tmp_path / "alone" / "metrics.json")
    rounds = [read_json(file)["rollout"]["played"] for file in tmp_path.glob("alone/round_*/metrics.json")]
    evaluated = [len(read_jsonl(file)) for file in tmp_path.glob("alone/round_*/**/evaluation.jsonl")]
    harder = metrics["base"]["harder"]["n"] * (1 + 2) * len(list(tmp_path.glob("alone/round_*/test")))
    assert rounds == [60, 60]
    assert asked == sum(rounds) + sum(evaluated) + harder


@pytest.mark.slow
@some(OF_WEIGHTS)
def test_a_run_of_lora_on_4_bits_killed_at_any_point_ends_in_the_same_files_and_weights(tmp_path, points):
    rows = gsm8k(ROOT / "tests" / "data" / "gsm8k_50.jsonl")
    tokenizer = llama_tokenizer([row["question"] for row in rows], vocabulary=300)
    pages = [{**row, "question": f"Page {page}. {row['question'][:60]}"} for page in range(6) for row in rows]
    keys = LLAMA | LOOP | {
        "model_name_or_path": save_llama(tmp_path / "llama", tokenizer, positions=1024), "eval_every": 1,
        "dataset_name": write_jsonl(tmp_path / "rows.jsonl", pages), "prompts_per_round": 20, "num_generations": 3,
        "reset_optimizer": False,
    }  # fmt: skip
    killed(tmp_path, ROOT / "recipes" / "llama-3.2-3b" / "filtered_bc_qlora.yaml", keys, points)
