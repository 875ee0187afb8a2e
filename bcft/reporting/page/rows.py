"""Attempts as lines that open: what was asked, said and answered, the verdict, and why it was kept or not.

Texts are bounded, so that the page stays small: what is left out of a text is said in its place.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from bcft.reporting.page.parts import Row
from bcft.reporting.page.rollouts import Attempt
from bcft.rewards.base import REFERENCE_COLUMNS

BYTES = 1_700_000
"""The most bytes of texts of all rows of a page."""
LONGEST = 12_000
"""The most bytes of texts of one row."""
MOST_BYTES = 6
"""Of a character in a page: `&quot;`."""
_HEAD = 110
WHY = {
    "kept": "it passes every rule, with a reward at or above the cutoff",
    "errored": "its environment failed",
    "ungraded": "no reward function could grade it",
    "truncated": "it did not stop by itself",
    "failed": "success is required, and it is not known to have solved its problem",
    "pass_rate": "its problem is solved less or more often than `pass_rate` allows",
    "below_min_reward": "its reward is below `min_reward`",
    "below_cutoff": "its reward is below the cutoff",
    "duplicate": "another attempt at its problem has the same actions",
    "max_per_problem": "other attempts at its problem fill `max_per_problem`",
    "tie_break": "it lost the draw among equal rewards at the cutoff",
}
"""Decision -> the reason in words."""
STOPS = {"stop_token": "stopped by itself", "max_tokens": "at the token limit", "context_full": "with a full context"}


def attempt_rows(attempts: Sequence[Attempt], problems: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return a row for each attempt. problems: lines of `problems.jsonl` by id."""
    limit = limit_of(len(attempts))
    return [_attempt_row(attempt, problems.get(attempt.played["problem_id"], {}), limit) for attempt in attempts]


