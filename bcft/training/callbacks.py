"""Callbacks of the trainer: a progress bar, a stop on request that loses no finished step, and what its end calls."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]
    """One bar with rate and time left; without a terminal, a line at about every tenth of the steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Open the bar at the step from which a resumed run starts."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not (state.is_world_process_zero and sys.stderr.isatty()),
        )
        self.printed = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the latest losses."""
        losses = {k: f"{logs[k]:.4f}" for k in ("loss", "eval_loss") if k in (logs or {})}
        if not losses or not state.is_world_process_zero:
            return
        if not self.bar.disable:
            self.bar.set_postfix(losses)
        elif state.global_step >= self.printed + state.max_steps / 10:
            self.printed = state.global_step
            line = ", ".join(f"{key} {value}" for key, value in losses.items())
            print(f"train: step {state.global_step} of {state.max_steps}, {line}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the bar."""
        self.bar.close()


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
