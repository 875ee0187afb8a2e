"""What a run's filter did: decisions, rewards and their cutoff, and problems by how many attempts solve them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bcft.evaluation.results import Measured
from bcft.reporting.page.common import numbers
from bcft.reporting.page.figures import matrix, stacks, waterfall
from bcft.reporting.page.parts import Cell, Figure, Note, Part, Table
from bcft.reporting.page.rollouts import Scores, spread
from bcft.reporting.run_files import RunFiles, decisions, evaluated

COLORS = {
    "kept": "accent", "errored": "other", "ungraded": "other-2", "truncated": "other-3", "failed": "n2",
    "pass_rate": "n1", "below_min_reward": "n3", "below_cutoff": "n4", "duplicate": "accent-4",
    "max_per_problem": "accent-3", "tie_break": "n5",
}  # fmt: skip
"""Decision -> color: what broke is of one hue, what did not pass is gray, what was one too many is a pale accent."""
RATES = ("none", "up to half", "more", "all")
"""Shares of a problem's attempts that solved it, in words."""
BINS = 16
"""Columns of a histogram of rewards that differ more than `VALUES`."""
VALUES = 10
"""The most different rewards that have a column each."""
HISTOGRAMS = 4
"""The most rounds whose rewards are drawn."""


# What the filter kept


def decisions_parts(run: RunFiles) -> list[Part]:
    """Return what became of the attempts, from played to kept; nothing before the first round."""
    if not run.rounds:
        return []
    counts = decisions(run)
    rejected = {name: heights for name, heights in counts.items() if name != "kept"}
    words = {name: name.replace("_", " ") for name in counts}
    steps = [(words[name], COLORS[name], sum(heights)) for name, heights in rejected.items()]
    steps.append(("kept", "accent", sum(counts["kept"])))
    numbers_of_rounds = [record["round"] for record in run.rounds]
    scope = "played" if run.config.get("history", 1) == 1 else "in scope"
    figure = Figure(
        "decisions",
        [
            waterfall("decisions-all", "All rounds: from played to kept", steps, first=scope, last="kept"),
            stacks(
                "decisions-rounds",
                "By round",
                numbers_of_rounds,
                {words[name]: (COLORS[name], heights) for name, heights in counts.items()},
            ),
        ],
        Table(
            ["round", *words.values(), "total"],
            [
                [numbers(number, "d"), *(numbers(n, ",d") for n in line), numbers(sum(line), ",d")]
                for number, *line in zip(numbers_of_rounds, *counts.values(), strict=True)
            ],
        ),
        "Each attempt has the first decision that applies, in this order."
        + ("" if scope == "played" else " An attempt counts in every round that selects from it (history)."),
    )
    notes = [f"Round {r['round']}: {r['selection']['note']}" for r in run.rounds if r["selection"].get("note")]
    return [figure, *map(Note, notes)]


# Rewards


def rewards_parts(run: RunFiles, scores: Mapping[int, Scores]) -> list[Part]:
    """Return the distribution of rewards in some rounds, and the means of several reward functions in all."""
    graded = [number for number, scored in scores.items() if len(scored.rewards)]
    if not graded:
        return [Note("No attempt was graded so far.")] if run.rounds else []
    everything = np.concatenate([scores[number].rewards for number in graded])
    values = np.unique(np.round(everything, 9))
    edges = None if len(values) <= VALUES else np.linspace(values[0], values[-1], BINS + 1)
    panels, rows = [], []
    for number in spread(graded, HISTOGRAMS):
        scored = scores[number]
        kept, all_of = _histogram(scored.rewards[scored.kept], values, edges), _histogram(scored.rewards, values, edges)
        rejected = all_of - kept
        labels = [f"{value:.3g}" for value in (values if edges is None else edges[:-1])]
        parts = {"kept": ("accent", kept.tolist()), "rejected": ("n4", rejected.tolist())}
        place = _cutoff_place(scored.cutoff, values, edges)
        panels.append(
            stacks(
                f"rewards-{number}", f"Round {number}", range(len(labels)), parts, labels=labels, axis="reward",
                line=(place, f"cutoff {scored.cutoff:.4g}"),
            )
        )  # fmt: skip
        rows += [
            [numbers(number, "d"), numbers(float(value), ".4g"), numbers(int(a), ",d"), numbers(int(b), ",d"),
             numbers(scored.cutoff, ".4g")]
            for value, a, b in zip(values if edges is None else edges[:-1], kept, rejected, strict=True)
        ]  # fmt: skip
    label = "reward" if edges is None else "reward from"
    drawn = "" if len(graded) <= HISTOGRAMS else f" {HISTOGRAMS} of {len(graded)} rounds are drawn."
    caption = f"All graded attempts; those left of the dashed line are below the cutoff.{drawn}"
    figure = Figure("rewards", panels, Table(["round", label, "kept", "rejected", "cutoff"], rows), caption)
    return [figure, *_functions(scores), *_logged(run)]


