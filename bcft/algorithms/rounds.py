"""The phases of a round of filtered behavior cloning, and what follows the last one.

Each function returns its part of the round's record or the values of the next phase; `filtered_bc` calls them in order.
"""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcft.algorithms.learner import Learner
from bcft.algorithms.run import Run
from bcft.algorithms.scales import choose_scale
from bcft.config.loader import Config
from bcft.data.examples import draw_replay
from bcft.environments.base import step_checker
from bcft.errors import FaultError
from bcft.evaluation.results import Measured, stored
from bcft.policy.loading import save_policy
from bcft.reporting.tables import conclusion, print_table, round_line, scaled_name
from bcft.reporting.trackers import LOSSES, losses
from bcft.rollout.sample import roll_out
from bcft.runs.distributed import barrier, broadcast, rank
from bcft.runs.history import History
from bcft.runs.progress import Progress
from bcft.runs.storage import (
    KEPT,
    ROLLOUTS,
    SCORES,
    commit_round,
    file_hash,
    read_manifest,
    seal,
    sealed,
    storage,
    write_json,
    write_jsonl,
    write_manifest,
)
from bcft.selection.apply import Filtered, apply_filter, rule_of
from bcft.selection.scoring import Score, stored_scores
from bcft.types import TrainingExample, Trajectory


def load_weights(run: Run, learner: Learner, history: History, number: int) -> None:
    """Give the learner the weights that a round starts from, unless it has them."""
    start_from = history.weights_round_before(number)
    if start_from != history.weights_round_after(number - 1):
        with Progress(run.session.label(f"round {number}, load round {start_from}")):
            learner.restore(history.weights_path(start_from))


def roll_out_round(run: Run, learner: Learner, number: int, directory: Path) -> list[Trajectory]:
    """Return the trajectories of a round's attempts; those that are journaled already are not played again."""
    label = run.session.label(f"round {number}, roll out")
    attempts = run.attempts(number)
    return roll_out(learner.policy, attempts, run.rollouts, directory=directory, clock=run.clock, label=label)


def score_round(run: Run, history: History, trajectories: Sequence[Trajectory], directory: Path) -> list[Score]:
    """Score a round's trajectories, or read their scores. Raises FaultError when too many environments failed."""
    if sealed(directory, SCORES):
        return stored_scores(directory)
    during = f"round {history.last + 1}"
    return run.score(trajectories, directory, step=history.steps(history.last), during=during)


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
    with Progress(run.session.label(f"round {number}, select")):
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

    Weights that an interrupted run has trained on the same rows are taken as they are. Raises FaultError when nothing
    is kept and `on_empty` is `stop`.
    """
    rounds = run.config.rounds
    if number <= rounds.warmup_rounds:
        return Trained()
    if not examples:
        if rounds.on_empty == "stop":
            raise FaultError(f"round {number} kept nothing: {selection.metrics['note']}")
        return Trained()
    directory = history.path(number)
    rows, weights = broadcast(_saved(directory) if rank() == 0 else ("", {}))
    if weights:
        learner.restore(str(directory / "model"))
        return Trained(**weights)
    if rank() == 0:
        for file in directory.glob("evaluation.json*"):  # of other weights
            file.unlink()
    if rounds.init_from == "base" and history.weights_round_after(number - 1):
        learner.restore(history.weights_path(0))
    before = history.last_trained(number - 1)
    carry_from = history.path(before) / "model" if before and not rounds.reset_optimizer else None
    with Progress(run.session.label(f"round {number}, train")) as progress:
        fitted, state = learner.train(examples, number, carry_from=carry_from, progress=progress)
    figures = {name: getattr(fitted, name) for name in (part.name for part in dataclasses.fields(Trained))}
    if rank() == 0:
        with run.clock.phase("other"), Progress(run.session.label(f"round {number}, save")):
            write_jsonl(directory / LOSSES, losses(learner.logged))
            learner.save(directory / "model", state, {"rows": rows, "train": figures})
    return Trained(**figures)


def _saved(directory: Path) -> tuple[str, dict[str, Any]]:
    """Return the hash of a round's rows, and the figures of the training on them if its weights are whole."""
    rows = file_hash(directory / KEPT)
    manifest = read_manifest(directory / "model")
    return rows, manifest["train"] if manifest.get("rows") == rows else {}


