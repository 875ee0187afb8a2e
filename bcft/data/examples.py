"""Demonstrations and trajectories to training examples, which are counted and checked before the first step.

Nothing is ever truncated: an example that is too long, has no loss or repeats another is dropped and counted, or
refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any

from bcft.errors import DataError
from bcft.policy.chat_template import Renderer, bos_at_head
from bcft.types import IGNORED, Demonstration, Message, Problem, Prompt, Source, TrainingExample, Trajectory, Turn
from bcft.types import messages as as_messages


@dataclass(frozen=True)
class ExampleCounts:
    """Counts over all examples before the first step."""

    given: int
    kept: int
    overlong: int
    duplicate: int
    unsupervised: int
    tokens: int
    tokens_supervised: int
    longest: int
    """Tokens of the longest example given, dropped ones included."""
    bos: int
    """BOS tokens at the head of each example: 0 or 1, as the tokenizer's template has it."""
    stop: str
    """The stop token that is the last label of every example, as text."""
    sampled: int = 0
    """Examples with the ids that a policy sampled, rather than those of a text."""

    def __str__(self) -> str:
        dropped = {"over-long": self.overlong, "duplicate": self.duplicate, "empty": self.unsupervised}
        drops = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none"
        sampled = f"; {self.sampled:,} with the ids that were sampled" if self.sampled else ""
        return (
            f"{self.kept:,} of {self.given:,} rows (dropped: {drops}); {self.tokens_supervised:,} of "
            f"{self.tokens:,} tokens carry loss; longest row {self.longest} tokens; "
            f"every row ends in {self.stop}, BOS {self.bos}{sampled}"
        )


# From demonstrations
def make_examples(
    demonstrations: Sequence[Demonstration],
    renderer: Renderer,
    *,
    max_length: int,
    overlength: str = "drop",
    train_on: str = "all_turns",
    may_be_empty: bool = False,
) -> tuple[list[TrainingExample], ExampleCounts]:
    """Return the examples to train on, and their counts.

    An example of a text has the demonstration's place as its id, and the whole demonstration as prompt and completion.
    max_length: most tokens of an example, prompt and completion together; overlength: `drop` or `raise`; train_on:
    which actions of a conversation carry loss, `all_turns` or `last_turn`.
    Raises DataError when labels break a promise of the package, when an example is too long under `raise`, and when
    nothing is left unless `may_be_empty`.
    """
    kept: dict[tuple[int, ...], TrainingExample] = {}
    overlong: list[TrainingExample] = []
    longest = duplicate = unsupervised = sampled = 0
    for demonstration, made in zip(demonstrations, _tokenized(demonstrations, renderer, train_on), strict=True):
        longest = max([longest, *(len(example.input_ids) for example in made)])
        unsupervised += not made
        for example in made:
            if len(example.input_ids) > max_length:
                overlong.append(example)
            elif example.input_ids in kept:
                duplicate += 1
            else:
                kept[example.input_ids] = example
                sampled += example is demonstration.sampled
    if overlong and overlength == "raise":
        first = overlong[0]
        raise DataError(
            f"{first.where}: {len(first.input_ids)} tokens, more than max_length {max_length} (and {len(overlong) - 1} "
            f"other rows): raise max_length, or set overlength: drop"
        )
    examples = list(kept.values())
    if not examples and not may_be_empty:
        raise DataError(_nothing_left(demonstrations, len(overlong), unsupervised, longest, max_length))
    _check_labels(examples, renderer)
    return examples, ExampleCounts(
        given=len(examples) + len(overlong) + duplicate + unsupervised,
        kept=len(examples),
        overlong=len(overlong),
        duplicate=duplicate,
        unsupervised=unsupervised,
        tokens=sum(len(example.input_ids) for example in examples),
        tokens_supervised=sum(example.supervised for example in examples),
        longest=longest,
        bos=renderer.bos_count,
        stop=repr(renderer.tokenizer.convert_ids_to_tokens(renderer.tail_ids[-1])),
        sampled=sampled,
    )


