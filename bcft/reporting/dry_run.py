"""What a run would be, before it costs anything: rows, steps, evaluation, parameters and memory.

Everything that a run refuses before it loads weights is refused here, in the same order. Nothing is trained, no weights
are loaded, nothing is written. Counts are exact: the real renderer makes the rows, and the model is built without
storage. Memory is a sum that a reader can check, not a measurement. What is not on this machine while the Hub is
unreachable is unknown; everything else is still printed.

The module loads no framework before it has asked whether the Hub answers: the libraries read `HF_HUB_OFFLINE` when they
are imported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcft.config.schema import (
    DataSettings,
    EngineSettings,
    EnvironmentSettings,
    EvaluationSettings,
    ModelSettings,
    RoundSettings,
    SamplingSettings,
    SelectionSettings,
    SharingSettings,
    TrainingSettings,
)
from bcft.data.checks import check_prompts, without_special_tokens
from bcft.data.examples import held_out_examples, make_examples, replay_examples
from bcft.data.loading import Splits, load_splits
from bcft.data.sources import BUILDERS
from bcft.data.weights import scaled
from bcft.environments.base import check_system_prompt, rollout_settings
from bcft.errors import UsageError
from bcft.reporting.costs import Line, batch, before_and_after, evaluations, round_steps, sft_steps, weight_lines
from bcft.reporting.hub import Missing, available, work_offline_if_unreachable
from bcft.reporting.report import check_against
from bcft.reporting.sharing import check_push
from bcft.reporting.tables import say
from bcft.rewards.base import Reward
from bcft.runs.directory import quiet_libraries
from bcft.runs.disk import copies_of_rounds, copies_of_sft
from bcft.runs.distributed import rank
from bcft.selection.scoring import Scorer
from bcft.training.tokens import longest_example
from bcft.types import Environment

if TYPE_CHECKING:
    from bcft.policy.chat_template import Renderer
    from bcft.policy.loading import Precision
    from bcft.reporting.memory import Outline

LARGE = 100_000_000
"""Parameters above which a model is hardly meant to train on a CPU."""


@dataclass(frozen=True)
class Plan:
    """A run as it was asked for: the sections of its configuration, and what Python gives in place of names."""

    model: ModelSettings
    data: DataSettings
    sampling: SamplingSettings
    engine: EngineSettings
    environment: EnvironmentSettings
    selection: SelectionSettings
    rounds: RoundSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    sharing: SharingSettings
    command_line: str
    debug: bool = False
    rows: Sequence[Mapping[str, Any]] | None = None
    """In place of the dataset."""
    reward_funcs: Sequence[Reward | str] | None = None
    make_environment: Callable[..., Environment] | None = None


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
    notes: tuple[str, ...]
    """About rows that repeat a prompt, and about references; '' where there is nothing to say."""
    graded: bool
    """Whether evaluations can measure success or a reward."""
    outline: "Outline | Missing"
    renderer: "Renderer | Missing"
    precision: "Precision"
    longest: int
    """Most tokens of an example; 0 where the model is unknown."""


def dry_run_sft(plan: Plan) -> None:
    """Print what a run of `sft` would be; the last line is the command that starts it.

    Raises what the run would before it loads weights: UsageError, DataError, StorageError.
    """
    if rank() > 0:
        return
    _check_push(plan)
    work_offline_if_unreachable(_names(plan))
    with quiet_libraries(debug=plan.debug):
        parts = _parts(plan, plays=False)
        rows, count, lengths = _examples(parts, plan)
        _check_disk(parts, plan, plays=False)
        steps = sft_steps(parts.splits, plan.training, count, exact=bool(lengths))
        lines = [
            ("data", str(parts.splits)),
            ("rows", rows),
            ("steps", f"{steps}; {batch(plan.training)}"),
            *before_and_after(plan.evaluation, parts.splits, graded=parts.graded),
            *_model_lines(parts, plan, lengths=lengths, held_out_loss=True),
        ]
    _print(lines, plan.command_line)


def dry_run_filtered(plan: Plan) -> None:
    """Print what a run of `filtered` would be; the last line is the command that starts it.

    Raises what the run would before it loads weights: UsageError, DataError, StorageError.
    """
    if rank() > 0:
        return
    if plan.evaluation.against:
        check_against(Path(plan.evaluation.against))
    _check_push(plan)
    work_offline_if_unreachable(_names(plan))
    with quiet_libraries(debug=plan.debug):
        parts = _parts(plan, plays=True)
        replay_note = _replay(parts, plan)
        problems, lengths = _problems(parts, plan)
        _check_disk(parts, plan, plays=True)
        rounds, samples, limit = plan.rounds, plan.sampling.num_generations, plan.sampling.max_completion_length
        prompts, replay = rounds.prompts_per_round, 0
        if isinstance(parts.splits, Splits):
            prompts = min(prompts, len(parts.splits.problems_to_attempt()))
            replay = len(parts.splits.replay)
        attempts = prompts * samples
        most = round_steps(rounds, plan.selection, plan.training, attempts=attempts, prompts=prompts, replay=replay)
        lines = [
            *problems,
            *(("", note) for note in (*parts.notes, replay_note) if note),
            ("rounds", f"{rounds.num_rounds} of {prompts:,} prompts x {samples} generations = "
                       f"{attempts:,} attempts each"),
            ("", f"at most {attempts * limit:,} tokens sampled per round ({limit} per attempt)"),
            ("steps", most),
            *weight_lines(plan.selection),
            *evaluations(rounds, plan.evaluation, parts.splits, played=attempts, graded=parts.graded),
            *_model_lines(parts, plan, lengths=lengths, held_out_loss=False),
        ]  # fmt: skip
    _print(lines, plan.command_line)


def _check_push(plan: Plan) -> None:
    check_push(plan.sharing, plan.model, Path(plan.training.output_dir), finished=False)


def _print(lines: Sequence[Line], command_line: str) -> None:
    first = ("dry run", "nothing is trained, no weights are loaded, no run directory is made")
    say("\n".join(f"{name:<12}{value}" for name, value in (first, *lines, ("to run it", command_line))), quiet=False)


# Data


def _examples(parts: _Parts, plan: Plan) -> tuple[str, int, Lengths | None]:
    """Return a description of the training examples, their number, and the lengths.

    Without a tokenizer the number is that of the demonstrations, and there are no lengths.
    """
    splits, renderer, data = parts.splits, parts.renderer, plan.data
    if isinstance(splits, Missing):
        return splits, 0, None
    if isinstance(renderer, Missing):
        return renderer, len(splits.train), None
    demonstrations, note = without_special_tokens(splits.train, renderer, special_tokens=data.special_tokens)
    limit, train_on = parts.longest, data.train_on
    examples, counts = make_examples(
        demonstrations, renderer, max_length=limit, overlength=data.overlength, train_on=train_on
    )
    words = "; ".join(filter(None, [str(counts), note, scaled(examples, plan.training)[1]]))
    for part in (splits.dev, splits.test):
        held_out_examples(part, renderer, special_tokens=data.special_tokens, max_length=limit, train_on=train_on)
    longest = longest_example(examples)
    if plan.environment.environment:  # what it shows beside the prompt, such as tools, is not known here
        return words, len(examples), Lengths(longest, limit)
    attempted = [d.problem for d in (*splits.test, *splits.harder)]
    prompts = renderer.prompts([p.prompt for p in attempted], [p.template_kwargs for p in attempted])
    sampled = max(map(len, prompts), default=0) + plan.sampling.max_completion_length
    return words, len(examples), Lengths(longest, sampled)


def _replay(parts: _Parts, plan: Plan) -> str:
    """Check the demonstrations to replay as far as they can be rendered here; return a note about them, or ''."""
    splits, renderer, data = parts.splits, parts.renderer, plan.data
    if isinstance(splits, Missing) or isinstance(renderer, Missing):
        return ""
    demonstrations, note = without_special_tokens(splits.replay, renderer, special_tokens=data.special_tokens)
    replay = replay_examples(demonstrations, renderer, max_length=parts.longest, train_on=data.train_on)
    return "; ".join(filter(None, (note, scaled(replay, plan.training)[1])))


def _problems(parts: _Parts, plan: Plan) -> tuple[list[Line], Lengths | None]:
    """Return the lines about data and prompts, and the lengths; None where the prompts are unknown."""
    splits, renderer, environment = parts.splits, parts.renderer, plan.environment.environment
    if isinstance(splits, Missing):
        return [("data", splits)], None
    problems = list(splits.problems_to_attempt().values())
    line = ("data", f"{len(problems):,} problems to attempt, {splits.held_out_words}")
    if environment:
        return [line, ("prompts", f"unknown: {environment} makes them during the rollout")], None
    if isinstance(renderer, Missing):
        return [line, ("prompts", renderer)], None
    both = [problems, [d.problem for d in splits.held_out]]
    counts, others = (
        [len(ids) for ids in renderer.prompts([p.prompt for p in part], [p.template_kwargs for p in part])]
        for part in both
    )
    prompts = f"{sum(counts) / len(counts):.1f} tokens on average, the longest {max(counts)}"
    limit = plan.sampling.max_completion_length
    return [line, ("prompts", prompts)], Lengths(max(counts) + limit, max(counts + others) + limit)


# Model and memory


def _model_lines(parts: _Parts, plan: Plan, *, lengths: Lengths | None, held_out_loss: bool) -> list[Line]:
    shape, why = parts.outline, parts.precision.why
    if isinstance(shape, Missing):
        return [("model", shape), ("precision", why), ("memory", shape)]
    if shape.parameters > LARGE and why.startswith("cpu, float32"):
        why = f"{why}; bf16=true plans for a GPU that has it"
    lines = [("model", f"{plan.model.model_name_or_path}: {shape}"), ("precision", why)]
    return lines + _memory_lines(shape, parts, plan, lengths=lengths, held_out_loss=held_out_loss)


def _memory_lines(
    shape: "Outline", parts: _Parts, plan: Plan, *, lengths: Lengths | None, held_out_loss: bool
) -> list[Line]:
    """Return the items and their sums, the largest of which is the peak; unknown lengths count as the longest."""
    from bcft.reporting.memory import free_memory, memory  # noqa: PLC0415 - loads torch

    longest = lengths or Lengths(parts.longest, parts.longest)
    items = memory(
        shape,
        parts.precision,
        model=plan.model,
        training=plan.training,
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


def _names(plan: Plan) -> list[str]:
    """Return the names that may be Hub ids."""
    data = plan.data
    parts = [str(part["path"]) for part in data.datasets or () if part["path"] not in BUILDERS]
    datasets = () if plan.rows else (data.dataset_name, *parts)
    return [name for name in (plan.model.model_name_or_path, *datasets, data.replay_dataset) if name]


def _parts(plan: Plan, *, plays: bool) -> _Parts:
    """Load data, functions, tokenizer and the model's configuration, and check them in the order of a run.

    plays: whether training problems are attempted, so that rows need no completion.
    """
    from bcft.policy.loading import choose_precision, longest_row  # noqa: PLC0415 - reads HF_HUB_OFFLINE
    from bcft.reporting.memory import outline  # noqa: PLC0415 - reads HF_HUB_OFFLINE
    from bcft.training.checks import check_training  # noqa: PLC0415 - loads torch

    name, data = plan.model.model_name_or_path, plan.data
    splits = available(
        lambda: load_splits(data, plan.evaluation, train=plan.rows, demonstrations=not plays), data.source_name
    )
    if plays and isinstance(splits, Splits):
        splits.require_dev(plan.evaluation.eval_dev_problems)
    notes, graded = _functions(plan, splits, plays=plays)
    check_training(plan.training)
    if not plays and isinstance(splits, Splits) and plan.training.eval_strategy != "no":
        _require_dev_rows(splits)
    renderer = available(lambda: _renderer(plan.model), name)
    shape = available(lambda: outline(plan.model), name)
    if isinstance(splits, Splits) and not isinstance(renderer, Missing):
        trained = splits.problems_to_attempt().values() if plays else (d.problem for d in splits.train)
        check_prompts(
            chain(trained, (d.problem for d in splits.held_out)), renderer, special_tokens=data.special_tokens
        )
    return _Parts(
        splits=splits,
        notes=notes,
        graded=graded,
        outline=shape,
        renderer=renderer,
        precision=choose_precision(name, plan.model),
        longest=0 if isinstance(shape, Missing) else longest_row(name, plan.model, data.max_length),
    )


def _require_dev_rows(splits: Splits) -> None:
    """Raise UsageError without dev rows that have a solution."""
    if not any(d.answered for d in splits.dev):
        raise UsageError("eval_strategy: there are no dev rows to take a loss on: raise eval_dev_problems, or set no")


def _check_disk(parts: _Parts, plan: Plan, *, plays: bool) -> None:
    from bcft.policy.loading import check_disk  # noqa: PLC0415 - reads HF_HUB_OFFLINE

    if isinstance(parts.outline, Missing):
        return
    check_disk(
        Path(plan.training.output_dir),
        plan.model.model_name_or_path,
        plan.model,
        plan.training,
        copies=copies_of_rounds(plan.rounds) if plays else copies_of_sft(plan.training),
        optimizer=not plan.rounds.reset_optimizer if plays else None,
    )


def _functions(plan: Plan, splits: Splits | Missing, *, plays: bool) -> tuple[tuple[str, ...], bool]:
    """Import and check environment and rewards; return notes, and whether evaluations can measure anything."""
    rollouts = rollout_settings(plan.sampling, plan.environment, seed=plan.training.seed, make=plan.make_environment)
    environment, held_out, own = plan.environment.environment, [], None
    if isinstance(splits, Splits):
        held_out, own = [d.problem for d in splits.held_out], splits.reward
        trained = (d.problem for d in splits.train)
        check_system_prompt(plan.data.system_prompt, rollouts, trained if plays else held_out)
    scorer = Scorer.of(plan.selection, held_out, environment=environment, reward_funcs=plan.reward_funcs, own=own)
    if isinstance(splits, Missing):
        return (), True
    if not plays:
        return (), scorer.measures != "nothing"
    conflicts = splits.note_conflicts(None if environment else scorer.columns_read)
    references = scorer.check(list(splits.problems_to_attempt().values()))
    return (conflicts, references), scorer.measures != "nothing"


def _renderer(model: ModelSettings) -> "Renderer | Missing":
    """Check the model and return its renderer; a directory with only a configuration, to plan with, has none."""
    from bcft.policy.loading import adapter_base, check_model, locate  # noqa: PLC0415 - reads HF_HUB_OFFLINE

    name = locate(model.model_name_or_path, model)
    places = [Path(place) for place in (name, adapter_base(name)) if place]
    if all(place.is_dir() and not [*place.glob("*token*"), *place.glob("vocab*")] for place in places):
        return Missing(f"unknown: {name} has no tokenizer")
    return check_model(model.model_name_or_path, model).renderer
