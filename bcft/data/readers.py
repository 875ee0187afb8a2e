"""Rows of users' files, each with its place, and the demonstrations that they become.

Files are json, jsonl, csv or parquet. A malformed file or row raises DataError with file and line. Nothing is guessed
and nothing is skipped.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bcft.errors import DataError
from bcft.rewards.base import REFERENCE_COLUMNS
from bcft.types import Demonstration, Message, Problem, Prompt, TrainingExample, problem_id, show

Row = tuple[dict[str, Any], str]
"""A row's columns and its place, such as `file:line`."""
SAMPLED_COLUMNS = {"prompt", "completion", "input_ids", "labels", "problem_id"}
"""Columns that make a row one of `kept.jsonl`."""


# Files to rows
def read_json_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a JSON file: an array of them, or one on each line. Raises DataError with file and line."""
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
                raise DataError(f"{where}: key {key!r} is given twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise DataError(f"{where}: {constant} is not a JSON number")

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
        raise DataError(f"{where}: expected an object with columns, not {type(row).__name__}")
    return row


def _read_csv(path: Path) -> Iterator[Row]:
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


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # noqa: PLC0415 - slow to import, and other formats do not need it
    import pyarrow.parquet  # noqa: PLC0415 - as above

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error
    yield from ((row, f"{path}: row {i}") for i, row in enumerate(rows))


READERS = {".jsonl": read_json_rows, ".json": read_json_rows, ".csv": _read_csv, ".parquet": _read_parquet}
"""File suffix -> the function that yields the rows of such a file."""


# Rows to demonstrations
def demonstration(row: Mapping[str, Any], where: str, *, problem_only: bool = False) -> Demonstration:
    """Return the demonstration of a row.

    A row has `prompt` and `completion`, `messages`, or `question` and `answer`; all other columns are the problem's.
    A row of `kept.jsonl` has token ids as well, which become `Demonstration.sampled`.
    where: the row's place; problem_only: accept a row without a completion.
    Raises DataError that names the place for a row of another shape.
    """
    columns = {k: v for k, v in row.items() if k not in ("prompt", "question", "completion", "messages")}
    for key in REFERENCE_COLUMNS:
        if key in columns and columns[key] is None:
            raise DataError(f"{where}: {key}: null: give every row its reference answer, or remove the column")
    if "messages" in row:
        return _conversation(row, columns, where)
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
    if row.keys() >= SAMPLED_COLUMNS:
        return _sampled(row, prompt, where)
    completion = _completion(row[completion_key], f"{where}: {completion_key}") if completion_key in row else ()
    return Demonstration(Problem(problem_id(prompt), prompt, columns, where), prompt, completion)


def _conversation(row: Mapping[str, Any], columns: Mapping[str, Any], where: str) -> Demonstration:
    """Return the demonstration of `messages`: the policy's prompt is everything before the first action.

    The row's own `prompt`, if there is one, identifies the problem.
    """
    conversation = _messages(row["messages"], f"{where}: messages")
    first = next((i for i, message in enumerate(conversation) if message["role"] == "assistant"), len(conversation))
    if first == 0:
        raise DataError(f"{where}: messages: the first is the assistant's: a conversation begins with a prompt")
    _ends_with_assistant(conversation, f"{where}: messages")
    prompt = _prompt(row["prompt"], f"{where}: prompt") if "prompt" in row else conversation[:first]
    problem = Problem(problem_id(prompt), prompt, columns, where)
    return Demonstration(problem, conversation[:first], tuple(conversation[first:]))


def _sampled(row: Mapping[str, Any], prompt: Prompt, where: str) -> Demonstration:
    """Return the demonstration of a row of `kept.jsonl`: its text, and the ids that were sampled."""
    completion = _messages(row["completion"], f"{where}: completion")
    _ends_with_assistant(completion, f"{where}: completion")
    try:
        example = TrainingExample.from_json(row, where=where)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error).removeprefix(f"{where}: ")
        raise DataError(f"{where}: not a row of kept.jsonl: {reason}") from error
    return Demonstration(Problem(example.problem_id, prompt, {}, where), prompt, tuple(completion), example)


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return _text(value, where, empty=False)
    messages = _messages(value, where)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's: move it to the completion")
    return messages


def _completion(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": _text(value, where)},)
    messages = _messages(value, where)
    _ends_with_assistant(messages, where)
    return tuple(messages)


def _ends_with_assistant(messages: list[Message], where: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {messages[-1]['role']}'s: a demonstration ends with the assistant's"
        )


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a string or a list of messages, not {show(value)}")
    messages: list[Message] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"{where}: message {i}: expected role and content, not {show(message)}")
        if message["role"] not in ("system", "user", "assistant"):
            raise DataError(f"{where}: message {i}: role {message['role']!r} is not system, user or assistant")
        if not isinstance(message["content"], str):
            raise DataError(f"{where}: message {i}: content must be text, not {show(message['content'])}")
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
