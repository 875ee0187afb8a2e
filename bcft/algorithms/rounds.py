"""The phases of filtered behavior cloning, before, in and after a round.

Each function returns its part of the round's record or the values of the next phase; `filtered_bc` calls them in order.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcft.algorithms.learner import Learner
from bcft.algorithms.session import Session
from bcft.config.loader import Config
from bcft.data.examples import draw_replay, replay_examples
from bcft.data.loading import Splits
from bcft.environments.base import step_checker
from bcft.errors import FaultError
from bcft.evaluation.held_out import measure, samples_of
from bcft.evaluation.results import Measured, stored
from bcft.policy.loading import load_policy, longest_row, save_policy, with_adapter
from bcft.reporting.model_card import model_card
from bcft.reporting.sanity_check import PROBLEMS, sanity_check
from bcft.reporting.tables import conclusion, print_table, round_line
from bcft.rollout.episode import Attempt
from bcft.rollout.sample import draw, play_journaled, roll_out
from bcft.runs.clock import Clock
from bcft.runs.distributed import barrier, broadcast, rank
from bcft.runs.history import History, is_due
from bcft.runs.storage import (
    KEPT,
    ROLLOUTS,
    SCORES,
    commit_round,
    seal,
    sealed,
    storage,
    write_json,
    write_jsonl,
    write_manifest,
    write_text,
)
from bcft.selection.apply import Filtered, apply_filter, rule_of
from bcft.selection.scoring import Score, Scorer, stored_scores
from bcft.types import Problem, RolloutSettings, TrainingExample, Trajectory


@dataclass(frozen=True)
class Run:
    """What all rounds share."""

    config: Config
    splits: Splits
    session: Session
    problems: Mapping[str, Problem]
    rollouts: RolloutSettings
    scorer: Scorer
    clock: Clock


# Before the first round


def start(run: Run, history: History) -> tuple[Learner, list[TrainingExample]]:
    """Load the policy as it was after the last committed round, and record what the run depends on.

    Returns the learner, and the demonstrations to replay.
    """
    config, splits, session = run.config, run.splits, run.session
    note = run.scorer.check(list(run.problems.values()))
    if session.directory.drifted and rank() == 0:
        discard_stale(history)
    loaded = load_policy(history.weights_path(history.weights_round_after(history.last)), config.model)
    policy = with_adapter(loaded, config.model, seed=config.training.seed)
    learner = Learner(config, policy, session.path)
    if policy is not loaded and rank() == 0:  # a new adapter is saved as round 0
        learner.save(history.path(0) / "model", {})
    limit = longest_row(history.base_model, config.model, config.data.max_length)
    replay = replay_examples(splits.replay, policy.renderer, max_length=limit, train_on=config.data.train_on)
    session.say(f"model: {history.base_model} on {policy.precision.why}")
    session.say(f"data: {len(run.problems):,} problems to attempt, {splits.held_out_words}")
    if config.environment.environment:
        session.say(f"environment: {config.environment.environment}, at most {config.environment.max_turns} turns")
    if note:
        session.say(note)
    barrier()  # every process has read the directory before it is written
    session.directory.record([d.problem for d in (*splits.train, *splits.held_out)], splits.digest)
    return learner, replay


def discard_stale(history: History) -> None:
    """Delete what another recipe left and this one would read: an unfinished round and the evaluations to compare with.

    It happens before the new recipe is recorded: an interruption in between leaves a directory that still differs.
    """
    shutil.rmtree(history.path(history.last + 1), ignore_errors=True)
    for directory in history.directory.glob("round_*/test"):
        shutil.rmtree(directory)
    for file in history.path(0).glob("evaluation.json*"):
        file.unlink()


def evaluate_base(run: Run, learner: Learner, history: History) -> tuple[Measured, Measured]:
    """Evaluate the policy as it is, on test and on dev, unless its results are there; start the history with dev."""
    directory = history.path(0)
    test = stored(directory / "test") or _measure(run, learner, directory / "test", "test")
    dev = stored(directory) or _measure(run, learner, directory, "dev")
    history.start(dev.summary)
    run.clock.lap()
    return test, dev


def check_sanity(run: Run, learner: Learner, history: History, base_dev: Measured) -> None:
    """Roll out the first problems of round 1, which stay in its journal, and check that there is something to learn.

    Raises FaultError when there is not.
    """
    config = run.config
    attempts = round_attempts(run, 1)[: PROBLEMS * config.sampling.num_generations]
    directory, label = history.path(1), _label(run.session)
    with run.clock.phase("rollout"):
        trajectories = play_journaled(
            learner.policy, attempts, run.rollouts, directory=directory, clock=run.clock, label=label
        )
    check = sanity_check(
        _score(run, trajectories),
        run.problems,
        base_dev.summary,
        answers=run.scorer.answers,
        environment=config.environment.environment,
        require_success=config.selection.require_success,
        max_completion_length=config.sampling.max_completion_length,
    )
    run.session.say("\n".join(check.lines))
    if check.reason:
        raise FaultError(f"nothing can be learned: {check.reason}")


# The phases of a round


def load_weights(learner: Learner, history: History, number: int) -> None:
    """Give the learner the weights that a round starts from, unless it has them."""
    start_from = history.weights_round_before(number)
    if start_from != history.weights_round_after(number - 1):
        learner.restore(history.weights_path(start_from))


def round_attempts(run: Run, number: int) -> list[Attempt]:
    """Return a round's attempts: training problems, drawn without replacement."""
    return draw(
        run.problems.values(),
        number,
        seed=run.config.training.seed,
        prompts=run.config.rounds.prompts_per_round,
        samples=run.config.sampling.num_generations,
    )


