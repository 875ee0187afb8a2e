"""Execute notebooks/bcft_colab.ipynb top to bottom on its CPU path; fail as its first failing cell does.

    python tests/notebook.py [--write]

Run by the continuous integration. The notebook's runs go to a temporary place; --write keeps the outputs in the
notebook, without what differs from machine to machine but the seconds.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "bcft_colab.ipynb"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
UNTIDY = re.compile(rf"/tmp/|/home/|/root/|{NOTEBOOK.parents[1]}|\r|Warning\b|Traceback|site-packages")
"""What no output may hold: places on a machine, bars drawn over themselves, warnings."""
VERDICTS = 3
"""How often the notebook ends in a verdict: plain BC, filtered BC, and filtered BC asked again."""


def words(cell: nbformat.NotebookNode) -> str:
    """Return what a cell has put out, its error included, pictures left out."""
    texts = []
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        texts += [output.get("text", ""), *output.get("traceback", ())]
        texts += [data[kind] for kind in data if kind.startswith("text/")]
    return COLOUR.sub("", "\n".join(text for text in texts if text))


def join(outputs: list[nbformat.NotebookNode], runs: str) -> list[nbformat.NotebookNode]:
    """Join what was printed piece by piece, and name the temporary place as a reader's own would be."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "text" in output:
            output.text = output.text.replace(runs, "runs/notebook")
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                output.data[kind] = content.replace(runs, "runs/notebook")
        if "text" in output and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def complaints(executed: nbformat.NotebookNode, committed: dict[str, str]) -> list[str]:
    """Return what is wrong with an execution that went through, and with the outputs that are committed."""
    lines = [line for cell in executed.cells for line in words(cell).splitlines()]
    found = [line for line in lines if line.startswith("better: ")]
    wrong = [] if len(found) == VERDICTS else [f"expected {VERDICTS} verdicts 'better', found {found}"]
    for cell in executed.cells:
        both = words(cell), committed[cell.id]
        wrong += [f"cell {cell.id}: {match[0]!r} in its output" for text in both if (match := UNTIDY.search(text))]
        if both[0] and not both[1]:
            wrong.append(f"cell {cell.id} is committed without its output: run python tests/notebook.py --write")
    return wrong


def main() -> int:
    """Execute, check, and keep the outputs if told; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write, start = parser.parse_args().write, time.perf_counter()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = {cell.id: words(cell) for cell in notebook.cells}
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {"BCFT_RUNS": runs, "HF_HUB_OFFLINE": "1"}
        place = {"metadata": {"path": str(NOTEBOOK.parent)}}
        client = NotebookClient(notebook, timeout=600, record_timing=False, resources=place)
        client.extra_arguments = ["--log-level=ERROR"]  # it would warn that it is spoken to unencrypted
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError) as error:
            failed = [cell for cell in notebook.cells if "error" in {o.output_type for o in cell.get("outputs", ())}]
            ends = ["\n  ".join([f"cell {cell.id}:", *words(cell).splitlines()[-8:]]) for cell in failed]
            print(f"{NOTEBOOK.name}: {''.join(ends) or error}", file=sys.stderr)
            return 1
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if cell.cell_type == "code":
                cell.outputs = join(cell.outputs, runs)
    if wrong := complaints(notebook, {cell.id: words(cell) for cell in notebook.cells} if write else committed):
        print("\n".join(f"{NOTEBOOK.name}: {line}" for line in wrong), file=sys.stderr)
        return 1
    if write:
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: executed in {time.perf_counter() - start:.0f} s, {VERDICTS} verdicts 'better'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
