"""The published methods of recipes/methods side by side, over five seeds.

    python tests/benchmarks/methods.py [NAME ...] [--seeds 0 1 2 3 4] [--jobs 2] [--output runs/methods]

Whole runs of the recipes as a user starts them, each with 12,288 attempts at training problems; a finished run is not
run again. The resulting policies attempt the same 500 test problems, all at temperature 1, whatever their recipes
sample with. `ship_scale` is the main recipe with scales to choose from. KL is the divergence of the chosen round from
the base, in nats a token. Prints the README's table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seeds import ROOT, Metrics, rounds, run, spread

METHODS: dict[str, tuple[str, ...]] = {
    name: (f"methods/{name}.yaml",)
    for name in ("archer", "raft", "rest_em", "star", "best_of_n", "rft", "maxrl", "rwr", "ssd")
} | {"ship_scale": ("filtered_bc.yaml", "ship_scale=[0.5,0.75,1.0]")}
"""Name -> recipe and keys."""
BASE = "bcft:tiny-math"


def one(name: str, seed: int, output: Path) -> Metrics:
    """Run a method with one seed, unless it is the base; return its policy's evaluation."""
    place, policy = output / f"{name}-{seed}", BASE
    if name != "base":
        recipe, *keys = METHODS[name]
        run("filtered", recipe, place, f"seed={seed}", *keys)
        policy = str(place / "best")
    return run("evaluate", "filtered_bc.yaml", place, f"seed={seed}", f"model_name_or_path={policy}")


def cells(summaries: Sequence[Metrics]) -> str:
    """Return the figures of a method, one policy for each seed."""
    figures = [("greedy", "success"), ("sampled", "pass@1"), ("sampled", "pass@k")]
    shown = [spread([summary[kind][figure] for summary in summaries]) for kind, figure in figures]
    return " | ".join([*shown, spread([summary["harder"]["sampled"]["pass@1"] for summary in summaries])])


def trained(name: str, seeds: Sequence[int], output: Path) -> str:
    """Return rows trained on up to the chosen round, the share kept with a wrong step, the divergence, the scales."""
    past = {seed: rounds(output / f"{name}-{seed}") for seed in seeds}
    lines = [line for one in past.values() for line in one]
    kept, wrong = (sum(line["selection"][key] for line in lines) for key in ("kept", "kept_with_wrong_step"))
    count = sum(line["train"]["rows"] for line in lines) / len(seeds)
    apart = [one[-1]["eval"]["kl_base"] for one in past.values() if one]
    kl = f"{sum(apart) / len(apart):.3f} ({min(apart):.3f} to {max(apart):.3f})" if apart else ""
    ends = [json.loads((output / f"{name}-{seed}" / "metrics.json").read_text(encoding="utf-8")) for seed in seeds]
    scales = "".join(f", {end['scale']:g}" for end in ends if "scale" in end)
    return f"{count:,.0f} | {100 * wrong / max(kept, 1):.1f} % | {kl}{scales and f'; scales{scales[1:]}'}"


def main() -> int:
    """Run all methods with all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "methods")
    options = parser.parse_args()
    output = options.output.absolute()
    jobs = [(name, seed) for seed in options.seeds for name in ("base", *options.methods)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: one(job[0], job[1], output), jobs), strict=True))
    policies = {name: cells([results[name, s]["model"] for s in options.seeds]) for name in ("base", *options.methods)}
    head = "greedy | sampled x 16 | pass@8 | harder, sampled | rows trained | kept with a wrong step | KL"
    print(f"\n| {len(options.seeds)} seeds, % of 500 test problems | {head} |\n|---|" + "---:|" * 7)
    print(f"| base | {policies['base']} | | | |")
    for name in options.methods:
        print(f"| `{name}` | {policies[name]} | {trained(name, options.seeds, output)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
