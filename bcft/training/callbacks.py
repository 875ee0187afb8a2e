"""What the trainer does besides training: one progress bar, and a stop that loses nothing."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):  # type: ignore[misc]
    """One bar with rate and time left; where nobody watches a terminal, a line about every tenth of the way."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Open the bar at the step a resumed run starts from."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not (state.is_world_process_zero and sys.stderr.isatty()),
        )
        self.told = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Advance."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the latest losses."""
        shown = {k: f"{logs[k]:.4f}" for k in ("loss", "eval_loss") if k in (logs or {})}
        if not shown or not state.is_world_process_zero:
            return
        if not self.bar.disable:
            self.bar.set_postfix(shown)
        elif state.global_step >= self.told + state.max_steps / 10:
            self.told = state.global_step
            losses = ", ".join(f"{key} {value}" for key, value in shown.items())
            print(f"train: step {state.global_step} of {state.max_steps}, {losses}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the bar."""
        self.bar.close()


class StopGently(TrainerCallback):  # type: ignore[misc]
    """On SIGTERM or Ctrl-C end the step, save a checkpoint and stop; a second signal stops at once.

    Rounds save none (`checkpoints` false): what they resume from is their sealed rows.
    """

    def __init__(self, accelerator: Any, *, checkpoints: bool) -> None:
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save and stop if any process was asked: between steps, where a resumed run meets the same random numbers."""
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(self.asked), device=self.accelerator.device)
            self.asked = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        if self.asked:
            control.should_save, control.should_training_stop = self.checkpoints, True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, and give them back whatever happens; a thread other than the main one hears none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
