"""The learning curve and `report.md` of a filtered run, made from the files in its directory and nothing else.

The same files give the same bytes, so both can be made again at any time. Left out: anything interactive, and figures
that are not in the files yet, except the paired comparison of two runs.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bcft.errors import CheckpointError, UsageError
from bcft.evaluation.results import Measured, stored
from bcft.reporting.tables import (
    FORMS,
    cell,
    conclusion,
    markdown_table,
    mean,
    percent,
    scaled_name,
    success_or_reward,
    table_rows,
)
from bcft.runs.clock import PHASES
from bcft.runs.directory import MAY_DIFFER
from bcft.runs.history import AVERAGES, scaled_path
from bcft.runs.storage import read_json, read_jsonl, read_yaml, write_bytes, write_text
from bcft.selection.filter import REASONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
PICTURE = "learning_curve.png"
FIGURE = {"sampled": "pass@1", "greedy": "success", "return": "mean", "reward": "mean"}
"""Part of an evaluation's summary -> its main figure: a share of solved attempts, or the mean return or reward."""
KL = "KL(base || policy), nats/token"
"""The head of the column of `kl_base`."""
OWN, LIGHT, OTHER, QUIET = "#0072B2", "#7FB8DA", "#D55E00", "#767676"
COLORS = {
    "kept": OWN, "errored": "#882255", "ungraded": "#AA4499", "truncated": "#332288", "failed": "#CC6677",
    "pass_rate": "#117733", "below_min_reward": "#999933", "below_cutoff": "#DDCC77", "duplicate": "#C9C9C9",
    "max_per_problem": "#88CCEE", "tie_break": "#44AA99",
}  # fmt: skip
"""Decision -> color, for color-blind readers as well: Okabe and Ito's blue, and the muted scheme of Paul Tol."""
FILES = {
    "config.yaml": "the recipe with every key",
    "versions.json": "packages, hardware, and the hash of the data",
    "status.json": "how the last command on this directory ended",
    "problems.jsonl": "all problems with their ids: training, dev, and test",
    "metrics.jsonl": "one round per line; the picture and the table of rounds are made from it",
    "metrics.json": "the test figures and the conclusion",
    "manifest.json": "written last: with it the run is finished",
    "round_000": "the policy before any training: `evaluation.json` on dev, `test/` on test, each with all attempts",
    "round_001": "and so on, one directory per round: `rollouts.jsonl` holds the trajectories, `scores.jsonl` their "
    "rewards and decisions, `kept.jsonl` the training examples, `evaluation.jsonl` the attempts at dev problems",
    "best": "the model of the chosen round, with its card",
}


