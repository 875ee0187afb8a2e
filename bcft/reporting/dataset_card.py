"""The kept trajectories of a filtered run as a dataset for others, and its README, made from the files of the run."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from bcft.reporting.cards import (
    as_yaml,
    configuration,
    functions_of,
    made_with,
    model_of,
    public,
    quoted,
    recipe_of,
    rule_of,
    source_names,
)
from bcft.reporting.run_files import RunFiles
from bcft.reporting.tables import markdown_table
from bcft.runs.storage import KEPT, MANIFEST, SCORES, jsonl_rows, read_json

SPLIT = "train.jsonl"
"""The file of the rows, in the dataset's repository."""
_OF_TOKENIZER = ("input_ids", "labels")
FIELDS = {
    "id": "the trajectory: `round-problem-sample`; several rows of one trajectory share it",
    "round": "the round in which it was played",
    "problem_id": "a hash of the problem's text",
    "turn": "the first turn of the trajectory that the row's completion holds",
    "source": "whose trajectory it is: `self`, the policy's own",
    "prompt": "the messages before the first turn that is trained on",
    "completion": "the messages from that turn to the last one that is trained on",
    "reward": "the weighted sum of the trajectory's rewards",
    "success": "whether it solves the problem: `yes`, `no` or `unknown`",
    "decision": "the filter's: `kept` in every row",
    "pass_rate": "of the attempts at the problem that the filter saw and whose success is known, the share that solve "
    "it; 0.0 where success is unknown",
    "weight": "what the row weighs in the loss; 1.0 on average",
    "tools": "the JSON schemas of the tools that the policy may call; only where there are some",
    "chat_template_kwargs": "arguments of the chat template; only where the problem has some",
}
"""Column of a row -> what it holds."""


def dataset_rows(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that the rounds of a run kept of the policy's own trajectories, each once, in the order of rounds.

    A row has the columns of `FIELDS`: text and outcomes, without the token ids, which belong to one tokenizer.
    """
    given: set[tuple[str, int]] = set()
    for directory in _rounds(run):
        scores = [line for line, _ in jsonl_rows(directory / SCORES)]
        known = Counter(_problem(line["id"]) for line in scores if line["success"] != "unknown")
        solved = Counter(_problem(line["id"]) for line in scores if line["success"] == "yes")
        kept = {line["id"]: line for line in scores if line["decision"] == "kept"}
        for row, _ in jsonl_rows(directory / KEPT):
            place = (row["id"], row["turn"])
            if row["id"] not in kept or place in given:  # a demonstration to replay, or an earlier round has it
                continue
            given.add(place)
            problem = row["problem_id"]
            row |= {
                "round": int(row["id"].partition("-")[0]),
                "success": kept[row["id"]]["success"],
                "decision": kept[row["id"]]["decision"],
                "pass_rate": solved[problem] / known[problem] if known[problem] else 0.0,
            }
            yield {name: row[name] for name in FIELDS if name in row}


def dataset_card(run: Path, *, name: str, rows: int) -> str:
    """Return the README of the dataset: where prompts, policy, rewards and filter come from, by hash, and the fields.

    name: the Hub id; rows: how many there are.
    """
    config, files = configuration(run), RunFiles.read(run)
    base, revision = config["model_name_or_path"], config.get("model_revision") or "main"
    data = ", ".join(map(quoted, source_names(config)))
    versions = read_json(run / "versions.json")
    functions = ", ".join(f"`{function}`" for function in functions_of(run)) or "the environment alone"
    rule = rule_of(config)
    about = DatasetCardData(
        pretty_name=Path(name).name,
        task_categories=["text-generation"],
        language_creators=["machine-generated"],
        size_categories=[_size(rows)],
        tags=["bcft", "filtered-behavior-cloning", "rejection-sampling"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": SPLIT}]}],
    )
    weights = ", ".join(f"`{file}` {digest[:16]}" for file, digest in _weights(run))
    parts = [
        f"# {Path(name).name}",
        f"{rows:,} rows: the trajectories that {len(files.rounds)} rounds of filtered behavior cloning with bcft kept, "
        "each with its outcome. Its prompt and completion are conversations, as TRL's trainers read them.",
        f'```python\nfrom datasets import load_dataset\n\nrows = load_dataset("{name}", split="train")\n```',
        "## Where it comes from",
        "\n".join(
            [
                f"- **Prompts**: {data}, split {quoted(config['dataset_train_split'])}, SHA-256 of its rows "
                f"`{versions['data']}`. Problems that are held out as dev and test are not in here.",
                f"- **Policy**: {quoted(base)}"
                + (f", revision `{revision}`" if "/" in str(public(base)) else "")
                + f"; tokenizer and chat template `{_tokenizer(run)}`. A round is played with the weights that the "
                f"round before was trained to. The last ones, by SHA-256: {weights}.",
                f"- **Verifier**: {functions}, each with the hash of its source.",
                f"- **Filter**: the rule below, SHA-256 `{_digest(rule)}`.",
            ]
        ),
        as_yaml(rule),
        markdown_table(["round", "played", "kept", "SHA-256 of kept.jsonl"], list(_provenance(run, files))),
        "## Fields",
        markdown_table(["column", "what it holds"], [[f"`{field}`", words] for field, words in FIELDS.items()]).replace(
            "---:", "---"
        ),
        "## Limits",
        "- The text is a model's. What the verifier accepts is kept, also where a step of it is wrong.\n"
        "- Easy problems are kept more often than hard ones: see `pass_rate`.\n"
        "- Licenses and terms of use of the policy and of the prompts apply.",
        "## Recipe",
        as_yaml(recipe_of(config)),
        f"The keys that are not here are as by default. {made_with(run)}",
    ]
    return f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _rounds(run: Path) -> list[Path]:
    """Return the directories of a finished run's rounds."""
    return [run / f"round_{record['round']:03d}" for record in RunFiles.read(run).rounds]


def _provenance(run: Path, files: RunFiles) -> Iterator[list[str]]:
    """Yield a line of the table of rounds for each."""
    for directory, record in zip(_rounds(run), files.rounds, strict=True):
        digest = read_json(directory / MANIFEST)["files"][KEPT]
        numbers = (record["rollout"]["played"], record["selection"]["kept"])
        yield [str(record["round"]), *(f"{number:,}" for number in numbers), f"`{digest[:16]}`"]


def _weights(run: Path) -> Iterator[tuple[str, str]]:
    """Yield the files of the run's weights, each with its hash."""
    for file, digest in read_json(run / MANIFEST)["files"].items():
        if file.endswith(".safetensors"):
            yield str((run / file).relative_to(model_of(run))), digest


def _tokenizer(run: Path) -> str:
    """Return the fingerprint of the tokenizer and its template that the rounds were played with."""
    return str(read_json(_rounds(run)[-1] / MANIFEST)["tokenizer"])


def _problem(trajectory: str) -> str:
    """Return the problem of a trajectory's id."""
    return trajectory.partition("-")[2].rpartition("-")[0]


def _digest(rule: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rule, sort_keys=True).encode()).hexdigest()[:16]


def _size(rows: int) -> str:
    """Return the word that the Hub has for so many rows."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    below = [10 ** (3 + power) for power in range(len(names))]
    place = sum(rows >= limit for limit in below)
    if place == 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>1B"
