"""What a run would be, before it costs anything: rows, steps, evaluation, parameters and memory.

Nothing is trained, no weights are loaded, nothing is written. Counts are exact: the real renderer makes the rows, and
the model is built without storage. Memory is a sum that a reader can check, not a measurement. What is not on this
machine while the Hub does not answer is unknown, and the rest is told all the same.
"""

import json
import math
import os
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bcft.config.loader import Recipe, load
from bcft.data.loading import SUFFIXES, Splits, load_splits
from bcft.errors import BcftError, DataError, UsageError
from bcft.reporting.tables import plain_console
from bcft.runs.directory import quiet_libraries
from bcft.runs.distributed import rank, world_size
from bcft.runs.history import its_turn

if TYPE_CHECKING:
    from bcft.policy.chat_template import Renderer
    from bcft.policy.loading import Precision
    from bcft.reporting.memory import Lengths, Outline

T = TypeVar("T")
PATIENCE = 3.0
"""Seconds the Hub may take to answer; the libraries would ask again for half a minute, once for each file."""
LARGE = 100_000_000
"""Parameters above which nobody means to train on a CPU."""


class Missing(str):
    """What cannot be told: `unknown`, and why in a few words."""


Line = tuple[str, object]
"""What is told, and its value; a line without a name goes on with the one above."""


def dry_run(recipe: Recipe) -> None:
    """Print what the run would be; the last line is the command that starts it.

    Raises what the run would: UsageError for a model or a function, DataError for the dataset.
    """
    if rank() > 0:
        return
    _do_without_an_absent_hub(recipe)
    from bcft.policy.loading import choose_precision
    from bcft.reporting.memory import Outline, outline  # these load torch

    with quiet_libraries(recipe):
        splits = _found(load_splits, recipe, "dataset_name")
        shape = _found(outline, recipe, "model_name_or_path")
        renderer = _found(_renderer, recipe, "model_name_or_path")
        precision = choose_precision(recipe)
        told, lengths = (_sft if recipe.command == "sft" else _filtered)(recipe, splits, renderer)
    lines: list[Line] = [("dry run", "nothing is trained, no weights are loaded, no run directory is made"), *told]
    large = isinstance(shape, Outline) and shape.parameters > LARGE and precision.why.startswith("cpu, float32")
    why = f"{precision.why}; bf16=true plans for a GPU that has it" if large else precision.why
    lines += [("model", f"{recipe['model_name_or_path']}: {shape}"), ("precision", why)]
    lines += [("memory", shape)] if isinstance(shape, Missing) else _memory_lines(recipe, shape, precision, lengths)
    console = plain_console()
    for name, value in [*lines, ("to run it", command(recipe))]:
        console.print(f"{name:<12}{value}", markup=False)


# What the run does


def _sft(recipe: Recipe, splits: Splits | Missing, renderer: Any) -> "tuple[list[Line], Lengths | None]":
    from bcft.data.examples import make_rows
    from bcft.policy.loading import longest_row

    rows: object = splits
    trained, word, lengths = 0, "at most ", None
    if isinstance(splits, Splits):
        trained, rows = len(splits.train), renderer
        if not isinstance(renderer, Missing):
            limit = longest_row(recipe)
            made, rows = make_rows(
                splits.train,
                renderer,
                max_length=limit,
                overlength=recipe["overlength"],
                train_on=recipe["train_on"],
            )
            prompts = renderer.prompts([d.problem.prompt for d in (*splits.test, *splits.harder)])
            sampled = max(map(len, prompts), default=0) + recipe["max_completion_length"]
            trained, word, lengths = len(made), "", (max(len(row.input_ids) for row in made), sampled)
    if recipe["max_steps"] >= 0:
        trained, word = 1, ""
    told = f"{word}{steps(recipe, trained):,}" if trained else splits
    each, text = _attempts(recipe, splits, "test", success=_tells_success(recipe, splits))
    return [
        ("data", splits),
        ("rows", rows),
        ("steps", f"{told}; {_batch(recipe)}"),
        ("evaluation", f"test: {text}"),
        ("", f"before and after training: {2 * each:,} attempts"),
    ], lengths


