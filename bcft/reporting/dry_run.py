"""What a run would be, before it costs anything: rows, steps, evaluation, parameters and memory.

Nothing is trained, no weights are loaded, nothing is written. Counts are exact: the real renderer makes the rows, and
the model is built without storage. Memory is a sum that a reader can check, not a measurement. What is not on this
machine while the Hub is unreachable is unknown; everything else is still printed.

The module loads no framework before it has asked whether the Hub answers: the libraries read `HF_HUB_OFFLINE` when they
are imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bcft.config.schema import (
    DataSettings,
    EnvironmentSettings,
    EvaluationSettings,
    ModelSettings,
    RoundSettings,
    RuleSettings,
    SamplingSettings,
    SelectionSettings,
    TrainingSettings,
)
from bcft.data.examples import make_examples
from bcft.data.loading import Splits, load_splits
from bcft.environments.base import rollout_settings
from bcft.reporting.hub import Missing, available, work_offline_if_unreachable
from bcft.reporting.tables import say
from bcft.runs.directory import quiet_libraries
from bcft.runs.distributed import rank, world_size
from bcft.runs.history import is_due
from bcft.selection.scoring import Scorer, success_function

if TYPE_CHECKING:
    from bcft.policy.chat_template import Renderer
    from bcft.policy.loading import Precision
    from bcft.reporting.memory import Outline

LARGE = 100_000_000
"""Parameters above which a model is hardly meant to train on a CPU."""

Line = tuple[str, str]
"""A name and its value; a line without a name continues the line above."""


@dataclass(frozen=True)
class Lengths:
    """The longest sequences of a run, in tokens."""

    trained: int
    sampled: int
    """Prompt included."""


@dataclass(frozen=True)
class _Parts:
    """What a run is made from, as far as it is on this machine."""

    splits: Splits | Missing
    outline: "Outline | Missing"
    renderer: "Renderer | Missing"
    precision: "Precision"
    longest: int
    """Most tokens of an example; 0 where the model is unknown."""


def dry_run_sft(
    *,
    model: ModelSettings,
    data: DataSettings,
    sampling: SamplingSettings,
    environment: EnvironmentSettings,
    selection: SelectionSettings,
    training: TrainingSettings,
    evaluation: EvaluationSettings,
    command_line: str,
    debug: bool = False,
) -> None:
    """Print what a run of `sft` would be; the last line is the command that starts it.

    Raises what the run would: UsageError for a model or a function, DataError for the dataset.
    """
    if rank() > 0:
        return
    work_offline_if_unreachable(_names(model, data))
    with quiet_libraries(debug=debug):
        parts = _parts(model, data, evaluation)
        graded = _graded(parts.splits, selection, environment.environment)
        rollout_settings(sampling, environment, seed=training.seed)  # raises where there is no such environment
        rows, count, lengths = _examples(parts, data, sampling)
        attempts, test = _attempts(evaluation, parts.splits, "test", graded=graded)
        lines = [
            ("data", str(parts.splits)),
            ("rows", rows),
            ("steps", f"{_sft_steps(parts.splits, training, count, exact=bool(lengths))}; {_batch(training)}"),
            ("evaluation", f"test: {test}"),
            ("", f"before and after training: {2 * attempts:,} attempts"),
            *_model_lines(parts, model, training, lengths=lengths, held_out_loss=True),
        ]
    _print(lines, command_line)


def dry_run_filtered(
    *,
    model: ModelSettings,
    data: DataSettings,
    sampling: SamplingSettings,
    environment: EnvironmentSettings,
    selection: SelectionSettings,
    rounds: RoundSettings,
    training: TrainingSettings,
    evaluation: EvaluationSettings,
    command_line: str,
    debug: bool = False,
) -> None:
    """Print what a run of `filtered` would be; the last line is the command that starts it.

    Raises what the run would: UsageError for a model or a function, DataError for the dataset.
    """
    if rank() > 0:
        return
    work_offline_if_unreachable(_names(model, data))
    with quiet_libraries(debug=debug):
        parts = _parts(model, data, evaluation)
        problems, lengths = _problems(parts, sampling, environment.environment)
        graded = _graded(parts.splits, selection, environment.environment, scorer=True)
        rollout_settings(sampling, environment, seed=training.seed)  # raises where there is no such environment
        prompts, replay = rounds.prompts_per_round, 0
        if isinstance(parts.splits, Splits):
            prompts = min(prompts, len(parts.splits.problems_to_attempt()))
            replay = len(parts.splits.replay)
        attempts = prompts * sampling.num_generations
        tokens = attempts * sampling.max_completion_length
        lines = [
            *problems,
            ("rounds", f"{rounds.num_rounds} of {prompts:,} prompts x {sampling.num_generations} generations = "
                       f"{attempts:,} attempts each"),
            ("", f"at most {tokens:,} tokens sampled per round ({sampling.max_completion_length} per attempt)"),
            ("steps", _round_steps(rounds, selection, training, attempts=attempts, prompts=prompts, replay=replay)),
            *_evaluations(rounds, evaluation, parts.splits, played=attempts, graded=graded),
            *_model_lines(parts, model, training, lengths=lengths, held_out_loss=False),
        ]  # fmt: skip
    _print(lines, command_line)


def _print(lines: Sequence[Line], command_line: str) -> None:
    first = ("dry run", "nothing is trained, no weights are loaded, no run directory is made")
    say("\n".join(f"{name:<12}{value}" for name, value in (first, *lines, ("to run it", command_line))), quiet=False)


# Data and training


def _examples(parts: _Parts, data: DataSettings, sampling: SamplingSettings) -> tuple[str, int, Lengths | None]:
    """Return a description of the training examples, their number, and the lengths.

    Without a tokenizer the number is that of the demonstrations, and there are no lengths.
    """
    if isinstance(parts.splits, Missing):
        return parts.splits, 0, None
    if isinstance(parts.renderer, Missing):
        return parts.renderer, len(parts.splits.train), None
    examples, counts = make_examples(
        parts.splits.train,
        parts.renderer,
        max_length=parts.longest,
        overlength=data.overlength,
        train_on=data.train_on,
    )
    prompts = parts.renderer.prompts([d.problem.prompt for d in (*parts.splits.test, *parts.splits.harder)])
    sampled = max(map(len, prompts), default=0) + sampling.max_completion_length
    return str(counts), len(examples), Lengths(max(len(example.input_ids) for example in examples), sampled)


def _problems(parts: _Parts, sampling: SamplingSettings, environment: str | None) -> tuple[list[Line], Lengths | None]:
    """Return the lines about data and prompts, and the lengths; None where the prompts are unknown."""
    splits, renderer = parts.splits, parts.renderer
    if isinstance(splits, Missing):
        return [("data", splits)], None
    problems = {key: problem.prompt for key, problem in splits.problems_to_attempt().items()}
    line = ("data", f"{len(problems):,} problems to attempt, {splits.held_out_words}")
    if environment:
        return [line, ("prompts", f"unknown: {environment} makes them during the rollout")], None
    if isinstance(renderer, Missing):
        return [line, ("prompts", renderer)], None
    counts = [len(ids) for ids in renderer.prompts(list(problems.values()))]
    longest = max(counts + [len(ids) for ids in renderer.prompts([d.problem.prompt for d in splits.held_out])])
    prompts = f"{sum(counts) / len(counts):.1f} tokens on average, the longest {max(counts)}"
    limit = sampling.max_completion_length
    return [line, ("prompts", prompts)], Lengths(max(counts) + limit, longest + limit)


def steps(training: TrainingSettings, examples: int) -> int:
    """Return how many optimizer steps training on so many examples takes, as transformers' Trainer counts them."""
    if training.max_steps >= 0:
        return training.max_steps
    size, whole = training.per_device_train_batch_size, training.dataloader_drop_last
    batches = examples // size if whole else math.ceil(examples / size)
    mine = batches // world_size() if whole else math.ceil(batches / world_size())
    epoch = max(math.ceil(mine / training.gradient_accumulation_steps), 1)
    return math.ceil(training.num_train_epochs * epoch)