@dataclass(frozen=True)
class _Run:
    """The files of a run, which may be unfinished."""

    path: Path
    config: Mapping[str, Any]
    base: Mapping[str, Any]
    """The dev summary before any training; empty until it exists."""
    rounds: Sequence[Mapping[str, Any]]
    """The lines of `metrics.jsonl`."""
    metrics: Mapping[str, Any]
    """`metrics.json`; empty until the run is finished."""

    @classmethod
    def read(cls, path: Path) -> "_Run":
        """Read the files that exist. Raises UsageError when they are damaged or not those of a filtered run."""
        nothing: dict[str, Any] = {}
        config = _read(path / "config.yaml", read_yaml, nothing)
        if not {"num_rounds", "control"} <= config.keys():
            raise UsageError(f"against: {path} is not a run of bcft filtered: give the output_dir of one")
        rounds: list[dict[str, Any]] = _read(path / "metrics.jsonl", read_jsonl, [])
        for record in rounds:
            _check_keys(path / "metrics.jsonl", record, "round", "rollout", "diversity", "selection")
        metrics = _read(path / "metrics.json", read_json, nothing)
        if metrics:
            _check_keys(path / "metrics.json", metrics, "conclusion", "base", "best", "best_round")
        base = _read(path / "round_000/evaluation.json", read_json, nothing)
        return cls(path.resolve(), config, base, rounds, metrics)

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The rounds, after a round 0 that has `eval` only."""
        return [{"round": 0, "eval": self.base}, *self.rounds]

    @property
    def name(self) -> str:
        """The run's name in another run's picture."""
        return "random control" if self.config["control"] == "random" else self.path.name

    def curve(self, kind: str) -> list[tuple[int, float, list[float]]]:
        """Return round, solved share or mean, and interval wherever dev was evaluated."""
        evaluated = [(r["round"], r["eval"][kind]) for r in self.records if kind in r.get("eval", {})]
        return [(number, summary[FIGURE[kind]], summary["ci95"]) for number, summary in evaluated]

    @property
    def chosen(self) -> str:
        """The name of the weights in `best/`, of a finished run."""
        return scaled_name(self.metrics["best_round"], self.metrics.get("scale", 1.0))

    def tested(self) -> Measured | None:
        """Return the evaluation on test of what is in `best/`; None if its attempts are missing."""
        place = self.path / f"round_{self.metrics['best_round']:03d}"
        directory = scaled_path(place, self.metrics.get("scale", 1.0)) / "test"
        return _read(directory / "evaluation.jsonl", lambda _: stored(directory), None)


def _read(file: Path, read: Callable[[Path], T], default: T) -> T:
    """Return the content of a file, or the default where there is none. Raises UsageError for a damaged file."""
    if not file.is_file():
        return default
    try:
        return read(file)
    except (ValueError, CheckpointError) as error:
        raise UsageError(f"{file} is damaged: restore it, or give another run directory") from error


def _check_keys(file: Path, value: Any, *keys: str) -> None:
    if not isinstance(value, Mapping) or not value.keys() >= set(keys):
        raise UsageError(f"{file} is damaged, it lacks one of {', '.join(keys)}: restore it, or give another run")


def check_against(directory: Path) -> None:
    """Raise UsageError unless `write_report` can draw the run in a directory, which may be unfinished."""
    _Run.read(directory)


def write_report(directory: Path, *, command: str, against: Path | None = None) -> Path:
    """Write `learning_curve.png` and `report.md` into a run's directory; return the path of the latter.

    command: the command line that reproduces the run; against: another run to draw and to compare with, typically its
    random control. Either run may be unfinished. Raises StorageError, and UsageError when either is damaged or not a
    filtered run.
    """
    run, other = _Run.read(directory), _Run.read(against) if against else None
    write_bytes(directory / PICTURE, _picture(run, other))
    parts = [
        f"# {run.path.name}",
        *_conclusion(run),
        f"![Dev figures and decisions by round]({PICTURE})",
        _caption(run),
        *_rounds(run),
        *_scales(run),
        *_decisions(run),
        *(_against(run, other) if other else []),
        *_seconds(run),
        *_reproduce(run, command),
        *_files(run),
    ]
    write_text(directory / "report.md", "\n\n".join(parts) + "\n")  # syncs the directory, for the picture as well
    return directory / "report.md"


# The picture


def _picture(run: _Run, other: _Run | None) -> bytes:
    """Return the picture as a PNG, which does not depend on the user's own matplotlibrc."""
    import matplotlib  # noqa: PLC0415 - only drawing needs it

    content = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # a directory's name may hold dollars
        _figure(run, other).savefig(content, format="png", metadata={"Software": None})  # None: matplotlib's version
    return content.getvalue()


