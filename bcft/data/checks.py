"""Checks before the first step: what a template has written into a text already, and what labels must have."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise

from bcft.errors import DataError
from bcft.policy.chat_template import Renderer, bos_at_head
from bcft.types import IGNORED, Demonstration, Lazy, Message, Problem, TrainingExample
from bcft.types import messages as as_messages


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Put the place before what a template refuses."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error


def is_usable(demonstration: Demonstration, renderer: Renderer) -> bool:
    """Return whether the demonstration has ids that were sampled with this tokenizer."""
    return demonstration.sampled is not None and demonstration.tokenizer == renderer.fingerprint


# Special tokens spelled out in text
def check_prompts(problems: Iterable[Problem], renderer: Renderer, *, special_tokens: str) -> None:
    """Raise DataError with place and count for prompts that a template has rendered already, unless `text`.

    Also renders the first prompt of each kind (its roles and template arguments), so that what the template refuses is
    reported with its place. special_tokens: `raise`, `strip` or `text`, as in the recipe.
    """
    kinds: set[bytes] = set()
    first: tuple[Problem, str] | None = None
    rendered = given = 0
    for problem in problems:
        given += 1
        roles = [message["role"] for message in as_messages(problem.prompt)]
        # A hash: where every row has tools of its own there are as many kinds as rows.
        kind = blake2b(f"{roles} {problem.template_kwargs}".encode(), digest_size=8).digest()
        if kind not in kinds:
            kinds.add(kind)
            with placed(problem.where):
                renderer.prompts([problem.prompt], [problem.template_kwargs])
        if special_tokens != "text" and (mark := renderer.rendered_mark(problem.prompt)):
            first, rendered = first or (problem, mark), rendered + 1
    if first:
        problem, mark = first
        where = "begins with" if as_messages(problem.prompt)[0]["content"].lstrip().startswith(mark) else "ends with"
        raise DataError(
            f"{problem.where}: the prompt {where} {mark!r}, so it seems to be rendered already ({rendered} of "
            f"{given} prompts): the template would be applied twice: give the text or the messages alone, or "
            f"set special_tokens: text to keep the letters as they are"
        )


def without_special_tokens(
    demonstrations: Sequence[Demonstration], renderer: Renderer, *, special_tokens: str
) -> tuple[Sequence[Demonstration], str]:
    """Return the demonstrations, their actions without what a template writes around them, and a note with the count.

    That is the letters of stop tokens at the end, and of the generation prompt at the beginning. special_tokens: what
    to do with such actions: `raise` DataError with the first place and the count, `strip` the letters (the note says
    how many rows), or leave them as `text`. Rows with the ids that were sampled stay.
    """
    if special_tokens == "text":
        return demonstrations, ""
    ending, first = 0, None
    for demonstration in demonstrations:
        if _stripped(demonstration, renderer) is not demonstration:
            ending, first = ending + 1, first or demonstration
    if first is None:
        return demonstrations, ""
    stops = " or ".join(renderer.stop_texts)
    if special_tokens == "raise":
        opening = renderer.opening_text
        begins = opening and any(m["content"].lstrip().startswith(opening) for m in first.completion)
        which = f"begins with the generation prompt, {opening!r}" if begins else f"ends in a stop token, {stops}"
        raise DataError(
            f"{first.problem.where}: the completion {which}, in letters ({ending} of {len(demonstrations)} "
            f"rows): the template adds the tokens itself: set special_tokens: strip to take the letters off, or "
            f"special_tokens: text to train them"
        )
    counts = f"{ending:,} of {len(demonstrations):,} rows"
    return (
        Lazy(len(demonstrations), lambda i: _stripped(demonstrations[i], renderer)),
        f"special_tokens: strip took a template's letters, such as {stops}, off the completions of {counts}",
    )


def _stripped(demonstration: Demonstration, renderer: Renderer) -> Demonstration:
    """Return a demonstration without what a template writes around its actions; itself if there is nothing."""
    bare = tuple(_bare(message, renderer) for message in demonstration.completion)
    if bare == demonstration.completion or is_usable(demonstration, renderer):
        return demonstration
    return replace(demonstration, completion=bare)


def _bare(message: Message, renderer: Renderer) -> Message:
    """Return an action without the letters of the generation prompt before it, and of stop tokens after it."""
    text = message["content"]
    if message["role"] != "assistant":
        return message
    if (opening := renderer.opening_text) and text.lstrip().startswith(opening):
        text = text.lstrip().removeprefix(opening).removeprefix("\n")
    bare = text.rstrip()
    while ending := next((stop for stop in renderer.stop_texts if bare.endswith(stop)), ""):
        text = bare = bare.removesuffix(ending).rstrip()
    return {**message, "content": text}


# Labels
def check_labels(example: TrainingExample, renderer: Renderer) -> None:
    """Raise DataError that names the example if its labels break a promise of the package."""
    for label, following in pairwise((*example.labels, IGNORED)):
        if label != IGNORED and following == IGNORED and label not in renderer.stop_ids:
            raise DataError(
                f"{example.where}: an action ends in label {label}, not in a stop token: {renderer.stop_ids}"
            )
    if example.supervised < 2:
        raise DataError(f"{example.where}: only the stop token carries loss")
    # Only the head matters: with some templates every message or every turn begins with one.
    if (count := bos_at_head(example.input_ids, renderer.tokenizer.bos_token_id)) != renderer.bos_count:
        raise DataError(f"{example.where}: {count} BOS tokens at its head, expected {renderer.bos_count}")
