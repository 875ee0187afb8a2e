"""Filtered BC against its random control and plain BC on as many demonstrations, over five seeds.

    python tests/benchmarks/seeds.py [--seeds 0 1 2 3 4] [--jobs 2] [--output runs/seeds]

Whole runs of the recipes as a user starts them, all scored on the same 500 test problems; a finished run is not run
again. Plain BC has its own recipe's settings, and as many demonstrations as the filter had rows up to its chosen
round. Prints the README's table; exits 1 unless the control stays below the filter in every seed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Metrics = Mapping[str, Any]


def run(command: str, recipe: str, output: Path, *keys: str) -> Metrics:
    """Run one recipe to its end; return its `metrics.json`."""
    process = subprocess.run(
        [sys.executable, "-m", f"bcft.{command}", f"recipes/{recipe}", f"output_dir={output}", "--quiet", *keys],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    place = output / "evaluate" if command == "evaluate" else output
    metrics: Metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    print(f"{output.name}: {metrics['conclusion']}", flush=True)
    return metrics


def rounds(output: Path) -> list[Metrics]:
    """Return the metrics of a run's rounds up to the chosen one."""
    best = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["best_round"]
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:best]]


def one_seed(seed: int, output: Path) -> dict[str, Metrics]:
    """Run filter, control and plain BC with one seed; return their metrics."""
    places = {name: output / f"{name}-{seed}" for name in ("filter", "control", "plain")}
    results = {
        "filter": run("filtered", "filtered_bc.yaml", places["filter"], f"seed={seed}"),
        "control": run("filtered", "filtered_bc.yaml", places["control"], f"seed={seed}", "control=random"),
    }
    rows = sum(line["train"]["rows"] for line in rounds(places["filter"]))
    results["plain"] = run(
        "sft",
        "bc_math.yaml",
        places["plain"],
        f"seed={seed}",
        f"dataset_train_split=train[:{rows}]",
        "save_strategy=no",
    )
    return results


def spread(values: Sequence[float]) -> str:
    """Return mean and range, as percentages."""
    low, high = min(values), max(values)
    return f"{100 * sum(values) / len(values):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(results: Mapping[int, Mapping[str, Metrics]]) -> list[str]:
    """Return the README's table, one column for each policy."""
    columns = {
        "base": [runs["filter"]["base"] for runs in results.values()],
        "random control": [runs["control"]["best"] for runs in results.values()],
        "filter": [runs["filter"]["best"] for runs in results.values()],
        "plain BC": [runs["plain"]["final"] for runs in results.values()],
    }
    figures = {
        "solved, greedy": ("greedy", "success"),
        "solved, sampled x 16": ("sampled", "pass@1"),
        "pass@8": ("sampled", "pass@k"),
    }
    lines = [
        f"| {len(results)} seeds, % of 500 test problems | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, (kind, figure) in figures.items():
        cells = [spread([summary[kind][figure] for summary in column]) for column in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [spread([summary["harder"]["sampled"]["pass@1"] for summary in column]) for column in columns.values()]
    return [*lines, f"| one carry more than in training, sampled | {' | '.join(cells)} |"]


def main() -> int:
    """Run all seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "seeds")
    options = parser.parse_args()
    output = options.output.absolute()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(options.seeds, pool.map(lambda seed: one_seed(seed, output), options.seeds), strict=True))
    print("\n".join(["", *table(results), ""]))
    below = 0
    for seed, runs in results.items():
        levels = {name: runs[name]["best"]["sampled"]["pass@1"] for name in ("control", "filter")}
        below += levels["control"] < levels["filter"]
        past = {name: rounds(output / f"{name}-{seed}") for name in levels}
        wrong = {name: sum(line["selection"]["kept_with_wrong_step"] for line in past[name]) for name in past}
        kept = {name: sum(line["selection"]["kept"] for line in past[name]) for name in past}
        low, high = runs["filter"]["vs_base"]["pass@k_ci95"]
        print(
            f"seed {seed}: round {runs['filter']['best_round']} of the filter, kept with a wrong step "
            f"{wrong['filter']} of {kept['filter']} (control, round {runs['control']['best_round']}: "
            f"{wrong['control']} of {kept['control']}); plain BC on {runs['plain']['train']['rows']} demonstrations; "
            f"pass@8 against base {100 * low:+.1f} to {100 * high:+.1f} points"
        )
    print(f"control below the filter in {below} of {len(results)} seeds")
    return 0 if below == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
