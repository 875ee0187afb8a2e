"""Lines and tables for a person: held-out figures side by side, the conclusion in words, one problem before and after.

Nothing here computes a figure except the paired comparison that a conclusion needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bcft.evaluation.results import Evaluation, Measured, compare
from bcft.runs.distributed import rank
from bcft.runs.history import AVERAGES
from bcft.runs.progress import tell
from bcft.types import Demonstration

FORMS = {"return": ".2f", "reward": ".4g"}
"""How a mean return or reward is printed."""


def say(text: str, *, quiet: bool) -> None:
    """Print a line at once, on rank 0 only; nothing with `quiet`. Exits with code 1 when the output pipe is closed."""
    if rank() == 0 and not quiet:
        tell(text)


def print_table(columns: Mapping[str, Mapping[str, Any]], quiet: bool) -> None:
    """Print summaries side by side, one column each; percentages have their 95 % interval."""
    table = Table(title="held-out problems", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, *cells in table_rows(columns):
        table.add_row(name, *cells)
    # Text also in a notebook, where rich would draw HTML.
    Console(quiet=quiet or rank() > 0, soft_wrap=True, highlight=False, force_jupyter=False).print(table)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with escaped cells: the first column to the left, figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines)


def table_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the table's rows, each with the figure's name first; figures that no summary has are left out."""
    first = next(iter(columns.values()))
    samples, k = (first["sampled"]["n"], first["sampled"]["k"]) if "sampled" in first else (0, 0)
    rows = {
        "problems": [f"{c['n']}" for c in columns.values()],
        "solved, greedy": [cell(c, "greedy", "success") for c in columns.values()],
        f"solved, sampled x {samples}": [cell(c, "sampled", "pass@1") for c in columns.values()],
        f"pass@{k}": [cell(c, "sampled", "pass@k", interval=False) for c in columns.values()],
        f"maj@{k}": ["" if "return" in c else cell(c, "sampled", "maj@k", interval=False) for c in columns.values()],
        "mean return": [mean(c, "return") for c in columns.values()],
        "mean reward": [mean(c, "reward") for c in columns.values()],
        "mean turns": [f"{c['return']['turns']:.2f}" if "return" in c else "" for c in columns.values()],
        "solved at the first turn": [_revised(c, "first") for c in columns.values()],
        "solved at the second turn": [_revised(c, "last") for c in columns.values()],
        "wrong to right, right to wrong": [_revised(c, "changes") for c in columns.values()],
        "stopped by itself": [percent(c["stop_rate"]) for c in columns.values()],
        "harder problems, sampled": [cell(c.get("harder", {}), "sampled", "pass@1") for c in columns.values()],
        "held-out loss, nats/token": [f"{c['loss']:.4f}" if "loss" in c else "" for c in columns.values()],
    }
    return [[name, *cells] for name, cells in rows.items() if any(cells)]


def conclusion(base: Measured, final: Measured, *, before: str = "before") -> dict[str, Any]:
    """Return `conclusion`, a sentence, and `vs_base`, which is left out where success is unknown.

    The sentence begins with better, worse or not distinguishable; or it says that success is unknown, or that nothing
    was measured. before: what the sentence calls the base.
    """
    old, new = base.summary, final.summary
    if not new:
        return {"conclusion": "nothing was measured: eval_test_problems is 0, or there are no held-out problems"}
    versus = compare(base.evaluation, final.evaluation)
    for average in AVERAGES:
        if f"{average}_delta" in versus:
            return _compare_averages(old, new, versus, average, before=before)
    if "greedy" not in new or "greedy" not in old:
        return {"conclusion": f"success is unknown, nothing could be graded: {_without_success(old, new, before)}"}
    kind, figure = ("sampled", "pass@1") if "sampled" in new and "sampled" in old else ("greedy", "success")
    low, high = versus["ci95"]
    sentence = (
        f"{versus['conclusion'].replace('_', ' ')}: {percent(new[kind][figure])} of attempts at {new['n']} held-out "
        f"problems solved ({kind}), {percent(old[kind][figure])} {before}: paired difference "
        f"{100 * versus['delta']:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p {_p_value(versus['p_value'])}"
    )
    return {"vs_base": versus, "conclusion": sentence}


def _compare_averages(
    old: Mapping[str, Any], new: Mapping[str, Any], versus: Mapping[str, Any], average: str, *, before: str
) -> dict[str, Any]:
    """Return `vs_base` and `conclusion` of evaluations that are compared by the mean return or reward."""
    form = FORMS[average]
    difference, low, high = (f"{value:+{form}}" for value in (versus[f"{average}_delta"], *versus[f"{average}_ci95"]))
    solved = ""
    if "sampled" in new and "sampled" in old:
        shares = (percent(summary["sampled"]["pass@1"]) for summary in (new, old))
        solved = "; {} of attempts solved, {} {}".format(*shares, before)
    if average == "reward":
        solved = f", p {_p_value(versus['p_value'])}; success is unknown"
    sentence = (
        f"{versus['conclusion'].replace('_', ' ')}: a mean {average} of {new[average]['mean']:{form}} at {new['n']} "
        f"held-out problems, {old[average]['mean']:{form}} {before}: paired difference {difference}, "
        f"95 % interval {low} to {high}{solved}"
    )
    return {"vs_base": versus, "conclusion": sentence}


