"""What the committed rounds of a run decide: the best round, the weights after each, and whether to continue.

Every decision is read off the rounds' metrics, so a resumed run takes the same ones.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bcft.config.schema import RoundSettings
from bcft.runs.storage import committed, read_json

AVERAGES = ("return", "reward")
"""Parts of an evaluation's summary that are a mean per problem: an environment's return, or the reward where success is
unknown."""


class History:
    """The records of the committed rounds; round 0 is before any training and has `eval` alone.

    base_model: the model that the run starts from, as a name or a directory.
    """

    def __init__(self, directory: Path, rounds: RoundSettings, *, base_model: str) -> None:
        self.directory = directory
        self.rounds = rounds
        self.base_model = base_model
        self.records: list[dict[str, Any]] = [{"round": 0}]
        evaluated = self.path(0) / "evaluation.json"
        if evaluated.is_file():
            self.start(read_json(evaluated))
        while committed(self.path(len(self.records))):
            self.records.append(read_json(self.path(len(self.records)) / "metrics.json"))

    @property
    def last(self) -> int:
        """The last committed round."""
        return len(self.records) - 1

    def next_round(self) -> int:
        """Return the number of the next round; 0 when all are played or there is a reason to stop."""
        return 0 if self.last >= self.rounds.num_rounds or self.stop_reason() else self.last + 1

    @property
    def measured(self) -> bool:
        """Whether evaluations measure success, a return or a reward."""
        return bool({"greedy", *AVERAGES} & self.records[0]["eval"].keys())

    def steps(self, last: int) -> int:
        """Return the optimizer steps of all rounds up to `last`."""
        return sum(record["train"]["steps"] for record in self.records[1 : last + 1])

    def start(self, base_dev: Mapping[str, Any]) -> None:
        """Set the evaluation of the base on dev, to which later rounds are compared."""
        self.records[0] = {"round": 0, "eval": dict(base_dev)}

    def append(self, record: Mapping[str, Any]) -> None:
        """Add the record of a round that is being committed."""
        self.records.append(dict(record))

    def path(self, number: int) -> Path:
        """Return the directory of a round."""
        return self.directory / f"round_{number:03d}"

    def weights_path(self, number: int) -> str:
        """Return the directory or model name of the weights that round `number` trained; 0: those before training."""
        saved = self.path(number) / "model"
        return str(saved) if number or committed(saved) else self.base_model

    def last_trained(self, last: int) -> int:
        """Return the last round up to `last` that trained, 0 if none did."""
        return next((n for n in range(last, 0, -1) if self.records[n]["train"]["steps"]), 0)

    def weights_round_before(self, number: int) -> int:
        """Return the round whose weights round `number` starts from and rolls out."""
        return self.weights_round_after(self.best(number - 1) if self.rounds.init_from == "best" else number - 1)

    def weights_round_after(self, number: int) -> int:
        """Return the round whose weights are in use after a committed round: itself, unless it trained nothing."""
        while number and not self.records[number]["train"]["steps"]:
            number = self.weights_round_before(number)
        return number

    def best(self, last: int) -> int:
        """Return the round up to `last` with the highest sampled pass@1 on dev, the earlier of equals.

        Where there is a return or a reward in its place it is the highest mean, which is what the filter raises.
        Where nothing is measured there is nothing to choose by, and it is the last evaluated round.
        """
        evaluated = [n for n in range(last + 1) if "eval" in self.records[n]]
        if not self.measured:
            return evaluated[-1]
        return max(evaluated, key=lambda n: (self.level(self.records[n]["eval"]), -n))

    def level(self, dev: Mapping[str, Any]) -> float:
        """Return what weights are chosen by, given their figures on dev: what the base was measured by."""
        base = self.records[0]["eval"]
        average = next((part for part in AVERAGES if part in base), "")
        if average:
            return float(dev[average]["mean"]) if average in dev else -math.inf
        if "greedy" not in dev:
            return -math.inf
        return float(dev["sampled"]["pass@1"] if "sampled" in dev else dev["greedy"]["success"])

    def stop_reason(self) -> str:
        """Return why no further round is played before `num_rounds`; '' while there is no reason."""
        patience, last = self.rounds.early_stop, self.last
        if patience is None or not last:
            return ""
        best = self.best(last)
        since = [n for n in range(best + 1, last + 1) if "eval" in self.records[n]]
        if len(since) >= patience:
            return f"none of {len(since)} evaluations after round {best} was better on dev"
        versus = self.records[last].get("eval", {}).get("vs_base", {})
        if versus.get("pass@k_ci95", [0, 0])[1] < 0:
            points = f"{100 * versus['pass@k_delta']:+.1f} points"
            return f"collapse: fewer dev problems than before training are solved in several attempts (pass@k {points})"
        return ""

    def rounds_to_keep(self) -> set[int]:
        """Return the rounds whose weights a resumed run, or the end of this one, may still read."""
        carried = set() if self.rounds.reset_optimizer else {self.last_trained(self.last)}
        return {0, self.weights_round_after(self.last), self.weights_round_after(self.best(self.last))} | carried


def scaled_path(directory: Path, scale: float) -> Path:
    """Return where a round's evaluations at a scale of `ship_scale` are; directory: of the round."""
    return directory if scale == 1 else directory / f"scale_{scale}"


def evaluation_interval(rounds: RoundSettings, *, evaluated: int, played: int) -> int:
    """Return the rounds from one evaluation on dev to the next.

    evaluated, played: attempts of an evaluation, and of a round; `eval_every: auto` keeps the former under a third.
    """
    if isinstance(rounds.eval_every, int):
        return rounds.eval_every
    return max(1, math.ceil(2 * evaluated / played))  # evaluated / (evaluated + every x played) is at most a third


def is_due(rounds: RoundSettings, number: int, *, evaluated: int, played: int) -> bool:
    """Return whether a round is one to be evaluated on dev; evaluated, played: as in `evaluation_interval`."""
    return number % evaluation_interval(rounds, evaluated=evaluated, played=played) == 0 or number == rounds.num_rounds
