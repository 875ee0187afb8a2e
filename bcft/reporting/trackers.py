"""`report_to`: trackers follow a run through accelerate's classes, which give them one shape.

The Trainer's own callbacks would start anew in every round. Here one run has one id and one axis, the optimizer steps
of all rounds. What a tracker hears of a filtered run is read from the files of committed rounds, so a resumed run goes
on where the tracker was, and logs no round twice. `trackers.json` holds the ids and how far each tracker is.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bcft.config.keys import TRACKERS as KNOWN
from bcft.config.schema import TrainingSettings
from bcft.runs.storage import committed, read_json, read_jsonl, write_json

TRACKERS = "trackers.json"
LOSSES = "losses.jsonl"
LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm", "entropy")
"""Figures of an optimizer step in `losses.jsonl`."""
SHOWN = 8
"""Trajectories of a round in its table: as many kept ones as rejected ones, if there are."""
_PROJECT = "bcft"


def losses(history: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the lines of `losses.jsonl`: what the trainer logged at each step, of `LOGGED`."""
    for entry in history:
        if {"loss", "eval_loss"} & entry.keys():  # the summary at the end has other figures
            yield {"step": entry["step"], **{name: entry[name] for name in LOGGED if name in entry}}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record under names with `/`; the ends of an interval are `/0` and `/1`."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{name}/")
        elif isinstance(value, list | tuple):
            numbers |= flat({str(place): item for place, item in enumerate(value)}, f"{name}/")
        elif isinstance(value, bool | int | float):
            numbers[name] = float(value)
    return numbers


