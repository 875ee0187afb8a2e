"""Demonstrations to training rows, and the census that proves their labels before step 0.

Nothing is ever cut: a row that is too long, says nothing or stands twice is dropped and counted, or refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

from bcft.config.loader import Recipe
from bcft.data.loading import Splits
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import longest_row
from bcft.types import IGNORED, Demonstration, Message, Problem, Row, Trajectory, Turn, messages


@dataclass(frozen=True)
class Census:
    """What was counted over every row before the first step."""

    given: int
    kept: int
    overlong: int
    duplicate: int
    unsupervised: int
    tokens: int
    tokens_supervised: int
    longest: int
    """Tokens of the longest row given, dropped ones included."""
    bos: int
    """BOS tokens at the head of each row: 0 or 1, as the tokenizer's template has it."""
    stop: str
    """The stop token that is the last label of every row, as text."""
    sampled: int = 0
    """Rows whose ids are those that a policy sampled, not those of a text."""

    def __str__(self) -> str:
        dropped = {"over-long": self.overlong, "duplicate": self.duplicate, "empty": self.unsupervised}
        drops = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none"
        sampled = f"; {self.sampled:,} with the ids that were sampled" if self.sampled else ""
        return (
            f"{self.kept:,} of {self.given:,} rows (dropped: {drops}); {self.tokens_supervised:,} of "
            f"{self.tokens:,} tokens carry loss; longest row {self.longest} tokens; "
            f"every row ends in {self.stop}, BOS {self.bos}{sampled}"
        )


def make_rows(
    demonstrations: Sequence[Demonstration],
    renderer: Renderer,
    *,
    max_length: int,
    overlength: str = "drop",
    train_on: str = "all_turns",
    may_be_empty: bool = False,
) -> tuple[list[Row], Census]:
    """Return the rows to train on and their census.

    max_length: most tokens of a row, prompt and completion together; overlength: `drop` or `raise`; train_on: which
    actions of a conversation carry loss, `all_turns` or `last_turn`.
    Raises DataError when a row breaks a promise, when one is too long under `raise`, and when nothing is left unless
    `may_be_empty`.
    """
    kept: dict[tuple[int, ...], Row] = {}
    overlong, longest, duplicate, unsupervised, sampled = [], 0, 0, 0, 0
    for demonstration, rows in zip(demonstrations, _tokenised(demonstrations, renderer, train_on), strict=True):
        longest = max([longest, *(len(row.input_ids) for row in rows)])
        unsupervised += not rows
        for row in rows:
            if len(row.input_ids) > max_length:
                overlong.append((row.where, len(row.input_ids)))
            elif row.input_ids in kept:
                duplicate += 1
            else:
                kept[row.input_ids] = row
                sampled += row is demonstration.sampled
    if overlong and overlength == "raise":
        where, length = overlong[0]
        raise DataError(
            f"{where}: {length} tokens, more than max_length {max_length} (so are {len(overlong) - 1} other rows): "
            f"raise max_length, or set overlength: drop"
        )
    rows = list(kept.values())
    if not rows and not may_be_empty:
        raise DataError(_nothing_left(demonstrations, len(overlong), unsupervised, longest, max_length))
    _prove(rows, renderer)
    return rows, Census(
        given=len(rows) + len(overlong) + duplicate + unsupervised,
        kept=len(rows),
        overlong=len(overlong),
        duplicate=duplicate,
        unsupervised=unsupervised,
        tokens=sum(len(row.input_ids) for row in rows),
        tokens_supervised=sum(row.supervised for row in rows),
        longest=longest,
        bos=renderer.bos_count,
        stop=repr(renderer.tokenizer.convert_ids_to_tokens(renderer.tail_ids[-1])),
        sampled=sampled,
    )


