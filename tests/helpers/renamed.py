"""The key map between run directories of version 0.1.0's first layout and today's, and a comparison of two runs.

    python tests/helpers/renamed.py OLD_RUN NEW_RUN

Weights must have the same sha256; rollouts, scores, kept rows and evaluations must be equal once the words of OLD_RUN
are replaced. Prints what was compared and what differs; exits 1 if anything differs.
"""

import hashlib
import json
import sys
from pathlib import Path

KEYS = {"fate": "decision"}
DECISIONS = {
    "outside_band": "pass_rate",
    "below_floor": "below_min_reward",
    "over_cap": "max_per_problem",
    "tie_lost": "tie_break",
}


def renamed(value):
    """Return a JSON value in today's words."""
    if isinstance(value, dict):
        return {DECISIONS.get(KEYS.get(key, key), KEYS.get(key, key)): renamed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item) for item in value]
    return DECISIONS.get(value, value) if isinstance(value, str) else value


def rows(path):
    """Return the JSON lines or the JSON object of a file as a list."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else [json.loads(text)]


def content(path):
    """Return what a file holds, in today's words and without seconds; of weights their hash."""
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    values = [renamed(row) for row in rows(path)]
    for value in values:
        value.pop("seconds", None)
        if isinstance(value.get("train"), dict):
            for name in ("seconds", "tokens_per_second"):
                value["train"].pop(name, None)
    return values


def main() -> int:
    """Compare two runs."""
    old, new = map(Path, sys.argv[1:])
    names = {"evaluation.json", "evaluation.jsonl", "rollouts.jsonl", "scores.jsonl", "kept.jsonl", "metrics.json"}
    files = sorted(
        path.relative_to(old)
        for path in old.rglob("*")
        if path.name in names | {"metrics.jsonl", "problems.jsonl"} or path.suffix == ".safetensors"
    )
    assert files, f"{old} holds nothing to compare"
    different = 0
    for file in files:
        if "checkpoint-" in str(file):
            continue
        same = (new / file).is_file() and content(old / file) == content(new / file)
        different += not same
        digest = f"  {content(new / file)[:16]}" if file.suffix == ".safetensors" and same else ""
        print(f"{'equal    ' if same else 'DIFFERENT'} {file}{digest}")
    print(f"{len(files)} files, {different} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
