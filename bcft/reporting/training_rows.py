"""What a run of `sft` trains on, for people: the counts of all rows, and the first rows token by token."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bcft.data.counts import ExampleCounts
from bcft.policy.chat_template import Renderer
from bcft.runs.storage import write_json
from bcft.types import TrainingExample

ROWS = "rows.json"
SHOWN = 3
"""So many rows are written."""


def row_tokens(example: TrainingExample, renderer: Renderer) -> dict[str, Any]:
    """Return a row as `{where, problem_id, weight, tokens: [{id, text, label}]}`, label -100 without loss."""
    tokens = [
        {"id": token, "text": renderer.tokenizer.decode([token]), "label": label}
        for token, label in zip(example.input_ids, example.labels, strict=True)
    ]
    return {"where": example.where, "problem_id": example.problem_id, "weight": example.weight, "tokens": tokens}


def write_rows(directory: Path, examples: Sequence[TrainingExample], counts: ExampleCounts, renderer: Renderer) -> None:
    """Write `rows.json`: the counts, in words and as numbers, and the first rows."""
    shown = [row_tokens(example, renderer) for example in examples[:SHOWN]]
    write_json(directory / ROWS, {"words": str(counts), "counts": dataclasses.asdict(counts), "examples": shown})