def evaluate_round(
    run: Run, learner: Learner, history: History, number: int, trained: Trained, base_dev: Measured
) -> dict[str, Any]:
    """Evaluate on dev when the round is due and its weights are new; return its figures, empty when it is not due.

    An evaluation that is there counts all the same: the round was due before the run was given more rounds.
    """
    last_evaluated = max(n for n in range(number) if "eval" in history.records[n])
    weights_round = number if trained.steps else history.weights_round_before(number)
    if weights_round == history.weights_round_after(last_evaluated):
        return {}
    step = history.steps(number - 1) + trained.steps
    place = history.path(number)
    dev = stored(place)
    if not dev and not run.budget.is_due(number):
        return {}
    dev = dev or run.measure(learner, place, "dev", during=f"round {number}", step=step)
    return run.figures(learner, dev, base_dev, directory=history.path(0), during=f"round {number}")


def commit(run: Run, learner: Learner, history: History, record: Mapping[str, Any]) -> None:
    """Write the round's metrics and its manifest, print its line, delete weights that nothing will read."""
    number = history.last + 1
    directory = history.path(number)
    history.append(record)
    with Progress(run.session.label(f"round {number}, commit")):
        if rank() == 0:
            write_json(directory / "metrics.json", record)
            commit_round(directory, tokenizer=learner.policy.renderer.fingerprint)
            write_jsonl(run.session.path / "metrics.jsonl", history.records[1:])
            for past in set(range(number)) - history.rounds_to_keep():
                shutil.rmtree(history.path(past) / "model", ignore_errors=True)
        barrier()  # the other processes wait for the files
    run.session.say(round_line(record))


def conclude(run: Run, learner: Learner, history: History, base_test: Measured, base_dev: Measured) -> dict[str, Any]:
    """Test the best round, at the best of its scales, and write it as `best/`; return what `metrics.json` holds."""
    config, session, last = run.config, run.session, history.last
    best = history.best(last)
    if history.weights_round_after(best) != history.weights_round_after(last):
        learner.restore(history.weights_path(history.weights_round_after(best)))
    chosen = choose_scale(run, learner, history, best, base_dev)
    tested, name = base_test, scaled_name(best, chosen.scale)
    if best:
        place = chosen.place / "test"
        # As many samples as the base had: a run with more rounds may choose another number.
        tested = stored(place) or run.measure(
            learner, place, "test", during=name, step=history.steps(best), samples=base_test.samples
        )
    metrics: dict[str, Any] = {"base": base_test.summary, "best": tested.summary, "best_round": best, "rounds": last}
    metrics |= chosen.metrics | conclusion(base_test, tested)
    metrics["conclusion"] += chosen.words
    if not best and history.measured:
        metrics["conclusion"] = f"no round was better on dev than the base; {metrics['conclusion']}"
    if last < config.rounds.num_rounds and (reason := history.stop_reason()):
        metrics["stopped"] = reason
        session.say(f"stopped after round {last}: {reason}")
    if tested.summary:
        print_table({"base": base_test.summary, name: tested.summary}, quiet=session.quiet)
    if rank() == 0:
        with Progress(session.label("saving the best round")):
            write_best(run, learner, metrics)
    target = session.path / "best"
    following = config.evaluating(str(target))
    session.say(f"The model is in {target}, from {name}" + (f"; next: {following}" if following else ""))
    return metrics


def write_best(run: Run, learner: Learner, metrics: Mapping[str, Any]) -> None:
    """Write `best/`, `metrics.json`, and the manifest that commits the run."""
    path = run.session.path
    target = path / "best"
    with storage(target):
        target.mkdir(exist_ok=True)
        files = save_policy(learner.policy, target)
    write_json(path / "metrics.json", metrics)
    write_manifest(path, [*files, path / "metrics.json", path / "config.yaml"])
