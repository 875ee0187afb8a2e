"""Execute notebooks/bcft_colab.ipynb top to bottom on its CPU path; fail as its first failing cell does.

    python tests/notebook.py [--write]

Run by the continuous integration. It works in a temporary place; --write keeps the outputs in the notebook, without
what differs from machine to machine.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "bcft_colab.ipynb"


def words(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed."""
    return "\n".join(output.get("text", "") or str(output.get("data", "")) for output in cell.get("outputs", ()))


def tidy(outputs: list[nbformat.NotebookNode], runs: str) -> list[nbformat.NotebookNode]:
    """Join what was printed piece by piece, and leave out where on this machine it ran."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "text" not in output:
            joined.append(output)
        elif joined and joined[-1].get("name") == output.name:
            joined[-1]["text"] += output["text"].replace(runs, "runs/notebook")
        else:
            joined.append(output | {"text": output["text"].replace(runs, "runs/notebook")})
    return joined


def main() -> int:
    """Execute, check, and keep the outputs if told."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = {cell.id: words(cell) for cell in notebook.cells}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {"BCFT_RUNS": runs, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"{NOTEBOOK.name}: a cell failed\n{error}", file=sys.stderr)
            return 1
        for cell in notebook.cells:
            if "outputs" in cell:
                cell.outputs = [nbformat.from_dict(output) for output in tidy(cell.outputs, runs)]
    verdicts = [line for cell in notebook.cells for line in words(cell).splitlines() if line.startswith("better: ")]
    if len(verdicts) < 3:  # of plain BC, of filtered BC, and of filtered BC asked again
        print(f"{NOTEBOOK.name}: expected three verdicts 'better', found {verdicts}", file=sys.stderr)
        return 1
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if words(cell) and not committed[cell.id] and not options.write:
            print(f"{NOTEBOOK.name}: {cell.id} has no outputs: run python tests/notebook.py --write", file=sys.stderr)
            return 1
    if options.write:
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: executed in {time.perf_counter() - start:.0f} s; {verdicts[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
