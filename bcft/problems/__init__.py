"""Embedded problems, one file each: what is to be solved, and demonstrations of it. Everything is drawn from sha256."""

from collections.abc import Iterator
from hashlib import sha256
from itertools import count


def lots(key: str) -> Iterator[float]:
    """Yield numbers in [0, 1) that depend on the key alone, the same in every version of Python."""
    for block in count():
        digest = sha256(f"{key}-{block}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in range(0, 32, 4))
