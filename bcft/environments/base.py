"""The package's own environments, one file each, and how a recipe names one."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any, Literal, Protocol, runtime_checkable

from bcft.environments.single_turn import SingleTurn
from bcft.errors import UsageError
from bcft.rewards.base import import_function
from bcft.types import (
    Environment,
)


@runtime_checkable
class Closing(Protocol):
    """An environment that holds something until it is closed."""

    def close(self) -> None:
        """Let go of it."""
        ...


@runtime_checkable
class Instant(Protocol):
    """A factory of environments that answer at once: they are asked where they stand, for a thread costs more."""

    instant: bool


Split = Literal["train", "dev", "test"]
SHARES: dict[Split, tuple[float, float]] = {"test": (0.0, 0.05), "dev": (0.05, 0.1), "train": (0.1, 1.0)}
"""Each split's part of the unit interval, on which `problem_id` places every problem."""


def lots(key: str) -> Iterator[float]:
    """Yield numbers in [0, 1) that depend on the key alone, the same in every version of Python."""
    for block in count():
        digest = sha256(f"{key}-{block}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in range(0, 32, 4))


def environment_factory(path: str | None, arguments: Mapping[str, Any]) -> Callable[[], Environment]:
    """Return what makes an environment for one attempt: what a dotted path names, called with the arguments.

    Without a path it is one question and one answer.

    Raises UsageError where nothing can be made of them.
    """
    if path is None:
        return SingleTurn
    factory = import_function(path, key="environment")
    make = partial(factory, **arguments)
    if isinstance(factory, Instant):
        make.instant = factory.instant
    try:
        made = make()
    except (TypeError, ValueError) as error:
        raise UsageError(f"environment_args: {path} cannot be made with {dict(arguments)}: {error}") from error
    missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
    if missing:
        raise UsageError(f"environment: {path} makes a {type(made).__name__}, which has no {' and no '.join(missing)}")
    if callable(close := getattr(made, "close", None)):
        close()
    return make
