"""Small real things for tests: a tokenizer, a random Llama, data files."""

import json
from pathlib import Path

from bcft.testing import save_tiny_model, tiny_tokenizer

llama_tokenizer = tiny_tokenizer
save_llama = save_tiny_model


def write_jsonl(path, rows):
    """Write rows as JSON lines; return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k(path):
    """Return the rows of a GSM8K file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
