"""The help of every command and the page of all keys say what there is."""

import re
from pathlib import Path

import pytest

from bcft.config.keys import COMMANDS, FLAGS, KEYS, PASSED_THROUGH, REFUSED, REFUSED_VALUES, RENAMED
from bcft.config.reference import COMMON, help_text, reference
from bcft.config.values import wanted

PAGE = Path(__file__).parents[2] / "recipes" / "KEYS.md"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_is_in_the_help_of_its_commands_with_default_and_meaning(command: str) -> None:
    text = help_text(command)
    for key in KEYS.values():
        asked = [f"  {key.name}: " in text, f" {key.name}: {wanted(key)}" in " ".join(text.split())]
        assert asked == [command in key.commands] * 2, key.name
        if command in key.commands:
            assert " ".join(key.meaning.split()) in " ".join(text.split())
    assert all(f"--{name} " in text for name, flag in FLAGS.items() if command in flag.commands)
    assert f"bcft {command} recipes/" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_screen_of_help_has_the_common_keys_the_flags_and_an_example(command: str) -> None:
    screen = "\n".join(help_text(command).splitlines()[:44])
    first, _, _ = help_text(command).partition("All keys follow")
    assert first in screen + "\n"
    assert all(f"  {name} " in first for name in COMMON if command in KEYS[name].commands)
    assert max(map(len, first.splitlines())) <= 120


def test_every_name_stands_once_in_the_table_that_fits_it() -> None:
    tables = {heading: re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) for heading, text in sections().items()}
    expected: dict[str, list[str]] = {heading: [] for heading in tables}
    for key in KEYS.values():
        expected["Passed to TRL's SFTConfig as they are" if key.name in PASSED_THROUGH else key.section].append(
            key.name
        )
    expected["Flags"] = [f"--{name}" for name in FLAGS]
    expected["Refused"] = sorted(REFUSED) + [f"{name}: {value}" for name, value in sorted(REFUSED_VALUES)]
    expected["Names from elsewhere"] = sorted(RENAMED)
    assert tables == expected


@pytest.mark.parametrize(
    ("heading", "row"),
    [
        ("data", "| `overlength` | one of drop, raise | `drop` | bcft | sft, preview | "),
        ("model", "| `model_name_or_path` | text | required | ModelConfig | all | "),
        ("selection", "| `keep_quantile` | a number >= 0 and <= 1 | `0.9` | bcft | filtered, collect, refilter | "),
        ("rounds", "| `early_stop` | an integer >= 1 or null | `null` | bcft | filtered | "),
        ("Flags", "| `--quiet` | sft, filtered, evaluate, collect, refilter | "),
        ("Names from elsewhere", "| `lr` | learning_rate |"),
    ],
)
def test_a_row_says_what_a_key_takes_its_default_and_its_commands(heading: str, row: str) -> None:
    assert f"\n{row}" in sections()[heading]


def sections() -> dict[str, str]:
    """Return the text of the committed page by heading."""
    _, *parts = PAGE.read_text(encoding="utf-8").split("\n## ")
    return dict(part.split("\n", 1) for part in parts)


def test_the_committed_reference_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `python -m bcft.config.reference > recipes/KEYS.md`"
