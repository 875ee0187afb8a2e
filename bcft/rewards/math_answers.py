"""Grade the last stated answer of a reply: 1.0 right, 0.0 wrong, None if it cannot be graded.

Numbers and words are compared here, exactly; everything else goes to `bcft.rewards.sandbox`. Regular expressions see
only the last `MAX_TEXT_CHARS` characters of a text. Left out, because each has turned failures into successes
elsewhere: credit for format or for showing work, numbers from the middle of a reply, rounding.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from numbers import Number
from typing import Any, NamedTuple

from bcft.errors import DataError
from bcft.rewards.base import Answers
from bcft.rewards.sandbox import MAX_TEXT_CHARS, default_sandbox
from bcft.types import Message, Prompt


def math_reward(
    prompts: Sequence[Prompt],  # noqa: ARG001
    completions: Sequence[str | Sequence[Message]],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    ground_truth: Sequence[Any] | None = None,
    **columns: Any,  # noqa: ARG001
) -> list[float | None]:
    r"""Compare each completion's last stated answer with the reference: 1.0 right, 0.0 wrong, None ungraded.

    The signature is that of a reward in TRL; prompts and other columns are ignored. The reference is the first value
    given, not None, of `answer`, `solution` and `ground_truth`: a number, an expression, or a worked solution that ends
    with `#### N` or `\boxed{}`. Of a completion of messages the last one of the assistant is graded. A completion is
    ungraded when its reference is not readable, and when the sandbox had to give up on its answer.

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
    cases = [_compare(reference, completion) for reference, completion in zip(references, completions, strict=True)]
    pairs = list(dict.fromkeys(case for case in cases if isinstance(case, tuple)))
    verdicts = dict(zip(pairs, default_sandbox().verify(pairs), strict=True)) if pairs else {}
    rewards = {"right": 1.0, "wrong": 0.0}
    return [rewards.get(verdicts[case]) if isinstance(case, tuple) else case for case in cases]


def extract_answer(text: str) -> str:
    r"""Return the last answer that a reply states, or '' when it states none.

    The last of `\boxed{...}`, `#### N` and "answer is N" (also "answer: N") wins, whichever it is. Without any, it is
    the last number, with the expression that it is part of. A box that is never closed means that the reply was
    truncated within its answer: ''.

    >>> extract_answer("First \\boxed{5}, no: the answer is $1,234. I tried 2 ways.")
    '1,234'
    >>> extract_answer("3 + 4 = 7, twice that is 14.")
    '14'
    """
    text = text[-MAX_TEXT_CHARS:]
    stated = _stated(text, words=False)
    return _last_number(text) if stated is None else stated


def answer_key(answer: str) -> str:
    """Return a text that equal plain answers share, to count votes: '7', '7.0' and '$7' are one answer."""
    plain = _plain(answer)
    return answer.strip() if plain is None else str(plain.value) if isinstance(plain, _Quantity) else plain


math_reward.answers = Answers(extract_answer, answer_key)  # type: ignore[attr-defined] # of a function


def _compare(reference: Any, completion: str | Sequence[Message]) -> float | tuple[str, str] | None:
    """Return the reward, or the (reference, answer) pair of formulas that only the sandbox can compare."""
    gold, reply = _reference(reference), _reply(completion)[-MAX_TEXT_CHARS:]
    if not gold:
        return None
    expected = _plain(gold)
    if isinstance(expected, _Quantity):
        stated: str | None = extract_answer(reply)
    else:
        stated = _stated(reply, words=isinstance(expected, str))
    text = reply if stated is None else stated
    actual = _plain(text)
    if expected is not None and (actual is not None or not text.strip()):
        return float(_same(expected, actual))
    # Where nothing is marked as the answer, math-verify looks for the last formula itself.
    return _formula(gold) if _is_formula(gold) else gold, reply if stated is None else _formula(stated)