def _tokenised(demonstrations: Sequence[Demonstration], renderer: Renderer, train_on: str) -> list[list[Row]]:
    """Return the rows of each demonstration; none where nothing would carry loss but a stop token."""
    single = [d for d in demonstrations if not d.conversation and not _as_sampled(d, renderer)]
    prompts = renderer.prompts([d.problem.prompt for d in single])
    completions = renderer.completions([d.completion for d in single])
    pairs = iter(zip(prompts, completions, strict=True))
    found: list[list[Row]] = []
    for d in demonstrations:
        if d.sampled is not None and _as_sampled(d, renderer):
            found.append([d.sampled])
        elif d.conversation:
            turns = conversation_turns(d.conversation, renderer, begins=d.begins, where=d.problem.where)
            laid = stretches(turns, train_on=train_on)
            found.append([Row(d.problem.id, s.input_ids, s.labels, d.problem.where) for s in laid])
        else:
            prompt, completion = next(pairs)
            row = Row(d.problem.id, (*prompt, *completion), (*[IGNORED] * len(prompt), *completion), d.problem.where)
            found.append([row] if d.completion.strip() else [])
    return found


def _as_sampled(demonstration: Demonstration, renderer: Renderer) -> bool:
    return demonstration.sampled is not None and demonstration.tokenizer == renderer.fingerprint


def conversation_turns(conversation: Sequence[Message], renderer: Renderer, *, begins: int, where: str) -> list[Turn]:
    """Return a demonstrated conversation as turns, with the ids that a policy would read and say.

    begins: how many messages are the prompt's, whose last is not the assistant's.

    Raises DataError where what follows does not go to and fro, with the assistant's word as the last.
    """
    mine = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    starts = [i for i in mine if i >= begins]
    whole = begins and starts and starts[0] == begins and starts[-1] == len(conversation) - 1
    if not whole or begins - 1 in mine or any(b - a == 1 for a, b in pairwise(starts)):
        raise DataError(f"{where}: in a conversation the assistant comes after others, never twice running, and last")
    turns: list[Turn] = []
    ids, rewritten = renderer.prompts([list(conversation[: starts[0]])])[0], False
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        action = conversation[start]["content"]
        action_ids = renderer.completions([action])[0]
        turns.append(Turn(action, tuple(ids), tuple(action_ids), "stop_token", rewritten))
        if following is not None:
            observation = list(conversation[start + 1 : following])
            ids, rewritten = renderer.continuation(conversation[:start], action_ids, observation)
    return turns


def _prove(rows: Sequence[Row], renderer: Renderer) -> None:
    """Check every row against what the package promises of labels; a breach names the row."""
    bos = renderer.tokenizer.bos_token_id
    for row in rows:
        for label, following in pairwise((*row.labels, IGNORED)):
            if label != IGNORED and following == IGNORED and label not in renderer.stop_ids:
                raise DataError(
                    f"{row.where}: an action ends in label {label}, not in a stop token: {renderer.stop_ids}"
                )
        if row.supervised < 2:
            raise DataError(f"{row.where}: nothing but the stop token carries loss")
        if bos is not None and bos not in renderer.stop_ids and row.input_ids.count(bos) != renderer.bos_count:
            raise DataError(f"{row.where}: {row.input_ids.count(bos)} BOS tokens, expected {renderer.bos_count}")


def _nothing_left(given: Sequence[Demonstration], overlong: int, unsupervised: int, longest: int, limit: int) -> str:
    if not given:
        return "no rows to train on: the training split is empty once dev and test are taken out"
    shown = given[0]
    return (
        f"{shown.problem.where}: nothing to train on in {len(given)} rows: {overlong} longer than max_length {limit} "
        f"(longest {longest}), {unsupervised} with an empty completion; the first is prompt "
        f"{str(shown.problem.prompt)[:60]!r}, completion {shown.completion[:60]!r}"
    )


@dataclass(frozen=True, slots=True)
class Stretch:
    """What of a conversation one row holds: the turns from `first` to `last`, and their ids."""

    first: int
    last: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def stretches(turns: Sequence[Turn], *, train_on: str = "all_turns") -> list[Stretch]:
    """Return the rows of a conversation, those left out in which nothing would carry loss.

    train_on: `all_turns`, or `last_turn`: loss on the last action alone, all before it is context. An action that says
    nothing carries no loss: its stop token alone would teach to say nothing.
    """
    found: list[Stretch] = []
    ids: list[int] = []
    labels: list[int] = []
    first = 0
    for number, turn in enumerate(turns):
        if turn.rewritten:
            found.append(Stretch(first, number - 1, tuple(ids), tuple(labels)))
            ids, labels, first = [], [], number
        trained = turn.action.strip() and (train_on == "all_turns" or number == len(turns) - 1)
        ids += [*turn.ids, *turn.action_ids]
        labels += [*[IGNORED] * len(turn.ids), *(turn.action_ids if trained else [IGNORED] * len(turn.action_ids))]
    found.append(Stretch(first, len(turns) - 1, tuple(ids), tuple(labels)))
    return [_trimmed(one) for one in found if any(label != IGNORED for label in one.labels)]


