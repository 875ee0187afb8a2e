"""Rows of other formats in the columns that `readers` reads. The recipe names the format: none is guessed.

A format's function changes names and puts texts together; what a row may hold is checked by `readers`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bcft.errors import DataError
from bcft.types import ROLES, show
from bcft.types.plain import is_empty, with_type
from bcft.types.text import MEANT

DatasetFormat = Literal["trl", "sharegpt", "alpaca", "math", "lines"]
SHAPE = ("prompt", "question", "completion", "messages")
"""Columns that say what is asked and answered in the format `trl`; null is as if absent."""


@dataclass(frozen=True)
class RowFormat:
    """The keys of a recipe that say what the columns of its rows mean."""

    dataset_format: DatasetFormat = "trl"
    prompt_column: str | None = None
    completion_column: str | None = None
    answer_column: str | None = None
    system_prompt: str | None = None


class _Format(NamedTuple):
    """A format: its columns, the one that must be there first, and what makes the columns of `trl` of a row."""

    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], str, RowFormat], dict[str, Any]]
    words: str
    """What its rows have, for messages."""
    beside: tuple[str, ...] = ("question",)
    """The columns of `SHAPE` that a row may have too, with the meaning that they have in `trl`."""


def in_trl_columns(row: Mapping[str, Any], where: str, form: RowFormat) -> Mapping[str, Any]:
    """Return a row under the column names of the format `trl`, its columns renamed as the recipe says.

    Raises DataError, which names the format that fits, for a row of another one.
    """
    named = _renamed(row, where, form)
    if form.dataset_format == "trl":
        return named
    chosen = FORMATS[form.dataset_format]
    fits = fitting(named)
    if named.get(chosen.columns[0]) is None or (fits and form.dataset_format not in fits):
        other = f": set dataset_format: {fits[0]} ({_words(fits[0])})" if fits else ""
        raise DataError(
            f"{where}: columns {names(named)}: dataset_format: {form.dataset_format} reads {chosen.words}{other}"
        )
    if taken := [key for key in SHAPE if key not in chosen.beside and not is_empty(named.get(key))]:
        raise DataError(
            f"{where}: columns {taken[0]} and {chosen.columns[0]} are two shapes of one row: remove one of them, or "
            f"set dataset_format: trl, which reads {taken[0]}"
        )
    return chosen.convert(named, where, form)


def fitting(row: Mapping[str, Any]) -> list[str]:
    """Return the formats that a row's columns fit, the likeliest first."""
    lines = row.get("conversation")
    fits = {
        "sharegpt": _is_list(row.get("conversations"), dict),
        "alpaca": isinstance(row.get("instruction"), str),
        "math": isinstance(row.get("problem"), str),
        "lines": _is_list(lines, str),
        "trl": any(row.get(key) is not None for key in ("prompt", "messages", "question")),
    }
    return [name for name, fit in fits.items() if fit]


def names(row: Mapping[str, Any]) -> str:
    """Return the columns of a row, for messages."""
    return ", ".join(sorted(map(str, row))) or "none"


def hint(row: Mapping[str, Any]) -> str:
    """Return the `dataset_format` to set for a row that is none of `trl`; '' if none fits."""
    return next((f"set dataset_format: {name} ({_words(name)})" for name in fitting(row) if name != "trl"), "")


def _words(name: str) -> str:
    return FORMATS[name].words if name in FORMATS else "prompt and completion, messages, or question and answer"


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], kind)


def _renamed(row: Mapping[str, Any], where: str, form: RowFormat) -> Mapping[str, Any]:
    """Return a row with the columns that the recipe maps under their own names; one column may serve as two."""
    mapped = {"prompt": form.prompt_column, "completion": form.completion_column, "answer": form.answer_column}
    if form.dataset_format == "lines":  # there the column names the problem, and stays what it is
        mapped["prompt"] = None
    given = {name: column for name, column in mapped.items() if column is not None and column != name}
    if not given:
        return row
    rest = {key: value for key, value in row.items() if key not in given.values() or mapped.get(key) == key}
    for name, column in given.items():
        if column not in row:
            if name == "completion":  # a prompt alone may be a row: `readers` knows
                continue
            raise DataError(f"{where}: {name}_column: there is no column {column!r}; the row has {names(row)}")
        if not is_empty(rest.get(name)):
            raise DataError(
                f"{where}: {name}_column: {column}: the row has a column {name} too: remove or rename that one"
            )
    return rest | {name: row[column] for name, column in given.items() if column in row}


