"""Demonstrations to training rows, and the census that proves their labels before step 0.

Nothing is ever cut: a row that is too long, says nothing or stands twice is dropped and counted, or refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bcft.errors import DataError
from bcft.rendering import Renderer
from bcft.types import IGNORED, Demonstration, Row


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

    def __str__(self) -> str:
        dropped = {"over-long": self.overlong, "duplicate": self.duplicate, "empty": self.unsupervised}
        drops = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none"
        return (
            f"{self.kept:,} of {self.given:,} rows (dropped: {drops}); {self.tokens_supervised:,} of "
            f"{self.tokens:,} tokens carry loss; longest row {self.longest} tokens; "
            f"every row ends in {self.stop}, BOS {self.bos}"
        )


def make_rows(
    demonstrations: Sequence[Demonstration],
    renderer: Renderer,
    *,
    max_length: int,
    overlength: str = "drop",
    may_be_empty: bool = False,
) -> tuple[list[Row], Census]:
    """Return the rows to train on and their census.

    max_length: most tokens of a row, prompt and completion together; overlength: `drop` or `raise`.
    Raises DataError when a row breaks a promise, when one is too long under `raise`, and when nothing is left unless
    `may_be_empty`.
    """
    prompts = renderer.prompts([d.problem.prompt for d in demonstrations])
    completions = renderer.completions([d.completion for d in demonstrations])
    kept: dict[tuple[int, ...], Row] = {}
    overlong, duplicate, unsupervised = [], 0, 0
    for demonstration, prompt, completion in zip(demonstrations, prompts, completions, strict=True):
        ids = (*prompt, *completion)
        if not demonstration.completion.strip():
            unsupervised += 1
        elif len(ids) > max_length:
            overlong.append((demonstration.problem.where, len(ids)))
        elif ids in kept:
            duplicate += 1
        else:
            labels = (*[IGNORED] * len(prompt), *completion)
            kept[ids] = Row(demonstration.problem.id, ids, labels, demonstration.problem.where)
    longest = max((len(p) + len(c) for p, c in zip(prompts, completions, strict=True)), default=0)
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
        given=len(demonstrations),
        kept=len(rows),
        overlong=len(overlong),
        duplicate=duplicate,
        unsupervised=unsupervised,
        tokens=sum(len(row.input_ids) for row in rows),
        tokens_supervised=sum(row.supervised for row in rows),
        longest=longest,
        bos=renderer.bos_count,
        stop=repr(renderer.tokenizer.convert_ids_to_tokens(renderer.tail_ids[-1])),
    )


def _prove(rows: Sequence[Row], renderer: Renderer) -> None:
    """Check every row against what the package promises of labels; a breach names the row."""
    bos = renderer.tokenizer.bos_token_id
    for row in rows:
        if row.labels[-1] not in renderer.stop_ids:
            raise DataError(f"{row.where}: the last label is {row.labels[-1]}, not a stop token {renderer.stop_ids}")
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
