r"""Formulas: their text as math-verify reads it, and the exact comparison that takes the place of its rounding one.

math-verify compares numbers after 6 decimals, and differences with 1e-15: so 9.1e-31 equals 1.6e-19, and pi equals
3.141593. Here a decimal is the fraction that it writes, and numbers are compared exactly or to 60 digits.
"""

import atexit
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

from bcft.rewards.plain import TEXT, plain
from bcft.rewards.sandbox import MAX_TEXT_CHARS, Job, Sandbox

Verdict = Literal["right", "wrong", "unparsable", "timeout", "memory", "died", "error"]
"""`unparsable`: the reference cannot be read. The last four say why an answer could not be compared."""

# Text to text, in the process that asks: every repetition is bounded.
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]|(?<!\\)\$")
_ROW_GAP = re.compile(r"\\\\\s*\[[-0-9.]{1,8}[a-z]{2}\]")
_MATRIX = re.compile(r"\\(begin|end)\{(?:bmatrix|matrix|smallmatrix)\}")
_REPEATING = re.compile(
    r"(?<![0-9.])([0-9]{1,20})\.([0-9]{0,20})\\(?:overline|bar|dot|overbar)\s*(?:\{([0-9]{1,20})\}|([0-9]))"
)
_POWER_OF_TEN = re.compile(r"(?<![\w.\\])([0-9]{1,20}(?:\.[0-9]{1,20})?)[eE]([-+]?[0-9]{1,3})(?![\w.^])")
_DECIMAL = re.compile(
    r"(?P<raised>[\^_]\s?)?(?<![0-9.}])(?:(?<![0-9],)|(?![0-9]{3}\.))(?P<whole>[0-9]{0,20})\.(?P<part>[0-9]{1,40})(?![0-9.])"
)
_DEGREES = re.compile(r"\\(sin|cos|tan|cot|sec|csc)\s*[({]?\s*([0-9]{1,4})\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?")
_LETTER_D = re.compile(r"\\[A-Za-z]+|d(?=\s{0,3}\\(?:end|cdot|times|[lg]eq?|neq?|in|pm|cup)(?![a-z]))")
"""The variable d, which math-verify reads as a differential before a command."""
_PERCENT = re.compile(r"\\?%|\b(?:percent(?:age)?|per cent|pct)\b", re.IGNORECASE)
_SIGNS = {"×": r"\times ", "÷": "/", "·": r"\cdot ", "−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ "}
_SIGNS |= {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "²": "^2", "³": "^3"}
_SIGNS |= {"±": r"\pm ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "**": "^", r"\varnothing": r"\emptyset"}
_SIGNS |= {r"\{\}": r"\emptyset", "∅": r"\emptyset", r"\langle": "(", r"\rangle": ")", r"\lt": "<", r"\gt": ">"}
_SIGNS |= {r"\quad": " ", r"\qquad": " ", r"\displaystyle": " ", "⟨": "(", "⟩": ")"}
_SIGN = re.compile("|".join(re.escape(sign) + ("(?![A-Za-z])" if sign[0] == "\\" else "") for sign in _SIGNS))
_ROOT = re.compile(r"√\s*(?:\(([^()]{1,40})\)|([0-9]{1,20}|[a-z]))")

# What is compared as text.
_LITERAL_ONLY = re.compile(
    r"""
    [0-9]:[0-9]{2}\b | [0-9]\s*:\s*[0-9]{1,20}\s*: | \\?\b[bp]?mod\b | \\equiv | ≡
    | \\overline\s*\{\s*[A-Z] | \\(?:overrightarrow|vec|triangle|angle|gcd|operatorname)\b
    | [0-9]\s*[A-Za-z]{2,20}\s[^\\]{0,20}[0-9]\s*[A-Za-z]{2}
    """,
    re.VERBOSE,
)
_SPACES = re.compile(r"\\[,;:!\ ]|\\(?:quad|qquad|left|right|displaystyle|limits|bigl?|bigr?)(?![A-Za-z])|~")
_SINGLE = re.compile(r"\{\s*([A-Za-z0-9]|\\[A-Za-z]{1,12})\s*\}")


def formula(text: str, *, percent_as_number: bool = False) -> str:
    r"""Return an answer as a box that math-verify reads as a whole, each decimal as the fraction that it writes."""
    if isinstance(plain(text), str):
        return rf"\boxed{{\text{{{text}}}}}"
    text = _DELIMITERS.sub(" ", text)
    text = _SIGN.sub(lambda match: _SIGNS[match[0]], text)
    text = _MATRIX.sub(r"\\\1{pmatrix}", _ROW_GAP.sub(r"\\\\", text))
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text)
    text = _PERCENT.sub("" if percent_as_number else r" \\cdot \\frac{1}{100} ", text)
    if r"\int" not in text and r"\frac{d" not in text:
        text = _LETTER_D.sub(lambda match: "{d}" if match[0] == "d" else match[0], text)
    text = _DEGREES.sub(r"\\\1(\\frac{\2\\pi}{180})", text)
    text = _POWER_OF_TEN.sub(r"\1 \\times 10^{\2}", _REPEATING.sub(_repeating, text))
    return rf"\boxed{{{_DECIMAL.sub(_fraction, text)}}}"


