"""What a person reads of a run: the table, the conclusion in words, one problem before and after, the model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bcft.evaluation.held_out import Evaluation, Measured, compare
from bcft.runs.distributed import rank
from bcft.types import Demonstration


def print_table(columns: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print summaries side by side, one column each, percentages with their 95 % interval."""
    table = Table(title="held-out problems", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for name, *cells in table_rows(columns):
        table.add_row(name, *cells)
    console.print(table)


def table_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return the table's lines, the name of the figure first; a figure nobody has is left out."""
    some = next(iter(columns.values()))
    samples, k = (some["sampled"]["n"], some["sampled"]["k"]) if "sampled" in some else (0, 0)
    lines = {
        "problems": [f"{c['n']}" for c in columns.values()],
        "solved, greedy": [cell(c, "greedy", "success") for c in columns.values()],
        f"solved, sampled x {samples}": [cell(c, "sampled", "pass@1") for c in columns.values()],
        f"pass@{k}": [cell(c, "sampled", "pass@k", interval=False) for c in columns.values()],
        f"maj@{k}": [cell(c, "sampled", "maj@k", interval=False) for c in columns.values() if "return" not in c],
        "mean return": [returned(c) for c in columns.values()],
        "mean turns": [f"{c['return']['turns']:.2f}" if "return" in c else "" for c in columns.values()],
        "solved at the first turn": [_revised(c, "first") for c in columns.values()],
        "solved at the second": [_revised(c, "last") for c in columns.values()],
        "wrong to right, right to wrong": [_revised(c, "changes") for c in columns.values()],
        "stopped by itself": [percent(c["stop_rate"]) for c in columns.values()],
        "harder problems, sampled": [cell(c.get("harder", {}), "sampled", "pass@1") for c in columns.values()],
        "held-out loss, nats a token": [f"{c['loss']:.4f}" if "loss" in c else "" for c in columns.values()],
    }
    return [[name, *cells] for name, cells in lines.items() if any(cells)]


def conclusion(base: Measured, final: Measured, *, before: str = "before") -> dict[str, Any]:
    """Return `vs_base` where success is known, and `conclusion`: better, worse, not distinguishable, or cannot tell."""
    old, new = base.summary, final.summary
    if not new:
        return {"conclusion": "nothing was measured: eval_test_problems is 0, or there are no held-out problems"}
    if "return" in new and "return" in old:
        return _returns(base, final, before=before)
    if "greedy" not in new or "greedy" not in old:
        loss = (
            f"held-out loss {old['loss']:.4f} {before}, {new['loss']:.4f} now; "
            if "loss" in new and "loss" in old
            else ""
        )
        stops = (
            f"{percent(old['stop_rate'])} of attempts stopped by themselves {before}, {percent(new['stop_rate'])} now"
        )
        return {"conclusion": f"success cannot be told, nothing could be graded: {loss}{stops}"}
    versus = compare(base.evaluation, final.evaluation)
    kind, figure = ("sampled", "pass@1") if "sampled" in new and "sampled" in old else ("greedy", "success")
    low, high = versus["ci95"]
    words = (
        f"{versus['conclusion'].replace('_', ' ')}: {percent(new[kind][figure])} of attempts at {new['n']} held-out "
        f"problems solved ({kind}), {percent(old[kind][figure])} {before}: paired difference "
        f"{100 * versus['delta']:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, "
        f"p {_p_value(versus['p_value'])}"
    )
    return {"vs_base": versus, "conclusion": words}


def _returns(base: Measured, final: Measured, *, before: str) -> dict[str, Any]:
    """Return `vs_base` and `conclusion` of evaluations in an environment that gives rewards."""
    versus = compare(base.evaluation, final.evaluation)
    old, new = base.summary, final.summary
    low, high = versus["return_ci95"]
    solved = ""
    if "sampled" in new and "sampled" in old:
        shares = (percent(found["sampled"]["pass@1"]) for found in (new, old))
        solved = "; {} of attempts solved, {} {}".format(*shares, before)
    words = (
        f"{versus['conclusion'].replace('_', ' ')}: a mean return of {new['return']['mean']:.2f} at {new['n']} "
        f"held-out problems, {old['return']['mean']:.2f} {before}: paired difference {versus['return_delta']:+.2f}, "
        f"95 % interval {low:+.2f} to {high:+.2f}{solved}"
    )
    return {"vs_base": versus, "conclusion": words}


ROUNDS = f"{'round':>5} {'played':>7} {'success':>8} {'kept':>6} {'cutoff':>7}  dev greedy  dev sampled"
"""The head of the table that grows by a line a round."""


def round_line(record: Mapping[str, Any]) -> str:
    """Return a round's line, of its metrics; what it does not have (round 0 plays nothing) stays blank.

    Where success is not known of any attempt, the mean reward stands in its place; a return in that of dev's success.
    """
    rollout, chosen, dev = (record.get(part, {}) for part in ("rollout", "selection", "eval"))
    played = " " * 17
    if rollout:
        known = rollout["unknown"] < rollout["played"]
        how = percent(rollout["success"]) if known else f"r {rollout['reward_mean']:.3g}"
        played = f"{rollout['played']:>7} {how:>8} "
    kept = f"{chosen['kept']:>6} {chosen['cutoff']:>7.3g}" if chosen else " " * 14
    greedy = percent(dev["greedy"]["success"]) if "greedy" in dev else ""
    seconds = sum(record.get("seconds", {}).values())
    sampled = returned(dev) if "return" in dev else cell(dev, "sampled", "pass@1")
    line = f"{record['round']:>5} {played}{kept}  {greedy:>10}  {sampled:<23}"
    line = f"{line}{seconds:.1f} s" if seconds else line.rstrip()
    note = chosen.get("note", "")
    return f"{line}\n      {note}" if note else line


def level(measured: Measured) -> str:
    """Return in a line how well one policy does."""
    found = measured.summary
    if "return" in found:
        turns = f"{found['return']['turns']:.1f} turns"
        return f"a mean return of {returned(found)} in {turns}, at {found['n']} problems"
    if "greedy" not in found:
        return f"{percent(found['stop_rate'])} of attempts stopped by themselves; success cannot be told"
    sampled = f", {cell(found, 'sampled', 'pass@1')} of sampled attempts" if "sampled" in found else ""
    return f"solved {cell(found, 'greedy', 'success')} of {found['n']} problems by greedy decoding{sampled}"


def before_and_after(base: Evaluation, final: Evaluation, asked: Sequence[Demonstration]) -> str:
    """Return one problem that greedy decoding solves only afterwards, or with a higher return, both in full; or ''."""
    for demonstration in asked:
        key, prompt = demonstration.problem.id, demonstration.problem.prompt
        first, last = (found.problems[key][0] for found in (base, final))
        higher = last.get("graded") and first.get("graded") and last["return"] > first["return"]
        if higher or (final.greedy[key] and not base.greedy[key]):
            words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            answers = (_indented(_said(attempt)) for attempt in (first, last))
            return "{}\n  before: {}\n  after:  {}\n".format(words.strip(), *answers)
    return ""


def percent(share: float) -> str:
    """Return a share as a percentage with one digit."""
    return f"{100 * share:.1f} %"


def cell(column: Mapping[str, Any], kind: str, figure: str, *, interval: bool = True) -> str:
    """Return a figure of an evaluation's summary with its 95 % interval; '' where the summary has no such figure."""
    if kind not in column:
        return ""
    shown = percent(column[kind][figure])
    if not interval:
        return shown
    low, high = column[kind]["ci95"]
    return f"{shown} [{100 * low:.1f}, {100 * high:.1f}]"


def returned(column: Mapping[str, Any]) -> str:
    """Return the mean return of an evaluation's summary with its 95 % interval; '' where there is none."""
    if "return" not in column:
        return ""
    low, high = column["return"]["ci95"]
    return f"{column['return']['mean']:.2f} [{low:.2f}, {high:.2f}]"


def _revised(column: Mapping[str, Any], figure: str) -> str:
    """Return what became of first attempts that were judged; '' where there are none."""
    found = column.get("revision")
    if not found:
        return ""
    return f"{found['wrong_to_right']}, {found['right_to_wrong']}" if figure == "changes" else percent(found[figure])


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}"


def _said(attempt: Mapping[str, Any]) -> str:
    """Return an attempt as text: of a conversation the actions, what was answered to each in brackets."""
    said = attempt.get("messages", ())
    shown = " ".join(m["content"] if m["role"] == "assistant" else f"[{m['content']}]" for m in said)
    return shown or str(attempt["completion"])


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n          ")


def plain_console(*, quiet: bool = False) -> Console:
    """Return where a command prints: text as it is, in a notebook as well; of several processes rank 0 alone prints."""
    return Console(quiet=quiet or rank() > 0, soft_wrap=True, highlight=False, force_jupyter=False)
