"""What the committed rounds of a run say: which is best, whose weights there are after each, and whether to go on.

Every decision is read off their metrics, so that a resumed run takes the same ones.
"""

import math
from pathlib import Path
from typing import Any

from bcft.config.loader import Recipe
from bcft.runs.storage import committed, read_json


class Ledger:
    """The metrics of the rounds so far, by round; round 0 is before any training and has `eval` alone."""

    def __init__(self, recipe: Recipe, directory: Path) -> None:
        self.recipe = recipe
        self.directory = directory
        self.records: list[dict[str, Any]] = [{"round": 0}]
        evaluated = self.path(0) / "evaluation.json"
        if evaluated.is_file():
            self.records[0]["eval"] = read_json(evaluated)
        while committed(self.path(len(self.records))):
            self.records.append(read_json(self.path(len(self.records)) / "metrics.json"))

    @property
    def last(self) -> int:
        """The last round."""
        return len(self.records) - 1

    @property
    def tells_success(self) -> bool:
        """Whether an evaluation can tell what is solved, or what return an attempt has."""
        return bool({"greedy", "return"} & self.records[0]["eval"].keys())

    def path(self, number: int) -> Path:
        """Return the directory of a round."""
        return self.directory / f"round_{number:03d}"

    def weights(self, number: int) -> str:
        """Return where the weights are that round `number` trained; 0: those before any training."""
        saved = self.path(number) / "model"
        return str(saved) if number or committed(saved) else str(self.recipe["model_name_or_path"])

    def trained(self, last: int) -> int:
        """Return the last round up to `last` that trained, 0 if none did."""
        return next((n for n in range(last, 0, -1) if self.records[n]["train"]["steps"]), 0)

    def begins(self, number: int) -> int:
        """Return the round that trained the weights which play round `number`."""
        return self.after(self.best(number - 1) if self.recipe["init_from"] == "best" else number - 1)

    def after(self, number: int) -> int:
        """Return the round that trained the weights there are after round `number`: itself, unless it was skipped."""
        while number and not self.records[number]["train"]["steps"]:
            number = self.begins(number)
        return number

    def best(self, last: int) -> int:
        """Return the round up to `last` with the highest sampled pass@1 on dev, the earlier of equals.

        Where an environment gives rewards it is the highest mean return, which is what the filter raises; where success
        cannot be told either there is nothing to choose by, and it is the last one.
        """

        def level(number: int) -> float:
            found = self.records[number]["eval"]
            if "return" in found:
                return float(found["return"]["mean"])
            return float(found["sampled"]["pass@1"] if "sampled" in found else found["greedy"]["success"])

        evaluated = [n for n in range(last + 1) if "eval" in self.records[n]]
        if not self.tells_success:
            return evaluated[-1]
        return max(evaluated, key=lambda n: (level(n), -n))

    def due(self, number: int, *, evaluated: int, played: int) -> bool:
        """Tell whether a round is to be evaluated: when it is its turn or the last one, and the weights are new.

        evaluated, played: attempts of an evaluation, and of a round.
        """
        before = max(n for n in range(number) if "eval" in self.records[n])
        turn = its_turn(self.recipe, number, evaluated=evaluated, played=played)
        return turn and self.after(number) != self.after(before)

    def stopped(self) -> str:
        """Return why no further round is played before `num_rounds`; '' while there is no reason."""
        patience, last = self.recipe["early_stop"], self.last
        if patience is None or not last:
            return ""
        best = self.best(last)
        since = [n for n in range(best + 1, last + 1) if "eval" in self.records[n]]
        if len(since) >= patience:
            return f"none of {len(since)} evaluations after round {best} was better on dev"
        versus = self.records[last].get("eval", {}).get("vs_base", {})
        if versus.get("pass@k_ci95", [0, 0])[1] < 0:
            fell = f"{100 * versus['pass@k_delta']:+.1f} points"
            return f"collapse: fewer dev problems than before training are solved in several attempts (pass@k {fell})"
        return ""

    def needed(self) -> set[int]:
        """Return the rounds whose weights a resumed run, or the end of this one, may still read."""
        carried = set() if self.recipe["reset_optimizer"] else {self.trained(self.last)}
        return {0, self.after(self.last), self.after(self.best(self.last))} | carried


def its_turn(recipe: Recipe, number: int, *, evaluated: int, played: int) -> bool:
    """Tell whether a round is one to be evaluated; evaluated, played: attempts of an evaluation, and of a round."""
    every = recipe["eval_every"]
    if every == "auto":  # evaluated / (evaluated + every x played) is at most a third
        every = max(1, math.ceil(2 * evaluated / played))
    return bool(number % every == 0 or number == recipe["num_rounds"])
