"""The help of every command and the page of all keys say what there is."""

from pathlib import Path

from bcft.config.keys import COMMANDS, FLAGS, KEYS, REFUSED, RENAMED
from bcft.config.reference import help_text, reference

PAGE = Path(__file__).parents[2] / "recipes" / "KEYS.md"


def test_every_own_key_is_in_the_help_of_its_commands() -> None:
    own = [key for key in KEYS.values() if key.group == "bcft"]
    assert len(own) > 30
    for command in COMMANDS:
        text = help_text(command)
        assert all(f"  {key.name}: " in text for key in own if command in key.commands)
        assert not any(f"  {key.name}: " in text for key in own if command not in key.commands)
        assert all(f"--{name} " in text for name, flag in FLAGS.items() if command in flag.commands)
        assert "SFTConfig" in text
        assert f"bcft {command} recipes/" in text


def test_the_reference_page_has_every_key_and_every_refused_or_foreign_name() -> None:
    page = reference()
    assert all(f"`{name}`" in page for name in (*KEYS, *REFUSED, *RENAMED))
    assert all(f"`--{name}`" in page for name in FLAGS)


def test_the_committed_reference_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `python -m bcft.config.reference > recipes/KEYS.md`"
