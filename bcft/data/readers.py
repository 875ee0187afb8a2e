"""Rows, each with its place, to the demonstrations and problems that they state.

Nothing in a row is dropped in silence: a column or a key that would change what is trained is honored or refused, with
file and line. All other columns are the problem's, for its reward and its environment.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bcft.data.formats import SHAPE, RowFormat, hint, in_trl_columns, names
from bcft.errors import DataError
from bcft.rewards.base import REFERENCE_COLUMNS
from bcft.rewards.signature import TRL_ARGUMENTS
from bcft.types import Demonstration, Message, Problem, Prompt, TrainingExample, messages, problem_id, show
from bcft.types.calls import texts, tools
from bcft.types.plain import is_empty, says_no, says_yes, valid_text

SAMPLED_COLUMNS = {"prompt", "completion", "input_ids", "labels", "problem_id"}
"""Columns that make a row one of `kept.jsonl`."""
TEMPLATE_COLUMN = "chat_template_kwargs"
TOOLS_COLUMN = "tools"
WEIGHT_COLUMN = "weight"
"""Column of a demonstration: what its loss is multiplied by."""
ARGUMENTS = (TEMPLATE_COLUMN, TOOLS_COLUMN)
"""Columns that the chat template reads."""
_TRL = RowFormat()
_TEXT_ALONE = "only text is trained: remove the column, or leave such rows out"
_SYSTEM = "write it into the prompt, as a first message of the role system"
_REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ALONE),
    **dict.fromkeys(("system", "system_prompt"), _SYSTEM),
    "functions": "rename it to tools, a list of JSON schemas",
    **dict.fromkeys(TRL_ARGUMENTS, "reward functions have an argument of that name: rename the column"),
}
"""Column -> what to do about it: it would change what the policy reads or how a reward is called."""
_WHICH_TOKENS = "which tokens carry loss follows from the messages: remove the column"
_INTO_MESSAGE = "write it into the assistant's message, in messages or completion, or remove the column"
_UNTRAINED = {
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"), _INTO_MESSAGE),
    "label": "an example not to follow, as in KTO: leave such rows out; rename the column if it says something else",
    "train": "leave such rows out, or give them the weight 0",
    **dict.fromkeys(("input_ids", "labels", "loss_mask", "completion_mask", "assistant_masks"), _WHICH_TOKENS),
}
"""Column of a demonstration -> what to do about it: it would change whether and how the row is trained."""
_STEPS = "the steps of a process reward model: join those that are right into completion, or leave such rows out"
_CHECKED = frozenset({*_REFUSED, *_UNTRAINED})
_NOT_TRAINED = {
    "chosen": "a preference pair: make prompt and completion of it",
    "text": "split text into prompt and completion",
}
"""Column of another type of TRL's -> how to make a demonstration of it."""


def demonstration(
    row: Mapping[str, Any], where: str, *, form: RowFormat = _TRL, problem_only: bool = False
) -> Demonstration:
    """Return the demonstration of a row.

    A row has `prompt` or `question` with `completion`, `messages`, or `question` and `answer`, which is the completion
    if there is no other, or the columns of another format; `weight` is the demonstration's, all other columns are the
    problem's.
    A row of `kept.jsonl` has token ids as well, which become `Demonstration.sampled`; it is read as it is.
    where: the row's place; form: what its columns mean; problem_only: accept a row without a completion, and columns
    that say how to train it.
    Raises DataError that names the place for a row of another shape, and for what cannot be trained.
    """
    given = _stated(row)
    if given.keys() >= SAMPLED_COLUMNS:
        return _sampled(given, where, form)
    column, talks = form.completion_column, row.get("messages") is not None
    if column is not None and column not in row and not talks and not problem_only:
        raise DataError(f"{where}: completion_column: there is no column {column!r}; the row has {names(row)}")
    if (named := in_trl_columns(row, where, form)) is not row:
        given = _stated(named)
    made = _read(given, where, problem_only=problem_only)
    if form.dataset_format == "lines":  # the policy must not read what names the problem
        name = problem_id(str(row[str(form.prompt_column)]))
        return replace(made, problem=replace(made.problem, id=name))
    return made if form.system_prompt is None else _with_system(made, form.system_prompt, where)


