"""What the README says can be done: its commands parse, its files exist, its code compiles, nothing is left open."""

import re
import shlex
from pathlib import Path

import pytest

from bcft.config import parse
from bcft.config_tables import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z]+@|TODO|TBD", README)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:recipes|tests|bcft)/[\w./-]+\.\w+", README))))
def test_every_file_it_names_exists(path):
    assert (ROOT / path).is_file()


COMMAND_LINES = sorted(set(re.findall(r"(?:`|-m )bcft[. ]([a-z]+ recipes/[^`\n]+)`?", README)))


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_it_shows_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *arguments = shlex.split(line)
    assert command in COMMANDS
    assert parse(command, arguments)["dataset_name"]


def test_every_command_is_shown():
    assert {line.split()[0] for line in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_its_python_compiles(code):
    compile(code, "README.md", "exec")