def _figure(run: _Run, other: _Run | None) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415 - only drawing needs it
    from matplotlib.layout_engine import ConstrainedLayoutEngine  # noqa: PLC0415 - only drawing needs it

    figure = Figure(figsize=(9, 6), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    above, below = figure.subplots(2, 1, sharex=True)
    last = max(drawn.records[-1]["round"] for drawn in (run, other) if drawn)
    if any(map(run.curve, ("greedy", *AVERAGES))):
        _draw_success(above, run, other)
    else:
        _draw_reward(above, run, other)
    _draw_decisions(below, run, span=last + 1)
    below.set_xlim(-0.5, last + 0.5)
    below.locator_params(axis="x", nbins=15, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    below.set_xlabel("round")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelbottom=True)
    return figure


def _draw_success(axes: "Axes", run: _Run, other: _Run | None) -> None:
    main = next(kind for kind in (*AVERAGES, "sampled", "greedy") if run.curve(kind))
    figure, label, form = f"Dev success, {main}", main, percent
    if main in AVERAGES:
        figure, label, form = f"Dev {main}", f"mean {main}", f"{{:{FORMS[main]}}}".format
    value_of = {number: value for number, value, _ in run.curve(main)}
    _draw_curve(axes, run, main, OWN, label=f"{label}, 95 % interval")
    if main == "sampled":
        rounds, values, _ = zip(*run.curve("greedy"), strict=True)
        axes.plot(rounds, values, color=LIGHT, linewidth=1.2, marker=".", markersize=5, label="greedy")
    chosen = run.metrics.get("best_round", max(value_of))
    if run.metrics:
        ring = f"chosen: round {chosen}"
        axes.scatter([chosen], [value_of[chosen]], 110, facecolors="none", edgecolors="black", zorder=5, label=ring)
    axes.axhline(value_of[0], color=QUIET, linestyle="--", linewidth=1, zorder=1, label="before training")
    if other and other.curve(main):
        _draw_curve(axes, other, main, OTHER, label=f"{label}, {_short(other.name)}")
    after = f", {form(value_of[chosen])} after round {chosen}" if chosen else ""
    if run.metrics and not chosen:
        after = ", no round is better"
    _title(axes, f"{figure}: {form(value_of[0])} before training{after}")
    if main not in AVERAGES:
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    _legend(axes)


def _draw_curve(axes: "Axes", run: _Run, kind: str, color: str, *, label: str) -> None:
    """Draw line and interval; a round that was not evaluated has no mark."""
    rounds, values, intervals = zip(*run.curve(kind), strict=True)
    low, high = zip(*intervals, strict=True)
    axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
    axes.vlines(rounds, low, high, color=color, alpha=0.5, linewidth=1.2)
    _line(axes, rounds, values, color, label)


def _draw_reward(axes: "Axes", run: _Run, other: _Run | None) -> None:
    for drawn, color in ((run, OWN), (other, OTHER)):
        if drawn and drawn.rounds:
            means = [record["rollout"]["reward_mean"] for record in drawn.rounds]
            label = "mean reward" if drawn is run else f"mean reward, {_short(drawn.name)}"
            _line(axes, [record["round"] for record in drawn.rounds], means, color, label)
            _legend(axes)
    _title(axes, "Mean reward of the rollouts; success is unknown")


def _line(axes: "Axes", rounds: Sequence[int], values: Sequence[float], color: str, label: str) -> None:
    above = 4 if color == OWN else 3
    axes.plot(rounds, values, color=color, linewidth=1.8, marker="o", markersize=4, zorder=above, label=label)


def _draw_decisions(axes: "Axes", run: _Run, *, span: int) -> None:
    """Draw a bar for each round: kept at the bottom, the reasons for rejection above it in the filter's order."""
    if not run.rounds:
        axes.set_yticks([])
        _title(axes, "Decisions: no round is finished")
        return
    numbers = [record["round"] for record in run.rounds]
    counts = _counts(run)
    bottom = [0] * len(numbers)
    width = min(0.8, 0.07 * span)  # a single round stays a bar and does not fill the panel
    for decision, heights in counts.items():
        label, color = decision.replace("_", " "), COLORS[decision]
        axes.bar(numbers, heights, width, bottom, label=label, color=color, edgecolor="white", linewidth=0.4)
        bottom = [sum(pair) for pair in zip(bottom, heights, strict=True)]
    _title(axes, f"Decisions: {sum(counts['kept']):,} of {sum(bottom):,} attempts kept")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _legend(axes, reverse=True)


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", pad=8)


def _legend(axes: "Axes", *, reverse: bool = False) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, reverse=reverse)


# The sections


def _conclusion(run: _Run) -> list[str]:
    metrics = run.metrics
    if not metrics:
        return [f"Not finished: {len(run.rounds)} of {run.config['num_rounds']} rounds so far."]
    parts = [f"**{metrics['conclusion']}**"]
    if "stopped" in metrics:
        parts.append(f"Stopped after round {run.records[-1]['round']}: {metrics['stopped']}.")
    return [*parts, *_test_figures({"base": metrics["base"], run.chosen: metrics["best"]})]


