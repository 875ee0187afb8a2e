"""Seconds from the shell to the first forward pass of `bcft.sft`, against `from trl import SFTTrainer` alone.

    python tests/benchmarks/startup.py [--pairs 5]

Whole processes, interleaved; the figure is the median of the pairwise differences, ours less trl's import.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The process ends at its first forward pass, whichever it is.
OURS = """
import os, sys, torch
def forward(self, *args, **kwargs): os._exit(7)
import transformers.models.llama.modeling_llama as llama
llama.LlamaForCausalLM.forward = forward
from bcft.sft import main
main(["recipes/bc_math.yaml", f"--output_dir={sys.argv[1]}"])
"""
THEIRS = "from trl import SFTTrainer"


def seconds(code: str, expected: int) -> float:
    """Return how long a fresh interpreter takes for the code."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        found = subprocess.run(
            [sys.executable, "-c", code, directory], cwd=ROOT, capture_output=True, check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        taken = time.perf_counter() - start
    assert found.returncode == expected, found.stderr.decode()
    return taken


def main() -> int:
    """Print each pair and the median difference; exit 1 above the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--bound", type=float, default=3.0)
    options = parser.parse_args()
    seconds(OURS, 7), seconds(THEIRS, 0)
    differences = []
    for pair in range(options.pairs):
        ours, theirs = seconds(OURS, 7), seconds(THEIRS, 0)
        differences.append(ours - theirs)
        print(f"pair {pair + 1}: first forward {ours:.1f} s, import of trl {theirs:.1f} s, {differences[-1]:+.1f} s")
    median = statistics.median(differences)
    print(f"median difference {median:+.1f} s of {options.pairs} pairs")
    return 0 if median <= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
