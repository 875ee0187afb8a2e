"""The page of a filtered run: success, what the filter did, rewards, problems, diversity, time, and the attempts."""

from collections.abc import Mapping, Sequence
from typing import Any

from bcft.reporting.page.common import (
    average_form,
    compact,
    main_figure,
    numbers,
    reproduction,
    share,
    summary_figure,
    summary_table,
)
from bcft.reporting.page.figures import Series, curves, number_text, percent_text, stacks
from bcft.reporting.page.parts import Cell, Figure, Note, Page, Panel, Part, Rows, Section, Table
from bcft.reporting.page.rollouts import Scores, attempts_shown, problem_of, problems_of, scores_of
from bcft.reporting.page.rows import attempt_rows
from bcft.reporting.page.selection import decisions_parts, problems_parts, rewards_parts
from bcft.reporting.run_files import FIGURE, RunFiles
from bcft.reporting.tables import cell, mean, percent, scaled_name, success_or_reward
from bcft.runs.clock import PHASES
from bcft.runs.history import AVERAGES

KL = "KL(base || policy), nats/token"
"""The head of the column of `kl_base`."""
PHASE_COLORS = dict(zip(PHASES, ("accent", "n2", "n3", "accent-2", "accent-4", "n5"), strict=True))


def filtered_page(run: RunFiles, other: RunFiles | None, more: Sequence[Section]) -> Page:
    """Return the page of a run. other: another filtered run, which is drawn beside it; more: sections about it."""
    numbers_of_rounds = [record["round"] for record in run.rounds]
    read = ((number, scores_of(run.path / f"round_{number:03d}", number)) for number in numbers_of_rounds)
    scores = {number: one for number, one in read if one is not None}
    sections = [
        Section("success", "Success", _success(run, other)),
        *more,
        Section("filter", "What the filter kept", decisions_parts(run)),
        Section("rewards", "Rewards", rewards_parts(run, scores)),
        Section("problems", "Problems", problems_parts(run, scores)),
        Section("diversity", "Diversity and drift", _diversity(run)),
        Section("time", "Time", _time(run)),
        Section("rounds", "Rounds", _rounds(run)),
        Section("attempts", "Attempts", _attempts(run, scores)),
        reproduction(run, _commands(run)),
    ]
    facts = [
        ("model", str(run.config.get("model_name_or_path", ""))),
        ("data", str(run.config.get("dataset_name") or ", ".join(map(str, run.config.get("datasets") or ())))),
        ("rounds", f"{len(run.rounds)} of {run.config['num_rounds']}"),
        ("attempts", f"{sum(record['rollout']['played'] for record in run.rounds):,}"),
    ]
    shown = [section for section in sections if section.parts]
    return Page(run.name, "filtered behavior cloning", _lead(run), [f for f in facts if f[1]], shown)


def _lead(run: RunFiles) -> str:
    if not run.metrics:
        return f"Not finished: {len(run.rounds)} of {run.config['num_rounds']} rounds so far."
    stopped = ""
    if "stopped" in run.metrics:
        stopped = f". Stopped after round {run.records[-1]['round']}: {run.metrics['stopped']}"
    return f"{run.metrics['conclusion']}{stopped}"


# Success


def _success(run: RunFiles, other: RunFiles | None) -> list[Part]:
    parts: list[Part] = []
    if panels := _dev_panels(run, other):
        test = _test_figure(run, other)
        parts.append(Figure("success", [*panels, *(test.panels if test else [])], _success_table(run), _caption(run)))
    table = summary_table({"base": run.metrics["base"], run.chosen: run.metrics["best"]}) if run.metrics else None
    if table:
        parts += [Note("On test problems, which no round was chosen by:"), table]
    return [*parts, *_scales(run)]


def _test_figure(run: RunFiles, other: RunFiles | None) -> Figure | None:
    if not run.metrics:
        return None
    policies = {"base": ("n2", run.metrics["base"]), run.chosen: ("accent", run.metrics["best"])}
    if other and other.metrics:
        policies[f"{_other_name(other)}, {other.chosen}"] = ("other", other.metrics["best"])
    return summary_figure("success-test", "Test problems: base and the chosen round", policies)


