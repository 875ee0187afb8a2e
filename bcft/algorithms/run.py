"""What all rounds of filtered behavior cloning share, and what they do with it: play, score and measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bcft.algorithms.learner import Learner
from bcft.algorithms.session import Session
from bcft.config.loader import Config
from bcft.data.loading import Splits
from bcft.evaluation.budget import Budget, samples_of
from bcft.evaluation.divergence import divergence, record_base
from bcft.evaluation.held_out import measure
from bcft.evaluation.results import Measured
from bcft.reporting.tables import conclusion
from bcft.rollout.episode import Attempt
from bcft.rollout.sample import draw
from bcft.runs.clock import Clock
from bcft.runs.distributed import broadcast, rank
from bcft.selection.scoring import Score, Scorer
from bcft.selection.store import answers_path
from bcft.types import Problem, RolloutSettings, Trajectory


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

    @cached_property
    def budget(self) -> Budget:
        """How often and with how many attempts the run is evaluated."""
        config, splits = self.config, self.splits
        return Budget.of(
            config.rounds,
            config.evaluation,
            dev=len(splits.dev),
            test=len(splits.test),
            harder=len(splits.harder),
            played=min(config.rounds.prompts_per_round, len(self.problems)) * config.sampling.num_generations,
            graded=self.scorer.measures != "nothing",
        )

    def attempts(self, number: int) -> list[Attempt]:
        """Return a round's attempts: training problems, drawn without replacement."""
        return draw(
            self.problems.values(),
            number,
            seed=self.config.training.seed,
            prompts=self.config.rounds.prompts_per_round,
            samples=self.config.sampling.num_generations,
        )

    def score(self, trajectories: Sequence[Trajectory], directory: Path, *, step: int, during: str) -> list[Score]:
        """Ask the reward functions on one process, once for each attempt: again they might answer differently.

        directory: of the round, where the answers are kept; step: optimizer steps so far; during: what, as `round 3`.
        """
        store, label = answers_path(directory), self.session.label(f"{during}, score")
        scores: list[Score] = broadcast(
            self.scorer.score(trajectories, self.problems, store=store, step=step, label=label) if rank() == 0 else []
        )
        return scores

    def measure(
        self,
        learner: Learner,
        directory: Path,
        split: str,
        *,
        during: str,
        step: int,
        samples: int | None = None,
        keep: bool = False,
    ) -> Measured:
        """Evaluate the policy on `dev` or `test`.

        during: what, as `round 3`; samples: of each problem, None: as the recipe says; keep: as in `measure`.
        """
        return measure(
            learner.policy,
            self.splits,
            self.rollouts,
            split=split,
            samples=self._samples(split) if samples is None else samples,
            scorer=self.scorer,
            examples=[],
            directory=directory,
            label=self.session.label(f"{during}, {split}"),
            step=step,
            keep=keep,
        )

    def record_base(self, learner: Learner, directory: Path) -> None:
        """Write what the base says on its attempts at dev problems, for `divergence`; directory: of round 0."""
        record_base(
            learner.policy,
            [d.problem for d in self.splits.dev],
            self.rollouts,
            samples=self._samples("dev"),
            directory=directory,
            label=self.session.label("base, log-probabilities"),
        )

    def figures(
        self, learner: Learner, dev: Measured, base_dev: Measured, *, directory: Path, during: str
    ) -> dict[str, Any]:
        """Return `eval` of a round's record: its figures on dev, and how they compare with the base's.

        directory: of round 0, which has the base's log-probabilities; during: what, as `round 3`.
        """
        kl = divergence(learner.policy, directory, label=self.session.label(f"{during}, divergence"))
        versus = {"vs_base": conclusion(base_dev, dev).get("vs_base", {})}
        return {**dev.summary, **({} if kl is None else {"kl_base": kl}), **versus}

    def _samples(self, split: str) -> int:
        """Return the sampled attempts at each problem of `dev` or `test`, as the recipe says."""
        return samples_of(self.budget.evaluation, split, graded=self.scorer.measures != "nothing")