def _tokenized(
    demonstrations: Sequence[Demonstration], renderer: Renderer, train_on: str
) -> Iterator[list[TrainingExample]]:
    """Yield the examples of each demonstration; none if only a stop token would carry loss."""
    # One call of the tokenizer for all demonstrations of one action is much faster than a call for each.
    pairs = [d for d in demonstrations if len(d.completion) == 1 and not _is_usable(d, renderer)]
    rows = iter(renderer.rows([_texts(d, renderer) for d in pairs]))
    for d in demonstrations:
        if d.sampled is not None and _is_usable(d, renderer):
            yield [d.sampled]
            continue
        if len(d.completion) == 1:
            ids, action_ids = next(rows)
            words = renderer.words(d.completion[0], action_ids)
            turns = [Turn(words, tuple(ids), tuple(action_ids), "stop_token")]
        elif d.completion:
            given = d.problem.template_kwargs
            turns = conversation_turns(d.prompt, d.completion, renderer, where=d.problem.where, template_kwargs=given)
        else:
            turns = []
        prompt, where = tuple(as_messages(d.prompt)), d.problem.where
        yield [
            TrainingExample(
                id=where,
                problem_id=d.problem.id,
                input_ids=segment.input_ids,
                labels=segment.labels,
                prompt=prompt,
                completion=d.completion,
                template_kwargs=d.problem.template_kwargs,
                where=where,
            )
            for segment in _segments(turns, train_on)
        ]


def _texts(demonstration: Demonstration, renderer: Renderer) -> tuple[str, str]:
    problem = demonstration.problem
    with _placed(problem.where):
        return renderer.texts(demonstration.prompt, demonstration.completion[0], problem.template_kwargs)


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Put the place before what a template refuses."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error


def _is_usable(demonstration: Demonstration, renderer: Renderer) -> bool:
    """Return whether the demonstration has ids that were sampled with this tokenizer."""
    return demonstration.sampled is not None and demonstration.tokenizer == renderer.fingerprint


