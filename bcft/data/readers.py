"""Files of users' rows: json, jsonl, csv and parquet, every row with the place it stands at."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bcft.errors import DataError
from bcft.rewards.base import REFERENCES
from bcft.types import Demonstration, Message, Problem, Prompt, Row, problem_id
from bcft.types import messages as as_messages


def read_json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of a JSON file, an array of them or one a line. Raises DataError with file and line."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        rows = _parse_json(raw, str(path))
        yield from ((_mapping(row, f"{path}: row {i}"), f"{path}: row {i}") for i, row in enumerate(rows))
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _mapping(_parse_json(line, where), where), where


def _parse_json(raw: bytes, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise DataError(f"{where}: key {key!r} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}:{error.lineno}"
        raise DataError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with columns, found {type(row).__name__}")
    return row


def _read_csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many fields as the header has ({len(reader.fieldnames or ())})")
                yield row, where
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    yield from ((row, f"{path}: row {i}") for i, row in enumerate(rows))


READERS = {".jsonl": read_json_rows, ".json": read_json_rows, ".csv": _read_csv, ".parquet": _read_parquet}


def shown(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# Rows to demonstrations
def demonstration(row: dict[str, Any], where: str, *, problem_only: bool = False) -> Demonstration:
    """Return a row as a demonstration; with `problem_only` the completion may be missing."""
    columns = {k: v for k, v in row.items() if k not in ("prompt", "question", "completion", "messages")}
    for key in REFERENCES:
        if key in columns and columns[key] is None:
            raise DataError(f"{where}: {key}: null: every row needs its reference answer, or none has one")
    if "messages" in row:
        said = _messages(row["messages"], f"{where}: messages")
        first = next((i for i, message in enumerate(said) if message["role"] == "assistant"), len(said))
        prompt = _prompt(row["prompt"], f"{where}: prompt") if "prompt" in row else said[:first]
        return _conversation(problem_id(prompt), prompt, columns, said, first, where)
    if "prompt" in row:
        prompt_key, completion_key = "prompt", "completion"
    elif "question" in row and "answer" in row:
        prompt_key, completion_key = "question", "answer"
    else:
        raise DataError(
            f"{where}: columns {', '.join(sorted(map(str, row))) or 'none'}: "
            f"expected prompt and completion, messages, or question and answer"
        )
    if completion_key not in row and not problem_only:
        raise DataError(f"{where}: no completion: a demonstration is a prompt and a completion")
    prompt = _prompt(row[prompt_key], f"{where}: {prompt_key}")
    if {"input_ids", "labels", "problem_id"} <= row.keys():
        return _sampled(row, prompt, where)
    answer = row.get(completion_key, "")
    if isinstance(answer, list) and len(answer) > 1:
        asked = as_messages(prompt)
        said = [*asked, *_messages(answer, f"{where}: {completion_key}")]
        return _conversation(problem_id(prompt), prompt, columns, said, len(asked), where)
    completion = _completion(answer, f"{where}: {completion_key}")
    return Demonstration(Problem(problem_id(prompt), prompt, columns, where), completion)


def _conversation(
    identity: str, prompt: Prompt, columns: Mapping[str, Any], said: Sequence[Message], begins: int, where: str
) -> Demonstration:
    """Return a demonstration of several turns, as the policy reads them."""
    if said[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {said[-1]['role']}'s: a demonstration ends with the assistant"
        )
    return Demonstration(Problem(identity, prompt, columns, where), said[-1]["content"], tuple(said), begins)


def _sampled(row: Mapping[str, Any], prompt: Prompt, where: str) -> Demonstration:
    """Return a row that a run kept: its text, and the ids that were sampled."""
    asked = as_messages(prompt)
    said = [*asked, *_messages(row["completion"], f"{where}: completion")]
    found = _conversation(str(row["problem_id"]), prompt, {}, said, len(asked), where)
    try:
        sampled = Row(found.problem.id, tuple(map(int, row["input_ids"])), tuple(map(int, row["labels"])), where)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: input_ids and labels are no row: {error}") from error
    return replace(found, sampled=sampled)


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return _text(value, where, empty=False)
    messages = _messages(value, where)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's: its words belong into the completion")
    return messages


def _completion(value: Any, where: str) -> str:
    if isinstance(value, str):
        return _text(value, where)
    messages = _messages(value, where)
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"{where}: expected one assistant message, found {roles}")
    return messages[0]["content"]


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a string or a list of messages, found {shown(value)}")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: message {i}: expected role and content, found {shown(message)}")
        if message["role"] not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {i}: role {message['role']!r} is not system, user or assistant")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: message {i}: content must be text, found {shown(message['content'])}")
        messages.append({"role": message["role"], "content": _text(message["content"], f"{where}: message {i}")})
    return messages


def _text(value: str, where: str, *, empty: bool = True) -> str:
    if not empty and not value.strip():
        raise DataError(f"{where}: empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair at character {error.start}: not valid text") from error
    return value
