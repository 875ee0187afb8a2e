"""The page of a run of `sft`: success before and after, the loss, the rows, which tokens carry loss, the problems."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bcft.evaluation.results import Measured
from bcft.reporting.page.common import numbers, reproduction, summary_figure, summary_table
from bcft.reporting.page.figures import Series, curves
from bcft.reporting.page.parts import Cell, Figure, Note, Page, Part, Rows, Section, Table, Tokens
from bcft.reporting.page.rollouts import problems_of
from bcft.reporting.page.rows import held_out_rows, limit_of
from bcft.reporting.run_files import ClonedFiles, evaluated
from bcft.types import IGNORED

PROBLEMS = 1000
"""The most problems whose attempts a page has."""
TOKENS = 2000
"""The most tokens of a row that a page has."""
POINTS = 400
"""The most points of a curve."""


def cloned_page(run: ClonedFiles, more: Sequence[Section]) -> Page:
    """Return the page of a run; more: sections about another one."""
    sections = [
        Section("success", "Success", _success(run)),
        *more,
        Section("loss", "Loss", _loss(run)),
        Section("rows", "Rows", _rows(run)),
        Section("tokens", "Which tokens carry loss", _tokens(run)),
        Section("problems", "Before and after", _problems(run)),
        reproduction(run, _commands(run)),
    ]
    train = run.metrics.get("train", {})
    facts = [
        ("model", str(run.config.get("model_name_or_path", ""))),
        ("data", str(run.config.get("dataset_name") or ", ".join(map(str, run.config.get("datasets") or ())))),
        ("rows", f"{train['rows']:,}" if train else ""),
        ("steps", f"{train['steps']:,}" if train else ""),
    ]
    lead = str(run.metrics["conclusion"]) if run.metrics else "Not finished."
    shown = [section for section in sections if section.parts]
    return Page(run.name, "behavior cloning", lead, [fact for fact in facts if fact[1]], shown)


def _success(run: ClonedFiles) -> list[Part]:
    if not run.metrics:
        return []
    columns = {"before": run.metrics["base"], "after": run.metrics["final"]}
    colors = {"before": ("n2", columns["before"]), "after": ("accent", columns["after"])}
    figure = summary_figure("success", "Held-out problems before and after training", colors)
    return [part for part in (figure, summary_table(columns)) if part]


def _loss(run: ClonedFiles) -> list[Part]:
    if not run.losses:
        return []
    training = [(line["step"], line["loss"]) for line in run.losses if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in run.losses if "eval_loss" in line]
    drawn = [
        Series(label, color, [x for x, _ in points], [y for _, y in points])
        for label, color, points in (("training", "accent", _thinned(training)), ("dev", "other", _thinned(held_out)))
        if points
    ]
    if not drawn:
        return []
    panels = [curves("loss-steps", "Loss by step, nats/token", drawn, axis="step")]
    rates = [(line["step"], line["learning_rate"]) for line in run.losses if "learning_rate" in line]
    if rates:
        xs, ys = zip(*_thinned(rates), strict=True)
        panels.append(
            curves("loss-rate", "Learning rate by step", [Series("learning rate", "n2", xs, ys)], axis="step")
        )
    names = [name for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "entropy") if _has(run.losses, name)]
    rows = [[numbers(line["step"], "d"), *(numbers(line.get(name)) for name in names)] for line in _thinned(run.losses)]
    caption = "" if len(rows) == len(run.losses) else f"{len(rows)} of {len(run.losses):,} logged steps."
    return [Figure("loss", panels, Table(["step", *names], rows), caption)]


def _has(lines: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in line for line in lines)


def _thinned(points: Sequence[Any]) -> list[Any]:
    """Return at most `POINTS` of the points, the first and the last among them."""
    every = -(-len(points) // POINTS)
    return [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1] if points else []


def _rows(run: ClonedFiles) -> list[Part]:
    if not run.rows:
        return []
    names = {
        "given": "rows given", "kept": "rows trained on", "overlong": "dropped: over-long",
        "duplicate": "dropped: duplicate", "unsupervised": "dropped: empty", "weightless": "dropped: of weight 0",
        "tokens": "tokens", "tokens_supervised": "tokens that carry loss", "longest": "tokens of the longest row",
    }  # fmt: skip
    counts = run.rows["counts"]
    rows = [[Cell(words), numbers(counts[name], ",d")] for name, words in names.items() if name in counts]
    return [Note(f"{run.rows['words']}."), Table(["", "count"], rows)]


def _tokens(run: ClonedFiles) -> list[Part]:
    parts: list[Part] = [
        Tokens(
            f"{row['where'] or row['problem_id']}: {len(row['tokens'])} tokens, "
            f"{sum(token['label'] != IGNORED for token in row['tokens'])} with loss"
            + (f"; the first {TOKENS:,} of them" if len(row["tokens"]) > TOKENS else ""),
            [(token["text"], token["label"] != IGNORED) for token in row["tokens"][:TOKENS]],
        )
        for row in run.rows.get("examples", ())
    ]
    return [Note("The first rows as the trainer gets them. Shaded tokens carry loss."), *parts] if parts else []


def _problems(run: ClonedFiles) -> list[Part]:
    return problem_parts(run.path, evaluated(run.path / "base"), run.tested(), before="before", after="after")


def problem_parts(
    path: Path, first: Measured | None, second: Measured | None, *, before: str, after: str
) -> list[Part]:
    """Return the problems that two policies attempted, side by side; of one policy where the first is missing.

    path: of the run, whose `problems.jsonl` has their prompts; before, after: what the policies are called.
    """
    if not second or not second.evaluation.problems:
        return []
    policies = [measured.evaluation.problems for measured in (first, second) if measured]
    keys = [key for key in policies[-1] if all(key in problems for problems in policies)]
    shown = keys[:: -(-len(keys) // PROBLEMS)] if keys else []
    if not shown:
        return []
    attempts = {key: [problems[key] for problems in policies] for key in shown}
    names, limit = [before, after][-len(policies) :], limit_of(len(shown))
    rows = held_out_rows(attempts, problems_of(path / "problems.jsonl", {*shown}), names=names, limit=limit)
    about = f"All {len(keys):,} problems" if len(shown) == len(keys) else f"{len(shown):,} of {len(keys):,} problems"
    compared = f", {before} and {after}" if len(policies) > 1 else ""
    words = f"{about}{compared}: the greedy attempts, and how many of the sampled ones are right."
    return [Rows(words, rows, "result")]


def _commands(run: ClonedFiles) -> list[tuple[str, list[str]]]:
    path = str(run.path)
    recipe = f"{path}/config.yaml"
    return [
        ("Repeat it from the recipe that it recorded", ["bcft", "sft", recipe, "--output_dir", f"{path}-again"]),
        ("Measure it again", ["bcft", "evaluate", recipe, "--model_name_or_path", path]),
        ("Draw this page again, beside another run", ["bcft", "report", path, f"{path}-again"]),
    ]
