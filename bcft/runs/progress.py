"""Progress for a person: bars on a terminal; elsewhere a line at least every thirty seconds, with rate and time left.

A phase shows itself while its `Progress` is open; of phases inside each other, the innermost one. A thread does it,
because a phase may be one long call: a prefill, an optimizer step, an import. The thread lives while a phase is open.
Process 0 alone shows progress, and a phase without a label shows none.
"""

import os
import sys
import threading
import time
from typing import Self

from tqdm import tqdm

from bcft.runs.distributed import rank

FIRST = 10.0
"""Seconds after which a phase says something for the first time; a shorter one says nothing."""
EVERY = 30.0
"""The most seconds without a line."""
TICK = 1.0
"""Seconds between two looks at whether a line is due."""
EARLY = (60.0, 0.05)
"""Before these seconds and share of the work, the attempts that have ended say little about those still running."""


class Progress:
    """A phase at work, from `with` to its end; what it counts may be of a part of it that starts later.

    label: which phase, of which round; '' shows nothing. around: other phases and messages are inside, so it gets no
    bar. summary: a short phase prints its last line as well.
    """

    def __init__(self, label: str, *, around: bool = False, summary: bool = False) -> None:
        self.label = label
        self.around = around
        self.summary = summary
        self.total = self.before = self.done = self.tokens = 0
        self.unit = self.doing = self.note = ""
        self.share = 0.0
        self.opened = self.since = _now()
        self.spoke = False
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        """Show the phase from now on."""
        self.opened = self.since = _now()
        if self.label and rank() == 0:
            shown = False
            try:
                self._show_bar()
                _THREAD.add(self)
                shown = True
            finally:
                if not shown:  # interrupted in here: the body of `with`, whose end calls `__exit__`, never begins
                    self._end()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop showing it; print what a long phase has done, unless it failed."""
        if not (self.label and rank() == 0):
            return
        self._end()
        if kind is None and self.done and (self.summary or _now() - self.opened >= FIRST):
            tell(self.summed_up(_now()))

    def count(self, total: int, unit: str, *, before: int = 0) -> None:
        """Count from now on. unit: the name of several; before: how many were done by an earlier process."""
        with _THREAD.lock:
            self.total, self.unit, self.before, self.done, self.tokens = total, unit, before, 0, 0
            self.share, self.doing, self.note, self.since = 0.0, "", "", _now()
            self._show_bar()

    def advance(self, more: int = 1, *, tokens: int = 0, share: float | None = None, note: str = "") -> None:
        """Count more of the unit, and tokens. share: of all work, where not every unit is as long; note: a figure."""
        self.done, self.tokens, self.note = self.done + more, self.tokens + tokens, note or self.note
        self.share += more / max(self.total - self.before, 1) if share is None else share
        if self._bar is not None:
            self._bar.update(more)

    def turn_to(self, doing: str) -> None:
        """Say from now on what the phase does, which cannot be counted."""
        with _THREAD.lock:
            self.total, self.done, self.doing, self.since = 0, 0, doing, _now()
            self._show_bar()

    def line(self, now: float) -> str:
        """Return the phase in one line: what is done, the rate, the time left or else the time so far."""
        seconds = now - self.since
        parts = [self.doing] if self.doing else []
        if self.total:
            parts = [f"{self.before + self.done:,} of {self.total:,} {self.unit}" + ("" if self.done else " finished")]
        early = bool(self.tokens) and seconds < EARLY[0] and self.share < EARLY[1]
        parts += [self._rate(seconds)] if (self.done or self.tokens) and not early else []
        parts += [self.note] if self.note and self.total else []
        parts.append(duration(seconds) if early else self._left(seconds))
        return f"{self.label}: {', '.join(parts)}"

    def summed_up(self, now: float) -> str:
        """Return what the phase has done in one line."""
        seconds = now - self.since
        unit = self.unit if self.done > 1 else self.unit.removesuffix("s")
        parts = [f"{self.done:,} {unit} in {duration(seconds)}", self._rate(seconds), self.note]
        return f"{self.label}: {', '.join(filter(None, parts))}"

    def beat(self, now: float) -> None:
        """Show the state at this moment: the bar, or a line."""
        self.spoke = True
        if _on_terminal():
            if self._bar is not None:
                self._bar.set_postfix_str(self._postfix(now), refresh=False)
                self._bar.refresh()
        else:
            write(self.line(now))

    def _rate(self, seconds: float) -> str:
        amount, unit = (self.tokens, "tokens") if self.tokens else (self.done, self.unit)
        rate = amount / max(seconds, 1e-6)
        if rate < 1:
            return f"{1 / rate:.3g} s per {unit.removesuffix('s')}"
        return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"

    def _left(self, seconds: float) -> str:
        if not self.total or self.share <= 0.0:
            return duration(seconds)
        return f"about {duration(seconds * max(1.0 - self.share, 0.0) / self.share)} left"

    def _postfix(self, now: float) -> str:
        if not self.total:
            return ""
        return ", ".join(filter(None, (self._rate(now - self.since) if self.tokens else "", self.note)))

    def _end(self) -> None:
        """Show the phase no more."""
        _THREAD.remove(self)
        if self._bar is not None:
            self._bar.close()

    def _show_bar(self) -> None:
        """Replace the bar: of what is counted, or of the time alone. The thread must not be showing it meanwhile."""
        if self.around or not self.label or rank() > 0 or not _on_terminal():
            return
        if self._bar is not None:
            self._bar.close()
        text = ": ".join(filter(None, (self.label, self.doing)))
        if self.total:
            self._bar = tqdm(
                total=self.total, initial=self.before, desc=text, unit=f" {self.unit}", leave=False, dynamic_ncols=True
            )
        else:
            self._bar = tqdm(bar_format="{desc}: {elapsed}", desc=text, leave=False, dynamic_ncols=True)


class _Thread:
    """The open phases, and the thread that shows the innermost."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.phases: list[Progress] = []
        self.spoke = 0.0
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def add(self, phase: Progress) -> None:
        """Show a phase; start the thread with the first."""
        with self.lock:
            self.phases.append(phase)
            if len(self.phases) == 1:
                self.stop, self.spoke = threading.Event(), _now()
                self.thread = threading.Thread(target=self.run, args=(self.stop,), name="bcft-progress", daemon=True)
                self.thread.start()

    def remove(self, phase: Progress) -> None:
        """Show a phase no more; when this returns, nothing about it is printed, and with the last the thread ended."""
        with self.lock:
            if phase in self.phases:  # with those inside it that an interrupt kept from ending themselves
                del self.phases[self.phases.index(phase) :]
            if self.phases and self.phases[-1].around:  # what it says is about the time between two phases
                self.phases[-1].since = _now()
            thread = None if self.phases else self.thread
            if thread:
                self.stop.set()
        if thread and thread.is_alive():  # it is not when an interrupt came before it had started
            thread.join()

    def run(self, stop: threading.Event) -> None:
        """Show what is due until the last phase has ended, or until nobody can read it."""
        while not _wait(stop, TICK):
            with self.lock:
                try:
                    self.look(_now())
                except (OSError, ValueError):  # a closed pipe or file: the main thread finds out when it prints
                    return

    def look(self, now: float) -> None:
        """Show the innermost phase if that is due: a bar always, a line after a while."""
        if not self.phases:
            return
        phase = self.phases[-1]
        if _on_terminal():
            phase.beat(now)
        elif now - self.spoke >= EVERY or (not phase.spoke and not phase.around and now - phase.opened >= FIRST):
            self.spoke = now
            phase.beat(now)


def tell(text: str) -> None:
    """Print a line at once. Exits with code 1 when the output pipe is closed."""
    try:
        write(text)
        _THREAD.spoke = _now()
    except BrokenPipeError:  # as in `bcft sft RECIPE | head`; Python flushes again at exit, which must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def write(text: str) -> None:
    """Print a line with a single write, so that lines of two threads do not mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return a duration as a person says it: nobody needs the seconds of an hour."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _on_terminal() -> bool:
    """Whether there is room for a bar: standard output is redirected to keep what a person did not watch."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def _now() -> float:
    return time.monotonic()


def _wait(stop: threading.Event, seconds: float) -> bool:
    """Wait; return whether to stop."""
    return stop.wait(seconds)


_THREAD = _Thread()
