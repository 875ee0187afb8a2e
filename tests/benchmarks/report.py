"""Time to draw `report.html` of a run, without imports: what a redraw during a run costs it.

    python tests/benchmarks/report.py [RUN] [--times 10]

RUN: the output_dir of any run, by default runs/filtered_bc; its page is drawn into a copy of its files without weights.
The first drawing imports matplotlib and Jinja2, and is not counted. Prints the seconds and the size of the page, and
exits with 1 if the median takes more than `MOST` seconds of a processor or the page is larger than `LARGEST`.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bcft.reporting.report import write_report

MOST = 0.5
LARGEST = 3_000_000


def main() -> int:
    """Draw, and print what it takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", default="runs/filtered_bc", type=Path)
    parser.add_argument("--times", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, given.run.resolve().name)
        shutil.copytree(given.run, run, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*", "journal"))
        start = time.perf_counter()
        page = write_report(run)
        first = time.perf_counter() - start
        walls, processors = [], []
        for _ in range(given.times):
            wall, processor = time.perf_counter(), time.process_time()
            write_report(run)
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
        size = page.stat().st_size
    median = statistics.median(processors)
    print(
        f"first drawing, with imports: {first:.2f} s; redraws: median {median:.2f} s of a processor "
        f"({min(processors):.2f} to {max(processors):.2f}), {statistics.median(walls):.2f} s of a clock; {size:,} bytes"
    )
    return int(median > MOST or size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
