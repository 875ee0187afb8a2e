"""The page of an evaluation, and the sections of any page that set two runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from bcft.reporting.page.cloned import problem_parts
from bcft.reporting.page.common import reproduction, summary_dots, summary_table
from bcft.reporting.page.parts import Cell, Figure, Note, Page, Part, Section, Table
from bcft.reporting.run_files import AnyRun, EvaluatedFiles, evaluated
from bcft.reporting.tables import conclusion
from bcft.runs.directory import MAY_DIFFER


def measured_page(run: EvaluatedFiles, more: Sequence[Section]) -> Page:
    """Return the page of an evaluation; more: sections about another one."""
    sections = [
        Section("success", "Success", _success(run)),
        *more,
        Section("problems", "Problems", _problems(run)),
        reproduction(run, _commands(run)),
    ]
    lead = str(run.metrics["conclusion"]) if run.metrics else "Not finished."
    names = [("model", "model_name_or_path"), ("against", "against"), ("data", "dataset_name"), ("split", "eval_split")]
    facts = [(label, str(run.config[key])) for label, key in names if run.config.get(key)]
    return Page(run.name, "evaluation", lead, facts, [section for section in sections if section.parts])


def _success(run: EvaluatedFiles) -> list[Part]:
    columns = {name: run.metrics[name] for name in ("against", "model") if run.metrics.get(name)}
    table = summary_table(columns)
    if not table:
        return []
    colors = {name: ("accent" if name == "model" else "n2", summary) for name, summary in columns.items()}
    panel = summary_dots("success-test", "Held-out problems", colors)
    notes = [Note(f"{run.metrics['note']}.")] if run.metrics.get("note") else []
    return [Figure("success", [panel], table, "Intervals at 95 %.") if panel else table, *notes]


def _problems(run: EvaluatedFiles) -> list[Part]:
    return problem_parts(evaluated(run.path / "against"), run.tested(), "against", "model")


def _commands(run: EvaluatedFiles) -> list[tuple[str, list[str]]]:
    path = str(run.path)
    again = ["bcft", "evaluate", f"{path}/config.yaml", "--output_dir", f"{path}-again"]
    commands = [("Repeat it from the recipe that it recorded", again)] if run.config else []
    return [*commands, ("Draw this page again, beside another evaluation", ["bcft", "report", path, "OTHER/evaluate"])]


def beside(run: AnyRun, other: AnyRun) -> list[Section]:
    """Return the section about another run: how the recipes differ, both runs' figures, and the paired difference."""
    parts: list[Part] = []
    keys = sorted((run.config.keys() | other.config.keys()) - MAY_DIFFER)
    rows = [
        [Cell(key), Cell(_shown(run.config, key)), Cell(_shown(other.config, key))]
        for key in keys
        if run.config.get(key) != other.config.get(key)
    ]
    title = f"Beside {other.name}"
    if not (run.metrics and other.metrics):
        unfinished = " and ".join(one.name for one in (run, other) if not one.metrics)
        parts.append(Note(f"Not compared on test problems yet: {unfinished} must be finished."))
    else:
        parts += _paired(run, other)
    if rows:
        parts += [Note("The recipes differ in:"), Table(["key", "here", "there"], rows)]
    else:
        parts.append(Note("The recipes are the same."))
    return [Section("beside", title, parts)]


def _shown(config: Mapping[str, Any], key: str) -> str:
    return str(config[key]) if key in config else "(no key of this command)"


def _paired(run: AnyRun, other: AnyRun) -> list[Part]:
    here, there = f"here, {run.final[0]}", f"there, {other.final[0]}"
    columns = {there: other.final[1], here: run.final[1]}
    table = summary_table(columns)
    panel = summary_dots(
        "beside-test", "Test problems of both", {there: ("other", columns[there]), here: ("accent", columns[here])}
    )
    parts: list[Part] = []
    mine, theirs = run.tested(), other.tested()
    if not (mine and theirs):
        parts.append(Note("Not compared problem by problem: a run's attempts at the test problems are missing."))
    elif mine.evaluation.problems.keys() != theirs.evaluation.problems.keys():
        parts.append(Note("Not compared problem by problem: the runs were tested on different problems."))
    else:
        sentence = conclusion(theirs, mine, before=f"in {other.name}")["conclusion"]
        parts.append(Note(f"Paired, problem by problem: {sentence}."))
    if table:
        parts.append(Figure("beside", [panel], table, "Intervals at 95 %.") if panel else table)
    if mine and theirs and mine.evaluation.problems.keys() == theirs.evaluation.problems.keys():
        parts += problem_parts(theirs, mine, "there", "here")
    return parts
