r"""Plain answers, compared exactly and in this process: quantities with or without a unit, and words.

A decimal stands for exactly the digits that it has: 0.5 is 1/2, and 0.333333 is not 1/3. 60% is 3/5.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_UNITS = {
    "mm": "millimeter",
    "cm": "centimeter",
    "km": "kilometer",
    "mg": "milligram",
    "kg": "kilogram",
    "ml": "milliliter",
    "mL": "milliliter",
    "ft": "foot",
    "feet": "foot",
    "inches": "inch",
    "yd": "yard",
    "mi": "mile",
    "lb": "pound",
    "lbs": "pound",
    "oz": "ounce",
    "hr": "hour",
    "hrs": "hour",
    "min": "minute",
    "sec": "second",
    "mph": "mile",
    "m": "meter",
}
"""Short and irregular units and their names: the first word of a compound one."""
_LETTER_UNITS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter", "l": "liter"}
r"""Units only within `\text{}`: elsewhere they are variables."""
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_SHORT_UNIT = "|".join(sorted((unit for unit in _UNITS if 1 < len(unit) < 4), key=len, reverse=True))

UNSIGNED = r"(?:(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:\ [0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
NUMBER = re.compile(
    rf"""
    [$€£¥]? \s* (?P<sign>[-+−–]?) \s* [$€£¥]? \s*
    (?: (?: (?P<whole>[0-9]+) \s+ )? (?P<top>{UNSIGNED}) \s* / \s* (?P<bottom>{UNSIGNED})
      | (?P<decimal>{UNSIGNED}) (?: e (?P<exponent>[-+]?[0-9]{{1,3}}) )? )
    (?: \s* (?P<percent>%|percent(?:age)?\b|per\ cent\b|pct\b) )?
    (?: \s* [$€£¥] )?
    (?: (?: \s+ (?P<unit>[a-z]{{3,}} (?: [ /-]+ [a-z]+ )* )
          | \s* (?P<short>(?:{_SHORT_UNIT}|m(?=[²³]))(?![a-z]) (?:\s*/\s*[a-z]+)?) )
        (?: \s* (?: \^ \s* \{{? (?P<power>[23]) \}}? | (?P<raised>[²³]) ) )? )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CHOICE = re.compile(r"\(?(?P<letter>[A-E])\)[.:]?\s{0,9}(?P<value>[^\s)].{0,150})")