def _caption(run: RunFiles) -> str:
    parts = [
        "Dev problems choose the round. Test problems are others: the base and the chosen round attempt them once."
    ]
    if "sampled" in run.base:
        parts.append(f"{run.base['n']} dev problems, {run.base['sampled']['n']} samples each; intervals at 95 %.")
    if any("eval" not in record for record in run.rounds):
        parts.append("Rounds without a mark were not evaluated.")
    return " ".join(parts)


def _dev_panels(run: RunFiles, other: RunFiles | None) -> list[Panel]:
    main = main_figure(run.base)
    if not main:
        return _reward_panels(run, other)
    by_rate = main not in AVERAGES
    series = [_curve(run, main, "accent", main if by_rate else f"mean {main}")]
    if main == "sampled":
        wide = [(r["round"], r["eval"]["sampled"]["pass@k"]) for r in run.records if "sampled" in r.get("eval", {})]
        series.append(_series(f"pass@{run.base['sampled']['k']}", "accent-2", wide, mark="square"))
        series.append(_curve(run, "greedy", "accent-2", "greedy", mark="ring"))
    value_of = {number: value for number, value, _ in run.curve(main)}
    chosen = run.metrics.get("best_round", 0)
    ring = (chosen, value_of[chosen], f"chosen: round {chosen}") if run.metrics and chosen in value_of else None
    series.append(Series("before training", "n2", [], [value_of[0]], mark="dash"))
    if other and other.curve(main):
        series.append(_curve(other, main, "other", f"{main}, {_other_name(other)}"))
    title = f"Dev problems by round: {'solved' if by_rate else f'mean {main}'}"
    form, limits = (percent_text, (0.0, 1.0)) if by_rate else (number_text, None)
    return [curves("success-dev", title, series, form=form, limits=limits, ring=ring)]


def _reward_panels(run: RunFiles, other: RunFiles | None) -> list[Panel]:
    """Return the success of the rollouts, or their mean reward, where dev problems say nothing of either."""
    known = any(record["rollout"]["unknown"] < record["rollout"]["played"] for record in run.rounds)
    figure, label = ("success", "solved attempts") if known else ("reward_mean", "mean reward")
    drawn = [
        _series(name, color, [(r["round"], r["rollout"][figure]) for r in one.rounds])
        for one, color, name in ((run, "accent", label), (other, "other", f"{label}, {_other_name(other)}"))
        if one and one.rounds
    ]
    if not drawn:
        return []
    if known:
        return [curves("success-dev", "Solved attempts of the rollouts", drawn, form=percent_text, limits=(0.0, 1.0))]
    return [curves("success-dev", "Mean reward of the rollouts; success is unknown", drawn)]


def _other_name(other: RunFiles | None) -> str:
    return "control" if other and other.config["control"] == "random" else "other"


def _curve(run: RunFiles, kind: str, color: str, label: str, *, mark: str = "line") -> Series:
    rounds, values, intervals = zip(*run.curve(kind), strict=True)
    return Series(label, color, rounds, values, intervals, mark)


def _series(label: str, color: str, points: Sequence[tuple[float, float]], *, mark: str = "line") -> Series:
    return Series(label, color, [x for x, _ in points], [y for _, y in points], mark=mark)


