r"""Grade the last stated answer of a reply: 1.0 right, 0.0 wrong, None if it cannot be graded.

`stated.py` says where a text states its answer. Numbers and words are compared in this process (`plain.py`), formulas
in the sandbox (`formulas.py`); both exactly, nothing is rounded.
"""

import math
from collections.abc import Sequence
from functools import partial
from numbers import Number
from typing import Any

from bcft.errors import DataError
from bcft.rewards.base import Answers
from bcft.rewards.formulas import default_sandbox, formula, is_literal_only, literal
from bcft.rewards.plain import Quantity, choices, decimal_comma, plain, same, strip
from bcft.rewards.stated import is_prose, last_side, named_value, relations, stated, unmarked, visible
from bcft.types import Message, Prompt


def math_reward(
    prompts: Sequence[Prompt],  # noqa: ARG001
    completions: Sequence[str | Sequence[Message]],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    ground_truth: Sequence[Any] | None = None,
    *,
    percent_as_number: bool = False,
    **columns: Any,  # noqa: ARG001
) -> list[float | None]:
    r"""Compare each completion's last stated answer with the reference: 1.0 right, 0.0 wrong, None ungraded.

    The signature is that of a reward in TRL; prompts and other columns are ignored. The reference is the first value
    given, not None, of `answer`, `solution` and `ground_truth`: a number, an expression, or a worked solution that ends
    with `#### N` or `\boxed{}`. Of a completion of messages the last one of the assistant is graded. A completion is
    ungraded when its reference is not readable, and when the sandbox had to give up on its answer.

    percent_as_number: percent signs are dropped on both sides: 60% equals 60, and no longer 3/5. A recipe sets this in
    its `reward_args`.

    Raises DataError when there is no reference column, or one of another length.
    """
    columns_given = [column for column in (answer, solution, ground_truth) if column is not None]
    if not columns_given:
        raise DataError("math_reward needs the reference answers in a column answer, solution or ground_truth")
    for column in columns_given:
        if len(column) != len(completions):
            raise DataError(f"math_reward got {len(column)} reference answers for {len(completions)} completions")
    rows = zip(*columns_given, strict=True)
    references = [next((value for value in row if value is not None), None) for row in rows]
    compare = partial(_compare, percent_as_number=percent_as_number)
    cases = [compare(reference, completion) for reference, completion in zip(references, completions, strict=True)]
    pairs = list(dict.fromkeys(case for case in cases if isinstance(case, tuple)))
    verdicts = dict(zip(pairs, default_sandbox().verify(pairs), strict=True)) if pairs else {}
    rewards = {"right": 1.0, "wrong": 0.0}
    return [rewards.get(verdicts[case]) if isinstance(case, tuple) else case for case in cases]


def extract_answer(text: str) -> str:
    r"""Return the last answer that a reply states, or '' when it states none.

    Only what stands behind the last `</think>` counts, up to the first stop token. In it the last of `\boxed{...}`,
    `<answer>...</answer>`, `#### N` and "answer is N" (also "answer: N") wins, whichever it is. Without any, it is the
    text itself if it is a formula, else its last formula in math mode or its last number, with the expression that it
    is part of. A thought, a box or a tag that is never closed means that the reply was truncated within it: ''.

    >>> extract_answer("First \\boxed{5}, no: the answer is $1,234. I tried 2 ways.")
    '1,234'
    >>> extract_answer("3 + 4 = 7, twice that is 14.")
    '14'
    """
    text = visible(text)
    answer = stated(text, words=False)
    return unmarked(text) if answer is None else answer


def answer_key(answer: str) -> str:
    """Return a text that equal plain answers share, to count votes: '7', '7.0' and '$7' are one answer."""
    value = plain(answer)
    return literal(answer) if value is None else str(value.value) if isinstance(value, Quantity) else value


math_reward.answers = Answers(extract_answer, answer_key)  # type: ignore[attr-defined] # of a function


def _compare(
    reference: Any, completion: str | Sequence[Message], *, percent_as_number: bool
) -> float | tuple[str, str] | None:
    """Return the reward, or the (reference, answer) pair of formulas that only the sandbox can compare."""
    gold, text = _reference(reference), visible(_reply(completion))
    if not gold:
        return None
    expected = plain(gold, percent_as_number=percent_as_number)
    answer = stated(text, words=isinstance(expected, str), percents="%" in gold)
    if answer is None:
        answer = unmarked(text) or (strip(text) if isinstance(expected, str) and plain(text) is not None else "")
    if not answer:
        return 0.0
    if ")" in gold + answer:
        gold, answer = choices(gold, answer)
        expected = plain(gold, percent_as_number=percent_as_number)
    if (both := relations(gold, answer)) is None:
        return 0.0
    gold, answer = both
    actual = plain(answer, percent_as_number=percent_as_number)
    if actual is None and isinstance(expected, Quantity):
        actual = plain(last_side(answer), percent_as_number=percent_as_number)
    if expected is None and isinstance(actual, Quantity):
        expected = plain(named_value(gold), percent_as_number=percent_as_number) or decimal_comma(gold, actual)
    if actual is None and isinstance(expected, Quantity):
        actual = decimal_comma(answer, expected)
    if expected is not None and actual is not None:
        return float(same(expected, actual))
    if literal(gold) == literal(answer):
        return 1.0
    if is_literal_only(gold) or is_literal_only(answer):
        return float(literal(last_side(gold)).casefold() == literal(last_side(answer)).casefold())
    return formula(gold, percent_as_number=percent_as_number), formula(answer, percent_as_number=percent_as_number)


def _reference(value: Any) -> str:
    """Return the answer in a reference: the one that it marks, else all of it; '' when there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if not isinstance(value, str | Number):
        raise DataError(f"math_reward reads references that are text or numbers, not {type(value).__name__}")
    text = visible(str(value))
    answer = stated(text, words=True)
    if answer is not None:
        return answer
    return unmarked(text) if is_prose(text) else strip(text)


def _reply(completion: str | Sequence[Message]) -> str:
    """Return the text of a completion, or of the last assistant message in it."""
    if isinstance(completion, str):
        return completion
    replies = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    content: Any = replies[-1] if replies else ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or ())  # TRL's parts of text and images
