"""The package's own environments, one file each, and how a recipe names one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bcft.environments.single_turn import SingleTurn
from bcft.errors import UsageError
from bcft.play import Instant
from bcft.rewards import import_function
from bcft.types import Environment


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
