"""Run a server in this process's group until it ends or the program that wants it is gone: no orphan holds a GPU.

    python -I -S watchdog.py PARENT COMMAND...

Standard input is a pipe that nobody writes to: it closes when the program ends, however it ends. A child that the
program forked may hold it open for longer, so the parent's id is watched as well. Whoever starts this makes it lead a
process group: the server's own children are ended with it, which a server that was killed does not do itself.

Read by Python as a script, without the package: it imports the standard library only.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE = 4.0
"""Seconds that a server has to end by itself: with two looks, all of it is gone in less than five."""
_LOOK = 0.2
"""Seconds between two looks."""


def watch(parent: int, command: Sequence[str]) -> None:
    """Run the command until it ends, standard input closes or the parent has changed; then end the whole group."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the whole group; the server does not inherit a handler
    try:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"cannot start {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return
    while server.poll() is None and os.getppid() == parent:
        with contextlib.suppress(InterruptedError):
            if select.select([sys.stdin], [], [], _LOOK)[0]:
                break
    if server.poll() is not None:
        print(f"\nthe server ended with exit code {server.returncode}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE)
    time.sleep(_LOOK)  # for its children
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2:])
