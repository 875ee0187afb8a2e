"""What the Markdown pages state is tried: links, commands, snippets, and the output that they show.

`.ci/run` runs what the two set-up commands at the top of README.md consist of: a fresh virtual environment, the
install, the main recipe and the tests. It also runs filtered_bc and the grid walk at full size. Commands of the methods
and of the 3B model are parsed here; their own tests run the recipes.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bcft import cli, export, filtered, sft
from bcft.config.keys import COMMANDS, ON_DIRECTORIES
from bcft.config.loader import parse
from bcft.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", ".github/*.md", "bcft/**/*.md", "recipes/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
START = re.compile(r"(?:python -m bcft\.|accelerate launch -m bcft\.|bcft )([A-Za-z]+)(?: (.+))?")
SIZES = {"eval_test_problems": 4, "eval_test_samples": 2}
LOOP = {"num_rounds": 1, "prompts_per_round": 16, "num_generations": 2, "eval_dev_problems": 4, "eval_dev_samples": 1}
SMALL = {
    "sft": {**SIZES, "max_steps": 2, "save_strategy": "no"},
    "filtered": {**SIZES, **LOOP},
    "evaluate": SIZES,
    "collect": {"prompts_per_round": 24, "num_generations": 2},
    "refilter": {},
    "preview": {},
}
"""Keys that make a command take seconds."""


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Return what stands in a page's fenced blocks of a language, '' for those without one."""
    return [text for code, text in re.findall(r"^```(\w*)\n(.*?)^```$", page(name), re.M | re.S) if code == language]


def commands(name: str) -> Iterator[tuple[str, str, str]]:
    """Yield (command, arguments, output) for each command of bcft in a page; after `$ ` a block shows its output."""
    for span, code, block in re.findall(r"(?<!`)`([^`\n]+)`(?!`)|^```(\w*)\n(.*?)^```$", page(name), re.M | re.S):
        asked, shown = block.splitlines() if code == "bash" else [span], ""
        if block.startswith("$ "):
            first, _, shown = block[2:].partition("\n")
            asked = [first]
        matches = [START.fullmatch(line.rpartition(" && ")[2]) for line in asked]
        of_recipes = (match for match in matches if match and match[1] != "report")
        yield from ((match[1], match[2] or "", shown) for match in of_recipes)


