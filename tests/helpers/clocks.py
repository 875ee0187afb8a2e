"""A clock for progress that a test moves by hand, with the thread that shows it in step."""

import threading

from bcft.runs import progress


class Time:
    """The time of `bcft.runs.progress`: it stands still, except in `passes`."""

    def __init__(self):
        self.now = 0.0
        self.waiting = threading.Semaphore(0)
        self.ticks = threading.Semaphore(0)

    def passes(self, seconds):
        """Move on in ticks; when this returns, the thread has shown what was due."""
        for _ in range(round(seconds / progress.TICK)):
            self.waiting.acquire()
            self.now += progress.TICK
            self.ticks.release()
        self.waiting.acquire()
        self.waiting.release()

    def wait(self, stop, seconds):  # noqa: ARG002
        """Wait, as the thread does, for the next tick or the end."""
        self.waiting.release()
        while not stop.is_set():
            if self.ticks.acquire(timeout=0.01):
                return False
        self.waiting.acquire()
        return True
