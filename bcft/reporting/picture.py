"""The learning curve of a filtered run: dev figures by round, and below them what became of the attempts."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bcft.reporting.run_files import RunFiles, decisions
from bcft.reporting.tables import FORMS, percent
from bcft.runs.history import AVERAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "learning_curve.png"
OWN, LIGHT, OTHER, QUIET = "#0072B2", "#7FB8DA", "#D55E00", "#767676"
COLORS = {
    "kept": OWN, "errored": "#882255", "ungraded": "#AA4499", "truncated": "#332288", "failed": "#CC6677",
    "pass_rate": "#117733", "below_min_reward": "#999933", "below_cutoff": "#DDCC77", "duplicate": "#C9C9C9",
    "max_per_problem": "#88CCEE", "tie_break": "#44AA99",
}  # fmt: skip
"""Decision -> color, for color-blind readers as well: Okabe and Ito's blue, and the muted scheme of Paul Tol."""


def picture(run: RunFiles, other: RunFiles | None) -> bytes:
    """Return the picture as a PNG, which does not depend on the user's own matplotlibrc."""
    import matplotlib  # noqa: PLC0415 - only drawing needs it

    content = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False  # a directory's name may hold dollars
        metadata = {"Software": None}  # not the version of matplotlib
        draw_figure(run, other).savefig(content, format="png", metadata=metadata)
    return content.getvalue()


def draw_figure(run: RunFiles, other: RunFiles | None) -> "Figure":
    """Return the picture as a figure of two panels."""
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


def _draw_success(axes: "Axes", run: RunFiles, other: RunFiles | None) -> None:
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


def _draw_curve(axes: "Axes", run: RunFiles, kind: str, color: str, *, label: str) -> None:
    """Draw line and interval; a round that was not evaluated has no mark."""
    rounds, values, intervals = zip(*run.curve(kind), strict=True)
    low, high = zip(*intervals, strict=True)
    axes.fill_between(rounds, low, high, color=color, alpha=0.15, linewidth=0)
    axes.vlines(rounds, low, high, color=color, alpha=0.5, linewidth=1.2)
    _line(axes, rounds, values, color, label)


def _draw_reward(axes: "Axes", run: RunFiles, other: RunFiles | None) -> None:
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


def _draw_decisions(axes: "Axes", run: RunFiles, *, span: int) -> None:
    """Draw a bar for each round: kept at the bottom, the reasons for rejection above it in the filter's order."""
    if not run.rounds:
        axes.set_yticks([])
        _title(axes, "Decisions: no round is finished")
        return
    numbers = [record["round"] for record in run.rounds]
    counts = decisions(run)
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


def _short(name: str) -> str:
    """Return a name that leaves room for the picture."""
    return name if len(name) <= 24 else f"{name[:23]}…"
