"""Filtered behavior cloning: rounds of roll out, score, select, train and evaluate.

`filtered_bc` is the loop; the phases are functions of `rounds`. Two things have state: the weights (`Learner`) and the
run directory, whose committed rounds `History` holds. Phases exchange frozen values.

Re-running the same command resumes. A round counts once its manifest is written. Of an unfinished round nothing that
was paid for is lost: trajectories and the answers of reward functions are journaled, of evaluations as well, and saved
weights are not trained again. Only selection runs again, on the same scores. A higher `num_rounds` prolongs
a finished run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bcft.algorithms.opening import evaluate_base, start, try_first_problems
from bcft.algorithms.rounds import (
    commit,
    conclude,
    evaluate_round,
    load_weights,
    roll_out_round,
    score_round,
    scores_in_scope,
    select_round,
    train_round,
)
from bcft.algorithms.run import Run
from bcft.algorithms.session import Session
from bcft.config.loader import Config
from bcft.data.loading import Splits
from bcft.evaluation.metrics import diversity, tally
from bcft.generation import agreement
from bcft.reporting.tables import ROUNDS, round_line
from bcft.runs.clock import Clock
from bcft.runs.distributed import rank
from bcft.runs.history import History
from bcft.selection.scoring import Score, Scorer
from bcft.types import Problem, RolloutSettings


@dataclass(frozen=True)
class RoundRecord:
    """What one round did, a part for each phase: a line of `metrics.jsonl`."""

    round: int
    rollout: Mapping[str, Any]
    diversity: Mapping[str, Any]
    selection: Mapping[str, Any]
    train: Mapping[str, Any]
    eval: Mapping[str, Any]
    """On dev, against the base; empty for a round that is not evaluated."""
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the line, without an empty evaluation."""
        parts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        return {name: part for name, part in parts.items() if name != "eval" or part}


def filtered_bc(
    config: Config,
    splits: Splits,
    session: Session,
    *,
    problems: Mapping[str, Problem],
    rollouts: RolloutSettings,
    scorer: Scorer,
    redraw: Callable[[], None],
) -> dict[str, Any]:
    """Run the rounds that are left, test the best one and write it; return what `metrics.json` holds.

    redraw: called on rank 0 after each round.
    """
    clock, history = Clock(), History(session.path, config.rounds, base_model=config.model.model_name_or_path)
    run = Run(config, splits, session, problems, rollouts, scorer, clock)
    learner, replay = start(run, history)
    check = try_first_problems(run, learner, history)
    base_test, base_dev = evaluate_base(run, learner, history, check)
    session.say("\n" + "\n".join([ROUNDS, *map(round_line, history.records)]))
    recent: dict[int, list[Score]] = {}

    while number := history.next_round():
        load_weights(run, learner, history, number)
        directory = history.path(number)
        with clock.phase("rollout"):
            trajectories = roll_out_round(run, learner, number, directory)
            compared = agreement(run.rollouts)
        with clock.phase("score"):
            scores = score_round(run, history, trajectories, directory)
        with clock.phase("select"):
            recent = scores_in_scope(config, history, number, scores, recent)
            selection, examples = select_round(run, number, recent, replay, directory)
        with clock.phase("train"):
            trained = train_round(run, learner, history, number, examples, selection)
        with clock.phase("evaluate"):
            evaluation = evaluate_round(run, learner, history, number, trained, base_dev)
        record = RoundRecord(
            round=number,
            rollout=tally(scores) | compared,
            diversity=diversity(scores) | trained.diversity,
            selection=selection.metrics,
            train=trained.metrics,
            eval=evaluation,
            seconds=clock.lap(),
        )
        commit(run, learner, history, record.to_json())
        session.trackers.follow()
        if rank() == 0:
            redraw()
    return conclude(run, learner, history, base_test, base_dev)
