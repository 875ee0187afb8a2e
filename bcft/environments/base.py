"""The parts that the built-in tasks share, and how a recipe names an environment or an embedded dataset.

An environment of your own needs nothing from here: it is any class with the `reset` and `step` of
`bcft.types.Environment`. A built-in task is one file in this folder. If it has problems of its own, the file ends with
a mapping `DATASETS` from their `bcft:` names to an `EmbeddedDataset`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from typing import Any, Literal, Protocol, runtime_checkable

from bcft import environments
from bcft.config.schema import EnvironmentSettings, SamplingSettings
from bcft.environments.single_turn import SingleTurn
from bcft.environments.tools import toolbox
from bcft.errors import UsageError
from bcft.integrations.trl_environment import Pool, TRLEnvironment, is_trl_environment
from bcft.rewards.base import import_function, name_of, users_code
from bcft.types import Environment, Problem, RolloutSettings, messages, show

Split = Literal["train", "dev", "test"]
SHARES: dict[Split, tuple[float, float]] = {"test": (0.0, 0.05), "dev": (0.05, 0.1), "train": (0.1, 1.0)}
"""The part of the unit interval that belongs to each split; `bcft.types.bucket` maps a problem id to the interval."""


@runtime_checkable
class Closing(Protocol):
    """An environment that holds a resource until it is closed."""

    def close(self) -> None:
        """Release the resource."""
        ...


def is_instant(factory: Callable[..., Environment]) -> bool:
    """Return whether a factory has the attribute `instant`, and it is True: its environments answer at once.

    They run in the loop's own thread, because another thread would cost more than their answers.
    """
    return getattr(factory, "instant", None) is True


def offers_tools(factory: Callable[..., Environment]) -> bool:
    """Return whether a factory of `environment_factory` makes environments with tools."""
    return getattr(factory, "offers_tools", None) is True


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

    None if the dataset has none, and with an environment: its actions need not be whole solutions.
    """
    dataset = embedded_datasets().get(dataset_name)
    return dataset.check_steps if dataset and environment is None else None


def uniforms(key: str) -> Iterator[float]:
    """Yield uniform numbers in [0, 1) that depend on the key alone, the same in every version of Python."""
    for block in count():
        digest = sha256(f"{key}-{block}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") / 2**32 for i in range(0, 32, 4))


def random_bits(key: str) -> int:
    """Return an integer in [0, 2**256) that depends on the key alone, the same in every version of Python."""
    return int.from_bytes(sha256(key.encode()).digest(), "big")


def environment_factory(
    environment: str | Callable[..., Environment] | None, arguments: Mapping[str, Any]
) -> Callable[[], Environment]:
    """Return a function that makes an environment for one attempt.

    environment: a factory or its dotted path; None: `SingleTurn`, one prompt and one completion.
    arguments: the factory's keyword arguments.
    An environment that is written for TRL's GRPO is played as a `TRLEnvironment`.

    Raises UsageError when the import or a first call fails, or the result is not an environment.
    """
    if environment is None:
        return SingleTurn
    if isinstance(environment, str):
        name, factory = environment, import_function(environment, key="environment")
    else:
        name, factory = name_of(environment), environment
    if not callable(factory):
        raise UsageError(f"environment: {name} is not a factory: give a class or a function that makes environments")
    make = partial(factory, **arguments)
    if is_instant(factory):
        make.instant = True  # type: ignore[attr-defined] # a partial takes attributes
    with users_code(f"environment_args: {name} cannot be made with {dict(arguments)}:", UsageError):
        first = make()
    if is_trl_environment(first):
        pool = Pool(make)
        pool.give(first)
        make = partial(TRLEnvironment, pool)
        first = make()
    missing = [method for method in ("reset", "step") if not callable(getattr(first, method, None))]
    if missing:
        raise UsageError(f"environment: {name} makes a {type(first).__name__}, which has no {' and no '.join(missing)}")
    if toolbox(first, name) is not None:  # tools without a schema are refused here
        make.offers_tools = True  # type: ignore[attr-defined] # a partial takes attributes
    if isinstance(first, Closing):
        with users_code(f"environment: {name}: close raised", UsageError):
            first.close()
    return make


def check_system_prompt(text: str | None, rollouts: RolloutSettings, problems: Iterable[Problem]) -> None:
    """Raise UsageError if the policy would not read the recipe's `system_prompt` first, at the first of the problems.

    An environment may begin with a message of its own: then it has to give the system message itself.
    """
    problem = next(iter(problems), None)
    if text is None or problem is None:
        return
    environment = rollouts.make_environment()
    with users_code("environment: reset raised", UsageError):
        first = messages(environment.reset(problem, seed=0))
        if isinstance(environment, Closing):
            environment.close()
    if first[0]["content"] != text:
        own = "the environment" if rollouts.make_environment is not SingleTurn else "the row's own prompt"
        raise UsageError(
            f"system_prompt: the policy would not read it: {own} begins with {show(first[0]['content'])} "
            f"({problem.where}): begin it with a system message, or remove system_prompt"
        )


def rollout_settings(
    sampling: SamplingSettings,
    environment: EnvironmentSettings,
    *,
    seed: int,
    make: Callable[..., Environment] | None = None,
) -> RolloutSettings:
    """Return how a recipe's attempts are rolled out; without an environment they have one turn.

    make: a factory in place of the one that the recipe names; it is called with the recipe's `environment_args` too.
    Raises UsageError when the environment cannot be made.
    """
    make_environment = environment_factory(make or environment.environment, environment.environment_args)
    return RolloutSettings(
        make_environment=make_environment,
        sampling=sampling.parameters,
        max_new_tokens=sampling.max_completion_length,
        max_turns=1 if make_environment is SingleTurn else environment.max_turns,
        step_timeout=environment.step_timeout,
        seed=seed,
    )