class Trackers:
    """The trackers of a run, on rank 0. One that fails is left out from then on: it never ends a run."""

    def __init__(
        self,
        training: TrainingSettings,
        directory: Path,
        *,
        recipe: Mapping[str, Any],
        warn: Callable[[str], None],
        active: bool = True,
    ) -> None:
        """Read how far each tracker is. recipe: the hyperparameters; warn: prints a line; active: false for none."""
        given = training.passed_through
        self.names = named(given.get("report_to")) if active else []
        self.given, self.directory, self.recipe, self.warn = given, directory, recipe, warn
        file = directory / TRACKERS
        self.state: dict[str, dict[str, Any]] = read_json(file) if file.is_file() else {}
        self._open: dict[str, Any] = {}

    def follow(self) -> None:
        """Log the base and all committed rounds that are new."""
        records = [read_json(self.directory / "round_000/evaluation.json")] if self._round(0).is_dir() else []
        while committed(self._round(len(records))):
            records.append(read_json(self._round(len(records)) / "metrics.json"))
        for name in self.names:
            steps = 0
            for number, record in enumerate(records):
                before, steps = steps, steps + (record["train"]["steps"] if number else 0)
                if name in self.names and number > self._state(name).get("round", -1):
                    log = partial(self._log_round, number=number, record=record, before=before)
                    self._tell(name, log, round=number)

    def step(self, step: int, figures: Mapping[str, Any]) -> None:
        """Log what a trainer logged at a step of `sft`, unless that was logged before an interruption."""
        for name in self.names:
            if step > self._state(name).get("step", -1):
                values = {f"train/{key}": float(figures[key]) for key in LOGGED if key in figures}
                self._tell(name, partial(_log, values=values, step=step), step=step)

    def conclude(self, metrics: Mapping[str, Any]) -> None:
        """Log the figures on test, once, and close the trackers."""
        if self._round(0).is_dir():
            self.follow()
        values = flat({"test": {key: metrics[key] for key in ("base", "final", "best", "vs_base") if key in metrics}})
        rounds = metrics.get("rounds", 0)
        for name in self.names:
            state = self._state(name)
            step = state.get("step", 0)
            if state.get("concluded") != rounds:
                self._tell(name, partial(_log, values=values, step=step), concluded=rounds)
        for name, tracker in self._open.items():
            self._try(name, tracker.finish)
        self._open = {}

    def _log_round(self, tracker: Any, *, number: int, record: Mapping[str, Any], before: int) -> None:
        """Log a committed round: its losses step by step, its record, and some trajectories; number 0: the base."""
        place, end = self._round(number), before
        if number:
            end = before + record["train"]["steps"]
            for line in read_jsonl(place / LOSSES) if (place / LOSSES).is_file() else []:
                # The record has `train/loss`, of the whole round.
                figures = {f"step/{key}": value for key, value in line.items() if key != "step"}
                tracker.log(figures, step=before + line["step"])
        tracker.log(flat(record if number else {"eval": record}), step=end)
        self._state(tracker.name)["step"] = end
        if number:
            columns, rows = _table(place)
            if hasattr(tracker, "log_table"):
                tracker.log_table("trajectories", columns=list(columns), data=rows, step=end)
            elif tracker.name == "tensorboard":
                tracker.log({"trajectories": _markdown(columns, rows)}, step=end)

    def _tell(self, name: str, action: Callable[[Any], None], **reached: int) -> None:
        """Do something with a tracker, which is opened first, and write how far it is."""
        if self._try(name, lambda: action(self._opened(name))):
            self._state(name).update(reached)
            write_json(self.directory / TRACKERS, self.state)

    def _try(self, name: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except Exception as error:  # each tracker has errors of its own, and none may cost a run
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.names = [other for other in self.names if other != name]
            self.warn(
                f"report_to: {name} failed and is left out; the run continues, and a resumed one logs the rest: "
                f"{reason[:200]}"
            )
            return False
        return True

    def _opened(self, name: str) -> Any:
        """Return the tracker, which is opened under the id of its run."""
        if name not in self._open:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # noqa: PLC0415 - loads torch

            state = self._state(name)
            first = not state.get("id")
            state.setdefault("id", secrets.token_hex(4))
            project = str(self.given.get("project") or _PROJECT)
            run = str(self.given.get("run_name") or self.directory.resolve().name)
            arguments: dict[str, dict[str, Any]] = {
                "tensorboard": {"run_name": "", "logging_dir": self.directory / "tensorboard"},
                "wandb": {
                    "run_name": project, "name": run, "id": state["id"], "resume": "allow", "dir": str(self.directory)
                },
                "trackio": {
                    "run_name": project, "name": f"{run}-{state['id']}", "resume": "allow", "embed": False,
                    "space_id": self.given.get("trackio_space_id"), "auto_log_gpu": False, "auto_log_cpu": False,
                },
                "mlflow": {
                    "experiment_name": project, "run_name": run, "run_id": state.get("run_id"),
                },
            }  # fmt: skip
            tracker = LOGGER_TYPE_TO_CLASS[name](**arguments[name])
            tracker.start()
            self._open[name] = tracker
            if name == "mlflow":
                state["run_id"] = tracker.tracker.info.run_id
            if first:
                plain = {key: value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
                         for key, value in self.recipe.items() if value is not None}  # fmt: skip
                if name == "tensorboard":  # its own page of hyperparameters wants a run of its own
                    tracker.log({"recipe": _markdown(("key", "value"), list(plain.items()))}, step=0)
                else:
                    tracker.store_init_configuration(plain)
        return self._open[name]

    def _state(self, name: str) -> dict[str, Any]:
        return self.state.setdefault(name, {})

    def _round(self, number: int) -> Path:
        return self.directory / f"round_{number:03d}"


def _log(tracker: Any, *, values: Mapping[str, float], step: int) -> None:
    tracker.log(dict(values), step=step)


def named(report_to: Any) -> list[str]:
    """Return the trackers that `report_to` names."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if names == ["all"]:
        return [name for name in KNOWN if find_spec(name)]
    return [name for name in names if name != "none"]


def _table(place: Path) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Return columns and rows of some trajectories of a round."""
    scores = {line["id"]: line for line in read_jsonl(place / "scores.jsonl")}
    played = [line for line in read_jsonl(place / "rollouts.jsonl") if line["id"] in scores]
    kept = [line for line in played if scores[line["id"]]["decision"] == "kept"][: SHOWN // 2]
    others = [line for line in played if scores[line["id"]]["decision"] != "kept"][: SHOWN - len(kept)]
    rows = [
        [line["id"], "\n".join(turn["action"] for turn in line["turns"]), score["reward"], score["decision"]]
        for line in (*kept, *others)
        for score in (scores[line["id"]],)
    ]
    return ("id", "actions", "reward", "decision"), rows


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of TensorBoard's text page."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
