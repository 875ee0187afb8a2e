"""The embedded problems `bcft:arithmetic`: adding and subtracting two-digit numbers, worked out in writing.

A solution does the units, then the tens, then writes the result, one line a step, and ends as GSM8K's do:

    Work out 47 + 35 - 36 + 21.

    7+5=12, 4+3+1=8: 82
    12-6=6, 8-3-1=4: 46
    6+1=7, 4+2=6: 67
    #### 67

That is the expert's. The apprentice mostly forgets the `+1` of a carry and the `-1` of a borrow, and goes on from the
wrong result. One forgotten carry and one forgotten borrow cancel: the answer is then right by wrong steps, which
`check_steps` finds out.

All choices come from sha256, so an item is the same in every version of Python. Answers are graded elsewhere, by
`bcft.rewards`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, pairwise
from typing import Literal, TypedDict

from bcft.types import problem_id

Split = Literal["train", "dev", "test"]
Level = Literal["standard", "harder"]
Demonstrator = Literal["expert", "apprentice"]

FORGETS = 0.65
"""The probability with which the apprentice forgets a carry or a borrow."""

STEPS = 3

CARRIES: dict[Level, range] = {"standard": range(1, STEPS), "harder": range(STEPS, STEPS + 1)}
"""How many steps of a problem carry or borrow: one or two, or (never in training) all three."""

SHARES: dict[Split, tuple[float, float]] = {"test": (0.0, 0.05), "dev": (0.05, 0.1), "train": (0.1, 1.0)}
"""Each split's part of the unit interval, on which `problem_id` places every problem."""

_PROMPT = re.compile(rf"Work out ([1-9][0-9](?: [+-] [1-9][0-9]){{{STEPS}}})\.")


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sum:
    """What is to be worked out: numbers of two digits, negative where they are subtracted."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        steps = [f" {'+' if term > 0 else '-'} {abs(term)}" for term in self.terms[1:]]
        return f"Work out {self.terms[0]}{''.join(steps)}."

    @property
    def answer(self) -> str:
        return str(sum(self.terms))

    @property
    def carries(self) -> list[int]:
        """For each step 1 if it carries, -1 if it borrows, else 0.

        What was forgotten before makes no difference: the units are right all the same.
        """
        carries, units = [], self.terms[0] % 10
        for term in self.terms[1:]:
            units += term % 10 if term > 0 else -(-term % 10)
            carries.append(units // 10)
            units %= 10
        return carries

    @property
    def has_two_digits_throughout(self) -> bool:
        """Whether all terms and results have two digits, no matter which carries and borrows are forgotten."""
        if not all(10 <= abs(term) <= 99 for term in self.terms):
            return False
        lowest = highest = self.terms[0]
        for term, carry in zip(self.terms[1:], self.carries, strict=True):
            lowest += term - 10 * (carry > 0)
            highest += term + 10 * (carry < 0)
            if lowest < 10 or highest > 99:
                return False
        return True

    def solution(self, forgets: Sequence[bool] = (False,) * STEPS) -> str:
        """Work the sum out; `forgets` says for each step whether its carry or borrow, if any, is forgotten."""
        lines, value = [], self.terms[0]
        for term, carry, forgotten in zip(self.terms[1:], self.carries, forgets, strict=True):
            sign, tens, units = "+" if term > 0 else "-", value // 10, value % 10 + 10 * (carry < 0)
            carried = int(carry != 0 and not forgotten)
            more_tens, more_units = divmod(abs(term), 10)
            new_units = units + more_units if term > 0 else units - more_units
            new_tens = tens + more_tens + carried if term > 0 else tens - more_tens - carried
            value = 10 * new_tens + new_units % 10
            carry_digit = f"{sign}1" if carried else ""
            lines.append(
                f"{units}{sign}{more_units}={new_units}, {tens}{sign}{more_tens}{carry_digit}={new_tens}: {value}"
            )
        return "\n".join([*lines, f"#### {value}"])


def problem(index: int, *, split: Split, seed: int = 0, level: Level = "standard") -> Sum:
    """Return the first sum of the stream (seed, index) that belongs to the split and the level.

    Two indices may give the same sum; `items` skips repetitions.
    """
    low, high = SHARES[split]
    candidates = (_candidate(f"{seed}-{index}-{attempt}") for attempt in count())
    return next(
        candidate
        for candidate in candidates
        if candidate.has_two_digits_throughout
        and sum(map(abs, candidate.carries)) in CARRIES[level]
        and low <= int(problem_id(candidate.prompt), 16) / 2**64 < high
    )


def items(
    split: Split, n: int, *, seed: int = 0, level: Level = "standard", demonstrator: Demonstrator = "expert"
) -> list[Item]:
    """Return n rows of distinct problems, of which any fewer are the first; `answer` is right whoever demonstrates."""
    first_index: dict[Sum, int] = {}
    for index in count():
        if len(first_index) == n:
            break
        first_index.setdefault(problem(index, split=split, seed=seed, level=level), index)
    return [
        Item(prompt=s.prompt, completion=s.solution(_forgets(demonstrator, f"{seed}-{index}")), answer=s.answer)
        for s, index in first_index.items()
    ]


def check_steps(prompt: str, completion: str) -> bool:
    """Whether every step of a worked solution is right, which it can be in one way only: the expert's, to the letter.

    False where the prompt is none of these problems.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        return False
    stated = Sum(tuple(map(int, match[1].replace("+ ", "").replace("- ", "-").split())))
    return stated.has_two_digits_throughout and completion == stated.solution()


def _candidate(key: str) -> Sum:
    """Draw the results from 10 to 99; the terms are what leads from one to the next."""
    rest, values = _hash(key), []
    for _ in range(STEPS + 1):
        rest, value = divmod(rest, 90)
        values.append(10 + value)
    return Sum((values[0], *(after - before for before, after in pairwise(values))))


def _forgets(demonstrator: Demonstrator, key: str) -> list[bool]:
    """Draw for each step whether the demonstrator would forget a carry there."""
    probability = {"expert": 0.0, "apprentice": FORGETS}[demonstrator]
    return [_hash(f"{key}-{step}-forgets") / 2**256 < probability for step in range(STEPS)]


def _hash(key: str) -> int:
    """Return 256 bits that depend on the key alone."""
    return int.from_bytes(sha256(key.encode()).digest(), "big")