def _filtered(recipe: Recipe, splits: Splits | Missing, renderer: Any) -> "tuple[list[Line], Lengths | None]":
    asked, samples, rounds = (recipe[key] for key in ("prompts_per_round", "num_generations", "num_rounds"))
    limit, lengths = recipe["max_completion_length"], None
    lines: list[Line] = [("data", splits)]
    if isinstance(splits, Splits):
        problems = {d.problem.id: d.problem.prompt for d in splits.train}
        if not problems:
            raise DataError("no problems to attempt: the training split is empty once dev and test are taken out")
        asked = min(asked, len(problems))
        held = f"{len(splits.dev):,} dev and {len(splits.test):,} test problems held out"
        lines = [("data", f"{len(problems):,} problems to attempt, {held}"), ("prompts", renderer)]
        if recipe["environment"]:
            lines[-1] = ("prompts", f"what {recipe['environment']} shows is not known before it is played")
        elif not isinstance(renderer, Missing):
            counts = [len(ids) for ids in renderer.prompts(list(problems.values()))]
            held_out = [len(ids) for ids in renderer.prompts([d.problem.prompt for d in splits.held_out])]
            lines[-1] = ("prompts", f"{sum(counts) / len(counts):.1f} tokens in the mean, the longest {max(counts)}")
            lengths = max(counts) + limit, max(*counts, *held_out) + limit
    played, success = asked * samples, _tells_success(recipe, splits)
    dev, dev_text = _attempts(recipe, splits, "dev", success=success)
    test, test_text = _attempts(recipe, splits, "test", success=success)
    times = 1 + evaluated_rounds(recipe, evaluated=dev, played=played)
    measured, rolled = times * dev + 2 * test, rounds * played
    share = 100 * measured / (measured + rolled)
    return [
        *lines,
        ("rounds", f"{rounds} of {asked:,} prompts x {samples} generations = {played:,} attempts each"),
        ("", f"at most {played * limit:,} tokens sampled in a round ({limit} an attempt)"),
        ("steps", _round_steps(recipe, asked, replay=len(splits.replay) if isinstance(splits, Splits) else 0)),
        ("evaluation", f"dev: {dev_text}, {times} times"),
        ("", f"test: {test_text}, twice"),
        ("", f"{measured:,} attempts beside {rolled:,} of rounds: {share:.0f} % of all that is sampled"),
    ], lengths


def _round_steps(recipe: Recipe, asked: int, *, replay: int) -> str:
    """Tell the most steps of a round: with everything in its scope kept, and with the share above the quantile.

    replay: demonstrations there are to be replayed.
    """
    span = recipe["num_rounds"] if recipe["history"] == "all" else min(recipe["history"], recipe["num_rounds"])
    scope = asked * recipe["num_generations"] * span
    most = min(scope, asked * span * (recipe["max_per_problem"] or scope))
    share = min(most, round((1 - recipe["keep_quantile"]) * scope))
    parts = []
    for kept in dict.fromkeys((most, share)):
        shown = min(kept, replay)
        beside = f" beside {shown:,} demonstrations" if shown else ""
        parts.append(f"{steps(recipe, kept + shown):,} if {kept:,} of {scope:,} are kept{beside}")
    return f"a round at most {', '.join(parts)}; {_batch(recipe)}"


def steps(recipe: Recipe, rows: int) -> int:
    """Return how many optimizer steps training on so many rows takes, as transformers' Trainer counts them."""
    if recipe["max_steps"] >= 0:
        return int(recipe["max_steps"])
    size, whole = recipe["per_device_train_batch_size"], recipe["dataloader_drop_last"]
    batches = rows // size if whole else math.ceil(rows / size)
    mine = batches // world_size() if whole else math.ceil(batches / world_size())
    epoch = max(math.ceil(mine / recipe["gradient_accumulation_steps"]), 1)
    total: int = math.ceil(recipe["num_train_epochs"] * epoch)
    return total


