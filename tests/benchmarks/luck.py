"""Does a filter by return select skill or luck? `guess_number` at two quantiles, from one cloned policy.

    python tests/benchmarks/luck.py [--seeds 0 1 2] [--quantiles 0.9 0.5] [--jobs 2] [--output runs/luck]

Whole runs of recipes/guess_number as a user starts them, all from one run of bc.yaml and scored on the same held-out
problems; a finished run is not run again. Prints the README's table.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seeds import ROOT, Metrics, run


def lengths(output: Path) -> dict[str, float]:
    """Return the mean turns of a run's trajectories: of all, and of the kept ones."""
    turns_of: dict[str, list[int]] = {"played": [], "kept": []}
    for place in sorted(output.glob("round_*")):
        if not (place / "rollouts.jsonl").is_file():
            continue
        lines = (place / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
        turns = {line["id"]: len(line["turns"]) for line in map(json.loads, lines)}
        scores = map(json.loads, (place / "scores.jsonl").read_text(encoding="utf-8").splitlines())
        turns_of["kept"] += [turns[score["id"]] for score in scores if score["decision"] == "kept"]
        turns_of["played"] += turns.values()
    return {name: sum(values) / max(len(values), 1) for name, values in turns_of.items()}


def last_dev(output: Path) -> float:
    """Return the mean return on dev after the last round, whichever round is chosen."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluated = [line for line in map(json.loads, lines) if "eval" in line]
    return float(evaluated[-1]["eval"]["return"]["mean"])


def main() -> int:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quantiles", type=float, nargs="+", default=[0.9, 0.5])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "luck")
    options = parser.parse_args()
    output = options.output.absolute()
    cloned = output / "bc"
    run("sft", "guess_number/bc.yaml", cloned)
    jobs = [(quantile, seed) for seed in options.seeds for quantile in options.quantiles]

    def one(job: tuple[float, int]) -> Metrics:
        """Run the filter with one quantile and seed."""
        keys = (f"model_name_or_path={cloned}", f"keep_quantile={job[0]}", f"seed={job[1]}")
        return run("filtered", "guess_number/filtered_bc.yaml", output / f"q{job[0]}-{job[1]}", *keys)

    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(jobs, pool.map(one, jobs), strict=True))
    print("\n| quantile, seed | guesses, played | guesses, kept | dev return, last round | test return: base, chosen |")
    print("|---|---:|---:|---:|---:|")
    for (quantile, seed), metrics in sorted(results.items(), reverse=True):
        place = output / f"q{quantile}-{seed}"
        length = lengths(place)
        base, best = (metrics[name]["return"]["mean"] for name in ("base", "best"))
        print(
            f"| {quantile}, {seed} | {length['played']:.1f} | {length['kept']:.1f} | {last_dev(place):.2f} | "
            f"{base:.2f}, {best:.2f} (round {metrics['best_round']}) |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
