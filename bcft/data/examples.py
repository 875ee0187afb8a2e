"""Demonstrations and trajectories to training examples, which are counted and checked before the first step.

Nothing is ever truncated: an example that is too long, has no loss or repeats another is dropped and counted, or
refused.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

from bcft.data.checks import check_labels, is_usable, placed, without_special_tokens
from bcft.data.counts import ExampleCounts
from bcft.data.weights import check_marks, marked_turns, trained_turns, unmarked
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer
from bcft.training.tokens import Examples, Tokens
from bcft.types import (
    IGNORED,
    Demonstration,
    Message,
    Problem,
    Prompt,
    Source,
    TrainingExample,
    Trajectory,
    Turn,
)
from bcft.types import messages as as_messages

WINDOW = 1000
"""Demonstrations that are rendered and tokenized at once: enough to keep all cores busy."""


# From demonstrations
def make_examples(
    demonstrations: Sequence[Demonstration],
    renderer: Renderer,
    *,
    max_length: int,
    overlength: str = "drop",
    train_on: str = "all_turns",
    may_be_empty: bool = False,
) -> tuple[Examples, ExampleCounts]:
    """Return the examples to train on, and their counts.

    Only their tokens are kept: the text of an example is read from its demonstration when it is asked for. An example
    of a text has the demonstration's place as its id, and the whole demonstration as prompt and completion.
    max_length: most tokens of an example, prompt and completion together; overlength: `drop` or `raise`; train_on:
    which actions of a conversation carry loss, `all_turns`, `last_turn` or `marked`.
    A row of weight 0 is as if it were not there. Where rows have weights, a duplicate adds its own to the first.
    Raises DataError when labels break a promise of the package, when an example is too long under `raise`, when marks
    of messages and `train_on` differ, and when nothing is left unless `may_be_empty`.
    """
    if not may_be_empty:
        check_marks(demonstrations, train_on)
    # Other marks make other labels of the same ids.
    collected = _Collected(Tokens(by_labels=train_on == "marked"), max_length)
    for number, (demonstration, made) in enumerate(_tokenized(demonstrations, renderer, train_on)):
        collected.add(number, demonstration, made, renderer)
    if collected.too_long and overlength == "raise":
        raise DataError(_too_long(collected.too_long, collected.overlong, max_length))
    kept, weights = collected.tokens.distinct(add_weights=collected.weighted)
    counts = collected.counts(kept, renderer)
    if not counts.kept and not may_be_empty:
        raise DataError(_nothing_left(demonstrations, counts, max_length))

    def text_of(row: int, input_ids: tuple[int, ...], labels: tuple[int, ...]) -> TrainingExample:
        given = demonstrations[collected.origins[row]]
        return given.sampled if collected.as_sampled[row] and given.sampled else _example(given, input_ids, labels)

    return Examples(collected.tokens, kept, weights, text_of), counts


@dataclass
class _Collected:
    """The tokens of the examples so far, what each is made from, and what was counted of those left out."""

    tokens: Tokens
    limit: int
    """Most tokens of an example."""
    origins: "array[int]" = field(default_factory=lambda: array("q"))
    """The number of the demonstration that each example is made from."""
    as_sampled: bytearray = field(default_factory=bytearray)
    """Whether each has the ids that were sampled."""
    weighted: bool = False
    """Whether rows have weights. One of weight 0 is not there, so it does not count."""
    too_long: TrainingExample | None = None
    longest: int = 0
    overlong: int = 0
    unsupervised: int = 0
    weightless: int = 0

    def add(
        self, number: int, demonstration: Demonstration, made: list[TrainingExample] | None, renderer: Renderer
    ) -> None:
        """Add the examples of the demonstration with this number, as `_tokenized` makes them."""
        if made is None:
            self.weightless += 1
            return
        self.weighted = self.weighted or demonstration.weight != 1.0
        self.longest = max([self.longest, *(len(example.input_ids) for example in made)])
        self.unsupervised += not made
        for example in made:
            if len(example.input_ids) > self.limit:
                self.too_long, self.overlong = self.too_long or example, self.overlong + 1
            else:
                check_labels(example, renderer)
                self.tokens.append(example)
                self.origins.append(number)
                self.as_sampled.append(example is demonstration.sampled)

    def counts(self, kept: np.ndarray, renderer: Renderer) -> ExampleCounts:
        """Return the counts; kept: the examples that repeat no other."""
        tokens = self.tokens
        return ExampleCounts(
            given=len(tokens) + self.overlong + self.unsupervised + self.weightless,
            kept=len(kept),
            overlong=self.overlong,
            duplicate=len(tokens) - len(kept),
            unsupervised=self.unsupervised,
            tokens=int(tokens.lengths[kept].sum()),
            tokens_supervised=int(tokens.supervised[kept].sum()),
            longest=self.longest,
            bos=renderer.bos_count,
            stop=repr(renderer.tokenizer.convert_ids_to_tokens(renderer.tail_ids[-1])),
            sampled=sum(self.as_sampled[row] for row in kept),
            weightless=self.weightless,
        )


def held_out_examples(
    demonstrations: Sequence[Demonstration],
    renderer: Renderer,
    *,
    special_tokens: str,
    max_length: int,
    train_on: str,
) -> Examples:
    """Return the examples to take a loss on, of those held-out problems that come with a solution.

    A held-out loss is that of the tokens, whatever a row would weigh in training.
    """
    answered = [replace(d, weight=1.0) for d in demonstrations if d.answered]
    bare, _ = without_special_tokens(answered, renderer, special_tokens=special_tokens)
    return make_examples(bare, renderer, max_length=max_length, train_on=train_on, may_be_empty=True)[0]


def _example(demonstration: Demonstration, input_ids: tuple[int, ...], labels: tuple[int, ...]) -> TrainingExample:
    """Return the example of a text that becomes these ids."""
    problem = demonstration.problem
    return TrainingExample(
        id=problem.where,
        problem_id=problem.id,
        input_ids=input_ids,
        labels=labels,
        prompt=tuple(unmarked(as_messages(demonstration.prompt))),
        completion=tuple(unmarked(demonstration.completion)),
        weight=demonstration.weight,
        template_kwargs=problem.template_kwargs,
        where=problem.where,
    )


def _is_marked_off(demonstration: Demonstration) -> bool:
    """Return whether every action of a conversation is marked to carry no loss."""
    return bool(demonstration.completion) and not any(marked_turns(demonstration.completion))


def _tokenized(
    demonstrations: Iterable[Demonstration], renderer: Renderer, train_on: str
) -> Iterator[tuple[Demonstration, list[TrainingExample] | None]]:
    """Yield each demonstration and its examples: [] if only a stop token would carry loss, None if it weighs 0."""
    given = iter(demonstrations)
    # One call of the tokenizer for many demonstrations of one action is much faster than a call for each.
    while window := list(islice(given, WINDOW)):
        weigh = [bool(d.weight) and not (train_on == "marked" and _is_marked_off(d)) for d in window]
        pairs = [
            d
            for d, weighs in zip(window, weigh, strict=True)
            if weighs and len(d.completion) == 1 and not is_usable(d, renderer)
        ]
        rows = iter(renderer.rows([_texts(d, renderer) for d in pairs]))
        for d, weighs in zip(window, weigh, strict=True):
            if not weighs:
                yield d, None
                continue
            if d.sampled is not None and is_usable(d, renderer):
                yield d, [d.sampled]
                continue
            if len(d.completion) == 1:
                ids, action_ids = next(rows)
                words = renderer.words(d.completion[0], action_ids)
                turns = [Turn(words, tuple(ids), tuple(action_ids), "stop_token")]
            elif d.completion:
                where, kwargs = d.problem.where, d.problem.template_kwargs
                turns = conversation_turns(d.prompt, d.completion, renderer, where=where, template_kwargs=kwargs)
            else:
                turns = []
            segments = _segments(turns, trained_turns(d, train_on))
            yield d, [_example(d, segment.input_ids, segment.labels) for segment in segments]


def _texts(demonstration: Demonstration, renderer: Renderer) -> tuple[str, str]:
    problem = demonstration.problem
    with placed(problem.where):
        return renderer.texts(demonstration.prompt, demonstration.completion[0], problem.template_kwargs)


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
    with placed(where):
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


def _too_long(first: TrainingExample, overlong: int, limit: int) -> str:
    return (
        f"{first.where}: {len(first.input_ids)} tokens, more than max_length {limit} (and {overlong - 1} other "
        f"rows): raise max_length, or set overlength: drop"
    )


def _nothing_left(given: Sequence[Demonstration], counts: ExampleCounts, limit: int) -> str:
    if not given:
        return "no rows to train on: the training split is empty without the dev and test problems"
    first = given[0]
    completion = first.completion[-1]["content"] if first.completion else ""
    return (
        f"{first.problem.where}: nothing to train on in {len(given)} rows: {counts.overlong} longer than max_length "
        f"{limit} (longest {counts.longest}), {counts.unsupervised} with an empty completion, {counts.weightless} of "
        f"weight 0; the first is prompt "
        f"{str(first.problem.prompt)[:60]!r}, completion {completion[:60]!r}"
    )


# From trajectories
def trajectory_examples(
    trajectory: Trajectory, problem: Problem, *, reward: float, source: Source, train_on: str = "all_turns"
) -> list[TrainingExample]:
    """Return the examples of a trajectory, with the ids as sampled: rows of `kept.jsonl`.

    There are several if the chat template rewrites earlier text, and none if every action is empty.
    source: the policy that sampled it, `self` or `teacher`; train_on: `all_turns` or `last_turn`.
    """
    opening = list(trajectory.opening) or as_messages(problem.prompt)
    conversation = [*opening, *trajectory.conversation]
    # The index of each action among the messages; the last number is the length of the conversation.
    starts = list(accumulate((1 + len(turn.observation) for turn in trajectory.turns), initial=len(opening)))
    examples = []
    last = len(trajectory.turns) - 1
    trained = [train_on == "all_turns" or number == last for number in range(last + 1)]
    for segment in _segments(trajectory.turns, trained):
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


def _segments(turns: Sequence[Turn], trained: Sequence[bool]) -> list[_Segment]:
    """Return the segments of a conversation in which an action carries loss; trained: whether each turn's may.

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
        has_loss = trained[number] and (turn.action.strip() or turn.message)
        ids += [*turn.ids, *turn.action_ids]
        labels += [*[IGNORED] * len(turn.ids), *(turn.action_ids if has_loss else [IGNORED] * len(turn.action_ids))]
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
        replace(example, id=f"demonstration-{number}", source="demonstration", turn=0, reward=0.0)
        for number, example in enumerate(examples)
    ]


def draw_replay(examples: Sequence[TrainingExample], number: int, *, seed: int, most: int) -> list[TrainingExample]:
    """Return the examples to replay in round `number`: at most `most`, drawn anew in every round."""

    def key(example: TrainingExample) -> bytes:
        return sha256(f"{seed}-{number}-{example.id}".encode()).digest()

    return sorted(examples, key=key)[:most]
