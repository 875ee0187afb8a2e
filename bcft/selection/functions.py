"""The reward functions of a recipe, with its arguments, and the one of them that decides about success."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from bcft.config.schema import SelectionSettings
from bcft.errors import DataError, UsageError
from bcft.rewards.base import (
    REFERENCE_COLUMNS,
    Reward,
    answers_of,
    ask,
    import_function,
    name_of,
    reference,
    reward_functions,
    solved,
    users_code,
)
from bcft.rewards.signature import (
    TRL_ARGUMENTS,
    makes_reward,
    missing_columns,
    named_arguments,
    required,
    why_missing,
)
from bcft.types import Message, Problem, show

DEFAULT_REWARD = "bcft.rewards.math_reward"
"""The dotted path of the reward function, unless the recipe names others or has an environment."""


def reward_names(selection: SelectionSettings, *, environment: str | None) -> tuple[str, ...]:
    """Return the dotted paths of the reward functions: by default `DEFAULT_REWARD`, and none with an environment."""
    if selection.reward_funcs is not None:
        return selection.reward_funcs
    return () if environment else (DEFAULT_REWARD,)


def choose_functions(
    selection: SelectionSettings,
    *,
    environment: str | None,
    reward_funcs: Reward | str | Sequence[Reward | str] | None,
    own: Reward | None = None,
) -> tuple[tuple[Reward, ...], Reward | None]:
    """Return the reward functions with `reward_args` bound, and the one that decides about success, if any does.

    reward_funcs: replace those of the recipe. own: the function that the problems come with, in place of the default
    one; a recipe gives its name to list it beside others. Success is decided by `success_func`: a dotted path, or the
    name of one of the functions; without it by the only reward function.

    Raises UsageError with the key for a function that does not exist, several without a `success_func`, and an argument
    that no function takes.
    """
    given: Any = reward_funcs or reward_names(selection, environment=environment)
    items = [given] if isinstance(given, str) or callable(given) else given
    if own:
        by_default = reward_funcs is None and selection.reward_funcs is None
        items = [own if item == name_of(own) or (by_default and item == DEFAULT_REWARD) else item for item in items]
    functions = reward_functions(items)
    paths = [item if isinstance(item, str) else "" for item in items]
    success = _success(selection.success_func, functions, paths)
    others = [success] if success and not any(success is function for function in functions) else []
    everyone = [*functions, *others]
    _check_arguments(selection.reward_args, everyone)
    bound = [_bind(function, selection.reward_args) for function in everyone]
    decides = next((made for function, made in zip(everyone, bound, strict=True) if function is success), None)
    return tuple(bound[: len(functions)]), decides


def _success(name: str | None, functions: Sequence[Reward], paths: Sequence[str]) -> Reward | None:
    """Return the function that decides about success, of the reward functions if it is one of them."""
    if name == "":
        return None
    names = [{path, name_of(f), _path_of(f)} for f, path in zip(functions, paths, strict=True)]
    if name is not None:
        named = [function for function, own in zip(functions, names, strict=True) if name in own]
        return named[0] if len(named) == 1 else import_function(name, key="success_func")
    if len(functions) < 2:
        return functions[0] if functions else None
    example = next((n for n, function in enumerate(functions) if answers_of(function)), 0)
    raise UsageError(
        f"success_func: {len(functions)} reward functions ({', '.join(map(name_of, functions))}), and none is said to "
        f"decide about success: add `success_func: {paths[example] or _path_of(functions[example])}` if its 1.0 means "
        "solved, or `success_func: ''` if no reward means that"
    )


def _path_of(function: Reward) -> str:
    """Return the dotted path of a function, or its name if it cannot be imported by a path."""
    module, name = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", ""))
    importable = module and module != "__main__" and name.isidentifier()
    return f"{module}.{name}" if importable else name_of(function)


def _check_arguments(arguments: Mapping[str, Any], functions: Sequence[Reward]) -> None:
    """Raise UsageError for one of `reward_args` that no function takes."""
    taken = sorted({name for function in functions for name in named_arguments(function)})
    for name in arguments:
        if name in TRL_ARGUMENTS:
            raise UsageError(f"reward_args: {name} is given with every batch: leave it out")
        if name not in taken:
            names = ", ".join(map(name_of, functions)) or "there is none"
            raise UsageError(
                f"reward_args: no reward function ({names}) names {name} in its signature"
                + (f"; there are {', '.join(taken)}" if taken else "")
            )


def _bind(function: Reward, arguments: Mapping[str, Any]) -> Reward:
    """Return a function with the arguments that it names; of one that makes a reward function, what it makes."""
    own = {name: value for name, value in arguments.items() if name in named_arguments(function)}
    if not makes_reward(function):
        return functools.partial(function, **own) if own else function
    name = name_of(function)
    if missing := [parameter for parameter in required(function) if parameter not in own]:
        raise UsageError(
            f"reward_args: {name} takes no completions, so it should make a reward function: give it "
            f"{', '.join(missing)}"
        )
    with users_code(f"reward_args: {name} raised", UsageError):
        made = function(**own)
    if not callable(made):
        raise UsageError(f"reward_funcs: {name} takes no completions, and returned {show(made)}, not a reward function")
    return made  # type: ignore[no-any-return]


def check_columns(functions: Sequence[Reward], problems: Sequence[Problem], *, row: str) -> None:
    """Raise DataError when a function needs a column that none of the problems has; row: what a problem is from."""
    columns = {key for problem in problems for key in problem.columns}
    for function in functions:
        if problems and (missing := missing_columns(function, columns)):
            raise DataError(why_missing(function, missing, columns, row=row))


def check_references(function: Reward, problems: Sequence[Problem]) -> str:
    """Grade each reference against itself: a refused one would make every attempt at its problem wrong.

    Returns what a function says that has a check of its own; else ''. Raises DataError with the first reference that
    the function does not accept.
    """
    answers = answers_of(function)
    if answers and answers.check:
        return answers.check(problems)
    texts = [reference(problem) for problem in problems]
    if "" in texts:
        bare = problems[texts.index("")]
        raise DataError(
            f"{bare.where}: {name_of(function)} needs a reference answer, and this row has none ({texts.count('')} of "
            f"{len(texts)} rows): add a column {' or '.join(REFERENCE_COLUMNS)}, or name other reward functions (the "
            f"kept rows of a run hold demonstrations, for sft)"
        )
    names = [name for name in REFERENCE_COLUMNS if any(name in problem.columns for problem in problems)]
    columns = names or [REFERENCE_COLUMNS[0]]
    questions = [
        Problem(problem.id, problem.prompt, {**problem.columns, **dict.fromkeys(columns, text)}, problem.where)
        for problem, text in zip(problems, texts, strict=True)
    ]
    grades = ask(function, questions, [_reply(text, problem) for text, problem in zip(texts, problems, strict=True)])
    refused = [
        question for question, grade in zip(questions, grades, strict=True) if grade is None or not solved(grade)
    ]
    if refused:
        more = f" (nor those of {len(refused) - 1} more rows)" if len(refused) > 1 else ""
        raise DataError(
            f"{refused[0].where}: {name_of(function)} does not accept the reference {reference(refused[0])[-60:]!r} "
            f"as its own solution{more}: correct or remove it, or name other reward functions"
        )
    return ""


def _reply(text: str, problem: Problem) -> str | list[Message]:
    return text if isinstance(problem.prompt, str) else [{"role": "assistant", "content": text}]


def have_references(problems: Sequence[Problem]) -> bool:
    """Return whether there are problems, and every one has a reference answer."""
    given = [[problem.columns.get(name) for name in REFERENCE_COLUMNS] for problem in problems]
    return bool(problems) and all(any(value is not None for value in values) for values in given)