def _sft_steps(splits: Splits | Missing, training: TrainingSettings, examples: int, *, exact: bool) -> str:
    """Return how many optimizer steps the run takes; at most, where the number of examples is not exact."""
    if training.max_steps < 0 and not examples:
        return str(splits)
    word = "" if exact or training.max_steps >= 0 else "at most "
    return f"{word}{steps(training, examples):,}"


def _round_steps(
    rounds: RoundSettings, rule: RuleSettings, training: TrainingSettings, *, attempts: int, prompts: int, replay: int
) -> str:
    """Return the most steps of a round: with all attempts in scope kept, and with the share above the quantile.

    attempts, prompts: of a round; replay: how many demonstrations there are to replay.
    """
    span = rounds.num_rounds if rounds.history == "all" else min(rounds.history, rounds.num_rounds)
    scope = attempts * span
    most = min(scope, prompts * span * (rule.max_per_problem or scope))
    share = min(most, round((1 - rule.keep_quantile) * scope))
    cases = []
    for kept in dict.fromkeys((most, share)):
        replayed = min(kept, replay)
        beside = f" beside {replayed:,} demonstrations" if replayed else ""
        cases.append(f"{steps(training, kept + replayed):,} if {kept:,} of {scope:,} are kept{beside}")
    return f"per round at most {', '.join(cases)}; {_batch(training)}"