def roll_out_round(run: Run, learner: Learner, number: int, directory: Path) -> list[Trajectory]:
    """Return the trajectories of a round's attempts; those that are journaled already are not played again."""
    attempts, label = round_attempts(run, number), _label(run.session)
    return roll_out(learner.policy, attempts, run.rollouts, directory=directory, clock=run.clock, label=label)


def score_round(run: Run, trajectories: Sequence[Trajectory], directory: Path) -> list[Score]:
    """Score a round's trajectories, or read their scores. Raises FaultError when too many environments failed."""
    return stored_scores(directory) if sealed(directory, SCORES) else _score(run, trajectories)


def _score(run: Run, trajectories: Sequence[Trajectory]) -> list[Score]:
    """Call the reward functions on one process: called twice they might answer differently."""
    scores: list[Score] = broadcast(run.scorer.score(trajectories, run.problems) if rank() == 0 else [])
    return scores


def scores_in_scope(
    config: Config, history: History, number: int, scores: Sequence[Score], recent: Mapping[int, list[Score]]
) -> dict[int, list[Score]]:
    """Return the scores to select from, by round: this round's, and those of the earlier rounds that `history` takes.

    recent: those of earlier rounds that are in memory.
    """
    span = number if config.rounds.history == "all" else config.rounds.history
    earlier = range(max(1, number - span + 1), number)
    return {n: recent.get(n) or stored_scores(history.path(n)) for n in earlier} | {number: list(scores)}


def select_round(
    run: Run,
    number: int,
    scope: Mapping[int, Sequence[Score]],
    replay: Sequence[TrainingExample],
    directory: Path,
) -> tuple[Filtered, list[TrainingExample]]:
    """Select, write and seal the decisions; return them, and the examples to train on: the kept ones and replayed ones.

    scope: the scores to select from, by round; replay: the demonstrations of which some are trained on as well.
    """
    config, seed = run.config, run.config.training.seed
    filtered = apply_filter(
        [score for n in sorted(scope) for score in scope[n]],
        rule_of(config.selection, seed=seed, number=number),
        run.problems,
        source="self",
        train_on=config.data.train_on,
        check_steps=step_checker(config.data.dataset_name, config.environment.environment),
    )
    examples = [*filtered.examples, *draw_replay(replay, number, seed=seed, most=len(filtered.examples))]
    if rank() == 0:
        with run.clock.phase("other"):
            filtered.write(directory, examples)
            seal(directory, ROLLOUTS, SCORES, KEPT)
    return filtered, examples


