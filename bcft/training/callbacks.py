"""Callbacks of the trainer: its progress, a stop on request that loses no finished step, and what its end calls."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from bcft.runs.progress import Progress


class CountSteps(TrainerCallback):  # type: ignore[misc]
    """Counts the steps of a training, and shows the latest losses."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Count from the step at which a resumed run starts."""
        self.progress.count(state.max_steps, "steps", before=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Count a step."""
        self.progress.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the latest losses."""
        losses = [f"{key} {logs[key]:.4f}" for key in ("loss", "eval_loss") if key in (logs or {})]
        self.progress.advance(0, note=", ".join(losses))


class Logs(TrainerCallback):  # type: ignore[misc]
    """Calls a function with each step that the trainer logs, and its figures."""

    def __init__(self, function: Callable[[int, Mapping[str, Any]], None]) -> None:
        self.function = function

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Call it."""
        self.function(state.global_step, logs or {})


class AtTheEnd(TrainerCallback):  # type: ignore[misc]
    """Calls a function when training has ended."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Call it."""
        self.function()


class StopGently(TrainerCallback):  # type: ignore[misc]
    """On SIGTERM or Ctrl-C finish the step, save a checkpoint and stop; a second signal stops at once.

    Rounds save no checkpoint (`checkpoints` false): the training of an interrupted round starts again.
    """

    def __init__(self, accelerator: Any, *, checkpoints: bool) -> None:
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save and stop if any process got a signal: between steps, where a resumed run has the same random state."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.requested), device=self.accelerator.device)
            self.requested = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        if self.requested:
            control.should_save, control.should_training_stop = self.checkpoints, True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside, and restore their handlers; in a thread other than the main one, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