def _histogram(rewards: "np.ndarray[Any, Any]", values: "np.ndarray[Any, Any]", edges: Any) -> "np.ndarray[Any, Any]":
    if edges is not None:
        return np.histogram(rewards, edges)[0]
    return np.bincount(np.searchsorted(values, np.round(rewards, 9)), minlength=len(values))


def _cutoff_place(cutoff: float, values: "np.ndarray[Any, Any]", edges: Any) -> float:
    """Return where the cutoff is among the columns, which are one apart: at the left edge of the first that passes."""
    if edges is None:
        return float(np.searchsorted(values, round(cutoff, 9))) - 0.5
    return float(np.clip((cutoff - edges[0]) / (edges[1] - edges[0]), 0, BINS)) - 0.5


def _functions(scores: Mapping[int, Scores]) -> list[Part]:
    """Return the mean of each reward function by round; nothing where there is one only."""
    names = list(dict.fromkeys(name for scored in scores.values() for name in scored.functions))
    if len(names) < 2:
        return []
    rows = [
        [numbers(number, "d"), *(_function_mean(scored.functions.get(name, (0.0, 0))) for name in names)]
        for number, scored in scores.items()
    ]
    return [Note("The mean of each reward function, of the attempts that it graded:"), Table(["round", *names], rows)]


def _function_mean(sums: tuple[float, int]) -> Cell:
    return numbers(sums[0] / sums[1], ".4g") if sums[1] else Cell("")


def _logged(run: RunFiles) -> list[Part]:
    logged = {record["round"]: record["rollout"].get("logged", {}) for record in run.rounds}
    names = list(dict.fromkeys(name for scored in logged.values() for name in scored))
    if not names:
        return []
    rows = [[numbers(n, "d"), *(numbers(scored.get(name)) for name in names)] for n, scored in logged.items()]
    return [Note("Logged by the reward functions, means:"), Table(["round", *names], rows)]


# Problems


def problems_parts(run: RunFiles, scores: Mapping[int, Scores]) -> list[Part]:
    """Return the problems by their share of attempts that solved them; nothing where success is unknown."""
    known = {number: scored.solved for number, scored in scores.items() if any(n for _, n in scored.solved.values())}
    if not known:
        return []
    by_rate = {number: _by_rate([yes / n for yes, n in solved.values() if n]) for number, solved in known.items()}
    colors = ("n4", "accent-4", "accent-3", "accent")
    parts = {
        name: (color, [c[i] for c in by_rate.values()])
        for i, (name, color) in enumerate(zip(RATES, colors, strict=True))
    }
    panels = [
        stacks("problems-rounds", "Training problems by share of attempts that solved them", list(by_rate), parts)
    ]
    rows = [[Cell(f"round {number}"), *(numbers(n, ",d") for n in counts)] for number, counts in by_rate.items()]
    caption = "Training problems are drawn anew in each round; dev problems are the same in all."
    moved = _moved(run)
    if moved:
        last, counts = moved
        title = f"Dev problems before training and after round {last}"
        panels.append(
            matrix("problems-moved", title, counts, RATES, across="solved before", upward=f"after round {last}")
        )
        rows += [
            [Cell(f"dev, {RATES[y]} after, {RATES[x]} before"), Cell(f"{n:,}", n), *[Cell("")] * 3]
            for y, line in enumerate(counts)
            for x, n in enumerate(line)
        ]
    return [Figure("problems", panels, Table(["problems", *RATES], rows), caption)]


def _by_rate(rates: Sequence[float]) -> list[int]:
    counts = [0] * len(RATES)
    for rate in rates:
        counts[_rate(rate)] += 1
    return counts


def _rate(rate: float) -> int:
    return 0 if rate == 0 else 3 if rate == 1 else 1 if rate <= 0.5 else 2


def _moved(run: RunFiles) -> tuple[int, list[list[int]]] | None:
    """Return the last evaluated round, and the dev problems by their share of solved attempts after it and before."""
    last = max((r["round"] for r in run.rounds if "greedy" in r.get("eval", {})), default=0)
    if not last or "greedy" not in run.base:
        return None
    before, after = (evaluated(run.path / f"round_{number:03d}") for number in (0, last))
    if not before or not after or before.evaluation.problems.keys() != after.evaluation.problems.keys():
        return None
    counts = [[0] * len(RATES) for _ in RATES]
    for old, new in zip(_rates_of(before), _rates_of(after), strict=True):
        counts[_rate(new)][_rate(old)] += 1
    return last, counts


def _rates_of(measured: Measured) -> list[float]:
    evaluation = measured.evaluation
    return evaluation.rates or [float(solved) for solved in evaluation.greedy.values()]
