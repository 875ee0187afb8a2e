"""Rules of the package that no tool checks: light imports, text that never runs as code, docstrings, broad excepts."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bcft"
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"}
LIGHT = [
    *("types", "errors", "config.loader", "config.reference", "rewards", "runs.directory", "runs.history"),
    *(
        "runs.storage",
        "environments.base",
        "environments.tools",
        "environments.twenty_questions",
        "environments.two_attempts",
    ),
    *("policy.chat_template", "data.loading", "data.readers", "data.examples", "testing", "selection.filter"),
    *("selection.scoring", "selection.apply", "evaluation.metrics", "evaluation.statistics", "evaluation.results"),
    *("reporting.tables", "reporting.report", "report", "algorithms.session", "cli"),
    *("config.effects", "config.entries", "config.python", "reporting.costs", "reporting.dry_run"),
    *("evaluation.budget", "runs.disk", "data.files", "data.sources", "policy.hub_errors", "policy.text_ids"),
    *("integrations.reasoning_gym", "integrations.trl_environment"),
    *("policy.template", "policy.template_kwargs", "selection.functions", "selection.store"),
    *("rewards.signature", "rewards.awaiting"),
    *("policy.gguf", "runs.progress", "sft", "filtered", "evaluate", "collect", "refilter", "preview"),
    "export",
]
BROAD_EXCEPT = {"rollout/threads.py", "rewards/base.py", "environments/tools.py"}
BROAD_EXCEPT |= {"integrations/reasoning_gym.py", "integrations/reasoning_gym_items.py", "reporting/trackers.py"}
"""Files that may catch everything: users' code and other projects' generators and scorers may raise anything."""
READS_TORCH_FILES = "policy/archer.py"
"""The one file that may call `torch.load`, with `weights_only=True`, and import what it raises from `pickle`."""
FORBIDDEN = {"pickle", "dill", "eval", "exec", "sympify", "parse_expr"}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Yield each module a file imports, wherever in the file, as its dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_everything_that_checks_a_users_input_imports_no_framework():
    code = "\n".join(
        [
            "import importlib, sys",
            f"for module in {LIGHT!r}:",
            "    importlib.import_module(f'bcft.{module}')",
            f"    heavy = {HEAVY!r} & set(sys.modules)",
            "    if heavy: sys.exit(f'{module} imports {heavy}')",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_upward_import_breaks_the_layers(tmp_path):
    """The contract in setup.cfg is not empty: the same contract refuses a copy of the package with one bad import."""
    import shutil

    shutil.copytree(PACKAGE, tmp_path / "bcft", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)

    def lint():
        command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert lint().returncode == 0
    with (tmp_path / "bcft" / "selection" / "filter.py").open("a") as file:
        file.write("\n\nfrom bcft.reporting.tables import percent\n")
    broken = lint()
    assert broken.returncode == 1
    assert "bcft.selection.filter -> bcft.reporting.tables" in broken.stdout


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_runs_text_as_code(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    names |= {module.split(".")[-1] for module in imports(path)}
    reader = path.relative_to(PACKAGE).as_posix() == READS_TORCH_FILES
    if reader:
        names -= {"pickle"}
        assert "from pickle import UnpicklingError\n" in path.read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8").count("pickle") == 1
    assert not FORBIDDEN & names
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = reader and called == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords)
            assert safe or called not in ("yaml.load", "torch.load"), f"{path.name}:{node.lineno} calls {called}"
            assert not any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_broad_except_and_every_public_function_says_what_it_does(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    broad = path.relative_to(PACKAGE).as_posix() in BROAD_EXCEPT
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not broad:
            assert node.type is not None, f"{path.name}:{node.lineno}"
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
            assert not caught & {"Exception", "BaseException"}, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress") and not broad:
            assert not {ast.unparse(a) for a in node.args} & {"Exception", "BaseException"}, f"{path}:{node.lineno}"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(member for cls in classes for member in cls.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}:{node.lineno} {node.name} has no docstring"


def test_no_recipe_is_passed_whole_or_looked_up_by_string():
    """Only commands, `cli` and `algorithms` receive the configuration; every other function takes the part it needs."""
    commands = {"sft", "filtered", "evaluate", "collect", "refilter", "preview", "export", "cli"}
    for path in files():
        parts = path.relative_to(PACKAGE).parts
        if parts[0].removesuffix(".py") in commands or parts[0] in ("algorithms", "config"):
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.arg) and node.annotation is not None:
                assert not re.search(r"\bConfig\b", ast.unparse(node.annotation)), f"{path}:{node.lineno}"
        assert "config.values[" not in text, path
