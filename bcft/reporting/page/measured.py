"""The page of an evaluation, and the sections of any page that set two runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from bcft.reporting.page.cloned import problem_parts
from bcft.reporting.page.common import reproduction, summary_figure, summary_table
from bcft.reporting.page.parts import Cell, Note, Page, Part, Section, Table
from bcft.reporting.run_files import AnyRun, EvaluatedFiles, RunFiles, evaluated
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
    colors = {name: ("accent" if name == "model" else "n2", summary) for name, summary in columns.items()}
    figure = summary_figure("success", "Held-out problems", colors)
    note = Note(f"{run.metrics['note']}.") if run.metrics.get("note") else None
    return [part for part in (figure, summary_table(columns), note) if part]


def _problems(run: EvaluatedFiles) -> list[Part]:
    return problem_parts(run.path, evaluated(run.path / "against"), run.tested(), before="against", after="model")


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
    parts: list[Part] = []
    mine, theirs = run.tested(), other.tested()
    if not (mine and theirs):
        parts.append(Note("Not compared problem by problem: a run's attempts at the test problems are missing."))
    elif mine.evaluation.problems.keys() != theirs.evaluation.problems.keys():
        parts.append(Note("Not compared problem by problem: the runs were tested on different problems."))
    else:
        sentence = conclusion(theirs, mine, before=f"in {other.name}")["conclusion"]
        parts.append(Note(f"Paired, problem by problem: {sentence}."))
    if not (isinstance(run, RunFiles) and isinstance(other, RunFiles)):  # they are in the figure of success already
        colors = {there: ("other", columns[there]), here: ("accent", columns[here])}
        figure = summary_figure("beside", "Test problems of both", colors)
        parts += [figure] if figure else []
    table = summary_table(columns)
    parts += [table] if table else []
    if mine and theirs and mine.evaluation.problems.keys() == theirs.evaluation.problems.keys():
        parts += problem_parts(run.path, theirs, mine, before="there", after="here")
    return parts
