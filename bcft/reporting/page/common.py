"""Parts that all pages share: tables of held-out figures, recipe, versions, and the commands to repeat a run."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from bcft.reporting.page.figures import Dot, dots, number_text, percent_text
from bcft.reporting.page.parts import Cell, Code, Figure, Note, Part, Section, Table
from bcft.reporting.run_files import FIGURE, AnyRun, check_keys, read
from bcft.reporting.tables import FORMS, percent, table_rows
from bcft.runs.history import AVERAGES
from bcft.runs.storage import read_json

_OBJECT = re.compile(r"@[0-9a-f]{8}\b")


def summary_table(columns: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Return the figures of evaluations side by side; None without any."""
    measured = {name: summary for name, summary in columns.items() if summary}
    if not measured:
        return None
    return Table(["", *measured], [[Cell(text) for text in row] for row in table_rows(measured)])


def numbers(value: float | None, form: str = ".4g") -> Cell:
    """Return a cell with a number; blank for none."""
    return Cell("") if value is None else Cell(f"{value:{form}}", value)


def share(value: float | None) -> Cell:
    """Return a cell with a share as a percentage; blank for none."""
    return Cell("") if value is None else Cell(percent(value), value)


def compact(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Return a table without the columns that are blank in all rows; the first one stays."""
    filled = [i for i in range(len(head)) if i == 0 or any(row[i].text for row in rows)]
    return Table([head[i] for i in filled], [[row[i] for i in filled] for row in rows])


def main_figure(summary: Mapping[str, Any]) -> str:
    """Return the part of a summary that policies are compared by; '' where nothing was measured."""
    return next((part for part in (*AVERAGES, "sampled", "greedy") if part in summary), "")


def summary_figure(
    name: str, title: str, policies: Mapping[str, tuple[str, Mapping[str, Any]]], caption: str = "Intervals at 95 %."
) -> Figure | None:
    """Return a figure of the held-out results of some policies; None where nothing was measured.

    policies: name -> color and summary.
    """
    measured = {row: (color, summary) for row, (color, summary) in policies.items() if main_figure(summary)}
    if not measured:
        return None
    values = [dot for row, (color, summary) in measured.items() for dot in _dots(row, color, summary)]
    by_average = main_figure(next(iter(measured.values()))[1]) in AVERAGES
    form, limits = (number_text, None) if by_average else (percent_text, (0.0, 1.0))
    rows = [
        [Cell(f"{dot.row}, {dot.label}"), *(numbers(value) for value in (dot.value, *(dot.interval or (None, None))))]
        for dot in values
    ]
    drawn = dots(f"{name}-dots", title, values, form=form, limits=limits)
    return Figure(name, [drawn], Table(["", "value", "low", "high"], rows), caption)


def _dots(row: str, color: str, summary: Mapping[str, Any]) -> list[Dot]:
    main = main_figure(summary)
    if main in AVERAGES:
        return [Dot(row, f"mean {main}", color, summary[main]["mean"], summary[main]["ci95"])]
    values = [
        Dot(row, part, color, summary[part][FIGURE[part]], summary[part]["ci95"], mark)
        for part, mark in (("greedy", "ring"), ("sampled", "dot"))
        if part in summary
    ]
    if "sampled" in summary:
        values.append(Dot(row, f"pass@{summary['sampled']['k']}", color, summary["sampled"]["pass@k"], (), "square"))
    return values


def average_form(main: str) -> str:
    """Return how a figure of an evaluation is printed in a table."""
    return FORMS.get(main, ".4g")


def reproduction(run: AnyRun, commands: Iterable[tuple[str, Sequence[str]]]) -> Section:
    """Return the section of what the run depends on. commands: what they do, and their words."""
    status: dict[str, Any] = read(run.path / "status.json", read_json, {})
    parts: list[Part] = []
    if started := status.get("command_line", ""):
        parts.append(Code("The command that made it:", started))
    objects = sorted(key for key, value in run.config.items() if _OBJECT.search(str(value)))
    if objects:
        parts.append(Note(f"Given from Python, so that no command line repeats the run: {', '.join(objects)}."))
    else:
        parts += [Code(f"{about}:", shlex.join(words)) for about, words in commands]
    parts += versions(run)
    if run.config:
        recipe = yaml.safe_dump(dict(run.config), allow_unicode=True, sort_keys=True).strip()
        parts.append(Code("The recipe with every key, config.yaml", recipe, folded=True))
    return Section("repeat", "Repeat it", parts)


def versions(run: AnyRun) -> list[Part]:
    """Return packages and hardware; nothing where they are not recorded yet."""
    file = run.path / "versions.json"
    made: dict[str, Any] | None = read(file, read_json, None)
    if made is None:
        return []
    check_keys(file, made, "packages", "python", "platform", "cpu", "cpus", "gpus", "world_size", "data")
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    hardware = f"{made['cpu']}, {made['cpus']} CPU cores, {', '.join(made['gpus']) or 'no GPU'}"
    processes = f"{made['world_size']} process{'es' * (made['world_size'] > 1)}"
    words = f"{packages}; Python {made['python']} on {made['platform']}; {hardware}, {processes}."
    return [Note(f"Made with {words}"), Note(f"SHA-256 of the data: {made['data']}")]
