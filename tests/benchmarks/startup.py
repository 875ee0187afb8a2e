"""The time that a command takes to answer, and to reach its first forward pass.

    python tests/benchmarks/startup.py [--pairs 5] [--before CHECKOUT]

- CPU seconds of `--help` and of a configuration error, for every command, less those of an empty Python: under 0.5 s.
- CPU seconds of the largest files that are not recipes, less those of an empty Python: under 2 s.
- Seconds from the shell to the first forward pass of `bcft.sft`, less those of `from trl import SFTTrainer` alone; with
  `--before`, also less those of another checkout of this package: no later than it.

Whole processes, in interleaved pairs; each figure is the median of the pairwise differences. CPU seconds are of all
threads, in user and kernel, so other load on the machine hardly changes them.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COMMANDS = ("sft", "filtered", "evaluate", "collect", "refilter", "preview")
ANSWER, HOSTILE, FORWARD, LATER = 0.5, 2.0, 3.0, 0.3
"""Seconds: the bounds of an answer, of a hostile file, of the first forward pass over trl's import, and of how much
later than before it may be, which is noise."""
# The process ends at its first forward pass.
FIRST_FORWARD = """
import os, sys, torch
def forward(self, *args, **kwargs): os._exit(7)
import transformers.models.llama.modeling_llama as llama
llama.LlamaForCausalLM.forward = forward
from bcft.sft import main
main(["recipes/bc_math.yaml", f"--output_dir={sys.argv[1]}"])
"""
TRL = "from trl import SFTTrainer"
WRONG = "model_name_or_path: bcft:tiny-math\ndataset_name: bcft:arithmetic\nlerning_rate: 5.0e-4\nbatch_size: 8\n"
NOT_RECIPES = {
    "490 unknown keys": "".join(f"learning_{i}_rate: 1\n" for i in range(490)),
    "800 kB of values": "seed: [" + "1," * 400_000 + "]",
    "900 kB of brackets": "[" * 900_000,
    "60,000 keys": "".join(f"key_{i}: 1\n" for i in range(60_000)),
}


class Times(NamedTuple):
    """The time of one process."""

    wall: float
    cpu: float


def times(arguments: Sequence[str], code: int, *, root: Path = ROOT) -> Times:
    """Run a fresh interpreter with the arguments; return its time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        capture_output=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)},
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == code, process.stderr.decode()
    return Times(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def empty() -> Times:
    """Return the time of an empty Python."""
    return times(["-c", "pass"], 0)


def first_forward(root: Path = ROOT) -> Times:
    """Return the time of a run of `sft` until its first forward pass."""
    with tempfile.TemporaryDirectory() as directory:
        return times(["-c", FIRST_FORWARD, directory], 7, root=root)


def median_difference(ours: Callable[[], Times], theirs: Callable[[], Times], pairs: int) -> Times:
    """Return the median of ours less theirs, of so many pairs after one that warms the file cache."""
    ours(), theirs()
    differences = []
    for _ in range(pairs):
        our, their = ours(), theirs()
        differences.append(Times(our.wall - their.wall, our.cpu - their.cpu))
    return Times(statistics.median(d.wall for d in differences), statistics.median(d.cpu for d in differences))


def main() -> int:
    """Print each figure; exit 1 if one is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout, whose start is compared")
    options = parser.parse_args()
    above = 0

    def report(what: str, seconds: float, bound: float, kind: str) -> None:
        nonlocal above
        above += seconds > bound
        print(
            f"{what}: {seconds:+.2f} s {kind}, bound {bound:.2f} s{'' if seconds <= bound else ': ABOVE'}", flush=True
        )

    with tempfile.TemporaryDirectory() as directory:
        recipe = Path(directory) / "wrong.yaml"
        recipe.write_text(WRONG)
        for command in COMMANDS:
            for arguments, code in (["--help"], 0), ([str(recipe)], 2):
                difference = median_difference(
                    lambda command=command, arguments=arguments, code=code: times(
                        ["-m", "bcft.cli", command, *arguments], code
                    ),
                    empty,
                    options.pairs,
                )
                shown = f"bcft {command} {'--help' if code == 0 else 'WRONG'}"
                report(shown, difference.cpu, ANSWER, "of CPU over an empty Python")
        for what, text in NOT_RECIPES.items():
            recipe.write_text(text)
            difference = median_difference(lambda: times(["-m", "bcft.cli", "sft", str(recipe)], 2), empty, 1)
            report(what, difference.cpu, HOSTILE, "of CPU over an empty Python")
    difference = median_difference(first_forward, lambda: times(["-c", TRL], 0), options.pairs)
    report("first forward pass", difference.wall, FORWARD, "over the import of trl")
    if options.before:
        difference = median_difference(first_forward, lambda: first_forward(options.before.resolve()), options.pairs)
        report("first forward pass", difference.wall, LATER, f"over {options.before}")
        print(f"  of CPU: {difference.cpu:+.2f} s")
    return int(above > 0)


if __name__ == "__main__":
    sys.exit(main())