def _trimmed(row: Stretch) -> Stretch:
    """Leave out what stands behind the last token that carries loss: nothing is learned from it."""
    end = max(place for place, label in enumerate(row.labels) if label != IGNORED) + 1
    return Stretch(row.first, row.last, row.input_ids[:end], row.labels[:end])


def kept_lines(
    trajectory: Trajectory, problem: Problem, *, reward: float, source: str, train_on: str = "all_turns"
) -> list[dict[str, Any]]:
    """Return the rows of `kept.jsonl`: messages to read, or for another tokenizer; to train on, the ids as sampled.

    source: whose attempt it was, `self` or `teacher`.
    """
    said = list(trajectory.opening) or messages(problem.prompt)
    before: list[int] = []  # of each action, how many messages stand before it
    for turn in trajectory.turns:
        before.append(len(said))
        said += [{"role": "assistant", "content": turn.action}, *turn.observation]
    lines = []
    for row in stretches(trajectory.turns, train_on=train_on):
        begins = before[row.last if train_on == "last_turn" else row.first]
        lines.append(
            {
                "id": trajectory.id,
                "problem_id": problem.id,
                "turn": row.first,
                "source": source,
                "prompt": [dict(message) for message in said[:begins]],
                "completion": [dict(message) for message in said[begins : before[row.last] + 1]],
                "input_ids": list(row.input_ids),
                "labels": list(row.labels),
                "reward": reward,
                "weight": 1.0,
            }
        )
    return lines


def demonstration_line(demonstration: Demonstration, row: Row, number: int) -> dict[str, Any]:
    """Return row `number` of demonstrations as `kept.jsonl` holds it: beside what was kept, and graded by nobody."""
    problem = demonstration.problem
    said = list(demonstration.conversation) or [
        *messages(problem.prompt),
        {"role": "assistant", "content": demonstration.completion},
    ]
    first = demonstration.begins or len(said) - 1
    return {
        "id": f"demonstration-{number}",
        "problem_id": problem.id,
        "turn": 0,
        "source": "demonstration",
        "prompt": [dict(message) for message in said[:first]],
        "completion": [dict(message) for message in said[first:]],
        "input_ids": list(row.input_ids),
        "labels": list(row.labels),
        "reward": 0.0,
        "weight": 1.0,
    }


def row_of(line: Mapping[str, Any]) -> Row:
    """Return a row of `kept.jsonl` as the trainer takes it."""
    return Row(line["problem_id"], tuple(line["input_ids"]), tuple(line["labels"]), line["id"])


def replay_lines(recipe: Recipe, splits: Splits, renderer: Renderer) -> list[dict[str, Any]]:
    """Return the rows of `replay_dataset` as `kept.jsonl` holds them; none without the key.

    Raises DataError where the dataset cannot be trained on.
    """
    demonstrations = {d.problem.where: d for d in splits.replay}
    if not demonstrations:
        return []
    limit = longest_row(recipe)
    rows, _ = make_rows(list(demonstrations.values()), renderer, max_length=limit, train_on=recipe["train_on"])
    return [demonstration_line(demonstrations[row.where], row, number) for number, row in enumerate(rows)]


def draw_replay(recipe: Recipe, lines: Sequence[dict[str, Any]], number: int, *, most: int) -> list[dict[str, Any]]:
    """Return a round's share of the rows to replay: at most so many, other ones each round."""

    def lot(line: dict[str, Any]) -> bytes:
        return sha256(f"{recipe['seed']}-{number}-{line['id']}".encode()).digest()

    return sorted(lines, key=lot)[:most]
