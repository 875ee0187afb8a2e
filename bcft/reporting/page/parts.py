"""What a page is made of, as frozen values: sections of notes, tables, figures, commands, rows of tokens and attempts.

The template has a macro for each `kind`. Texts are plain; the template escapes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is read, and the number behind it as the files hold it."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a color of the style sheet, and how it is drawn (`line`, `dash`, `dot`, `ring`, `box`)."""

    label: str
    color: str
    mark: str


@dataclass(frozen=True)
class Panel:
    """One drawing with its title above it and its legend below it."""

    title: str
    svg: str
    """Safe markup."""
    keys: Sequence[Key] = ()


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, and the numbers that they are drawn from."""

    kind: ClassVar[str] = "figure"
    name: str
    panels: Sequence[Panel]
    table: Table
    caption: str = ""


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy, and what they do; `folded` ones open on a click."""

    kind: ClassVar[str] = "code"
    about: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Tokens:
    """The tokens of a training row, each with whether it carries loss."""

    kind: ClassVar[str] = "tokens"
    about: str
    tokens: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Row:
    """One attempt, or one problem before and after: a line that opens.

    group: what it is filtered by, such as its decision; good: whether that is shown in the accent color.
    """

    group: str
    good: bool
    round: int
    solved: str
    facts: Sequence[str]
    """Short, beside the group."""
    head: str
    """The prompt in one line."""
    blocks: Sequence[tuple[str, str]]
    """Label and text, in order."""


@dataclass(frozen=True)
class Rows:
    """Lines that open, and can be searched and filtered. grouped: what their groups are, in one word."""

    kind: ClassVar[str] = "rows"
    about: str
    rows: Sequence[Row]
    grouped: str


Part: TypeAlias = Table | Figure | Note | Code | Tokens | Rows


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its table of contents."""

    id: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page. lead: the conclusion; facts: label and value, in a line below it."""

    title: str
    command: str
    lead: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