def conversation_turns(
    prompt: Prompt,
    completion: Sequence[Message],
    renderer: Renderer,
    *,
    where: str = "",
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[Turn]:
    """Return a demonstrated conversation as turns, with the ids that a policy would read and sample.

    prompt: the first observation; completion: the actions, and the observations between them; template_kwargs: the
    problem's. Raises DataError that names the place unless actions and observations alternate, from an action to an
    action, and each action is what the template renders behind the messages before it.
    """
    history = [*as_messages(prompt)]
    roles = [message["role"] == "assistant" for message in completion]
    alternating = not any(a and b for a, b in pairwise(roles))
    if not (roles and roles[0] and roles[-1] and alternating) or history[-1]["role"] == "assistant":
        raise DataError(
            f"{where}: in a conversation every assistant message must follow another role's, and the last message must "
            f"be the assistant's"
        )
    starts = [i for i, is_action in enumerate(roles) if is_action]
    turns: list[Turn] = []
    with _placed(where):
        ids, rewritten = renderer.prompts([history], [template_kwargs or {}])[0], False
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            action = completion[start]
            # Without a template, a text continues the one before it, and nothing stands for the messages.
            context = history if renderer.chat else history[-1:]
            ((_, action_ids),) = renderer.rows([renderer.texts(context, action, template_kwargs)])
            words = renderer.words(action, action_ids)
            turns.append(Turn(words, tuple(ids), tuple(action_ids), "stop_token", rewritten))
            if following is not None:
                observation = completion[start + 1 : following]
                ids, rewritten = renderer.continuation(
                    history, action_ids, observation, template_kwargs=template_kwargs, said=action
                )
                history = [*history, action, *observation]
    return turns


# Special tokens spelled out in text
def check_prompts(problems: Sequence[Problem], renderer: Renderer, *, special_tokens: str) -> None:
    """Raise DataError with place and count for prompts that a template has rendered already, unless `text`.

    Also renders the first prompt of each kind (its roles and template arguments), so that what the template refuses is
    reported with its place. special_tokens: `raise`, `strip` or `text`, as in the recipe.
    """
    kinds: dict[str, Problem] = {}
    for problem in problems:
        roles = [message["role"] for message in as_messages(problem.prompt)]
        kinds.setdefault(f"{roles} {problem.template_kwargs}", problem)
    for problem in kinds.values():
        with _placed(problem.where):
            renderer.prompts([problem.prompt], [problem.template_kwargs])
    if special_tokens == "text":
        return
    rendered = [(p, mark) for p in problems if (mark := renderer.rendered_mark(p.prompt))]
    if rendered:
        first, mark = rendered[0]
        where = "begins with" if as_messages(first.prompt)[0]["content"].lstrip().startswith(mark) else "ends with"
        raise DataError(
            f"{first.where}: the prompt {where} {mark!r}, so it seems to be rendered already ({len(rendered)} of "
            f"{len(problems)} prompts): the template would be applied twice: give the text or the messages alone, or "
            f"set special_tokens: text to keep the letters as they are"
        )


def without_special_tokens(
    demonstrations: Sequence[Demonstration], renderer: Renderer, *, special_tokens: str
) -> tuple[list[Demonstration], str]:
    """Return the demonstrations, their actions without what a template writes around them, and a note with the count.

    That is the letters of stop tokens at the end, and of the generation prompt at the beginning. special_tokens: what
    to do with such actions: `raise` DataError with the first place and the count, `strip` the letters (the note says
    how many rows), or leave them as `text`. Rows with the ids that were sampled stay.
    """
    ending: list[Demonstration] = []
    kept: list[Demonstration] = []
    for demonstration in demonstrations:
        bare = tuple(_bare(message, renderer) for message in demonstration.completion)
        spelled = bare != demonstration.completion and not _is_usable(demonstration, renderer)
        if spelled:
            ending.append(demonstration)
        kept.append(replace(demonstration, completion=bare) if spelled else demonstration)
    if not ending or special_tokens == "text":
        return list(demonstrations), ""
    stops = " or ".join(renderer.stop_texts)
    if special_tokens == "raise":
        opening = renderer.opening_text
        begins = opening and any(m["content"].lstrip().startswith(opening) for m in ending[0].completion)
        which = f"begins with the generation prompt, {opening!r}" if begins else f"ends in a stop token, {stops}"
        raise DataError(
            f"{ending[0].problem.where}: the completion {which}, in letters ({len(ending)} of {len(demonstrations)} "
            f"rows): the template adds the tokens itself: set special_tokens: strip to take the letters off, or "
            f"special_tokens: text to train them"
        )
    counts = f"{len(ending):,} of {len(demonstrations):,} rows"
    return kept, f"special_tokens: strip took a template's letters, such as {stops}, off the completions of {counts}"


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


def _check_labels(examples: Sequence[TrainingExample], renderer: Renderer) -> None:
    """Raise DataError that names the first example with labels that break a promise of the package."""
    bos = renderer.tokenizer.bos_token_id
    for example in examples:
        for label, following in pairwise((*example.labels, IGNORED)):
            if label != IGNORED and following == IGNORED and label not in renderer.stop_ids:
                raise DataError(
                    f"{example.where}: an action ends in label {label}, not in a stop token: {renderer.stop_ids}"
                )
        if example.supervised < 2:
            raise DataError(f"{example.where}: only the stop token carries loss")
        # Only the head matters: with some templates every message or every turn begins with one.
        if (count := bos_at_head(example.input_ids, bos)) != renderer.bos_count:
            raise DataError(f"{example.where}: {count} BOS tokens at its head, expected {renderer.bos_count}")


def _nothing_left(given: Sequence[Demonstration], overlong: int, unsupervised: int, longest: int, limit: int) -> str:
    if not given:
        return "no rows to train on: the training split is empty without the dev and test problems"
    first = given[0]
    completion = first.completion[-1]["content"] if first.completion else ""
    return (
        f"{first.problem.where}: nothing to train on in {len(given)} rows: {overlong} longer than max_length {limit} "
        f"(longest {longest}), {unsupervised} with an empty completion; the first is prompt "
        f"{str(first.problem.prompt)[:60]!r}, completion {completion[:60]!r}"
    )


# From trajectories
def trajectory_examples(
    trajectory: Trajectory, problem: Problem, *, reward: float, source: Source, train_on: str = "all_turns"
) -> list[TrainingExample]:
    """Return the examples of a trajectory, with the ids as sampled: rows of `kept.jsonl`.

    There are several if the chat template rewrites earlier text, and none if every action is empty.
    source: the policy that sampled it, `self` or `teacher`; train_on: as in `make_examples`.
    """
    opening = list(trajectory.opening) or as_messages(problem.prompt)
    conversation = [*opening, *trajectory.conversation]
    # The index of each action among the messages; the last number is the length of the conversation.
    starts = list(accumulate((1 + len(turn.observation) for turn in trajectory.turns), initial=len(opening)))
    examples = []
    for segment in _segments(trajectory.turns, train_on):
        first = starts[segment.last if train_on == "last_turn" else segment.first]
        examples.append(
            TrainingExample(
                id=trajectory.id,
                problem_id=problem.id,
                input_ids=segment.input_ids,
                labels=segment.labels,
                turn=segment.first,
                source=source,
                prompt=tuple(conversation[:first]),
                completion=tuple(conversation[first : starts[segment.last] + 1]),
                reward=reward,
                template_kwargs=trajectory.template_kwargs(problem),
            )
        )
    return examples


@dataclass(frozen=True, slots=True)
class _Segment:
    """The turns of a conversation that one example holds, from `first` to `last`, and their ids."""

    first: int
    last: int
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def _segments(turns: Sequence[Turn], train_on: str) -> list[_Segment]:
    """Return the segments of a conversation in which an action carries loss.

    A segment ends where the template rewrites earlier text. An empty action carries no loss: its stop token alone would
    teach the policy to say nothing.
    """
    segments: list[_Segment] = []
    ids: list[int] = []
    labels: list[int] = []
    first = 0
    for number, turn in enumerate(turns):
        if turn.rewritten:
            segments.append(_Segment(first, number - 1, tuple(ids), tuple(labels)))
            ids, labels, first = [], [], number
        trained = turn.action.strip() and (train_on == "all_turns" or number == len(turns) - 1)
        ids += [*turn.ids, *turn.action_ids]
        labels += [*[IGNORED] * len(turn.ids), *(turn.action_ids if trained else [IGNORED] * len(turn.action_ids))]
    segments.append(_Segment(first, len(turns) - 1, tuple(ids), tuple(labels)))
    return [_trimmed(segment) for segment in segments if any(label != IGNORED for label in segment.labels)]


def _trimmed(segment: _Segment) -> _Segment:
    """Remove the tokens after the last one that carries loss: they would train nothing."""
    end = max(position for position, label in enumerate(segment.labels) if label != IGNORED) + 1
    return replace(segment, input_ids=segment.input_ids[:end], labels=segment.labels[:end])


# Replay
def replay_examples(
    demonstrations: Sequence[Demonstration], renderer: Renderer, *, max_length: int, train_on: str
) -> list[TrainingExample]:
    """Return the examples of `replay_dataset`, numbered for `draw_replay`; an empty list without demonstrations.

    Raises DataError if no example is left.
    """
    if not demonstrations:
        return []
    examples, _ = make_examples(demonstrations, renderer, max_length=max_length, train_on=train_on)
    return [
        replace(example, id=f"demonstration-{number}", source="demonstration", turn=0, reward=0.0, weight=1.0)
        for number, example in enumerate(examples)
    ]


def draw_replay(examples: Sequence[TrainingExample], number: int, *, seed: int, most: int) -> list[TrainingExample]:
    """Return the examples to replay in round `number`: at most `most`, drawn anew in every round."""

    def key(example: TrainingExample) -> bytes:
        return sha256(f"{seed}-{number}-{example.id}".encode()).digest()

    return sorted(examples, key=key)[:most]