def _success_table(run: RunFiles) -> Table:
    measured = [(f"dev, round {r['round']}", r["eval"]) for r in run.records if r.get("eval")]
    if run.metrics:
        tested = {"vs_base": run.metrics.get("vs_base", {})} | dict(run.metrics["best"])
        measured += [("test, base", run.metrics["base"]), (f"test, {run.chosen}", tested)]
    head = ["evaluated", "n", "greedy", "low", "high", "sampled", "low", "high", "pass@k", "maj@k"]
    head += [*(word for average in AVERAGES for word in (f"mean {average}", "low", "high")), "stopped by itself"]
    head += ["against base", "low", "high", "p", "pass@k against base", "low", "high"]
    rows = []
    for name, summary in measured:
        row = [Cell(name), numbers(summary.get("n"), "d")]
        for part in ("greedy", "sampled"):
            row += _with_interval(summary.get(part, {}), FIGURE[part], percentage=True)
            row += [share(summary.get(part, {}).get(figure)) for figure in ("pass@k", "maj@k")] * (part == "sampled")
        for average in AVERAGES:
            row += _with_interval(summary.get(average, {}), "mean", form=average_form(average))
        versus = summary.get("vs_base", {})
        delta = next((part for part in ("delta", *(f"{average}_delta" for average in AVERAGES)) if part in versus), "")
        low, high = versus.get(delta.replace("delta", "ci95"), (None, None))
        row += [share(summary.get("stop_rate")), *(numbers(v, "+.3f") for v in (versus.get(delta), low, high))]
        wide = versus.get("pass@k_ci95", (None, None))
        row += [numbers(versus.get("p_value"), ".3g")]
        rows.append([*row, *(numbers(v, "+.3f") for v in (versus.get("pass@k_delta"), *wide))])
    return compact(head, rows)


def _with_interval(part: Mapping[str, Any], figure: str, *, percentage: bool = False, form: str = ".4g") -> list[Cell]:
    if not part:
        return [Cell("")] * 3
    values = (part[figure], *part["ci95"])
    return [share(value) if percentage else numbers(value, form) for value in values]


def _scales(run: RunFiles) -> list[Part]:
    """Return the table of `ship_scale`; nothing where no scale was chosen."""
    measured = run.metrics.get("scales", [])
    if not measured:
        return []
    rows = [
        [
            Cell(f"{one['scale']:g}", one["scale"]),
            Cell(cell(one["eval"], "greedy", "success")),
            Cell(cell(one["eval"], "sampled", "pass@1")),
            Cell(cell(one["eval"], "sampled", "pass@k", interval=False)),
            *(Cell(mean(one["eval"], average)) for average in AVERAGES),
            numbers(one["eval"].get("kl_base"), ".4f"),
            Cell("in best/" if one["scale"] == run.metrics["scale"] else ""),
        ]
        for one in measured
    ]
    head = ["scale", "dev greedy", "dev sampled", "dev pass@k", "dev return", "dev reward", KL, "chosen"]
    name = scaled_name(run.metrics["best_round"], 1.0)
    return [Note(f"Scales of the change of {name} from the base, on dev problems:"), compact(head, rows)]


# Diversity, time


def _diversity(run: RunFiles) -> list[Part]:
    def of(part: str, key: str) -> list[tuple[int, float]]:
        return [(r["round"], r[part][key]) for r in run.records if key in r.get(part, {})]

    lines = {
        "distinct solutions per problem": of("diversity", "unique_correct_per_problem"),
        "distinct-2": of("diversity", "distinct_2"),
        "entropy, nats/token": of("diversity", "entropy"),
        KL: of("eval", "kl_base"),
        "tokens per attempt": of("diversity", "completion_length"),
        "stopped by itself": of("rollout", "stop_rate"),
    }
    lines = {name: points for name, points in lines.items() if points}
    if not run.rounds or not lines:
        return []
    panels = [
        curves(f"diversity-{i}", name, [_series("", "accent", points)], height=170)
        for i, (name, points) in enumerate(lines.items())
    ]
    panels = [Panel(panel.title, panel.svg) for panel in panels]
    values = {name: dict(points) for name, points in lines.items()}
    rows = [[numbers(r["round"], "d"), *(numbers(values[name].get(r["round"])) for name in lines)] for r in run.rounds]
    caption = (
        "A policy that collapses loses diversity before it loses success. KL is taken on the base's own dev attempts."
    )
    return [Figure("diversity", panels, Table(["round", *lines], rows), caption)]


