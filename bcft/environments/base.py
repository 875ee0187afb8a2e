"""What the built-in tasks share, and how a recipe names an environment or an embedded dataset.

An environment of your own needs nothing from here: it is any class with the `reset` and `step` of
`bcft.types.Environment`. A built-in task is one file in this folder. If it has problems of its own, the file ends with
a mapping `DATASETS` from their `bcft:` names to an `EmbeddedDataset`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any, Literal, Protocol, runtime_checkable

from bcft import environments
from bcft.config.schema import EnvironmentSettings, SamplingSettings
from bcft.environments.single_turn import SingleTurn
from bcft.errors import UsageError
from bcft.rewards.base import import_function
from bcft.types import Environment, RolloutSettings

Split = Literal["train", "dev", "test"]
SHARES: dict[Split, tuple[float, float]] = {"test": (0.0, 0.05), "dev": (0.05, 0.1), "train": (0.1, 1.0)}
"""The part of the unit interval that belongs to each split; `bcft.types.bucket` places a problem in the interval."""


@runtime_checkable
class Closing(Protocol):
    """An environment that holds a resource until it is closed."""

    def close(self) -> None:
        """Release the resource."""
        ...


@runtime_checkable
class Instant(Protocol):
    """A factory of environments that answer at once: they run in the loop's own thread, since a thread costs more."""

    instant: bool


@dataclass(frozen=True)
class EmbeddedDataset:
    """A dataset that the package computes. Its items have the columns of a data file's rows."""

    items: Callable[[Split, int], Sequence[Mapping[str, Any]]]
    """(split, n) -> n items. A smaller n gives the first of them, and no problem is in two splits."""
    harder: Callable[[int], Sequence[Mapping[str, Any]]] | None = None
    """n -> n distinct problems that are harder than any in training, for evaluation only."""
    check_steps: Callable[[str, str], bool] | None = None
    """(prompt, completion) -> whether every step of a worked solution is right."""


def embedded_datasets() -> dict[str, EmbeddedDataset]:
    """Return every embedded dataset by its `bcft:` name: the `DATASETS` of all files in this folder."""
    names = [module.name for module in pkgutil.iter_modules(environments.__path__)]
    modules = [importlib.import_module(f"{environments.__name__}.{name}") for name in names]
    return {name: dataset for module in modules for name, dataset in vars(module).get("DATASETS", {}).items()}


def step_checker(dataset_name: str, environment: str | None) -> Callable[[str, str], bool] | None:
    """Return the check of a dataset's worked solutions.

    None where the dataset has none, and with an environment, whose actions need not be whole solutions.
    """
    dataset = embedded_datasets().get(dataset_name)
    return dataset.check_steps if dataset and environment is None else None


def uniforms(key: str) -> Iterator[float]:
    """Yield uniform numbers in [0, 1) that depend on the key alone, the same in every version of Python."""
    for block in count():
        digest = sha256(f"{key}-{block}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in range(0, 32, 4))


def environment_factory(path: str | None, arguments: Mapping[str, Any]) -> Callable[[], Environment]:
    """Return a function that makes an environment for one attempt: it calls what the dotted path names.

    Without a path it makes `SingleTurn`: one prompt and one completion.
    Raises UsageError when the import or a first call fails, or the result is not an environment.
    """
    if path is None:
        return SingleTurn
    factory = import_function(path, key="environment")
    make = partial(factory, **arguments)
    if isinstance(factory, Instant):
        make.instant = factory.instant
    try:
        first = make()
    except (TypeError, ValueError) as error:
        raise UsageError(f"environment_args: {path} cannot be made with {dict(arguments)}: {error}") from error
    missing = [name for name in ("reset", "step") if not callable(getattr(first, name, None))]
    if missing:
        raise UsageError(f"environment: {path} makes a {type(first).__name__}, which has no {' and no '.join(missing)}")
    if isinstance(first, Closing):
        first.close()
    return make


def rollout_settings(
    sampling: SamplingSettings,
    environment: EnvironmentSettings,
    *,
    seed: int,
    make: Callable[[], Environment] | None = None,
) -> RolloutSettings:
    """Return how a recipe's attempts are rolled out; without an environment they have one turn.

    make: the environment's factory, in place of the one that the recipe names.
    Raises UsageError when the recipe's environment cannot be made.
    """
    make = make or environment_factory(environment.environment, environment.environment_args)
    return RolloutSettings(
        make_environment=make,
        sampling=sampling.parameters,
        max_new_tokens=sampling.max_completion_length,
        max_turns=1 if make is SingleTurn else environment.max_turns,
        step_timeout=environment.step_timeout,
        seed=seed,
    )