def limit_of(rows: int) -> int:
    """Return the most bytes of texts of each of so many rows."""
    return min(LONGEST, BYTES // max(rows, 1))


def _attempt_row(attempt: Attempt, problem: Mapping[str, Any], limit: int) -> Row:
    played, score = attempt.played, attempt.score
    decision = score["decision"]
    asked = played["opening"] or problem.get("prompt", "")
    head = _last_words(asked)
    blocks = [] if _is_head(asked) else _messages(asked, "prompt")
    for number, turn in enumerate(played["turns"], 1):
        said = turn.get("message") or {"role": "assistant", "content": turn["action"]}
        label = "completion" if len(played["turns"]) == 1 else f"action {number}"
        blocks += _messages([said], label)
        blocks += _messages(turn["observation"], f"observation {number}")
    reference = next((str(problem[name]) for name in REFERENCE_COLUMNS if problem.get(name) not in (None, "")), "")
    stop = next((turn["stop"] for turn in played["turns"] if turn["stop"] != "stop_token"), "stop_token")
    ended = f", {played['ended'].replace('_', ' ')}" if played["ended"] != "done" else ""
    return Row(
        group=decision.replace("_", " "),
        good=decision == "kept",
        round=attempt.round,
        solved=score["success"],
        facts=[f"round {attempt.round}", f"r {score['reward']:.4g}" if score["graded"] else "ungraded"],
        head=head,
        blocks=[
            *_bounded(blocks, limit),
            *_bounded([("reference", reference)] if reference else [], limit // 4),
            ("verdict", f"{_verdict(score)}; {STOPS[stop]}{ended}"),
            ("why", _why(score, played["error"])),
        ],
    )


def _verdict(score: Mapping[str, Any]) -> str:
    solved = {"yes": "solved", "no": "not solved", "unknown": "success unknown"}[score["success"]]
    given = (f"{one['name']} {one['value']:.6g}" if one["graded"] else f"{one['name']} -" for one in score["rewards"])
    reward = f"reward {score['reward']:.6g}" if score["graded"] else "not graded"
    return f"{solved}, {reward} ({', '.join(given)})" if score["rewards"] else f"{solved}, {reward}"


def _why(score: Mapping[str, Any], error: str) -> str:
    decision = score["decision"]
    cutoff = f" ({score['cutoff']:.4g})" if decision in ("kept", "below_cutoff", "tie_break") else ""
    failure = f": {error[:300]}" if error else ""
    outcome = "kept" if decision == "kept" else f"rejected, {decision.replace('_', ' ')}"
    return f"{outcome}: {WHY[decision]}{cutoff}{failure}"


def held_out_rows(
    attempts: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    problems: Mapping[str, Mapping[str, Any]],
    *,
    names: Sequence[str],
    limit: int,
) -> list[Row]:
    """Return a row for each problem: the greedy attempts of one policy or of two, and first what changed between them.

    attempts: problem -> of each policy its attempts, the greedy one first; problems: lines of `problems.jsonl` by id,
    as far as there are any; names: of the policies, the earlier one first.
    """
    rows = [
        _held_out_row(policies, problems.get(key, {}).get("prompt", ""), names, limit)
        for key, policies in attempts.items()
    ]
    return sorted(rows, key=lambda row: MOVEMENTS.index(row.group))


MOVEMENTS = ("failed now", "solved now", "failed", "failed in both", "unknown", "solved", "solved in both")
"""How greedy attempts compare, in the order in which the rows stand."""


def _held_out_row(policies: Sequence[Any], asked: Any, names: Sequence[str], limit: int) -> Row:
    firsts = [attempts[0] for attempts in policies]
    solved = [first["success"] for first in firsts]
    asked = asked or firsts[0]["prompt"]
    blocks = [] if _is_head(asked) else _messages(asked, "prompt")
    for name, first in zip(names, firsts, strict=True):
        label = f"{name}, greedy" if len(names) > 1 else "greedy"
        blocks += _messages(first.get("messages") or first["completion"], label)
    verdicts = [
        f"{name}: {_rate(attempts)}" if len(names) > 1 else _rate(attempts)
        for name, attempts in zip(names, policies, strict=True)
    ]
    reference = [("reference", str(firsts[0]["answer"]))] if firsts[0]["answer"] not in ("", None) else []
    group = _movement(solved)
    return Row(
        group=group,
        good=group in ("solved", "solved now"),
        round=0,
        solved=solved[-1],
        facts=[_rate(attempts, short=True) for attempts in policies],
        head=_last_words(asked),
        blocks=[*_bounded(blocks, limit), *_bounded(reference, limit // 4), ("verdict", "; ".join(verdicts))],
    )


def _movement(solved: Sequence[str]) -> str:
    words = {"yes": "solved", "no": "failed", "unknown": "unknown"}
    if len(solved) == 1 or "unknown" in solved:
        return "unknown" if "unknown" in solved else words[solved[0]]
    return f"{words[solved[1]]} {'in both' if solved[0] == solved[1] else 'now'}"


def _rate(attempts: Sequence[Mapping[str, Any]], *, short: bool = False) -> str:
    """Return how a problem's attempts did: solved ones, or the mean return or reward where success is unknown."""
    greedy, *sampled = attempts
    average = next((name for name in ("return", "reward") if greedy.get("graded") and name in greedy), "")
    if average:
        value = sum(a[average] for a in sampled or attempts) / len(sampled or attempts)
        return f"{value:.3g}" if short else f"mean {average} {value:.4g}, greedy {greedy[average]:.4g}"
    wins = sum(attempt["success"] == "yes" for attempt in sampled)
    if short:
        return f"{wins}/{len(sampled)}" if sampled else {"yes": "1/1", "no": "0/1"}.get(greedy["success"], "?")
    rate = f", {wins} of {len(sampled)} sampled attempts solved" if sampled else ""
    done = {"yes": "solved", "no": "not solved", "unknown": "success unknown"}[greedy["success"]]
    return f"greedy {done}, {STOPS[greedy['stop']]}{rate}"


def _messages(given: Any, label: str) -> list[tuple[str, str]]:
    """Return messages, or a text, as labeled blocks."""
    if isinstance(given, str):
        return [(label, given)] if given else []
    several = len(given) > 1
    return [(f"{label}, {message['role']}" if several else label, _words(message)) for message in given]


def _words(message: Mapping[str, Any]) -> str:
    """Return a message as text: its thought, its content, and its calls as they are written in the file."""
    parts = [str(message[key]) for key in ("reasoning_content", "thinking", "content") if message.get(key)]
    return "\n".join([*parts, *(str(call) for call in message.get("tool_calls") or ())])


def _last_words(asked: Any) -> str:
    """Return the last message of a prompt in one line."""
    text = asked if isinstance(asked, str) else _words(asked[-1]) if asked else ""
    return _shortened(" ".join(text.split()))


def _is_head(asked: Any) -> bool:
    """Return whether the line that opens says the whole prompt already."""
    text = asked if isinstance(asked, str) else _words(asked[0]) if len(asked) == 1 else "\n"
    return len(text) <= _HEAD and "\n" not in text


def _shortened(text: str) -> str:
    return text if len(text) <= _HEAD else f"{text[: _HEAD - 1]}…"


def _bounded(blocks: Sequence[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """Return the blocks with at most so many bytes of text in the page, each with its share of them."""
    if sum(len(text) for _, text in blocks) * MOST_BYTES <= limit:
        return list(blocks)
    sizes = [_size(text) for _, text in blocks]
    if sum(sizes) <= limit:
        return list(blocks)
    left = limit
    shares = sorted(range(len(blocks)), key=sizes.__getitem__)
    texts: dict[int, str] = {}
    for done, number in enumerate(shares):  # short ones stay whole, long ones share what is left
        share = left // (len(blocks) - done)
        texts[number] = _clipped(blocks[number][1], share)
        left -= min(_size(texts[number]), share)
    return [(blocks[number][0], texts[number]) for number in range(len(blocks)) if texts[number]]


def _clipped(text: str, limit: int) -> str:
    """Return the head and the tail of a text, with at most about `limit` bytes in the page."""
    size = _size(text)
    if size <= limit:
        return text
    fits = max(int(len(text) * (limit - 60) / size), 0)  # characters that need more bytes than others are spread
    head, tail = 2 * fits // 3, fits - 2 * fits // 3
    while head and _size(text[:head] + (text[-tail:] if tail else "")) > limit:
        head, tail = head // 2, tail // 2
    left_out = len(text) - head - tail
    return f"{text[:head]} [… {left_out:,} characters left out …] {text[-tail:] if tail else ''}".strip()


def _size(text: str) -> int:
    return len(html.escape(text).encode("utf-8", "replace"))
