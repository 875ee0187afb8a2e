"""The learning curve and `report.md` of a filtered run, made from the files in its directory and nothing else.

The same files give the same bytes, so both can be made again at any time. Left out: anything interactive, and figures
that are not in the files yet, except the paired comparison of two runs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bcft.reporting.picture import PICTURE, picture
from bcft.reporting.run_files import RunFiles, check_keys, decisions, read
from bcft.reporting.tables import cell, conclusion, markdown_table, mean, percent, success_or_reward, table_rows
from bcft.runs.clock import PHASES
from bcft.runs.directory import MAY_DIFFER
from bcft.runs.storage import read_json, write_bytes, write_text

KL = "KL(base || policy), nats/token"
"""The head of the column of `kl_base`."""
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


def check_against(directory: Path) -> None:
    """Raise UsageError unless `write_report` can draw the run in a directory, which may be unfinished."""
    RunFiles.read(directory)


def write_report(directory: Path, *, command: str, against: Path | None = None) -> Path:
    """Write `learning_curve.png` and `report.md` into a run's directory; return the path of the latter.

    command: the command line that reproduces the run; against: another run to draw and to compare with, typically its
    random control. Either run may be unfinished. Raises StorageError, and UsageError when either is damaged or not a
    filtered run.
    """
    run, other = RunFiles.read(directory), RunFiles.read(against) if against else None
    write_bytes(directory / PICTURE, picture(run, other))
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


# The sections


def _conclusion(run: RunFiles) -> list[str]:
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


def _caption(run: RunFiles) -> str:
    parts = ["Dev problems choose the round; the test problems are different ones."]
    if "sampled" in run.base:
        parts.append(f"{run.base['n']} dev problems, {run.base['sampled']['n']} samples each; intervals at 95 %.")
    if any("eval" not in record for record in run.rounds):
        parts.append("Rounds without a mark were not evaluated.")
    if run.config.get("history", 1) != 1:
        parts.append("An attempt counts in every round that selects from it (`history`).")
    return " ".join(parts)


def _rounds(run: RunFiles) -> list[str]:
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


def _scales(run: RunFiles) -> list[str]:
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


def _decisions(run: RunFiles) -> list[str]:
    totals = {decision: sum(numbers) for decision, numbers in decisions(run).items()}
    attempts = max(sum(totals.values()), 1)
    rows = [[name.replace("_", " "), str(number), percent(number / attempts)] for name, number in totals.items()]
    return ["## Decisions", markdown_table(["decision", "attempts", "share"], rows)]


def _against(run: RunFiles, other: RunFiles) -> list[str]:
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


def _seconds(run: RunFiles) -> list[str]:
    spent = {phase: sum(record.get("seconds", {}).get(phase, 0.0) for record in run.rounds) for phase in PHASES}
    total = sum(spent.values())
    rows = [[phase, f"{seconds:.1f}", percent(seconds / total)] for phase, seconds in spent.items() if seconds]
    table = markdown_table(["phase", "seconds", "share"], [*rows, ["all", f"{total:.1f}", ""]])
    return [
        "## Where the time went",
        table,
        "This does not include the evaluations before the first round and after the last.",
    ]


def _reproduce(run: RunFiles, command: str) -> list[str]:
    file = run.path / "versions.json"
    versions: dict[str, Any] = read(file, read_json, {})
    check_keys(file, versions, "packages", "python", "platform", "cpu", "cpus", "gpus", "world_size", "data")
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items() if version)
    hardware = f"{versions['cpu']}, {versions['cpus']} CPU cores, {', '.join(versions['gpus']) or 'no GPU'}"
    processes = f"{versions['world_size']} process{'es' * (versions['world_size'] > 1)}"
    return [
        "## How to reproduce",
        f"```bash\n{command}\n```",
        f"{packages}; Python {versions['python']} on {versions['platform']}; {hardware}, {processes}. "
        f"SHA-256 of the data: `{versions['data']}`.",
    ]


def _files(run: RunFiles) -> list[str]:
    existing = [f"- `{name}`: {content}" for name, content in FILES.items() if (run.path / name).exists()]
    return ["## Files", "\n".join([*existing, f"- `{PICTURE}`, `report.md`: made from these"])]
