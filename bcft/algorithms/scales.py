"""`ship_scale`: which weights between the base and the chosen round are the best on dev.

Wortsman et al. 2022 (https://arxiv.org/abs/2109.01903) interpolate the weights of a model before and after fine-tuning;
Dang et al. 2025 (https://arxiv.org/abs/2504.10478) find that it gives pass@k back that training took.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcft.algorithms.learner import Learner
from bcft.algorithms.run import Run
from bcft.errors import UsageError
from bcft.evaluation.results import Measured, stored
from bcft.reporting.tables import scaled_name
from bcft.runs.distributed import barrier, rank
from bcft.runs.history import History, scaled_path
from bcft.runs.storage import read_json, write_json


@dataclass(frozen=True)
class Chosen:
    """The weights to test and to write."""

    place: Path
    """The directory of their evaluations."""
    scale: float = 1.0
    """Of the round's change from the base."""
    measured: Sequence[Mapping[str, Any]] = ()
    """`{scale, eval}` of each scale, on dev; empty where there was no choice."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The part of `metrics.json`; empty where there was no choice."""
        return {"scale": self.scale, "scales": list(self.measured)} if self.measured else {}

    @property
    def words(self) -> str:
        """What the conclusion says; '' where there was no choice."""
        if not self.measured:
            return ""
        given = ", ".join(f"{one['scale']:g}" for one in self.measured)
        return f"; best/ has {self.scale:g} of the round's change from the base, the best on dev of {given}"


def check_scales(run: Run) -> None:
    """Raise UsageError when a scale could not be chosen: nothing is measured on dev."""
    if run.config.rounds.scales and run.scorer.measures == "nothing":
        raise UsageError(
            "ship_scale: nothing is measured on dev, so no scale can be chosen: give a success_func, or leave "
            "ship_scale out"
        )


def choose_scale(run: Run, learner: Learner, history: History, best: int, base_dev: Measured) -> Chosen:
    """Evaluate each scale of the chosen round on dev, and give the learner the weights of the best one.

    Of equals it is the larger. Scale 1 has been evaluated already. Evaluations are stored, so an interrupted run takes
    them as they are. Nothing is done where the base itself is the best.
    """
    place, scales = history.path(best), run.config.rounds.scales
    if not best or not scales:
        return Chosen(place)
    measured: list[dict[str, Any]] = [
        {"scale": scale, "eval": _evaluated(run, learner, history, best, scale, base_dev=base_dev)} for scale in scales
    ]
    chosen = float(max(measured, key=lambda one: (history.level(one["eval"]), one["scale"]))["scale"])
    _take(learner, history, best, chosen)
    return Chosen(scaled_path(place, chosen), chosen, measured)


def _evaluated(
    run: Run, learner: Learner, history: History, best: int, scale: float, *, base_dev: Measured
) -> dict[str, Any]:
    """Return the figures of a scale on dev, as `eval` of a round's record holds them."""
    if scale == 1:
        return dict(history.records[best]["eval"])
    place = scaled_path(history.path(best), scale)
    if (place / "metrics.json").is_file():
        return dict(read_json(place / "metrics.json")["eval"])
    _take(learner, history, best, scale)
    during = scaled_name(best, scale)
    dev = stored(place) or run.measure(learner, place, "dev", during=during, step=history.steps(best))
    figures = run.figures(learner, dev, base_dev, directory=history.path(0), during=during)
    barrier()  # every process has looked for the file
    if rank() == 0:
        write_json(place / "metrics.json", {"scale": scale, "eval": figures})
    return figures


def _take(learner: Learner, history: History, best: int, scale: float) -> None:
    weights = history.weights_path(history.weights_round_after(best))
    learner.restore_scaled(weights, history.weights_path(0), scale)