def _without_success(old: Mapping[str, Any], new: Mapping[str, Any], before: str) -> str:
    """Return what is left to compare where no attempt could be graded: held-out loss and stop rate."""
    stops = f"{percent(old['stop_rate'])} of attempts stopped by themselves {before}, {percent(new['stop_rate'])} now"
    if "loss" in new and "loss" in old:
        return f"held-out loss {old['loss']:.4f} {before}, {new['loss']:.4f} now; {stops}"
    return stops


ROUNDS = f"{'round':>5} {'played':>7} {'success':>8} {'kept':>6} {'cutoff':>7}  dev greedy  {'dev sampled':<22} KL base"
"""The head of the table that grows by a line with each round."""


def round_line(record: Mapping[str, Any]) -> str:
    """Return the line of a round's metrics; what the round does not have stays blank (round 0 plays nothing).

    The mean return or reward takes the place of dev success where policies are compared by it. `KL base` is the
    divergence from the base, in nats a token.
    """
    rollout, selection, dev = (record.get(part, {}) for part in ("rollout", "selection", "eval"))
    played = " " * 17
    if rollout:
        played = f"{rollout['played']:>7} {success_or_reward(rollout):>8} "
    kept = f"{selection['kept']:>6} {selection['cutoff']:>7.3g}" if selection else " " * 14
    greedy = percent(dev["greedy"]["success"]) if "greedy" in dev else ""
    seconds = sum(record.get("seconds", {}).values())
    sampled = next((mean(dev, part) for part in AVERAGES if part in dev), cell(dev, "sampled", "pass@1"))
    forgotten = f"{dev['kl_base']:.4f}" if "kl_base" in dev else ""
    line = f"{record['round']:>5} {played}{kept}  {greedy:>10}  {sampled:<22} {forgotten:>7}  "
    line = f"{line}{seconds:.1f} s" if seconds else line.rstrip()
    note = selection.get("note", "")
    return f"{line}\n      {note}" if note else line


def scaled_name(number: int, scale: float) -> str:
    """Return what the weights of a round are called at a scale of its change from the base, such as `round 3 x 0.5`."""
    return f"round {number}" if scale == 1 else f"round {number} x {scale:g}"


def success_or_reward(rollout: Mapping[str, Any]) -> str:
    """Return the share of a round's attempts that solved; `r` and the mean reward where success is always unknown."""
    known = rollout["unknown"] < rollout["played"]
    return percent(rollout["success"]) if known else f"r {rollout['reward_mean']:.3g}"


def level(measured: Measured) -> str:
    """Return one line on how well a single policy does."""
    summary = measured.summary
    if "return" in summary:
        turns = f"{summary['return']['turns']:.1f} turns"
        return f"a mean return of {mean(summary, 'return')} in {turns}, at {summary['n']} problems"
    if "reward" in summary:
        return f"a mean reward of {mean(summary, 'reward')} at {summary['n']} problems; success is unknown"
    if "greedy" not in summary:
        return f"{percent(summary['stop_rate'])} of attempts stopped by themselves; success is unknown"
    sampled = f", {cell(summary, 'sampled', 'pass@1')} of sampled attempts" if "sampled" in summary else ""
    return f"solved {cell(summary, 'greedy', 'success')} of {summary['n']} problems by greedy decoding{sampled}"


def before_and_after(base: Evaluation, final: Evaluation, demonstrations: Sequence[Demonstration]) -> str:
    """Return the first problem that the policy does better on afterwards, with both greedy attempts; '' if none is.

    Better: solved only afterwards, or with a higher return or reward.
    """
    for demonstration in demonstrations:
        key, prompt = demonstration.problem.id, demonstration.problem.prompt
        first, last = (evaluation.problems[key][0] for evaluation in (base, final))
        average = base.average if base.average == final.average else ""
        graded = average and first.get("graded") and last.get("graded")
        higher = graded and last[average] > first[average]
        if higher or (final.greedy[key] and not base.greedy[key]):
            question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            answers = (_indented(_transcript(attempt)) for attempt in (first, last))
            return "{}\n  before: {}\n  after:  {}\n".format(question.strip(), *answers)
    return ""


def percent(share: float) -> str:
    """Return a share as a percentage with one digit."""
    return f"{100 * share:.1f} %"


def cell(column: Mapping[str, Any], kind: str, figure: str, *, interval: bool = True) -> str:
    """Return a figure of an evaluation's summary with its 95 % interval; '' where the summary has no such figure."""
    if kind not in column:
        return ""
    share = percent(column[kind][figure])
    if not interval:
        return share
    low, high = column[kind]["ci95"]
    return f"{share} [{100 * low:.1f}, {100 * high:.1f}]"


def mean(column: Mapping[str, Any], average: str) -> str:
    """Return the mean `return` or `reward` of an evaluation's summary with its 95 % interval; '' where it has none."""
    if average not in column:
        return ""
    figure, low, high = (f"{value:{FORMS[average]}}" for value in (column[average]["mean"], *column[average]["ci95"]))
    return f"{figure} [{low}, {high}]"


def _revised(column: Mapping[str, Any], figure: str) -> str:
    """Return a figure of attempts at which the policy answered twice; '' where the summary has none."""
    revision = column.get("revision")
    if not revision:
        return ""
    if figure == "changes":
        return f"{revision['wrong_to_right']}, {revision['right_to_wrong']}"
    return percent(revision[figure])


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}"


def _transcript(attempt: Mapping[str, Any]) -> str:
    """Return an attempt as text: the completion, or a conversation's actions with each observation in brackets."""
    messages = attempt.get("messages", ())
    turns = " ".join(m["content"] if m["role"] == "assistant" else f"[{m['content']}]" for m in messages)
    return turns or str(attempt["completion"])


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n          ")