@dataclass(frozen=True)
class Trained:
    """What the training of a round adds to its record."""

    rows: int = 0
    tokens_supervised: int = 0
    steps: int = 0
    loss: float = 0.0
    weights_changed: bool = False
    entropy: float | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """`train` of the record."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "entropy"}

    @property
    def diversity(self) -> dict[str, float]:
        """The part of `diversity` that training measures."""
        return {} if self.entropy is None else {"entropy": self.entropy}


def train_round(
    run: Run,
    learner: Learner,
    history: History,
    number: int,
    examples: Sequence[TrainingExample],
    selection: Filtered,
) -> Trained:
    """Train on the examples and save the weights, except in a warm-up round and in one that kept nothing.

    Raises FaultError when nothing is kept and `on_empty` is `stop`.
    """
    rounds = run.config.rounds
    if number <= rounds.warmup_rounds:
        return Trained()
    if not examples:
        if rounds.on_empty == "stop":
            raise FaultError(f"round {number} kept nothing: {selection.metrics['note']}")
        return Trained()
    if rounds.init_from == "base" and history.weights_round_after(number - 1):
        learner.restore(history.weights_path(0))
    before = history.last_trained(number - 1)
    carry_from = history.path(before) / "model" if before and not rounds.reset_optimizer else None
    fitted, state = learner.train(examples, number, carry_from=carry_from)
    if rank() == 0:
        with run.clock.phase("other"):
            learner.save(history.path(number) / "model", state)
    return Trained(
        rows=fitted.rows,
        tokens_supervised=fitted.tokens_supervised,
        steps=fitted.steps,
        loss=fitted.loss,
        weights_changed=fitted.weights_changed,
        entropy=fitted.entropy,
    )


def evaluate_round(
    run: Run, learner: Learner, history: History, number: int, trained: Trained, base_dev: Measured
) -> dict[str, Any]:
    """Evaluate on dev when the round is due and its weights are new; return its figures, empty when it is not due."""
    config = run.config
    played = min(config.rounds.prompts_per_round, len(run.problems)) * config.sampling.num_generations
    each = 1 + _samples(run, "dev")
    due = is_due(config.rounds, number, evaluated=len(run.splits.dev) * each, played=played)
    last_evaluated = max(n for n in range(number) if "eval" in history.records[n])
    weights_round = number if trained.steps else history.weights_round_before(number)
    if not due or weights_round == history.weights_round_after(last_evaluated):
        return {}
    dev = _measure(run, learner, history.path(number), "dev")
    return {**dev.summary, "vs_base": conclusion(base_dev, dev).get("vs_base", {})}


def commit(run: Run, learner: Learner, history: History, record: Mapping[str, Any]) -> None:
    """Write the round's metrics and its manifest, print its line, delete weights that nothing will read."""
    number = history.last + 1
    directory = history.path(number)
    history.append(record)
    if rank() == 0:
        write_json(directory / "metrics.json", record)
        commit_round(directory, tokenizer=learner.policy.renderer.fingerprint)
        write_jsonl(run.session.path / "metrics.jsonl", history.records[1:])
        for past in set(range(number)) - history.rounds_to_keep():
            shutil.rmtree(history.path(past) / "model", ignore_errors=True)
    barrier()  # the other processes wait for the files
    run.session.say(round_line(record))


def conclude(run: Run, learner: Learner, history: History, base_test: Measured) -> dict[str, Any]:
    """Test the best round, write it as `best/`; return what `metrics.json` holds."""
    config, session, last = run.config, run.session, history.last
    best = history.best(last)
    if history.weights_round_after(best) != history.weights_round_after(last):
        learner.restore(history.weights_path(history.weights_round_after(best)))
    tested = base_test
    if best:
        place = history.path(best) / "test"
        tested = stored(place) or _measure(run, learner, place, "test")
    metrics = {"base": base_test.summary, "best": tested.summary, "best_round": best, "rounds": last}
    metrics |= conclusion(base_test, tested)
    if not best and history.success_known:
        metrics["conclusion"] = f"no round was better on dev than the base; {metrics['conclusion']}"
    if last < config.rounds.num_rounds and (reason := history.stop_reason()):
        metrics["stopped"] = reason
        session.say(f"stopped after round {last}: {reason}")
    if tested.summary:
        print_table({"base": base_test.summary, f"round {best}": tested.summary}, quiet=session.quiet)
    if rank() == 0:
        write_best(run, learner, metrics)
    target = session.path / "best"
    following = f"bcft evaluate {config.path or 'RECIPE'} --model_name_or_path {target}"
    session.say(f"The model is in {target}, from round {best}; next: {following}")
    return metrics


def write_best(run: Run, learner: Learner, metrics: Mapping[str, Any]) -> None:
    """Write `best/` with its card, `metrics.json`, and the manifest that commits the run."""
    config, path = run.config, run.session.path
    target = path / "best"
    with storage(target):
        target.mkdir(exist_ok=True)
        files = save_policy(learner.policy, target)
    card = model_card(
        metrics,
        command=config.command,
        base=config.model.model_name_or_path,
        dataset=config.data.dataset_name,
        split=config.data.dataset_train_split,
        data=f"the policy's own trajectories, round {metrics['best_round']} of {metrics['rounds']}",
        directory=target,
        adapter=learner.policy.adapter,
        recipe={key: config.values[key] for key in sorted(config.given)},
    )
    write_text(target / "README.md", card)
    write_json(path / "metrics.json", metrics)
    write_manifest(path, [*files, path / "metrics.json", path / "config.yaml"])


def _measure(run: Run, learner: Learner, directory: Path, split: str) -> Measured:
    return measure(
        learner.policy,
        run.splits,
        run.rollouts,
        split=split,
        samples=_samples(run, split),
        success=run.scorer.success,
        examples=[],
        directory=directory,
        quiet=run.session.quiet or split == "dev",
    )


def _samples(run: Run, split: str) -> int:
    graded = bool(run.scorer.success or run.config.environment.environment)
    return samples_of(run.config.evaluation, split, graded=graded)


def _label(session: Session) -> str:
    return "" if session.quiet else "roll out"
