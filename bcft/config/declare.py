"""How a setting is declared: its default, meaning, limits and commands; and how settings that conflict are reported.

`library_fields.json` holds the names, types, defaults and help of the fields of TRL and transformers.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

ALL = ("sft", "filtered", "evaluate", "collect", "refilter", "preview")
TRAINING = ("sft", "filtered")
PLAYING = (*TRAINING, "evaluate", "collect")
GRADING = (*PLAYING, "refilter")
SPLITTING = (*PLAYING, "preview")
SELECTING = ("filtered", "collect", "refilter")

LIBRARY: Mapping[str, Mapping[str, Mapping[str, Any]]] = json.loads(
    Path(__file__).with_name("library_fields.json").read_text(encoding="utf-8")
)
LIBRARY_FIELDS = {name: (group, row) for group, rows in LIBRARY.items() for name, row in rows.items()}
"""Library field -> the class it belongs to, and its type, default, help and choices."""
_INHERITED: Any = object()


def own(default: Any, meaning: str, *, commands: tuple[str, ...] = ALL, limits: str = "") -> Any:
    """Declare a key of bcft: its default, its meaning, the commands that read it, the limits of its numbers."""
    metadata = {"meaning": meaning, "commands": commands, "limits": limits, "group": "bcft"}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def library(
    name: str, *, default: Any = _INHERITED, note: str = "", commands: tuple[str, ...] = ALL, limits: str = ""
) -> Any:
    """Declare a library's field under its own name; the note follows the library's help."""
    group, row = LIBRARY_FIELDS[name]
    metadata = {
        "meaning": f"{row['help']} ({note})" if note else row["help"],
        "commands": commands,
        "limits": limits,
        "group": group,
        "choices": tuple(row.get("choices", ())),
    }
    return field(default=row["default"] if default is _INHERITED else default, metadata=metadata)


Conflict = tuple[tuple[str, ...], str]
"""The keys in conflict, the one to change first, and the reason."""


class SettingError(ValueError):
    """Settings that are valid one by one but not together."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        super().__init__("; ".join(f"{keys[0]}: {message}" for keys, message in conflicts))
        self.conflicts = conflicts


class Settings:
    """A section of the configuration. Creating one raises SettingError for its conflicts."""

    def __post_init__(self) -> None:
        if conflicts := list(self.conflicts()):
            raise SettingError(conflicts)

    def conflicts(self) -> Iterator[Conflict]:
        """Yield the conflicts between fields that are valid one by one."""
        yield from ()
