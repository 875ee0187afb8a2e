"""One prompt in several rows: which rows differ in another column than the completion."""

from collections.abc import Sequence

import numpy as np

from bcft.data.readers import ARGUMENTS
from bcft.data.stored import ids_of
from bcft.types import Demonstration, Lazy, Problem


def repeated_prompts(*parts: Sequence[Demonstration]) -> Sequence[tuple[Problem, Problem]]:
    """Return the rows that repeat the prompt of an earlier one with other columns, each behind the first such row."""
    starts = np.cumsum([0, *map(len, parts)])

    def problem(place: int) -> Problem:
        part = int(np.searchsorted(starts, place, side="right")) - 1
        return parts[part][place - int(starts[part])].problem

    ids = np.concatenate([ids_of(part) for part in parts])
    _, firsts, prompt = np.unique(ids, return_index=True, return_inverse=True)
    first = firsts[prompt]
    again = np.flatnonzero(first != np.arange(len(ids)))
    differ = (bool(differing(problem(int(first[place])), problem(int(place)))) for place in again)
    again = again[np.fromiter(differ, dtype=bool, count=len(again))]
    return Lazy(len(again), lambda i: (problem(int(first[again[i]])), problem(int(again[i]))))


def differing(first: Problem, again: Problem) -> list[str]:
    """Return the columns in which two problems differ; a missing one is null."""
    values = [(name, first.columns.get(name), again.columns.get(name)) for name in {**first.columns, **again.columns}]
    values = [(name, a or {}, b or {}) if name in ARGUMENTS else (name, a, b) for name, a, b in values]
    # NaN differs from itself, and arrays compare by element.
    return [name for name, a, b in values if repr(a) != repr(b) and not (isinstance(a, _VALUES) and a == b)]


_VALUES = (str, int, float, bool, list, tuple, dict)
"""Types whose values are compared as they are."""