def literal(text: str) -> str:
    """Return the text that the same formula shares, however it is spaced and braced."""
    text = TEXT.sub(r"\1", _DELIMITERS.sub("", _SPACES.sub(" ", text)))
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "~", re.sub(r"\\[dt]frac", r"\\frac", text))
    text = _SINGLE.sub(r"\1", "".join(text.split()))
    return text.rstrip(".")


def is_literal_only(text: str) -> bool:
    """Whether math-verify would read a formula as something else: times, congruences, hours and minutes, names."""
    return _LITERAL_ONLY.search(TEXT.sub(r" \1 ", text)) is not None


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1], match[2], match[3] or match[4]
    scale = 10 ** len(fixed)
    bottom = scale * (10 ** len(repeated) - 1)
    top = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{top}}}{{{bottom}}}"


def _fraction(match: re.Match[str]) -> str:
    fraction = rf"\frac{{{int(match['whole'] + match['part'])}}}{{{10 ** len(match['part'])}}}"
    return f"{match['raised']}{{{fraction}}}" if match["raised"] else fraction


# Formulas to verdicts, in this process.

_WARM_UP = (
    (r"\boxed{\frac{1}{2}}", r"\boxed{0.3}"),
    (r"\boxed{x^2+1}", r"\boxed{1+x}"),
    (r"\boxed{(1,2)}", r"\boxed{(1,3)}"),
    (r"\boxed{\text{even}}", r"\boxed{\text{odd}}"),
    (r"\boxed{2\sqrt{3}}", r"$\sqrt{13}\pi$"),
    (r"\boxed{\pi}", r"\boxed{\frac{22}{7}}"),
    (r"\boxed{[2,5)}", r"$[2,6) \cup \{7\}$"),
    (r"\boxed{x \le 5}", r"\boxed{x = 5}"),
    (r"\boxed{\log_2 3}", r"\boxed{\sin(30^\circ)}"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}"),
    (r"\boxed{\frac{3x-1}{2}}", r"The answer is 50%"),
)
"""Pairs that load math-verify's lazy modules and fill its parser's tables, once for all workers."""


class Verifier(Sandbox):
    """The sandbox that compares formulas. `seconds` and `memory` (bytes) limit each answer."""

    def __init__(self, *, seconds: float = 2.0, memory: int = 1 << 30, workers: int | None = None) -> None:
        job = Job(f"{__name__}.{compare.__name__}", _WARM_UP, "math_verify")
        super().__init__(job, seconds=seconds, memory=memory, workers=workers)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Return a verdict for each (reference, answer) pair, in order; math-verify's `parse` reads both texts.

        Raises FaultError when the server cannot be started at all.
        """
        texts = [(reference[-MAX_TEXT_CHARS:], answer[-MAX_TEXT_CHARS:]) for reference, answer in pairs]
        known = {str(verdict): verdict for verdict in get_args(Verdict)}
        return [known.get(result, "died") for result in self.call(texts)]


@cache
def default_sandbox() -> Verifier:
    """Return the sandbox that the whole process shares; it ends with the process."""
    sandbox = Verifier()
    atexit.register(sandbox.close)
    return sandbox


# sympy to verdict, in a worker of the sandbox alone.


def compare(reference: str, answer: str) -> Literal["right", "wrong", "unparsable"]:
    """Compare two texts, as math-verify's `parse` reads them, exactly. Its timeouts are off: they are signals."""
    from math_verify import parse, verify  # noqa: PLC0415 - sympy is for the sandbox alone

    _make_exact()
    gold, given = (_with_sets(parse(text, parsing_timeout=None), text) for text in (reference, answer))
    if all(isinstance(expression, str) for expression in gold):
        return "unparsable"
    if _has_euler(gold) or _has_euler(given):
        gold, given = _with_imaginary_unit(gold), _with_imaginary_unit(given)
    return "right" if verify(gold, given, timeout_seconds=None, allow_set_relation_comp=True) else "wrong"


