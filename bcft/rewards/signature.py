"""What a reward function takes, read from its signature: TRL's arguments, columns, arguments of the recipe."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL gives to a reward function besides the columns of the rows."""
IDS = ("completion_ids", "completions_ids")
"""The token ids of the completions; the second is their name in older pages of TRL, for a function that names it."""
_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's name, also of one in a `functools.partial`; of another object the name of its class."""
    function = inner_function(function)
    return str(getattr(function, "__name__", type(function).__name__))


def inner_function(function: Any) -> Any:
    """Return the function in a `functools.partial`; another one as it is."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def named_arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names in a function's signature that are not TRL's: columns, and arguments that a recipe may give."""
    return frozenset(_named(function)) - {*TRL_ARGUMENTS, *IDS}


def named_columns(function: Callable[..., Any]) -> frozenset[str]:
    """Return the columns that a function reads: its named arguments, except those with a number or text as default."""
    options = {name for name, p in _named(function).items() if isinstance(p.default, int | float | str)}
    return named_arguments(function) - options


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function is called with an argument: one that it names, or any if it has `**kwargs`.

    An argument that a `functools.partial` has bound is not given again.
    """
    bound = isinstance(function, functools.partial) and name in function.keywords
    return not bound and (name in _named(function) or (_takes_any(function) and name != IDS[1]))


def missing_columns(function: Callable[..., Any], columns: Collection[str], *, ids: bool = True) -> list[str]:
    """Return what a function needs and is in no column; ids: whether the completions' token ids are known."""
    given = {*columns, *TRL_ARGUMENTS, *IDS} - (set() if ids else {*IDS})
    return [name for name in required(function) if name not in given]


def why_missing(
    function: Callable[..., Any], missing: Sequence[str], columns: Collection[str], *, row: str = "row"
) -> str:
    """Return the message for a function whose columns are missing; row: what lacks them."""
    if missing[0] in IDS:
        return f"{name_of(function)} needs {missing[0]}, which are known only after a rollout"
    if missing[0] == "environments":  # TRL's, of its environment_factory
        return (
            f"{name_of(function)} needs environments, which are gone when attempts are graded: give the environment a "
            f"method get_reward that returns the reward"
        )
    has = f"the columns are {', '.join(sorted(columns))}" if columns else "there are no columns besides the prompt"
    word = "column" if len(missing) == 1 else "columns"
    return f"{name_of(function)} needs the {word} {', '.join(missing)}, which no {row} has: {has}"


def makes_reward(function: Callable[..., Any]) -> bool:
    """Return whether a function makes a reward function, as `trl.rewards.get_soft_overlong_punishment` does.

    It takes neither prompts nor completions, so it cannot grade.
    """
    return not _takes_any(function) and not {*TRL_ARGUMENTS[:3], *IDS} & _named(function).keys()


def required(function: Callable[..., Any]) -> list[str]:
    """Return the named parameters without a default."""
    return [name for name, parameter in _named(function).items() if parameter.default is parameter.empty]


def reads_messages(function: Callable[..., Any]) -> bool:
    """Return whether `completions` is annotated as lists of messages, as in `trl.rewards`."""
    parameter = _named(function).get("completions")
    return parameter is not None and "list[list[" in str(parameter.annotation).lower().replace("typing.", "")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters that no `functools.partial` has bound; None if the signature cannot be read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {name: parameter for name, parameter in parameters.items() if name not in bound}


def _named(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = _parameters(function) or {}
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in _VARIABLE}


def _takes_any(function: Callable[..., Any]) -> bool:
    parameters = _parameters(function)
    return parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