def _test_figures(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    tested = {name: summary for name, summary in columns.items() if summary}
    return [markdown_table(["test", *tested], table_rows(tested))] if tested else []


def _caption(run: _Run) -> str:
    parts = ["Dev problems choose the round; the test problems are different ones."]
    if "sampled" in run.base:
        parts.append(f"{run.base['n']} dev problems, {run.base['sampled']['n']} samples each; intervals at 95 %.")
    if any("eval" not in record for record in run.rounds):
        parts.append("Rounds without a mark were not evaluated.")
    if run.config.get("history", 1) != 1:
        parts.append("An attempt counts in every round that selects from it (`history`).")
    return " ".join(parts)


def _rounds(run: _Run) -> list[str]:
    """Return the table of rounds, without the columns that are empty for all of them, and the rounds' notes."""

    def column(part: str, key: str, form: Callable[[Any], str] = str) -> list[str]:
        """Return a figure of every round; '' where a round does not have it."""
        return [form(r[part][key]) if key in r.get(part, {}) else "" for r in run.records]

    seconds = [sum(record.get("seconds", {}).values()) for record in run.records]
    columns = {
        "round": [str(record["round"]) for record in run.records],
        "played": column("rollout", "played"),
        "success": [success_or_reward(r["rollout"]) if r.get("rollout") else "" for r in run.records],
        "kept": column("selection", "kept"),
        "cutoff": column("selection", "cutoff", "{:.3g}".format),
        "kept of graded": column("selection", "kept_fraction", percent),
        "requested": column("selection", "requested_fraction", percent),
        "kept with a wrong step": column("selection", "kept_with_wrong_step"),
        "dev greedy": [cell(record.get("eval", {}), "greedy", "success") for record in run.records],
        "dev sampled": [cell(record.get("eval", {}), "sampled", "pass@1") for record in run.records],
        "dev return": [mean(record.get("eval", {}), "return") for record in run.records],
        "dev reward": [mean(record.get("eval", {}), "reward") for record in run.records],
        KL: column("eval", "kl_base", "{:.4f}".format),
        "distinct solutions per problem": column("diversity", "unique_correct_per_problem", "{:.2f}".format),
        "distinct-2": column("diversity", "distinct_2", "{:.3f}".format),
        "entropy": column("diversity", "entropy", "{:.3f}".format),
        "tokens per attempt": column("diversity", "completion_length", "{:.1f}".format),
        "seconds": [f"{spent:.1f}" if spent else "" for spent in seconds],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    lines = [list(cells) for cells in zip(*shown.values(), strict=True)]
    notes = [f"- Round {r['round']}: {r['selection']['note']}" for r in run.rounds if r["selection"].get("note")]
    return ["## Rounds", markdown_table(list(shown), lines), *(["\n".join(notes)] if notes else [])]


def _scales(run: _Run) -> list[str]:
    """Return the table of `ship_scale`; nothing where no scale was chosen."""
    measured = run.metrics.get("scales", [])
    if not measured:
        return []
    evaluated = [one["eval"] for one in measured]
    columns = {
        "scale": [f"{one['scale']:g}" for one in measured],
        "dev greedy": [cell(dev, "greedy", "success") for dev in evaluated],
        "dev sampled": [cell(dev, "sampled", "pass@1") for dev in evaluated],
        "dev pass@k": [cell(dev, "sampled", "pass@k", interval=False) for dev in evaluated],
        "dev return": [mean(dev, "return") for dev in evaluated],
        "dev reward": [mean(dev, "reward") for dev in evaluated],
        KL: [f"{dev['kl_base']:.4f}" if "kl_base" in dev else "" for dev in evaluated],
        "": ["in `best/`" if one["scale"] == run.metrics["scale"] else "" for one in measured],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    title = f"## Scales of round {run.metrics['best_round']}"
    return [title, markdown_table(list(shown), [list(cells) for cells in zip(*shown.values(), strict=True)])]


def _counts(run: _Run) -> dict[str, list[int]]:
    """Return how many attempts of each round were kept, and rejected for each reason that occurs."""
    rejected = {reason: [record["selection"]["rejected"][reason] for record in run.rounds] for reason in REASONS}
    return {
        "kept": [record["selection"]["kept"] for record in run.rounds],
        **{reason: numbers for reason, numbers in rejected.items() if any(numbers)},
    }


def _decisions(run: _Run) -> list[str]:
    totals = {decision: sum(numbers) for decision, numbers in _counts(run).items()}
    attempts = max(sum(totals.values()), 1)
    rows = [[name.replace("_", " "), str(number), percent(number / attempts)] for name, number in totals.items()]
    return ["## Decisions", markdown_table(["decision", "attempts", "share"], rows)]


def _against(run: _Run, other: _Run) -> list[str]:
    """Return how the recipes differ, both runs' test figures, and the paired difference or why there is none."""
    parts = [f"## Against `{other.path.name}`"]
    keys = sorted((run.config.keys() | other.config.keys()) - MAY_DIFFER)
    differing = [
        f"`{key}` ({run.config.get(key)} here, {other.config.get(key)} there)"
        for key in keys
        if run.config.get(key) != other.config.get(key)
    ]
    parts.append(f"The recipes differ in {', '.join(differing)}." if differing else "The recipes are the same.")
    if not (run.metrics and other.metrics):
        unfinished = " and ".join(f"`{compared.path.name}`" for compared in (run, other) if not compared.metrics)
        return [*parts, f"Not compared on test problems yet: {unfinished} must be finished."]
    columns = {f"this run, {run.chosen}": run.metrics["best"]}
    parts += _test_figures(columns | {f"`{other.path.name}`, {other.chosen}": other.metrics["best"]})
    mine, theirs = run.tested(), other.tested()
    if not (mine and theirs):
        return [*parts, "Not compared problem by problem: a run's attempts at the test problems are missing."]
    if mine.evaluation.problems.keys() != theirs.evaluation.problems.keys():
        return [*parts, "Not compared problem by problem: the runs were tested on different problems."]
    sentence = conclusion(theirs, mine, before=f"in `{other.path.name}`")["conclusion"]
    return [*parts, f"Paired, problem by problem: {sentence}."]


def _seconds(run: _Run) -> list[str]:
    spent = {phase: sum(record.get("seconds", {}).get(phase, 0.0) for record in run.rounds) for phase in PHASES}
    total = sum(spent.values())
    rows = [[phase, f"{seconds:.1f}", percent(seconds / total)] for phase, seconds in spent.items() if seconds]
    table = markdown_table(["phase", "seconds", "share"], [*rows, ["all", f"{total:.1f}", ""]])
    return [
        "## Where the time went",
        table,
        "This does not include the evaluations before the first round and after the last.",
    ]


def _reproduce(run: _Run, command: str) -> list[str]:
    file = run.path / "versions.json"
    versions: dict[str, Any] = _read(file, read_json, {})
    _check_keys(file, versions, "packages", "python", "platform", "cpu", "cpus", "gpus", "world_size", "data")
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items() if version)
    hardware = f"{versions['cpu']}, {versions['cpus']} CPU cores, {', '.join(versions['gpus']) or 'no GPU'}"
    processes = f"{versions['world_size']} process{'es' * (versions['world_size'] > 1)}"
    return [
        "## How to reproduce",
        f"```bash\n{command}\n```",
        f"{packages}; Python {versions['python']} on {versions['platform']}; {hardware}, {processes}. "
        f"SHA-256 of the data: `{versions['data']}`.",
    ]


def _files(run: _Run) -> list[str]:
    existing = [f"- `{name}`: {content}" for name, content in FILES.items() if (run.path / name).exists()]
    return ["## Files", "\n".join([*existing, f"- `{PICTURE}`, `report.md`: made from these"])]


def _short(name: str) -> str:
    """Return a name that leaves room for the picture."""
    return name if len(name) <= 24 else f"{name[:23]}…"