SHOWN = sorted({line for name in PAGES for line in commands(name) if line[0] != "X"})
"""Every command in any page; `X` stands for any of them."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a directory with the recipes, and with the files that the pages ask to be saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for text in (text for name in PAGES for text in blocks(name, "yaml")):
        if named := re.match(r"# (\w+\.yaml)", text):
            (tmp_path / named[1]).write_text(text, encoding="utf-8")
    row = re.search(r"^# my\.yaml.*?(\{.*\})", page("README.md"), re.M)[1]
    lines = [row.replace("6", str(number)) + "\n" for number in range(100, 200)]
    (tmp_path / "my_rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_the_readme_is_six_to_eight_kilobytes():
    assert 6_000 <= len(page("README.md").encode()) <= 8_000


@pytest.mark.parametrize("name", PAGES)
def test_no_placeholder_is_left(name):
    assert not re.findall(r"@[A-Z]+@|TODO|TBD", page(name))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_every_relative_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        path, _, anchor = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert "://" in target or there.exists(), f"{name} links to {target}, which does not exist"
        assert "://" in target or not anchor or anchor in anchors(there), f"{name}: no heading for {target}"


@pytest.mark.parametrize("name", PAGES)
def test_every_file_it_names_exists(name):
    named = re.findall(r"(?<![\w/.-])(?:recipes|tests|bcft|notebooks)/[\w./-]+\.(?:py|yaml|md|ipynb)\b", page(name))
    assert {path for path in named if not (ROOT / path).is_file()} == set()


@pytest.mark.parametrize("name", PAGES)
def test_its_python_compiles(name):
    for code in blocks(name, "python"):
        compile(code, name, "exec")


def test_every_command_is_shown_in_the_readme_with_a_recipe():
    assert {command for command, arguments, _ in commands("README.md") if ".yaml" in arguments} == set(COMMANDS)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("command", "arguments", "shown"), SHOWN)
def test_every_command_in_any_page_parses_or_fails_as_shown(command, arguments, shown):
    if command in ON_DIRECTORIES:
        if command == "export" and "--output_dir" in arguments:
            export.options_of(shlex.split(arguments))
        return
    assert command in COMMANDS
    if shown:
        with pytest.raises(UsageError) as caught:
            parse(command, shlex.split(arguments))
        assert shown.splitlines() == [f"bcft: error: {line}" for line in str(caught.value).splitlines()]
    elif arguments:
        parse(command, shlex.split(arguments))


@pytest.mark.usefixtures("here")
def test_a_command_with_a_mistake_would_be_refused():
    """The test above can fail: of a recipe that does not exist, and of a key that does not."""
    for arguments in (["recipes/no_such.yaml"], ["recipes/bc_math.yaml", "--lerning_rate", "1"]):
        with pytest.raises(UsageError):
            parse("sft", arguments)


# Your data, your reward, your environment


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_three_snippets_are_short():
    snippets = [*blocks("README.md", "yaml"), *blocks("README.md", "python")]
    assert len(snippets) == 3
    for snippet in snippets:
        assert len([line for line in snippet.splitlines() if line.strip()]) < 10


@pytest.mark.usefixtures("here")
def test_the_data_snippet_trains_on_rows_like_the_one_shown():
    """With the embedded model in place of the one from the Hub."""
    metrics = sft.run("my.yaml", model_name_or_path="bcft:tiny-math", output_dir="runs/my", **SMALL["sft"])
    assert metrics["train"]["steps"] == 2
    assert metrics["final"]["n"] > 0
    assert "greedy" in metrics["final"]  # the answers make success measurable


@pytest.fixture
def ran(here, monkeypatch, request):
    """Execute one of the README's Python snippets at a small size; return the directory of its run."""
    whole = filtered.run
    monkeypatch.setattr(filtered, "run", lambda recipe, **keys: whole(recipe, **keys, **SMALL["filtered"]))
    code = blocks("README.md", "python")[request.param]
    exec(compile(code, "<snippet>", "exec"), {"__name__": "snippet"})
    return here / re.search(r'output_dir="(.+?)"', code)[1]


@pytest.mark.parametrize("ran", [0], indirect=True)
def test_the_reward_snippet_decides_what_is_kept(ran):
    answers = {row["problem_id"]: row["answer"] for row in lines(ran / "problems.jsonl")}
    played = {row["id"]: row for row in lines(ran / "round_001" / "rollouts.jsonl")}
    rewards = {row["id"]: row["reward"] for row in lines(ran / "round_001" / "scores.jsonl")}
    right = {
        key: float(row["turns"][0]["action"].strip().endswith(f"#### {answers[row['problem_id']]}"))
        for key, row in played.items()
    }
    assert rewards == right
    assert set(rewards.values()) == {0.0, 1.0}
    assert {rewards[row["id"]] for row in lines(ran / "round_001" / "kept.jsonl")} == {1.0}


def test_the_reward_snippet_grades_text_and_messages(monkeypatch):
    monkeypatch.setattr(filtered, "run", lambda *_, **__: None)
    names = {"__name__": "snippet"}
    exec(compile(blocks("README.md", "python")[0], "README.md", "exec"), names)
    completions = ["#### 4", "#### 5", [{"role": "assistant", "content": "#### 4"}]]
    assert names["right_answer"](completions=completions, prompts=[""] * 3, answer=["4"] * 3) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("ran", [1], indirect=True)
def test_the_environment_snippet_asks_again_until_the_answer_is_right(ran):
    answers = {row["problem_id"]: row["answer"] for row in lines(ran / "problems.jsonl")}
    played = lines(ran / "round_001" / "rollouts.jsonl")
    assert {len(row["turns"]) for row in played} >= {1, 3}
    for row in played:
        right = [turn["action"].strip().endswith(f"#### {answers[row['problem_id']]}") for turn in row["turns"]]
        assert right[:-1] == [False] * (len(right) - 1)
        assert row["ended"] == ("done" if right[-1] else "turn_limit")
        assert {turn["observation"][0]["content"] for turn in row["turns"][:-1]} <= {"Wrong. Try again."}