def _reference(value: Any) -> str:
    """Return the answer in a reference: the one that it marks, else all of it; '' when there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if not isinstance(value, str | Number):
        raise DataError(f"math_reward reads references that are text or numbers, not {type(value).__name__}")
    text = str(value)[-MAX_TEXT_CHARS:]
    stated = _stated(text, words=True)
    return _strip(text) if stated is None else stated


def _reply(completion: str | Sequence[Message]) -> str:
    """Return the text of a completion, or of the last assistant message in it."""
    if isinstance(completion, str):
        return completion
    replies = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    content: Any = replies[-1] if replies else ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or ())  # TRL's parts of text and images


# Plain answers: quantities and words, compared exactly.
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""
    [$€£¥]? \s* (?P<sign>[-+−–]?) \s* [$€£¥]? \s*
    (?: (?: (?P<whole>[0-9]+) \s+ )? (?P<top>{_UNSIGNED}) \s* / \s* (?P<bottom>{_UNSIGNED})
      | (?P<decimal>{_UNSIGNED}) (?: e (?P<exponent>[-+]?[0-9]{{1,3}}) )? )
    (?: \s* (?P<percent>%|percent\b|per\ cent\b) )?
    (?: \s+ (?P<unit>[a-z]{{3,}} (?: [ /-]+ [a-z]+ )* ) )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LONGEST_PLAIN = 200
"""Most characters of a plain answer: exact arithmetic on so few is immediate."""
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = {"and", "or", "to", "half", "halves", "third", "thirds", "quarter", "quarters", "squared", "cubed"}
_NOT_UNITS |= {"times", "plus", "minus", "divided", "factorial"}
"""Words that change the number before them, or join it to the next."""
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([^{}\s]+)\s*\}|([0-9]))\s*(?:\{\s*([^{}\s]+)\s*\}|([0-9]))")
_SPELLINGS = (("{,}", ","), (r"\!", ""), (r"\,", ""), (r"\$", "$"), (r"\%", "%"), (r"\ ", " "), ("~", " "))


class _Quantity(NamedTuple):
    value: Fraction
    unit: str
    """Its first word in lower case, without the s of a plural; '' if none is stated."""


def _plain(text: str) -> _Quantity | str | None:
    """Read a number, with or without a unit, or words of three or more letters, or "no"; None for everything else.

    60% is 3/5: it equals 0.6 and not 60. Currency signs are dropped. Words are returned in lower case; shorter ones
    may be products of variables.
    """
    if len(text) > _LONGEST_PLAIN:
        return None
    for written, meant in _SPELLINGS:
        text = text.replace(written, meant)
    text = _strip(_FRACTION.sub(r" \1\2/\3\4 ", _TEXT.sub(r" \1 ", text)))
    if "\n" in text:
        return None
    if match := _NUMBER.fullmatch(text):
        return _quantity(match)
    words = " ".join(text.casefold().split())
    letters = sum(character.isalpha() for character in words)
    is_words = all(character.isalpha() or character in " -'" for character in words)
    return words if (is_words and letters >= 3) or words == "no" else None


def _quantity(match: re.Match[str]) -> _Quantity | None:
    part = {name: re.sub("[, ]", "", text or "") for name, text in match.groupdict().items()}
    scale, *unit = re.split("[ /-]+", (match["unit"] or "").lower())
    if scale not in _SCALES:
        scale, unit = "", [scale, *unit]
    if not _NOT_UNITS.isdisjoint(unit) or not _SCALES.keys().isdisjoint(unit):
        return None
    if not part["bottom"]:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part["exponent"] or 0)
    elif bottom := Fraction(part["bottom"]):
        value = int(part["whole"] or 0) + Fraction(part["top"]) / bottom
    else:
        return None
    value *= _SCALES.get(scale, 1) * (Fraction(1, 100) if part["percent"] else 1)
    return _Quantity(-value if part["sign"] in ("-", "−", "–") else value, unit[0].rstrip("s") if unit else "")


def _same(expected: _Quantity | str, actual: _Quantity | str | None) -> bool:
    if isinstance(expected, _Quantity) and isinstance(actual, _Quantity):
        same_unit = expected.unit == actual.unit or "" in (expected.unit, actual.unit)
        return expected.value == actual.value and same_unit
    return expected == actual


# The place of the answer in a text.
_MARK = re.compile(
    r"""
    (?P<box> \\ (?: boxed | fbox ) \s* \{ )
    | (?P<hashes> (?<!\#) \#{4} (?!\#) )
    | \b answers? \b [^.:=\n]{0,40}? (?: \b (?: is | are | be ) \b | [:=] )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_PHRASE = re.compile(
    r"""
    (?: [\s*_:=`"$~] | \\[\[($] )*
    (?: (?: about | approximately | equal\s+to | exactly | now | simply | therefore | thus ) \b [\s*_:=`"$]* )?
    (?P<answer> .*? )
    (?: (?<![-+−\\])\$ | \\[\])] | \*\*(?![\w(]) | [`"\n] | [.!?](?=\s|$) | ;
      | , \s+ (?!and\b|or\b)(?=[a-z]{2}) | \s+ \( (?=[a-z]{2})
      | \s+ (?: after | as | because | if | since | so | when | where | which ) \b | $ )
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""The text after "answer is", up to the end of its clause."""
_LONGEST_PHRASE = 200
_FORMULA = re.compile(r"[-+−–.]?\s*[0-9$\\(\[{|√π∞]|[A-Za-z](?![A-Za-z])(?!\s+[A-Za-z])")
_PROSE = re.compile(r"(?<![A-Za-z\\])(?!(?:sin|cos|tan|log|exp|sqrt|max|min|mod|and)\b)[A-Za-z]{3,}")
_TOKEN = re.compile(
    rf"""
    (?<![\w.,\\{{^/*+−–-]) (?<![0-9]:)
    [-+−–]? [$€£¥]? [-+−–]?
    (?: (?: [0-9]+ \s* )? \\[cdt]?frac \s* \{{ [^{{}}\n]{{1,50}} \}} \s* \{{ [^{{}}\n]{{1,50}} \}}
      | (?: [0-9]+ [ ] )? {_UNSIGNED} / {_UNSIGNED}
      | {_UNSIGNED} )
    (?: \s* \\?% | \s+ (?: per[ ]?cent | {"|".join(_SCALES)} ) \b )?
    (?! [\w^\\{{}}*] | / [^A-Za-z] | [.,] [0-9] )
    """,
    re.VERBOSE,
)


def _stated(text: str, *, words: bool) -> str | None:
    """Return the last answer that is marked as one; '' when it is truncated, None when there is no mark.

    Plain words after "answer is" or `####` count only with `words`: "the answer is correct" and "#### Step" do not.
    """
    for mark in reversed(list(_MARK.finditer(text))):
        if mark["box"]:
            end = _closing_brace(text, mark.end())
            if end is None:
                return ""
            answer = _strip(text[mark.end() : end])
        elif mark["hashes"]:
            line = text[mark.end() : mark.end() + _LONGEST_PHRASE].lstrip(" \t").partition("\n")[0]
            answer = _readable(line, words)
        else:
            phrase = _PHRASE.match(text, mark.end(), mark.end() + _LONGEST_PHRASE)
            stated = _strip(phrase["answer"]) if phrase else ""
            # A phrase that begins with a number was meant as one: a number from elsewhere must not replace it.
            answer = _readable(stated, words) or (stated if _NUMBER.match(stated) else "")
        if answer:
            return answer
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start + brace.start()
    return None


def _readable(phrase: str, words: bool) -> str:
    """Return the phrase if it reads as an answer, the last term of an equation ("10 - 3 = 7 apples"), or ''."""
    phrase = _strip(phrase)
    plain, last_term = _plain(phrase), phrase.rpartition("=")[2].strip()
    if isinstance(plain, _Quantity) or (words and plain is not None):
        return phrase
    if "," not in phrase and isinstance(_plain(last_term), _Quantity):
        return last_term
    return phrase if _FORMULA.match(phrase) and not _PROSE.search(_TEXT.sub("", phrase)) else ""


def _last_number(text: str) -> str:
    """Return the last number of a text; with a number in an expression, the expression up to the next blanks."""
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)", " ", text)  # bold, not a power
    if isinstance(_plain(text), _Quantity):
        return _strip(text)
    last = max(text.rfind(digit) for digit in "0123456789")
    if last < 0:
        return ""
    for token in _TOKEN.finditer(text):
        if token.end() > last:
            return _strip(token[0])
    start = 1 + max(text.rfind(blank, 0, last) for blank in " \t\n")
    return _strip(text[start:].split(None, 1)[0])


def _strip(text: str) -> str:
    """Remove the signs around an answer in Markdown, in LaTeX's math modes and at the end of a sentence."""
    text = text.lstrip(' \t\n*_`"$~').rstrip(' \t\n*_`"$~.,;:?')
    return text.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]").strip()


def _formula(text: str) -> str:
    """Return an answer as a formula that math-verify reads as a whole."""
    if isinstance(_plain(text), str):
        return f"\\boxed{{\\text{{{text}}}}}"
    return text if any(sign in text for sign in ("$", r"\(", r"\[", r"\boxed")) else f"\\boxed{{{text}}}"


def _is_formula(text: str) -> bool:
    """Whether a text is a formula or words, not a worked solution without a marked answer: several words of prose."""
    return _plain(text) is not None or len(_PROSE.findall(_TEXT.sub("", text))) < 2