_LETTER = re.compile(r"\(?[A-Ea-e]\)?")
_DECIMAL_COMMA = re.compile(r"[-+−–]?[0-9]{1,20},[0-9]{1,20}")
_IN_BASE = re.compile(r"([0-9]{1,50})\s*_\s*(?:\{\s*([0-9]{1,2})\s*\}|([0-9]))")
_O_CLOCK = re.compile(r"([0-9]{1,2}):00(?:\s*([ap])\.?\s?m\b\.?)?", re.IGNORECASE)
_LONGEST_PLAIN = 200
"""Most characters of a plain answer: exact arithmetic on so few is immediate."""
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NOT_UNITS = {"and", "or", "to", "half", "halves", "third", "thirds", "quarter", "quarters", "squared", "cubed"}
_NOT_UNITS |= {"times", "plus", "minus", "divided", "factorial"}
"""Words that change the number before them, or join it to the next."""
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*([^{}\s]+)\s*\}|([0-9]))\s*(?:\{\s*([^{}\s]+)\s*\}|([0-9]))")
_SPELLINGS = {"{,}": ",", r"\!": "", r"\,": "", r"\;": " ", r"\$": "", r"\%": "%", r"\ ": " ", "~": " ", "$": ""}
_SPELLINGS |= {r"\left": "", r"\right": ""}
_SIGN_WORD = re.compile(
    r"""
    (?: (?P<before>
          (?: ^ | [=:,;(*#>"\n]
            | \b (?: is | are | be | was | were | equals? | exactly | about | to | of | or | and | gives | answer ) \b )
          \s{0,5} [*"]{0,3} ) minus
      | \b negative )
    \s{1,5} (?P<opening> \$? | \\\(\s? ) (?= \.?[0-9] | \\[cdt]?frac | \\sqrt )
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""A word that is the sign of the number behind it; "10 minus 5" has none."""


class Quantity(NamedTuple):
    """A number, exactly, and its unit."""

    value: Fraction
    unit: str
    """Its first word in lower case, singular, with its power; '' if none is stated."""


@lru_cache(maxsize=4096)
def plain(text: str, *, percent_as_number: bool = False) -> Quantity | str | None:
    """Read a number, with or without a unit, or words of three or more letters, or "no"; None for everything else.

    60% is 3/5: it equals 0.6 and not 60; with `percent_as_number` it is 60. Currency signs are dropped. Words are
    returned in lower case; shorter ones may be products of variables.
    """
    if len(text) > _LONGEST_PLAIN:
        return None
    for written, meant in _SPELLINGS.items():
        text = text.replace(written, meant)
    text = with_signs(strip(_FRACTION.sub(r" \1\2/\3\4 ", TEXT.sub(_unwrapped, text))))
    if "\n" in text:
        return None
    if match := NUMBER.fullmatch(text):
        return _quantity(match, percent_as_number=percent_as_number)
    if match := _IN_BASE.fullmatch(text):
        return Quantity(Fraction(match[1]), f"base {match[2] or match[3]}")
    if match := _O_CLOCK.fullmatch(text):
        return Quantity(Fraction(match[1]), f"{match[2].lower()}m" if match[2] else "")
    words = " ".join(text.casefold().split())
    letters = sum(character.isalpha() for character in words)
    is_words = all(character.isalpha() or character in " -'" for character in words)
    return words if (is_words and letters >= 3) or words == "no" else None


def same(expected: Quantity | str, actual: Quantity | str | None) -> bool:
    """Whether two plain answers are equal. A unit that only one of them states is not compared."""
    if isinstance(expected, Quantity) and isinstance(actual, Quantity):
        same_unit = expected.unit == actual.unit or "" in (expected.unit, actual.unit)
        return expected.value == actual.value and same_unit
    return expected == actual


def decimal_comma(text: str, other: Quantity) -> Quantity | None:
    """Read 1,22 as 1.22 where it is compared with a number that is not whole; there it cannot be two numbers."""
    if other.value.denominator == 1 or not _DECIMAL_COMMA.fullmatch(strip(text)):
        return None
    value = plain(strip(text).replace(",", "."))
    return value if isinstance(value, Quantity) else None


def choices(gold: str, answer: str) -> tuple[str, str]:
    """Return both with one part of a choice such as "(B) 12": its letter where the other is one, else its value."""
    chosen = [_CHOICE.fullmatch(strip(TEXT.sub(r" \1 ", text).replace("\\ ", " "))) for text in (gold, answer)]
    if chosen[0] and chosen[1]:
        return chosen[0]["letter"], chosen[1]["letter"]
    for match, text in zip(chosen, (answer, gold), strict=True):
        if match:
            part = match["letter"] if _LETTER.fullmatch(strip(TEXT.sub(r"\1", text))) else match["value"]
            return (part, text) if match is chosen[0] else (text, part)
    return gold, answer


def strip(text: str) -> str:
    """Remove the signs around an answer in Markdown, in LaTeX's math modes and at the end of a sentence."""
    text = text.lstrip(' \t\n*_`"$~').rstrip(' \t\n*_`"$~.,;:?')
    return text.removeprefix(r"\(").removesuffix(r"\)").removeprefix(r"\[").removesuffix(r"\]").strip()


def with_signs(text: str) -> str:
    """Write "minus 5" and "negative 5" as -5."""
    return _SIGN_WORD.sub(lambda match: f"{match['before'] or ''}{match['opening']}-", text)


def _unwrapped(match: re.Match[str]) -> str:
    words = match[1].strip()
    return f" {_LETTER_UNITS.get(words, words)} "


def _quantity(match: re.Match[str], *, percent_as_number: bool) -> Quantity | None:
    part = {name: re.sub("[, ]", "", text or "") for name, text in match.groupdict().items()}
    scale, *words = re.split("[ /-]+", match["unit"] or match["short"] or "")
    if scale.lower() not in SCALES:
        scale, words = "", [scale, *words]
    lower = [word.lower() for word in words]
    if not _NOT_UNITS.isdisjoint(lower) or not SCALES.keys().isdisjoint(lower):
        return None
    if not part["bottom"]:
        value = Fraction(part["decimal"]) * Fraction(10) ** int(part["exponent"] or 0)
    elif bottom := Fraction(part["bottom"]):
        value = int(part["whole"] or 0) + Fraction(part["top"]) / bottom
    else:
        return None
    value *= SCALES.get(scale.lower(), 1)
    if part["percent"] and not percent_as_number:
        value /= 100
    power = part["power"] or {"²": "2", "³": "3"}.get(part["raised"], "")
    return Quantity(-value if part["sign"] in ("-", "−", "–") else value, _unit(lower or [""], power))


def _unit(words: list[str], power: str) -> str:
    if words[0] in _POWERS and len(words) > 1:
        power = str(_POWERS[words[0]])
        words = words[1:]
    name = _UNITS.get(words[0]) or words[0].rstrip("s")
    return name + power if name else ""
