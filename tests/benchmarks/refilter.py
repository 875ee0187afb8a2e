"""Time and memory of `refilter` on many saved trajectories.

    python tests/benchmarks/refilter.py [--attempts 50000 100000 200000] [--output runs/refilter] [--key value ...]

Makes a run of `filtered` with as many trajectories, eight at each problem and 120 tokens each, whose ids are as unequal
as those of words (Zipf's law), and a third of them right. Then runs `bcft refilter` on it in a process of its own, with
the default reward and the keys that follow. Prints seconds and the peak of resident memory, and exits with 1 if 300,000
trajectories or fewer take more than `MOST` bytes, or if a processor's time for one doubles from the fewest to the most.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml

from bcft.runs.storage import ROLLOUTS, seal

ROOT = Path(__file__).parents[2]
MOST = 1_000_000_000
SAMPLES, LENGTH, PROMPT = 8, 120, 60
VOCABULARY = 32_000


def trajectories(n: int) -> Iterator[str]:
    """Yield the lines of `rollouts.jsonl`; the ids of sample k of a problem depend on nothing else."""
    for number in range(n):
        problem, sample = divmod(number, SAMPLES)
        ids = (np.random.default_rng(number).zipf(1.2, LENGTH) % VOCABULARY).tolist()
        answer = problem % 97 + (number % 3 > 0)
        turn = {
            "action": f"{' '.join(f'w{i}' for i in ids[:80])}\n#### {answer}",
            "ids": list(range(100, 100 + PROMPT)), "action_ids": ids, "rewritten": False, "stop": "stop_token",
            "observation": [], "graded": False, "reward": 0.0, "success": "unknown",
        }  # fmt: skip
        identity = f"{problem:016x}"
        line = {"id": f"1-{identity}-{sample}", "round": 1, "problem_id": identity, "sample": sample, "turns": [turn]}
        yield json.dumps(line | {"ended": "done", "error": "", "opening": []}) + "\n"


def make(n: int, run: Path) -> None:
    """Write the run."""
    place = run / "round_001"
    place.mkdir(parents=True)
    with (place / ROLLOUTS).open("w", encoding="utf-8") as file:
        file.writelines(trajectories(n))
    problems = range((n + SAMPLES - 1) // SAMPLES)
    with (run / "problems.jsonl").open("w", encoding="utf-8") as file:
        for number in problems:
            row = {"problem_id": f"{number:016x}", "prompt": f"Problem {number}: what is it?"}
            file.write(json.dumps(row | {"answer": str(number % 97)}) + "\n")
    made = {"dataset_name": "bcft:arithmetic", "dataset_train_split": "train", "environment": None, "num_rounds": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(made | {"dataset_config": None, "dataset_test_split": None}))
    seal(place, ROLLOUTS)


def measure(n: int, output: Path, keys: Sequence[str]) -> tuple[float, int]:
    """Return seconds of one processor and the peak of resident memory in bytes of `refilter` on n trajectories."""
    run, chosen = output / "run", output / "chosen"
    shutil.rmtree(output, ignore_errors=True)
    make(n, run)
    command = [sys.executable, "-m", "bcft.refilter", "--quiet", "model_name_or_path=bcft:tiny-math"]
    command += ["dataset_name=bcft:arithmetic", f"rollouts={run}", f"output_dir={chosen}", *keys]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"refilter ended with {process.returncode}"
    rows = sum(1 for _ in (chosen / "kept.jsonl").open("rb"))
    busy, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    spent = f"{seconds:.1f} s, {busy:.1f} s of a processor, {peak / 1e6:,.0f} MB"
    print(f"{n:,} attempts: {spent}, {rows:,} kept", flush=True)
    return busy, peak


def main() -> int:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, nargs="+", default=[50_000, 100_000, 200_000, 300_000])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "refilter")
    options, keys = parser.parse_known_args()
    measured = {n: measure(n, options.output.absolute(), keys) for n in sorted(options.attempts)}
    shutil.rmtree(options.output, ignore_errors=True)
    each = [seconds / n for n, (seconds, _) in measured.items()]
    linear = each[-1] < 2 * each[0]
    small = all(peak <= MOST for n, (_, peak) in measured.items() if n <= 300_000)
    return 0 if linear and small else 1


if __name__ == "__main__":
    sys.exit(main())