def _batch(training: TrainingSettings) -> str:
    factors = (training.per_device_train_batch_size, training.gradient_accumulation_steps, world_size())
    length = f"num_train_epochs {training.num_train_epochs:g}" if training.max_steps < 0 else "max_steps"
    return "{}, {} rows per step (batch {} x accumulation {} x processes {})".format(
        length, math.prod(factors), *factors
    )


# Evaluation


def evaluated_rounds(rounds: RoundSettings, *, evaluated: int, played: int) -> int:
    """Return how many rounds are evaluated on dev if each trains; evaluated, played: attempts of one and of a round."""
    numbers = range(rounds.warmup_rounds + 1, rounds.num_rounds + 1)
    return sum(is_due(rounds, number, evaluated=evaluated, played=played) for number in numbers)


def _graded(
    splits: Splits | Missing, selection: SelectionSettings, environment: str | None, *, scorer: bool = False
) -> bool:
    """Return whether evaluations can measure success; check functions and references as the run does.

    scorer: whether the run scores trajectories as well.
    """
    problems, held_out = [], []
    if isinstance(splits, Splits):
        problems, held_out = ([d.problem for d in part] for part in (splits.train, splits.held_out))
    if scorer:
        scoring = Scorer.of(selection, held_out, environment=environment)
        scoring.check(problems)
        success = scoring.success
    else:
        success = success_function(selection, held_out, environment=environment)
    if isinstance(splits, Missing):
        return selection.success_func != ""
    return success is not None or environment is not None


def _evaluations(
    rounds: RoundSettings, evaluation: EvaluationSettings, splits: Splits | Missing, *, played: int, graded: bool
) -> list[Line]:
    """Return the lines about evaluations beside rounds; played: attempts of a round."""
    dev, dev_sum = _attempts(evaluation, splits, "dev", graded=graded)
    test, test_sum = _attempts(evaluation, splits, "test", graded=graded)
    times = 1 + evaluated_rounds(rounds, evaluated=dev, played=played)
    measured, rolled_out = times * dev + 2 * test, rounds.num_rounds * played
    share = 100 * measured / (measured + rolled_out)
    return [
        ("evaluation", f"dev: {dev_sum}, {times} times"),
        ("", f"test: {test_sum}, twice"),
        ("", f"{measured:,} attempts beside {rolled_out:,} of rounds: {share:.0f} % of all attempts"),
    ]


def _attempts(evaluation: EvaluationSettings, splits: Splits | Missing, split: str, *, graded: bool) -> tuple[int, str]:
    """Return the attempts of one evaluation, and the sum they come from; at most so many without the dataset."""
    from bcft.evaluation.held_out import HARDER_SAMPLES, samples_of  # noqa: PLC0415 - loads torch

    test = split == "test"
    samples = samples_of(evaluation, split, graded=graded)
    problems, harder, word = evaluation.eval_test_problems if test else evaluation.eval_dev_problems, 0, "at most "
    if isinstance(splits, Splits):
        problems, harder, word = len(splits.test if test else splits.dev), len(splits.harder) if test else 0, ""
    few = min(samples, HARDER_SAMPLES)
    total = problems * (1 + samples) + harder * (1 + few)
    more = f" + {harder:,} harder x (1 + {few})" if harder else ""
    return total, f"{word}{problems:,} problems x (1 greedy + {samples} sampled){more} = {total:,} attempts"


