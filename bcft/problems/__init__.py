"""Embedded problems, one file each: what is to be solved, and demonstrations of it. Everything is drawn from sha256."""

from collections.abc import Iterator
from hashlib import sha256
from itertools import count
from typing import Literal

Split = Literal["train", "dev", "test"]

SHARES: dict[Split, tuple[float, float]] = {"test": (0.0, 0.05), "dev": (0.05, 0.1), "train": (0.1, 1.0)}
"""Each split's part of the unit interval, on which `problem_id` places every problem."""


def lots(key: str) -> Iterator[float]:
    """Yield numbers in [0, 1) that depend on the key alone, the same in every version of Python."""
    for block in count():
        digest = sha256(f"{key}-{block}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in range(0, 32, 4))
