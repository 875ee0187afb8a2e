"""The cost of a round of `bcft.filtered` beside its phases: journal, fsync, manifests, report, waiting.

    python tests/benchmarks/overhead.py [--prompts 1400] [--rounds 4]

Rounds of some twenty seconds on two CPU cores. The seconds of a round's phases must add up to the wall time between
its manifest and the one before; `other` is the overhead. Exits 1 above the bound or where the sum is off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run, print one line for each round; exit 1 if one is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1400)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--bound", type=float, default=0.05, help="largest share of other")
    parser.add_argument("--off", type=float, default=0.01, help="largest share by which sum and wall time may differ")
    options = parser.parse_args()
    keys = [f"prompts_per_round={options.prompts}", f"num_rounds={options.rounds}", "eval_test_problems=10"]
    good = True
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, "-m", "bcft.filtered", "recipes/filtered_bc.yaml", f"output_dir={directory}", *keys],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        places = [Path(directory) / f"round_{number:03d}" for number in range(1, options.rounds + 1)]
        written = [(place / "manifest.json").stat().st_mtime for place in places]
        for number in range(2, options.rounds + 1):
            seconds = json.loads((places[number - 1] / "metrics.json").read_text(encoding="utf-8"))["seconds"]
            total, wall = sum(seconds.values()), written[number - 1] - written[number - 2]
            share, off = seconds["other"] / total, abs(total - wall) / wall
            good &= share <= options.bound and off <= options.off
            print(f"round {number}: phases {total:.2f} s, wall {wall:.2f} s, other {100 * share:.1f} %  {seconds}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
