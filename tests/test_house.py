"""The house: files sit on floors and import downward; the lower floors start in milliseconds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bcft"
FLOORS = [
    {"types", "errors", "processes", "clock"},
    {"config", "statistics", "judge", "journal", "selection", "files"},
    {"rewards"},
    {"problems", "rendering", "play", "scoring", "transcripts"},
    {"environments", "checks", "filtering", "grading"},
    {"data", "rows", "model", "generation", "training"},
    {"playing", "testing"},
    {"run", "command", "evaluation", "ledger"},
    {"summary", "rollouts", "memory"},
    {"probe", "learning_curve", "dry_run"},
    {"rounds"},
    {"sft", "filtered", "evaluate", "collect", "refilter", "preview", "cli"},
]
"""Lowest first; some floors of the design have a mezzanine."""
LIGHT = {
    "types",
    "errors",
    "processes",
    "clock",
    "config",
    "statistics",
    "judge",
    "journal",
    "selection",
    "rewards",
    "problems",
    "rendering",
    "environments",
    "play",
    "scoring",
    "transcripts",
    "checks",
    "filtering",
    "grading",
    "files",
}
PARTS = {"config_tables": "config", "config_values": "config"}
"""A file that was split keeps one place in the house."""
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"}
BROAD_EXCEPT = {
    ("play.py", "users' environments: whatever they raise is the failure of one attempt, never of a run"),
    ("rewards.py", "users' reward functions: whatever they raise is told in one line, with the function's name"),
}
"""The files that may catch everything, each with the failure it expects."""
FORBIDDEN = {"pickle", "dill", "eval", "exec", "sympify", "parse_expr"}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return PARTS.get(first, first)


def floor_of(name):
    return next((i for i, floor in enumerate(FLOORS) if name in floor), None)


def imports(path):
    """Yield each module a file imports, wherever in the file, as its dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_floors_only(path):
    own = name_of(path)
    if own == "__init__":
        return
    assert floor_of(own) is not None, f"{path} is on no floor"
    for module in imports(path):
        if not module.startswith("bcft."):
            continue
        other = PARTS.get(module.split(".")[1], module.split(".")[1])
        assert other == own or floor_of(other) < floor_of(own), f"{path.name} imports {module} from above or beside it"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_floors_0_to_2_import_no_framework(path):
    if name_of(path) in LIGHT:
        assert not HEAVY & {module.split(".")[0] for module in imports(path)}


@pytest.mark.parametrize(
    "module", ["config", "sft", "evaluate", "preview", "collect", "refilter", "cli", "rewards", "journal", "play"]
)
def test_what_reads_the_command_line_imports_no_framework(module):
    code = f"import sys, bcft.{module}; sys.exit(' '.join({HEAVY!r} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_runs_text_as_code(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    names |= {module.split(".")[-1] for module in imports(path)}
    assert not FORBIDDEN & names
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("yaml.load", "torch.load"), f"{path.name}:{node.lineno} calls {called}"
            assert not any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_broad_except_and_every_public_function_says_what_it_does(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    broad = str(path.relative_to(PACKAGE)) in {name for name, _ in BROAD_EXCEPT}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not broad:
            assert node.type is not None, f"{path.name}:{node.lineno}"
            assert ast.unparse(node.type) not in ("Exception", "BaseException"), f"{path.name}:{node.lineno}"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(member for found in classes for member in found.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name} has no docstring"
