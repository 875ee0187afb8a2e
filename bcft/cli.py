"""The command line: dispatch, and one place where errors become lines and exit codes."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from bcft.config import Recipe, help_text, parse
from bcft.config_tables import COMMANDS
from bcft.errors import BcftError, Preempted


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bcft COMMAND ...`; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: bcft COMMAND RECIPE [--key value | key=value ...]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<9} {' '.join(command.summary.split())}")
        print(
            "\nbcft COMMAND --help lists the keys; bcft sft recipes/bc_math.yaml runs without network or accelerator."
        )
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from bcft import __version__

        print(f"bcft {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"bcft: error: {arguments[0]!r} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    entry: Callable[[Sequence[str]], int] = importlib.import_module(f"bcft.{arguments[0]}").main
    return entry(arguments[1:])


def execute(command: str, action: Callable[[Recipe], object], argv: Sequence[str] | None) -> int:
    """Parse, act, and turn every foreseen failure into its lines on stderr and its exit code.

    With `--debug` errors keep their traceback. Of several processes rank 0 alone prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(help_text(command))
        return 0
    signal.signal(signal.SIGTERM, _preempt)
    try:
        action(parse(command, arguments))
    except BcftError as error:
        if "--debug" in arguments:
            raise
        if os.environ.get("RANK", "0") == "0":
            for line in str(error).splitlines():
                print(f"bcft: error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nbcft: stopped; the same command goes on from here", file=sys.stderr)
        return Preempted.exit_code
    return 0


def _preempt(*_: object) -> NoReturn:
    raise Preempted("asked to stop; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
