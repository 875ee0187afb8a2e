"""The embedded problems `bcft:arithmetic`: adding and subtracting two-digit numbers, worked out in writing.

A solution has a line for each step: the units, then the tens, then the result. It ends as those of GSM8K do:

    Work out 47 + 35 - 36 + 21.

    7+5=12, 4+3+1=8: 82
    12-6=6, 8-3-1=4: 46
    6+1=7, 4+2=6: 67
    #### 67

This is the expert's solution. The apprentice (`bcft:arithmetic-apprentice`) mostly forgets to carry
(`7+5=12, 4+3=7: 72`) and to borrow: then it takes the smaller digit from the larger one (`6-2=4, 8-3=5: 54`). It
continues from the wrong result. Now and then two mistakes cancel, and wrong steps lead to the right answer;
`check_steps` detects that.

All choices come from sha256, so an item is the same in every version of Python. There is no environment of its own: a
solution is one completion, and `bcft.rewards.math_reward` grades its answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Literal, TypedDict

from bcft.environments.base import SHARES, EmbeddedDataset, Split, random_bits
from bcft.types import bucket, problem_id

Level = Literal["standard", "harder"]
Demonstrator = Literal["expert", "apprentice"]

STEPS = 3
CARRIES: dict[Level, range] = {"standard": range(1, STEPS), "harder": range(STEPS, STEPS + 1)}
"""How many steps of a problem carry or borrow: one or two, or (never in training) all three."""
FORGETS = 0.65
"""The probability with which the apprentice forgets a carry or a borrow."""
_PROMPT = re.compile(rf"Work out ([1-9][0-9](?: [+-] [1-9][0-9]){{{STEPS}}})\.")


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sum:
    """A problem: numbers of two digits to add up, negative if they are subtracted."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The problem's text."""
        steps = [f" {'+' if term > 0 else '-'} {abs(term)}" for term in self.terms[1:]]
        return f"Work out {self.terms[0]}{''.join(steps)}."

    @property
    def answer(self) -> str:
        """The right result."""
        return str(sum(self.terms))

    @property
    def carries(self) -> int:
        """How many steps carry or borrow when none is forgotten."""
        value, carries = self.terms[0], 0
        for term in self.terms[1:]:
            carries += _carries(value, term)
            value += term
        return carries

    @property
    def fits(self) -> bool:
        """Whether terms and results have two digits each, no matter which carries and borrows are forgotten."""
        if not all(10 <= abs(term) <= 99 for term in self.terms):
            return False
        results = {self.terms[0]}
        for term in self.terms[1:]:
            results = {_work_out(value, term, forget)[1] for value in results for forget in (False, True)}
            if min(results) < 10 or max(results) > 99:
                return False
        return True

    def solution(self, forgets: Sequence[bool] = (False,) * STEPS) -> str:
        """Return the sum worked out; `forgets` says for each step whether its carry or borrow, if any, is forgotten."""
        lines, value = [], self.terms[0]
        for term, forget in zip(self.terms[1:], forgets, strict=True):
            working, value = _work_out(value, term, forget)
            lines.append(f"{working}: {value}")
        return "\n".join([*lines, f"#### {value}"])


# Problems
def problem(index: int, *, split: Split, seed: int = 0, level: Level = "standard") -> Sum:
    """Return the first sum of the stream (seed, index) that belongs to the split and the level.

    Two indices may give the same sum; `items` skips repetitions.
    """
    low, high = SHARES[split]
    candidates = (_candidate(f"{seed}-{index}-{attempt}") for attempt in count())
    return next(
        candidate
        for candidate in candidates
        if candidate.carries in CARRIES[level] and low <= bucket(problem_id(candidate.prompt)) < high and candidate.fits
    )


def _candidate(key: str) -> Sum:
    """Draw the results, from 10 to 99; the terms lead from one to the next."""
    rest, values = random_bits(key), []
    for _ in range(STEPS + 1):
        rest, value = divmod(rest, 90)
        values.append(10 + value)
    return Sum((values[0], *(after - before for before, after in pairwise(values))))


# Demonstrations
def items(
    split: Split, n: int, *, seed: int = 0, level: Level = "standard", demonstrator: Demonstrator = "expert"
) -> list[Item]:
    """Return n rows of distinct problems, of which any fewer are the first.

    `answer` is right whoever demonstrates.
    """
    first_index: dict[Sum, int] = {}
    for index in count():
        if len(first_index) == n:
            break
        first_index.setdefault(problem(index, split=split, seed=seed, level=level), index)
    return [
        Item(prompt=s.prompt, completion=s.solution(_forgets(demonstrator, f"{seed}-{index}")), answer=s.answer)
        for s, index in first_index.items()
    ]


def _forgets(demonstrator: Demonstrator, key: str) -> list[bool]:
    """Draw for each step whether the demonstrator would forget a carry there."""
    probability = {"expert": 0.0, "apprentice": FORGETS}[demonstrator]
    return [random_bits(f"{key}-{step}-forgets") / 2**256 < probability for step in range(STEPS)]


def _work_out(value: int, term: int, forget: bool) -> tuple[str, int]:
    """Return one step in writing, and its result."""
    tens, units = divmod(value, 10)
    more_tens, more_units = divmod(abs(term), 10)
    carried = _carries(value, term)
    if carried and forget:
        carried = False
        if term < 0:
            units, more_units = more_units, units
    if term > 0:
        new_units, new_tens = units + more_units, tens + more_tens + carried
    else:
        units += 10 * carried
        new_units, new_tens = units - more_units, tens - more_tens - carried
    sign = "+" if term > 0 else "-"
    one = f"{sign}1" if carried else ""
    working = f"{units}{sign}{more_units}={new_units}, {tens}{sign}{more_tens}{one}={new_tens}"
    return working, 10 * new_tens + new_units % 10


def _carries(value: int, term: int) -> bool:
    """Return whether adding the term carries, or subtracting it borrows."""
    return value % 10 + term % 10 > 9 if term > 0 else value % 10 < -term % 10


# Checks
def check_steps(prompt: str, completion: str) -> bool:
    """Return whether every step of a worked solution is right.

    Only the expert's solution, to the letter, is. False if the prompt is not one of these problems.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        return False
    stated = Sum(tuple(map(int, match[1].replace("+ ", "").replace("- ", "-").split())))
    return stated.fits and completion == stated.solution()


def _dataset(demonstrator: Demonstrator) -> EmbeddedDataset:
    return EmbeddedDataset(
        items=partial(items, demonstrator=demonstrator),
        harder=lambda n: items("test", n, level="harder", demonstrator=demonstrator),
        check_steps=check_steps,
    )


DATASETS = {"bcft:arithmetic": _dataset("expert"), "bcft:arithmetic-apprentice": _dataset("apprentice")}
