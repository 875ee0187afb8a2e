"""Seconds by phase that add up: every moment belongs to exactly one phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("rollout", "score", "select", "train", "evaluate", "other")


class Clock:
    """Counts the time of the innermost open phase; `other` while none is open."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as this phase, and not as the enclosing one."""
        enclosing = self._phase
        self._switch(name)
        try:
            yield
        finally:
            self._switch(enclosing)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Count what happens inside nowhere."""
        self._switch(self._phase)
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase since the last lap, and start a new one."""
        self._switch(self._phase)
        spent = {name: round(seconds, 3) for name, seconds in self._spent.items()}
        self._spent = dict.fromkeys(PHASES, 0.0)
        return spent

    def _switch(self, name: str) -> None:
        now = time.perf_counter()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = name, now
