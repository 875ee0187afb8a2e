"""The console script: `bcft COMMAND ...` is `python -m bcft.COMMAND ...`."""

import importlib
import sys
from collections.abc import Callable, Sequence

from bcft import __version__
from bcft.config_tables import COMMANDS


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
        print(
            "\nbcft COMMAND --help lists the keys; bcft sft recipes/bc_math.yaml runs without network or accelerator."
        )
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        print(f"bcft: error: {arguments[0]!r} is no command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    entry: Callable[[Sequence[str]], int] = importlib.import_module(f"bcft.{arguments[0]}").main
    return entry(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
