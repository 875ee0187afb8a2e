"""Calls of users' code in threads, each with a time limit.

A thread that hangs cannot be stopped: it is given up, and ends when its call returns or with the process.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread, current_thread, main_thread
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from bcft.errors import Preempted

MOST_AT_ONCE = 128
"""Calls of environments that run at the same time; with more, each would get too little time to compute."""
_LONGEST_ERROR = 500
"""Characters."""
_LONGEST_WAIT = 60.0
"""Seconds; `step_timeout` may be longer than a queue can wait at once."""


class Caller(Protocol):
    """Whose calls run, one at a time; it is hashable by identity."""

    given_up: bool
    """A call hangs; its thread calls `close` when the call returns."""

    @property
    def to_close(self) -> bool:
        """Whether there is something to close, and no thread that was given up will close it."""
        ...

    def close(self) -> None:
        """Release what its calls use."""
        ...


C = TypeVar("C", bound=Caller)


@dataclass(frozen=True)
class Failure:
    """A call that returned nothing: why, in one line."""

    reason: str


class Calls(Generic[C]):
    """Calls of users' code in daemon threads, each with a time limit; calls beyond `MOST_AT_ONCE` wait for room.

    A thread that has answered takes the next call; one that hangs is given up, and another takes its place. Without
    `threads` a call runs at once, in the thread that starts it, and has no limit.
    """

    def __init__(self, limit: float, *, threads: bool) -> None:
        self.limit = limit
        self.threads = threads
        self.idle = 0  # threads that wait for work
        self.work: SimpleQueue[tuple[C, Callable[[], Any]] | None] = SimpleQueue()
        self.waiting: deque[tuple[C, Callable[[], Any]]] = deque()
        self.deadlines: dict[C, float] = {}  # of the calls not answered yet, the earliest first
        # Calls in threads. Removing one settles its end: the thread removes it to answer, the loop to give it up.
        self.running: dict[C, bool] = {}
        self.done: SimpleQueue[tuple[C, float, Any]] = SimpleQueue()

    def start(self, caller: C, call: Callable[[], Any]) -> None:
        """Call as soon as there is room."""
        if not self.threads:
            self.done.put((caller, 0.0, _answer(call)))
            self.deadlines[caller] = math.inf
            return
        self.waiting.append((caller, call))
        self._fill()

    def answers(self, *, wait: bool = True) -> Iterator[tuple[C, Any]]:
        """Yield answers, `Failure` for a failed call: those of all started calls, or only those ready by now."""
        while self.deadlines:
            caller, deadline = next(iter(self.deadlines.items()))
            left = deadline - monotonic()
            try:
                caller, finished, answer = self.done.get(wait and left > 0, timeout=min(max(left, 0), _LONGEST_WAIT))
            except Empty:
                if left > 0:
                    if wait:
                        continue
                    return
                self._give_up(caller)
                if not caller.given_up:
                    continue  # it has just answered
                finished, answer = math.inf, None
            else:
                self.idle += self.threads
                if caller not in self.deadlines:
                    continue  # an interruption came between the answer and its use
            late = finished > self.deadlines.pop(caller)
            self._fill()
            yield caller, Failure(f"took longer than step_timeout, {self.limit:g} s") if late else answer

    def close(self, callers: Sequence[C]) -> None:
        """Close the environments that are still open, and end all threads, a given-up one after its call."""
        self.waiting.clear()
        for caller in self.deadlines:
            self._give_up(caller)
        self.deadlines.clear()
        for caller in callers:
            if caller.to_close:
                self.start(caller, caller.close)
        for _ in self.answers():
            pass
        self.work.put(None)

    def _give_up(self, caller: C) -> None:
        caller.given_up = self.running.pop(caller, None) is not None

    def _fill(self) -> None:
        while self.waiting and len(self.deadlines) < MOST_AT_ONCE:
            caller, call = self.waiting.popleft()
            self.deadlines[caller] = monotonic() + self.limit
            self.running[caller] = True
            self.work.put((caller, call))
            if self.idle:
                self.idle -= 1
            else:
                Thread(target=self._run, name="environments", daemon=True).start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            caller, call = work
            answer, finished = _answer(call), monotonic()
            if self.running.pop(caller, None) is None:
                _answer(caller.close)
                return
            self.done.put((caller, finished, answer))
        self.work.put(None)  # for the next thread


def _answer(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BaseException as error:  # users' code: whatever it does, `sys.exit` included, fails one attempt
        # A signal arrives in the main thread, so also in an instant environment: it is meant for the run.
        if isinstance(error, KeyboardInterrupt | Preempted) and current_thread() is main_thread():
            raise
        return Failure(f"raised {one_line(error)}")


def one_line(error: BaseException) -> str:
    """Return an exception's type and message on one line."""
    text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()
    return " ".join(text.split())[:_LONGEST_ERROR]
