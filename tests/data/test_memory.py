"""Memory does not grow with the data: rows and tokens of a large file are not held."""

import json
import random
import subprocess
import sys
import tracemalloc

import pytest

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data import stored
from bcft.data.checks import check_prompts, without_special_tokens
from bcft.data.loading import load_splits
from bcft.policy.chat_template import Renderer
from bcft.testing import save_tiny_model, tiny_tokenizer

MEGABYTES = 60
CODE = """
import resource, sys
from bcft.config.schema import DataSettings, EvaluationSettings, ModelSettings
from bcft.data import stored
from bcft.data.examples import make_examples
from bcft.data.loading import load_splits
from bcft.policy.loading import load_renderer
from bcft.training import tokens, trainer

stored.IN_MEMORY = tokens.IN_MEMORY = 1 << 20
model, *files = sys.argv[1:]
renderer = load_renderer(model, ModelSettings(model_name_or_path=model))
for file in files:
    splits = load_splits(DataSettings(dataset_name=file), EvaluationSettings(), demonstrations=True)
    splits.digest
    examples, counts = make_examples(splits.train, renderer, max_length=1024)
    dataset = trainer.to_dataset(examples)
    assert len(dataset) == counts.kept == len(examples)
    assert tuple(dataset[len(dataset) - 1]["labels"]) == examples[-1].labels
    print(counts.kept, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_rows(path, megabytes):
    words, numbers, rows = [f"word{number}" for number in range(500)], random.Random(0), megabytes * 1000 // 2
    with path.open("w") as file:
        for number in range(rows):
            text = " ".join(numbers.choices(words, k=210))
            file.write(json.dumps({"prompt": f"{number}: {text[:200]}", "completion": text}) + "\n")
    return str(path), rows


def test_every_pass_over_the_rows_holds_few_of_them_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "IN_MEMORY", 1 << 16)
    path, rows = write_rows(tmp_path / "a.jsonl", 4)
    renderer = Renderer(tiny_tokenizer([" ".join(f"word{number}" for number in range(500))]))
    sizes = EvaluationSettings(eval_dev_problems=8, eval_test_problems=8)
    splits = load_splits(DataSettings(dataset_name=path), sizes)
    passes = {
        "read": lambda: load_splits(DataSettings(dataset_name=path, replay_dataset=path), sizes),
        "digest": lambda: splits.digest,
        "prompts": lambda: check_prompts((d.problem for d in splits.train), renderer, special_tokens="raise"),
        "special": lambda: without_special_tokens(splits.train, renderer, special_tokens="raise"),
        "weights": lambda: sum(d.weight for d in splits.train),
    }
    for name, read in passes.items():
        tracemalloc.start()
        read()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.2e6, f"{name}: {peak} bytes for {rows} rows of 4 MB"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows_of_a_file(tmp_path):
    small, _ = write_rows(tmp_path / "small.jsonl", 4)
    large, rows = write_rows(tmp_path / "large.jsonl", MEGABYTES)
    tokenizer = tiny_tokenizer([" ".join(f"word{number}" for number in range(500))], vocabulary=2000)
    model = save_tiny_model(tmp_path / "model", tokenizer)
    command = [sys.executable, "-c", CODE, model, small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (_, before), (kept, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert kept > 0.85 * rows
    # As Python objects the rows alone would take more than twice the size of the file, and their tokens more.
    assert after - before < MEGABYTES