def test_the_environment_check_in_the_recipes_page_passes():
    (code,) = (code for code in blocks("recipes/README.md", "python") if "check_environment" in code)
    exec(compile(code, "recipes/README.md", "exec"), {"__name__": "snippet"})


# Commands at a small size, and what they print


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_commands_run_in_the_order_of_the_pages_and_the_result_loads(capsys):
    """Those of README.md, then those of recipes/README.md, in one directory, as a reader would."""
    pages = ("README.md", "recipes/README.md")
    asked = dict.fromkeys((c, arguments) for name in pages for c, arguments, shown in commands(name) if not shown)
    ran = set()
    for command, arguments in asked:
        if not arguments.startswith("recipes/") or "grid_walk" in arguments or "smollm2" in arguments:
            continue  # a form such as `bcft X RECIPE`, a model from the Hub or a package, and what the test below runs
        given = shlex.split(arguments)
        small = [f"{key}={value}" for key, value in SMALL[command].items() if not {f"--{key}"} & set(given)]
        assert cli.main([command, *given, *small]) == 0, f"{command} {arguments}: {capsys.readouterr().err}"
        ran.add(command)
    assert ran == set(COMMANDS)
    (code,) = (code for code in blocks("recipes/README.md", "python") if "from_pretrained" in code)
    capsys.readouterr()
    exec(compile(code, "recipes/README.md", "exec"), {})
    assert "Work out 47 + 35 - 36 + 21." in capsys.readouterr().out


def shape(text: str) -> str:
    """Return printed text without its figures, its conclusion and its line breaks."""
    text = re.sub(r"better|worse|not distinguishable", "CONCLUSION", re.sub(r"p [<=] ", "p ", text))
    return " ".join(re.sub(r"[+-]?\d[\d,]*(\.\d+)?(e-\d+)?", "N", text).split())


WALK = {**SIZES, "num_rounds": 2, "prompts_per_round": 64, "eval_dev_problems": 4, "eval_dev_samples": 2}
OUTPUTS = [
    ("README.md", 0, "sft recipes/bc_math.yaml", {"eval_test_problems": 60, "eval_test_samples": 2}),
    ("recipes/README.md", 0, "filtered recipes/filtered_bc.yaml", {**SIZES, "num_rounds": 2}),
    ("recipes/README.md", 1, "filtered recipes/grid_walk/filtered_bc.yaml", WALK),
]
"""Page, which of its blocks with a conclusion, the command above it, and keys that make it small."""


@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("name", "number", "line", "keys"), OUTPUTS, ids=[line for _, _, line, _ in OUTPUTS])
def test_the_output_shown_is_what_the_command_prints(name, number, line, keys, capsys):
    """All but the figures; the pages leave lines out at `...`."""
    block = [text for text in blocks(name, "") if "\nbetter: " in text][number]
    if "grid_walk" in line:  # it starts from a policy that its first recipe trains
        sft.run("recipes/grid_walk/bc.yaml", max_steps=60, per_device_train_batch_size=16, eval_test_problems=0)
        capsys.readouterr()
    assert cli.main([*line.split(), *(f"{key}={value}" for key, value in keys.items())]) == 0
    printed = shape(capsys.readouterr().out)
    for part in re.split(r"^\.\.\.$", block, flags=re.M):
        assert shape(part) in printed


# The hooks of a contributor


def test_the_hook_refuses_strange_names_and_large_files(tmp_path):
    config = yaml.safe_load(page(".pre-commit-config.yaml"))
    hooks = {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}
    assert {hook["language"] for hook in hooks.values()} == {"system"}
    names = {"fine-name_1.py": 1, 'quo"te': 1, "back\\slash": 1, "wild*card": 1, "x" * 151: 1, "large.bin": 5_000_001}
    for name, size in names.items():
        (tmp_path / name).write_bytes(b"x" * size)
        entry = [*shlex.split(hooks["file-names"]["entry"]), name]
        hook = subprocess.run(entry, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert hook.returncode == (name != "fine-name_1.py"), f"{name}: {hook.stdout}{hook.stderr}"