def _batch(recipe: Recipe) -> str:
    parts = (recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"], world_size())
    length = f"num_train_epochs {recipe['num_train_epochs']:g}" if recipe["max_steps"] < 0 else "max_steps"
    how = "batch {} x accumulation {} x processes {}".format(*parts)
    return f"{length}, {math.prod(parts)} rows a step ({how})"


def evaluated_rounds(recipe: Recipe, *, evaluated: int, played: int) -> int:
    """Return how many rounds are evaluated on dev if each trains; evaluated, played: attempts of one and of a round."""
    rounds = range(recipe["warmup_rounds"] + 1, recipe["num_rounds"] + 1)
    return sum(its_turn(recipe, n, evaluated=evaluated, played=played) for n in rounds)


def _tells_success(recipe: Recipe, splits: Splits | Missing) -> bool:
    """Say whether evaluations can tell what is solved, with functions and references checked as the run does."""
    from bcft.rewards.base import import_function
    from bcft.rewards.math_answers import math_reward
    from bcft.rollout.sample import turns_of
    from bcft.selection.scoring import check_references, reward_names, success_function

    turns_of(recipe)
    names = reward_names(recipe) if recipe.command == "filtered" else []
    functions = [import_function(name, key="reward_funcs") for name in names]
    if isinstance(splits, Missing):
        return bool(recipe["success_func"] != "")
    if math_reward in functions:
        check_references([d.problem for d in splits.train])
    return (
        success_function(recipe, [d.problem for d in splits.held_out], functions) is not None
        or recipe["environment"] is not None
    )


def _attempts(recipe: Recipe, splits: Splits | Missing, split: str, *, success: bool) -> tuple[int, str]:
    """Return the attempts of one evaluation and how they come about; the most there can be without the dataset."""
    from bcft.evaluation.held_out import HARDER_SAMPLES

    samples = recipe[f"eval_{split}_samples"] if success else 0
    n, harder, word = recipe[f"eval_{split}_problems"], 0, "at most "
    if isinstance(splits, Splits):
        test = split == "test"
        n, harder, word = len(splits.test if test else splits.dev), len(splits.harder) if test else 0, ""
    few = min(samples, HARDER_SAMPLES)
    total = n * (1 + samples) + harder * (1 + few)
    more = f" + {harder:,} harder x (1 + {few})" if harder else ""
    return total, f"{word}{n:,} problems x (1 greedy + {samples} sampled){more} = {total:,} attempts"


def _renderer(recipe: Recipe) -> "Renderer | Missing":
    """Load the renderer; a directory of a configuration alone is a model to plan with, and has none."""
    from bcft.policy.loading import adapter_base, load_renderer, locate

    name = locate(recipe["model_name_or_path"])
    places = [Path(place) for place in (name, adapter_base(name)) if place]
    if all(place.is_dir() and not [*place.glob("*token*"), *place.glob("vocab*")] for place in places):
        return Missing(f"unknown: {name} has no tokenizer")
    return load_renderer(recipe)


def _memory_lines(recipe: Recipe, shape: "Outline", precision: "Precision", lengths: "Lengths | None") -> list[Line]:
    """Tell the items and the sums, the largest of which is the peak; rows nobody could count are `max_length` long."""
    import torch

    from bcft.reporting.memory import memory

    most = min(recipe["max_length"] or shape.context, shape.context)
    room = torch.cuda.mem_get_info()[0] if precision.device == "cuda" else None
    found = memory(recipe, shape, precision, lengths or (most, most), room=room)
    always = sum(size for _, size, _ in found["always"])
    totals = {part: always + sum(size for _, size, _ in items) for part, items in found.items() if part != "always"}
    why = "rows as counted" if lengths else f"rows of {most:,} tokens assumed, as max_length allows"
    lines: list[Line] = [("memory", f"estimated, not measured; of one process; {why}")]
    for part, items in found.items():
        lines += [("", f"{'' if i else part:<10}{_bytes(s):>9}  {n}: {how}") for i, (n, s, how) in enumerate(items)]
    sums = ", ".join(f"{part} {_bytes(total)}" for part, total in totals.items())
    return [*lines, ("peak", f"about {_bytes(max(totals.values()))} (with what is there always: {sums})")]


def _bytes(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u), (1, "bytes"))
    return f"{size / unit:.1f} {name}"


# What is at hand, and what to do next


def _found(find: Callable[[Recipe], T], recipe: Recipe, key: str) -> T | Missing:
    """Return what is found, or that it would have to come from the Hub, which is out of reach."""
    try:
        return find(recipe)
    except BcftError as error:
        from huggingface_hub.errors import LocalEntryNotFoundError

        cause = error.__cause__
        while cause and not isinstance(cause, (ConnectionError, LocalEntryNotFoundError)):
            cause = cause.__cause__
        if cause:
            return Missing(f"unknown: {recipe[key]} is not on this machine, and the Hub is out of reach")
        raise


def _do_without_an_absent_hub(recipe: Recipe) -> None:
    """Keep the libraries, which read it when they are loaded, from asking a Hub that does not answer."""
    names = (recipe["model_name_or_path"], recipe["dataset_name"])
    there = all(n.startswith("bcft:") or n.endswith(SUFFIXES) or Path(n).exists() for n in names)
    if not there and "HF_HUB_OFFLINE" not in os.environ and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _hub_answers() -> bool:
    hub = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(hub, timeout=PATIENCE).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # an answer, if not a kind one
    return True


def command(recipe: Recipe) -> str:
    """Return the command line that starts the run: the recipe, and every key that is not as its file has it."""
    try:
        in_file = load(recipe.command, recipe.path, {}, flags=recipe.flags).values if recipe.path else {}
    except UsageError:  # the file is whole only with what the command line adds
        in_file = {}
    words = ["bcft", recipe.command, *([recipe.path] if recipe.path else [])]
    for key in sorted(recipe.given):
        value = recipe[key]
        if key not in in_file or in_file[key] != value:
            words.append(f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return shlex.join([*words, *(f"--{flag}" for flag in sorted(recipe.flags - {"dry-run"}))])
