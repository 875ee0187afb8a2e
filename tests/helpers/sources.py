"""Functions that a recipe may name as a dataset."""

from helpers.rows import many


def sums(n=60):
    """Yield rows, as `many` has them."""
    yield from many(n)


def breaks(n=1):
    """Yield some rows, and raise."""
    yield from many(n)
    raise RuntimeError("no more")


def splits_of():
    """Return what is no split."""
    return {"train": many(3)}


def numbers():
    """Return what are no rows."""
    return [*many(1), 3]


def nothing():
    """Return no rows."""
    return []
