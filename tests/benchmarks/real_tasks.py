"""SmolLM2 on reasoning-gym: filtered BC beside its random control and SSD over seeds, and the base on ten tasks.

    python tests/benchmarks/real_tasks.py [runs base] [--recipe filtered_bc] [--seeds 0 1 2] [--output runs/real_tasks]

Needs what recipes/smollm2 needs. Whole runs as a user starts them, one after the other, since each uses all cores; a
finished run is not run again. The random control trains on as many attempts as the filter keeps, drawn blindly; SSD
trains on all own attempts that ended by themselves. `base` evaluates the model as it is. Prints the tables of
recipes/smollm2/README.md.
"""

import argparse
import sys
import time
from pathlib import Path

from seeds import ROOT, Metrics, run, spread

ARMS = {
    "filter": (),
    "random control": ("control=random",),
    "SSD": ("keep_quantile=0", "require_success=false"),
}
TASKS = {
    "chain_sum": "{min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 2}",
    "gcd": "{min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 30}",
    "lcm": "{min_numbers: 2, max_numbers: 2, min_value: 1, max_value: 12}",
    "basic_arithmetic": "{}",
    "simple_equations": "{}",
    "letter_counting": "{}",
    "count_bits": "{max_n: 100}",
    "leg_counting": "{}",
    "products": "{min_digits: 1, max_digits: 1}",
    "number_sequence": "{}",
}
"""Generator -> its arguments. Each asks for a number."""


def runs(recipe: str, seeds: list[int], output: Path) -> None:
    """Run every arm with every seed; print a table of test success, and the seconds of the filter's runs."""
    print(f"\n| {recipe}, seed | base | {' | '.join(ARMS)} | interval of the filter | seconds |")
    print("|---|---:|" + "---:|" * (len(ARMS) + 2))
    columns: dict[str, list[float]] = {name: [] for name in ("base", *ARMS)}
    for seed in seeds:
        results: dict[str, Metrics] = {}
        seconds = 0.0
        for name, keys in ARMS.items():
            place, start = output / f"{recipe}-{name.replace(' ', '-')}-{seed}", time.perf_counter()
            results[name] = run("filtered", f"smollm2/{recipe}.yaml", place, f"seed={seed}", *keys)
            seconds = time.perf_counter() - start if name == "filter" else seconds
        columns["base"].append(results["filter"]["base"]["sampled"]["pass@1"])
        for name, metrics in results.items():
            columns[name].append(metrics["best"]["sampled"]["pass@1"])
        low, high = results["filter"]["best"]["sampled"]["ci95"]
        cells = " | ".join(f"{100 * values[-1]:.1f}" for values in columns.values())
        print(f"| {seed} | {cells} | {100 * low:.1f} to {100 * high:.1f} | {seconds:.0f} |", flush=True)
    print(f"| mean | {' | '.join(spread(values) for values in columns.values())} | | |")


def base(output: Path) -> None:
    """Evaluate the model as it is on ten tasks; print a table."""
    print("\n| task | arguments | solved, greedy | solved, sampled | stopped by itself |\n|---|---|---:|---:|---:|")
    for task, arguments in TASKS.items():
        keys = [f"dataset_name=reasoning-gym:{task}", f"dataset_args={arguments}", "eval_test_problems=50"]
        place = output / f"base-{task}"
        metrics = run("evaluate", "smollm2/filtered_bc.yaml", place, *keys, "dataset_train_split=train[:1]")
        result = metrics["model"]
        figures = (result["greedy"]["success"], result["sampled"]["pass@1"], result["stop_rate"])
        print(f"| {task} | `{arguments}` | {' | '.join(f'{100 * figure:.1f}' for figure in figures)} |", flush=True)


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["runs", "base"])
    parser.add_argument("--recipe", default="filtered_bc")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "real_tasks")
    options = parser.parse_args()
    if "runs" in options.parts:
        runs(options.recipe, options.seeds, options.output.absolute())
    if "base" in options.parts:
        base(options.output.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