def _time(run: RunFiles) -> list[Part]:
    if not run.rounds:
        return []
    spent = {phase: [record.get("seconds", {}).get(phase, 0.0) for record in run.rounds] for phase in PHASES}
    spent = {phase: seconds for phase, seconds in spent.items() if any(seconds)}
    if not spent:
        return []
    total = sum(map(sum, spent.values()))
    numbers_of_rounds = [record["round"] for record in run.rounds]
    steps = [(phase, PHASE_COLORS[phase], seconds) for phase, seconds in spent.items()]
    panels = [
        stacks("time-rounds", "Seconds by round", numbers_of_rounds, {name: (color, s) for name, color, s in steps})
    ]
    rows = [
        [numbers(number, "d"), *(numbers(s, ".1f") for s in line), numbers(sum(line), ".1f")]
        for number, *line in zip(numbers_of_rounds, *spent.values(), strict=True)
    ]
    sums = [sum(seconds) for seconds in spent.values()]
    rows.append([Cell("all"), *(numbers(s, ".1f") for s in sums), numbers(total, ".1f")])
    shares = ", ".join(f"{phase} {percent(sum(seconds) / total)}" for phase, seconds in spent.items())
    caption = (
        f"{total:,.0f} s in all: {shares}. Evaluations before the first round and after the last are not included."
    )
    return [Figure("time", panels, Table(["round", *spent, "all"], rows), caption)]


# Rounds and attempts


def _rounds(run: RunFiles) -> list[Part]:
    """Return the table of rounds, without the columns that are empty for all of them."""

    def of(record: Mapping[str, Any], part: str, key: str, form: str = ".4g") -> Cell:
        return numbers(record.get(part, {}).get(key), form)

    head = ["round", "played", "success", "kept", "cutoff", "kept of graded", "requested", "kept with a wrong step"]
    head += ["rows", "steps", "loss", "dev greedy", "dev sampled", "dev return", "dev reward", KL, "seconds"]
    rows = []
    for record in run.records:
        rollout, dev = record.get("rollout"), record.get("eval", {})
        spent = sum(record.get("seconds", {}).values())
        rows.append(
            [
                numbers(record["round"], "d"),
                of(record, "rollout", "played", ",d"),
                Cell(success_or_reward(rollout), rollout["success"]) if rollout else Cell(""),
                of(record, "selection", "kept", ",d"),
                of(record, "selection", "cutoff"),
                share(record.get("selection", {}).get("kept_fraction")),
                share(record.get("selection", {}).get("requested_fraction")),
                of(record, "selection", "kept_with_wrong_step", "d"),
                of(record, "train", "rows", ",d"),
                of(record, "train", "steps", ",d"),
                of(record, "train", "loss"),
                Cell(cell(dev, "greedy", "success")),
                Cell(cell(dev, "sampled", "pass@1")),
                *(Cell(mean(dev, average)) for average in AVERAGES),
                of(record, "eval", "kl_base", ".4f"),
                Cell(f"{spent:.1f}" if spent else ""),
            ]
        )
    return [compact(head, rows)]


def _attempts(run: RunFiles, scores: Mapping[int, Scores]) -> list[Part]:
    shown = attempts_shown(run.path, list(scores), scores)
    if not shown:
        return []
    problems = problems_of(run.path / "problems.jsonl", {problem_of(attempt.played["id"]) for attempt in shown})
    played = sum(len(scored.lines) for scored in scores.values())
    about = f"All {played:,} attempts."
    if len(shown) < played:
        read = sorted({attempt.round for attempt in shown})
        about = (
            f"{len(shown):,} of {played:,} attempts, of {len(read)} of {len(scores)} rounds: all attempts at some "
            "problems, drawn by a hash of their ids, and some of every decision. The rest is in rollouts.jsonl and "
            "scores.jsonl of each round."
        )
    return [Rows(about, attempt_rows(shown, problems), "decision")]


def _commands(run: RunFiles) -> list[tuple[str, list[str]]]:
    path = str(run.path)
    recipe = f"{path}/config.yaml"
    commands = [
        ("Repeat it from the recipe that it recorded", ["bcft", "filtered", recipe, "--output_dir", f"{path}-again"]),
        (
            "The same with a random filter",
            ["bcft", "filtered", recipe, "--output_dir", f"{path}-control", "--control", "random"],
        ),
    ]
    if run.metrics:
        best = ["bcft", "evaluate", recipe, "--model_name_or_path", f"{path}/best"]
        commands.append(("Measure the chosen round again", best))
    return [*commands, ("Draw this page again, beside another run", ["bcft", "report", path, f"{path}-control"])]
