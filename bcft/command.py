"""One place where a foreseen failure becomes its lines on stderr and its exit code."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from bcft.config import Recipe, help_text, parse
from bcft.errors import BcftError, Preempted
from bcft.processes import leave, rank


def execute(command: str, action: Callable[[Recipe], object], argv: Sequence[str] | None) -> int:
    """Parse the command line, act, and return the exit code; with `--debug` errors keep their traceback.

    Of several processes rank 0 alone prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(help_text(command))
        return 0
    signal.signal(signal.SIGTERM, _preempt)
    # Read when torch is loaded: threads that spin while they wait are 25 times slower once anything shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--debug" not in arguments:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is loaded
    try:
        action(parse(command, arguments))
    except BcftError as error:
        if "--debug" in arguments:
            raise
        _tell(*(f"bcft: error: {line}" for line in str(error).splitlines()))
        return error.exit_code
    except KeyboardInterrupt:
        _tell("", "bcft: stopped; the same command goes on from here")
        return Preempted.exit_code
    leave()
    return 0


def _tell(*lines: str) -> None:
    if rank() == 0:
        print(*lines, sep="\n", file=sys.stderr)


def _preempt(*_: object) -> NoReturn:
    raise Preempted("asked to stop; the same command goes on from here")