# Model and memory


def _model_lines(
    parts: _Parts, model: ModelSettings, training: TrainingSettings, *, lengths: Lengths | None, held_out_loss: bool
) -> list[Line]:
    shape, why = parts.outline, parts.precision.why
    if isinstance(shape, Missing):
        return [("model", shape), ("precision", why), ("memory", shape)]
    if shape.parameters > LARGE and why.startswith("cpu, float32"):
        why = f"{why}; bf16=true plans for a GPU that has it"
    lines = [("model", f"{model.model_name_or_path}: {shape}"), ("precision", why)]
    return lines + _memory_lines(
        shape, parts, model=model, training=training, lengths=lengths, held_out_loss=held_out_loss
    )


def _memory_lines(
    shape: "Outline",
    parts: _Parts,
    *,
    model: ModelSettings,
    training: TrainingSettings,
    lengths: Lengths | None,
    held_out_loss: bool,
) -> list[Line]:
    """Return the items and their sums, the largest of which is the peak; unknown lengths count as the longest."""
    from bcft.reporting.memory import free_memory, memory  # noqa: PLC0415 - loads torch

    longest = lengths or Lengths(parts.longest, parts.longest)
    items = memory(
        shape,
        parts.precision,
        model=model,
        training=training,
        trained=longest.trained,
        sampled=longest.sampled,
        held_out_loss=held_out_loss,
        room=free_memory(parts.precision),
    )
    always = sum(item.size for item in items["always"])
    totals = {part: always + sum(item.size for item in items[part]) for part in items if part != "always"}
    rows = "rows as counted" if lengths else f"rows of {parts.longest:,} tokens assumed, as max_length allows"
    lines = [("memory", f"estimated, not measured; of one process; {rows}")]
    for part, group in items.items():
        for i, item in enumerate(group):
            lines.append(("", f"{'' if i else part:<10}{_bytes(item.size):>9}  {item.name}: {item.formula}"))
    sums = ", ".join(f"{part} {_bytes(total)}" for part, total in totals.items())
    return [*lines, ("peak", f"about {_bytes(max(totals.values()))} (each with the items of `always`: {sums})")]


def _bytes(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u), (1, "bytes"))
    return f"{size / unit:.1f} {name}"


# What is on this machine


def _names(model: ModelSettings, data: DataSettings) -> list[str]:
    """Return the names that may be Hub ids."""
    return [name for name in (model.model_name_or_path, data.dataset_name, data.replay_dataset) if name]


def _parts(model: ModelSettings, data: DataSettings, evaluation: EvaluationSettings) -> _Parts:
    """Load the data, the tokenizer and the model's configuration."""
    from bcft.policy.loading import choose_precision, longest_row  # noqa: PLC0415 - reads HF_HUB_OFFLINE
    from bcft.reporting.memory import outline  # noqa: PLC0415 - reads HF_HUB_OFFLINE

    name = model.model_name_or_path
    splits = available(lambda: load_splits(data, evaluation), data.dataset_name)
    shape = available(lambda: outline(model), name)
    return _Parts(
        splits=splits,
        outline=shape,
        renderer=shape if isinstance(shape, Missing) else available(lambda: _renderer(model), name),
        precision=choose_precision(name, model),
        longest=0 if isinstance(shape, Missing) else longest_row(name, model, data.max_length),
    )


def _renderer(model: ModelSettings) -> "Renderer | Missing":
    """Load the renderer; a directory with only a configuration is a model to plan with, and has none."""
    from bcft.policy.loading import adapter_base, load_renderer, locate  # noqa: PLC0415 - reads HF_HUB_OFFLINE

    name = locate(model.model_name_or_path)
    places = [Path(place) for place in (name, adapter_base(name)) if place]
    if all(place.is_dir() and not [*place.glob("*token*"), *place.glob("vocab*")] for place in places):
        return Missing(f"unknown: {name} has no tokenizer")
    return load_renderer(model.model_name_or_path, model)