# ShareGPT
def _sharegpt(row: Mapping[str, Any], where: str, _: RowFormat) -> dict[str, Any]:
    """Return `conversations`, a list of {from, value}, as `messages`; the column `system` comes first."""
    made = {key: value for key, value in row.items() if key not in ("conversations", "system")}
    talk = [_turn(turn, f"{where}: conversations: message {i}") for i, turn in enumerate(row["conversations"])]
    return made | {"messages": _system(row, where) + talk}


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        other = isinstance(turn, Mapping) and "role" in turn
        remedy = ": rename the column to messages, and set dataset_format: trl" if other else ""
        raise DataError(f"{where}: a message is {{from, value}}, not {with_type(turn)}{remedy}")
    said, further = turn["from"], {key: value for key, value in turn.items() if key not in ("from", "value")}
    if said == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _called(turn.get("value"), where), **further}
    role = said if said in ROLES else MEANT.get(said)
    if role is None:
        known = ", ".join(["human", "gpt", "function_call", *ROLES])
        raise DataError(f"{where}: from {show(said)} is not one of {known}")
    return {"role": role, "content": turn.get("value"), **further}


def _called(value: Any, where: str) -> list[Any]:
    """Return the calls of a message `function_call`: an object or a list of them, as JSON text."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{where}: the value of a function_call is JSON, not {show(value)}") from error
    return calls if isinstance(calls, list) else [calls]


def _system(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the column `system` as a message, if it says anything."""
    if is_empty(row.get("system")):
        return []
    return [{"role": "system", "content": _text(row, "system", where)}]


# Alpaca and MATH
def _alpaca(row: Mapping[str, Any], where: str, _: RowFormat) -> dict[str, Any]:
    """Return instruction and input, with a blank line between them, as `prompt`, and output as `completion`."""
    if not is_empty(row.get("history")):
        raise DataError(f"{where}: column 'history': write the earlier turns into messages: dataset_format: trl")
    taken = ("instruction", "input", "output", "system", "history")
    made = {key: value for key, value in row.items() if key not in taken}
    further = [] if is_empty(row.get("input")) else [_text(row, "input", where)]
    asked = "\n\n".join([_text(row, "instruction", where), *further])
    system = _system(row, where)
    made["prompt"] = [*system, {"role": "user", "content": asked}] if system else asked
    return made | ({"completion": row["output"]} if row.get("output") is not None else {})


def _math(row: Mapping[str, Any], where: str, _: RowFormat) -> dict[str, Any]:
    """Return problem as `prompt` and solution as `completion`; the solution stays the reference as well."""
    made = {key: value for key, value in row.items() if key != "problem"}
    made["prompt"] = _text(row, "problem", where)
    return made | ({"completion": row["solution"]} if row.get("solution") is not None else {})


# Lines
def _lines(row: Mapping[str, Any], where: str, form: RowFormat) -> dict[str, Any]:
    """Return `conversation`, a list of lines that hold a question and its reply, as `messages`.

    A line's question ends with its first question mark. The policy asks, so the recipe's `system_prompt` is what it
    reads first. The reply to the last question is left out: nothing follows it that could be trained.
    """
    if form.system_prompt is None or form.prompt_column is None:
        raise DataError(f"{where}: dataset_format: lines needs system_prompt and prompt_column")
    if not isinstance(row.get(form.prompt_column), str):
        raise DataError(f"{where}: prompt_column: there is no text in the column {form.prompt_column!r}: {names(row)}")
    if form.prompt_column != "prompt" and not is_empty(row.get("prompt")):
        raise DataError(
            f"{where}: column 'prompt': prompt_column is {form.prompt_column}, and nothing else reads it: rename or "
            f"remove it"
        )
    made = {key: value for key, value in row.items() if key not in ("conversation", "prompt")}
    talk = [{"role": "user", "content": form.system_prompt}]
    for number, line in enumerate(row["conversation"]):
        question, mark, reply = line.partition("?") if isinstance(line, str) else ("", "", "")
        last = number == len(row["conversation"]) - 1
        if not mark or not (last or reply.strip()):
            raise DataError(
                f"{where}: conversation: line {number}: a line is a question that ends in a question mark, and its "
                f"reply, not {show(line)}"
            )
        talk += [{"role": "assistant", "content": question + mark}, {"role": "user", "content": reply.strip()}]
    return made | {"messages": talk[:-1]}


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{where}: {column}: expected text, not {with_type(value)}")
    return value


FORMATS = {
    "sharegpt": _Format(
        ("conversations",), _sharegpt, "conversations, a list of {from, value}", ("prompt", "completion", "question")
    ),
    "alpaca": _Format(("instruction", "input", "output"), _alpaca, "instruction, input and output"),
    "math": _Format(("problem", "solution"), _math, "problem and solution"),
    "lines": _Format(
        ("conversation",),
        _lines,
        "conversation, a list of questions with their replies",
        ("prompt", "question"),
    ),
}
"""`dataset_format` -> how its rows are read."""