def _with_sets(parsed: list[Any], text: str) -> list[Any]:
    """Return what math-verify parsed, "x < 1 or x > 5" as the set of numbers that it is."""
    from sympy import FiniteSet, Or  # type: ignore[import-untyped] # noqa: PLC0415 - sympy is for the sandbox alone

    first: Any = parsed[0] if parsed else None
    if not isinstance(first, FiniteSet) or not all(part.is_Relational for part in first.args):
        return parsed
    if len(first.free_symbols) != 1 or not re.search(r"\bor\b", text):
        return parsed
    return [Or(*first.args).as_set(), *parsed[1:]]


def _has_euler(parsed: list[Any]) -> bool:
    r"""Whether a formula holds e^{i\pi}: there the letter i is the imaginary unit, elsewhere it may be a variable."""
    from sympy import exp, pi  # noqa: PLC0415 - sympy is for the sandbox alone

    powers = [power for part in parsed if not isinstance(part, str) for power in part.atoms(exp)]
    return any(power.has(pi) and any(str(symbol) == "i" for symbol in power.free_symbols) for power in powers)


def _with_imaginary_unit(parsed: list[Any]) -> list[Any]:
    from sympy import I  # noqa: PLC0415 - sympy is for the sandbox alone

    return [
        part
        if isinstance(part, str)
        else part.xreplace({symbol: I for symbol in part.free_symbols if str(symbol) == "i"}).doit()
        for part in parsed
    ]


@cache
def _make_exact() -> None:
    """Give math-verify, in this process, a comparison of numbers that does not round."""
    from math_verify import grader  # noqa: PLC0415 - sympy is for the sandbox alone

    simplified = grader.sympy_symbolic_eq
    grader.sympy_numeric_eq = _equal
    grader.sympy_symbolic_eq = lambda left, right: _numbers_equal(left, right) is None and simplified(left, right)


def _equal(left: Any, right: Any, float_rounding: int, numeric_precision: int) -> bool:
    """Whether two values are known to be equal without simplifying; signature and place are math-verify's."""
    from math_verify.grader import safe_sympy_doit, sympy_expr_eq  # noqa: PLC0415 - sympy is for the sandbox alone
    from sympy import MatrixBase  # noqa: PLC0415 - as above

    left, right = safe_sympy_doit(left), safe_sympy_doit(right)
    if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
        return left.shape == right.shape and all(
            sympy_expr_eq(one, other, float_rounding, numeric_precision)
            for one, other in zip(left.flat(), right.flat(), strict=True)
        )
    return _numbers_equal(left, right) is True


def _numbers_equal(left: Any, right: Any) -> bool | None:
    """Whether two sympy numbers are equal, exactly or to 60 digits; None where only simplifying can say it."""
    from math_verify.grader import safe_sympy_doit  # noqa: PLC0415 - sympy is for the sandbox alone
    from sympy import Float, Rational  # noqa: PLC0415 - as above

    try:
        left, right = (
            value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)})
            for value in (safe_sympy_doit(left), safe_sympy_doit(right))
        )
        if left.free_symbols or right.free_symbols:
            return True if left == right else None
        if (left.is_Rational and right.is_Rational) or left.is_infinite or right.is_infinite:
            return bool(left == right)
        first, second, difference = (abs(value.evalf(30, maxn=200)) for value in (left, right, left - right))
        if difference <= first * Rational(1, 10**60):
            return True
        return None if min(first, second) < Rational(1, 10**100) else False  # a zero in disguise has no digits
    except (AttributeError, TypeError, ValueError):  # not numbers
        return None