def _stated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without the columns of `SHAPE` that are null."""
    return {key: value for key, value in row.items() if key not in SHAPE or value is not None}


def _read(given: dict[str, Any], where: str, *, problem_only: bool) -> Demonstration:
    """Return the demonstration of a row in the columns of `trl`."""
    _refuse_columns(given, where, demonstrates=not problem_only)
    keys = [key for key in ("messages", "prompt", "question") if key in given]
    if not keys or (keys == ["question"] and {"answer", "completion"}.isdisjoint(given) and not problem_only):
        raise DataError(_other_shape(given, where, problem_only=problem_only))
    weight = 1.0 if problem_only else _weight(given.pop(WEIGHT_COLUMN, None), where)
    columns = {key: value for key, value in given.items() if key not in SHAPE}
    if "question" in given and keys != ["question"]:
        columns["question"] = given["question"]
    _check_columns(columns, where)
    if "messages" in given:
        return replace(_conversation(given, columns, where, problem_only=problem_only), weight=weight)
    completion_key = "completion" if keys[0] == "prompt" or "completion" in given else "answer"
    if completion_key not in given and not problem_only:
        remedy = next((f": {words}" for key, words in _NOT_TRAINED.items() if key in given), "")
        raise DataError(
            f"{where}: no completion: a demonstration is a prompt and a completion (only filtered, collect and "
            f"evaluate take prompts alone){remedy}"
        )
    prompt = _prompt(given[keys[0]], f"{where}: {keys[0]}")
    answered = completion_key in given
    completion = _completion(given[completion_key], f"{where}: {completion_key}") if answered else ()
    return Demonstration(Problem(problem_id(prompt), prompt, columns, where), prompt, completion, weight=weight)


def _with_system(made: Demonstration, text: str, where: str) -> Demonstration:
    """Return a demonstration whose prompt begins with a system message; the id is still that of the row's own prompt.

    So the splits are the same under every system prompt. Raises DataError for a row with a system message of its own.
    """
    given = messages(made.prompt)
    if any(message["role"] == "system" for message in given):
        raise DataError(f"{where}: the row has a system message: remove it, or system_prompt from the recipe")
    prompt: list[Message] = [{"role": "system", "content": text}, *given]
    read = made.prompt == made.problem.prompt
    return replace(made, prompt=prompt, problem=replace(made.problem, prompt=prompt) if read else made.problem)


# Columns
def _refuse_columns(row: Mapping[str, Any], where: str, *, demonstrates: bool) -> None:
    """Raise DataError for a column that would be dropped although it changes what is trained."""
    if _CHECKED.isdisjoint(row):
        return
    for key in sorted(row.keys() & _REFUSED.keys()):
        if not is_empty(row[key]):
            remedy = _STEPS if key == "completions" and "labels" in row else _REFUSED[key]
            raise DataError(f"{where}: column {key!r}: {remedy}")
    if not demonstrates:
        return
    harmless = {"label": lambda value: not says_no(value), "train": says_yes}
    for key in sorted(row.keys() & _UNTRAINED.keys()):
        if not is_empty(row[key]) and not (key in harmless and harmless[key](row[key])):
            raise DataError(f"{where}: column {key!r} ({show(row[key])}): {_UNTRAINED[key]}")


def _weight(value: Any, where: str) -> float:
    """Return the weight that a row gives. Raises DataError unless it is a finite number of at least 0."""
    if is_empty(value) or says_yes(value):
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = 0.0 if says_no(value) else math.nan
    if not 0 <= weight < math.inf:
        raise DataError(
            f"{where}: weight {show(value)}: it multiplies the row's loss, so it is a finite number >= 0: give one, or "
            f"rename the column"
        )
    return weight


def _check_columns(columns: dict[str, Any], where: str) -> None:
    """Raise DataError for a null reference, text that no file can hold, and tools or arguments of another form."""
    for key, value in columns.items():
        if any(isinstance(text, str) and not _is_text(text) for text in texts(value)):
            raise DataError(f"{where}: {key}: {show(value)} has half of a surrogate pair: not valid text")
    for key in REFERENCE_COLUMNS:
        if key in columns and columns[key] is None:
            raise DataError(f"{where}: {key}: null: give every row its reference answer, or remove the column")
    if not is_empty(columns.get(TOOLS_COLUMN)):
        try:
            columns[TOOLS_COLUMN] = tools(columns[TOOLS_COLUMN])
        except ValueError as error:
            raise DataError(f"{where}: {TOOLS_COLUMN}: {error}") from error
    if TEMPLATE_COLUMN not in columns:
        return
    given = columns[TEMPLATE_COLUMN]
    if is_empty(given) and not isinstance(given, Mapping):
        return
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        remedy = ": write it as an object, which csv and tsv cannot hold" if isinstance(given, str) else ""
        raise DataError(f"{where}: {TEMPLATE_COLUMN}: expected an object with names as keys, not {show(given)}{remedy}")
    if TOOLS_COLUMN in given:
        raise DataError(f"{where}: {TEMPLATE_COLUMN}: give tools as a column of its own, {TOOLS_COLUMN}")
    # `datasets` and parquet give every row the keys of all rows: null is as if absent.
    columns[TEMPLATE_COLUMN] = {key: value for key, value in given.items() if value is not None}


def _other_shape(row: Mapping[str, Any], where: str, *, problem_only: bool) -> str:
    """Return why a row is not understood: the columns it has, those expected, and what to rename."""
    expected = (
        "prompt, messages or question" if problem_only else "prompt and completion, messages, or question and answer"
    )
    remedy = hint(row) or next((words for key, words in _NOT_TRAINED.items() if key in row), "")
    return f"{where}: columns {names(row)}: expected {expected}{f' ({remedy})' if remedy else ''}"


# Messages
def _conversation(
    row: Mapping[str, Any], columns: Mapping[str, Any], where: str, *, problem_only: bool
) -> Demonstration:
    """Return the demonstration of `messages`: the policy's prompt is everything before the first action.

    The row's own `prompt`, if there is one, identifies the problem. A conversation that no assistant ends is a prompt.
    """
    conversation = _messages(row["messages"], f"{where}: messages")
    first = next((i for i, message in enumerate(conversation) if message["role"] == "assistant"), len(conversation))
    if first == 0:
        raise DataError(f"{where}: messages: the first is the assistant's: a conversation begins with a prompt")
    if problem_only and conversation[-1]["role"] != "assistant":
        first = len(conversation)
    else:
        _ends_with_assistant(conversation, f"{where}: messages")
    stated = _completion(row["completion"], f"{where}: completion") if "completion" in row else ()
    if stated and tuple(conversation[-len(stated) :]) != stated:
        raise DataError(f"{where}: messages and completion say different things: remove one of them")
    prompt = _prompt(row["prompt"], f"{where}: prompt") if "prompt" in row else conversation[:first]
    problem = Problem(problem_id(prompt), prompt, columns, where)
    return Demonstration(problem, conversation[:first], tuple(conversation[first:]))


def _sampled(row: Mapping[str, Any], where: str, form: RowFormat) -> Demonstration:
    """Return the demonstration of a row of `kept.jsonl`: its text, and the ids that were sampled."""
    _refuse_columns(row, where, demonstrates=False)
    prompt = _prompt(row["prompt"], f"{where}: prompt")
    completion = _messages(row["completion"], f"{where}: completion")
    _ends_with_assistant(completion, f"{where}: completion")
    try:
        example = TrainingExample.from_json(row, where=where)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error).removeprefix(f"{where}: ")
        raise DataError(f"{where}: not a row of kept.jsonl: {reason}") from error
    if form.system_prompt is not None and messages(prompt)[0]["content"] != form.system_prompt:
        raise DataError(f"{where}: sampled without this system_prompt: remove the key")
    arguments = dict(example.template_kwargs)
    columns = {TOOLS_COLUMN: arguments.pop(TOOLS_COLUMN)} if TOOLS_COLUMN in arguments else {}
    if arguments:
        columns[TEMPLATE_COLUMN] = arguments
    problem = Problem(example.problem_id, prompt, columns, where)
    return Demonstration(problem, prompt, tuple(completion), example, weight=example.weight)


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: empty")
        return _text(value, where)
    conversation = _messages(value, where)
    if conversation[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's: move it to the completion")
    return conversation


def _completion(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": _text(value, where)},)
    conversation = _messages(value, where)
    _ends_with_assistant(conversation, where)
    return tuple(conversation)


def _ends_with_assistant(conversation: list[Message], where: str) -> None:
    if conversation[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: the last message is the {conversation[-1]['role']}'s: a demonstration ends with the assistant's"
        )


def _messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        raise DataError(f"{where}: expected a list of messages, not {show(value)}")
    try:
        return messages(value)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _is_text(text: str) -> bool:
    """Return whether a file can hold a text."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _text(value: str, where: str) -> str:
    try:
        return valid_text(value)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
