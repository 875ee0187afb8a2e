"""The published methods of recipes/methods side by side, over five seeds.

    python tests/benchmarks/methods.py [--seeds 0 1 2 3 4] [--jobs 2] [--output runs/methods]

Whole runs of the recipes as a user starts them, each with 12,288 attempts at training problems, all scored on the same
500 test problems; a finished run is not run again. Prints the README's table.
"""

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seeds import ROOT, Metrics, rounds, run, spread

METHODS = ("archer", "raft", "rest_em", "star", "best_of_n")


def row(name: str, found: Mapping[int, Metrics], output: Path) -> str:
    """Return a method's line of the table."""
    best = [metrics["best"] for metrics in found.values()]
    figures = [("greedy", "success"), ("sampled", "pass@1"), ("sampled", "pass@k")]
    cells = [spread([summary[kind][figure] for summary in best]) for kind, figure in figures]
    cells.append(spread([summary["harder"]["sampled"]["pass@1"] for summary in best]))
    lines = [line for seed in found for line in rounds(output / f"{name}-{seed}")]
    kept, wrong = (sum(line["selection"][key] for line in lines) for key in ("kept", "kept_with_wrong_step"))
    rows = sum(line["train"]["rows"] for line in lines) / len(found)
    return f"| `{name}` | {' | '.join(cells)} | {rows:,.0f} | {100 * wrong / max(kept, 1):.1f} % |"


def main() -> int:
    """Run all methods with all seeds and print what they show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "methods")
    options = parser.parse_args()
    output = options.output.absolute()
    jobs = [(name, seed) for seed in options.seeds for name in METHODS]
    with ThreadPoolExecutor(options.jobs) as pool:
        ran = pool.map(
            lambda job: run("filtered", f"methods/{job[0]}.yaml", output / f"{job[0]}-{job[1]}", f"seed={job[1]}"), jobs
        )
        found = dict(zip(jobs, ran, strict=True))
    head = "greedy | sampled x 16 | pass@8 | harder, sampled | rows trained | of these with a wrong step"
    print(f"\n| {len(options.seeds)} seeds, % of 500 test problems | {head} |\n|---|" + "---:|" * 6)
    for name in METHODS:
        print(row(name, {seed: found[name, seed] for seed in options.seeds}, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
