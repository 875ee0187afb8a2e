"""The console script: `bcft X ...` is `python -m bcft.X ...`. Foreseen errors become one line and an exit code here."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from bcft import __version__
from bcft.config.keys import COMMANDS, ON_DIRECTORIES
from bcft.config.loader import Config, parse
from bcft.config.reference import help_text
from bcft.errors import BcftError, Preempted
from bcft.runs.distributed import leave, rank


def execute(command: str, action: Callable[[Config], object], argv: Sequence[str] | None) -> int:
    """Parse the command line, act, and return the exit code; with `--debug` errors keep their traceback.

    Of several processes rank 0 alone prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `bcft X --help | head` ends quietly
        print(help_text(command))
        return 0
    signal.signal(signal.SIGTERM, _preempt)
    # torch reads it when it is loaded: threads that spin while they wait are 25 times slower on shared cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--debug" not in arguments:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is loaded
    return guarded(lambda: action(parse(command, arguments)), debug="--debug" in arguments)


def guarded(action: Callable[[], object], *, debug: bool) -> int:
    """Act and return the exit code: a foreseen error becomes one line, unless `debug`."""
    try:
        action()
    except BcftError as error:
        if debug:
            raise
        _print_error(*(f"bcft: error: {line}" for line in str(error).splitlines()))
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("", "bcft: interrupted; re-run the same command to resume")
        return Preempted.exit_code
    leave()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"bcft {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: bcft COMMAND RECIPE [--key value | key=value ...]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<9} {' '.join(command.summary.split())}")
        for name, summary in ON_DIRECTORIES.items():
            print(f"  {name:<9} {summary}")
        print(
            "\nbcft COMMAND --help lists the keys; bcft sft recipes/bc_math.yaml runs without network or accelerator."
        )
        return 0 if arguments else 2
    if arguments[0] not in (*COMMANDS, *ON_DIRECTORIES):
        names = ", ".join((*COMMANDS, *ON_DIRECTORIES))
        print(f"bcft: error: {arguments[0]!r} is not a command; the commands are {names}", file=sys.stderr)
        return 2
    entry: Callable[[Sequence[str]], int] = importlib.import_module(f"bcft.{arguments[0]}").main
    return entry(arguments[1:])


def _print_error(*lines: str) -> None:
    if rank() == 0:
        print(*lines, sep="\n", file=sys.stderr)


def _preempt(*_: object) -> NoReturn:
    raise Preempted("asked to stop; re-run the same command to resume")


if __name__ == "__main__":
    sys.exit(main())
