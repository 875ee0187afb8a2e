"""Examples: the policy's words and their stop tokens carry loss, each once, nothing less and nothing else."""

import datetime
import os
from pathlib import Path

import pytest
from helpers.episodes import FORGETFUL, Counting, Scripted, attempts, contexts, played, retold
from helpers.tiny import gsm8k, llama_tokenizer

from bcft.data.examples import (
    conversation_turns,
    draw_replay,
    make_examples,
    replay_examples,
    trajectory_examples,
)
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer
from bcft.types import (
    IGNORED,
    Demonstration,
    Problem,
    TrainingExample,
    Trajectory,
    Turn,
    messages,
    problem_id,
)

FIFTY = Path(__file__).parent / "gsm8k_50.jsonl"
TEMPLATES = ["llama", "plain", "forgetful"]


def demonstration(prompt, completion, where="here"):
    reply = {"role": "assistant", "content": completion}
    return Demonstration(Problem(problem_id(prompt), prompt, where=where), prompt, (reply,))


def demonstrations(rows):
    return [demonstration(r["question"], r["answer"], f"row {i}") for i, r in enumerate(rows)]


def supervised(example):
    return tuple(label for label in example.labels if label != IGNORED)


@pytest.fixture(scope="module")
def rows():
    return gsm8k(FIFTY)


@pytest.fixture(scope="module")
def renderer(rows):
    return Renderer(llama_tokenizer([r["question"] + r["answer"] for r in rows]))


@pytest.fixture(scope="module")
def plain(rows):
    return Renderer(llama_tokenizer([r["question"] + r["answer"] for r in rows], chat=False))


# From demonstrations


def prove(rows, renderer):
    """Check the promises about labels on real rows; return the examples."""
    examples, counts = make_examples(demonstrations(rows), renderer, max_length=4096)
    assert (counts.given, counts.kept) == (len(rows), len(rows))
    tokenizer = renderer.tokenizer
    today = {datetime.date.today().strftime(form) for form in ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y")}
    for example, row in zip(examples, rows, strict=True):
        assert example.labels[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert example.input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(supervised(example)[:-1]) == row["answer"]
        text = tokenizer.decode(example.input_ids)
        assert row["question"].strip() in text
        assert not any(date in text for date in today)
    return examples


def test_fifty_gsm8k_rows_keep_every_row_whole_and_end_in_the_stop_token(rows, renderer):
    prove(rows, renderer)


@pytest.mark.slow
@pytest.mark.skipif("BCFT_TEST_DATA" not in os.environ, reason="BCFT_TEST_DATA does not name the large data")
def test_all_7473_gsm8k_rows_keep_every_row_whole_and_end_in_the_stop_token():
    full = gsm8k(Path(os.environ["BCFT_TEST_DATA"]) / "gsm8k" / "train.jsonl")
    assert len(full) == 7473
    tokenizer = llama_tokenizer([r["question"] + r["answer"] for r in full], vocabulary=4000)
    assert len(prove(full, Renderer(tokenizer))) == 7473


def test_an_example_is_the_prompt_of_a_rollout_followed_by_the_action_a_rollout_would_make(rows, renderer):
    """The text path and the id path are one: prompt ids are equal, and the action decodes to the completion."""
    examples, _ = make_examples(demonstrations(rows), renderer, max_length=4096)
    for example, row in zip(examples, rows, strict=True):
        prompt = renderer.prompts([row["question"]])[0]
        action = example.input_ids[len(prompt) :]
        assert list(example.input_ids[: len(prompt)]) == prompt
        assert all(label == IGNORED for label in example.labels[: len(prompt)])
        assert example.labels[len(prompt) :] == action
        assert renderer.decode(action) == row["answer"]


def test_plain_text_has_one_bos_and_ends_in_eos(plain):
    (example,), counts = make_examples([demonstration("2+2=", "4")], plain, max_length=512)
    tokenizer = plain.tokenizer
    assert tokenizer.decode(supervised(example)) == "4<|end_of_text|>"
    assert example.input_ids.count(tokenizer.bos_token_id) == plain.bos_count == counts.bos


def test_an_example_of_a_text_has_its_place_and_its_messages(renderer):
    (example,), _ = make_examples([demonstration("2 + 2?", "4", "file:3")], renderer, max_length=512)
    assert (example.id, example.where, example.problem_id) == ("file:3", "file:3", problem_id("2 + 2?"))
    assert example.prompt == ({"role": "user", "content": "2 + 2?"},)
    assert example.completion == ({"role": "assistant", "content": "4"},)
    assert (example.source, example.turn, example.reward, example.weight) == ("demonstration", 0, 0.0, 1.0)


def test_over_long_examples_are_dropped_and_counted_never_truncated(rows, renderer):
    examples, counts = make_examples(demonstrations(rows), renderer, max_length=250)
    assert 0 < counts.overlong < len(rows)
    assert counts.kept == len(examples) == len(rows) - counts.overlong
    assert max(len(example.input_ids) for example in examples) <= 250
    assert all(example.labels[-1] in renderer.stop_ids for example in examples)


def test_over_long_examples_are_refused_on_request_with_their_place(rows, renderer):
    with pytest.raises(DataError, match=r"row \d+: \d+ tokens, more than max_length 250"):
        make_examples(demonstrations(rows), renderer, max_length=250, overlength="raise")


def test_duplicates_and_empty_completions_are_counted_drops(renderer):
    given = [demonstration("2 + 2?", completion) for completion in ("4", "4", " ", "four")]
    examples, counts = make_examples(given, renderer, max_length=512)
    assert (len(examples), counts.duplicate, counts.unsupervised) == (2, 1, 1)
    problem_only = Demonstration(Problem("p", "2 + 2?"), "2 + 2?")
    assert make_examples([problem_only], renderer, max_length=512, may_be_empty=True)[1].unsupervised == 1


def test_nothing_left_is_an_error_that_shows_a_row(renderer):
    with pytest.raises(DataError, match=r"here: nothing to train on in 1 rows: 1 longer than max_length 8"):
        make_examples([demonstration("2 + 2?", "4")], renderer, max_length=8)


def test_sampled_ids_are_trained_as_they_are_with_the_same_tokenizer_and_else_the_text(renderer):
    four, nine = (renderer.completions([text])[0] for text in ("4", "9"))
    prompt = renderer.prompts(["2 + 2?"])[0]
    sampled = TrainingExample(
        "1-p-0", "p", (*prompt, *nine), (*[IGNORED] * len(prompt), *nine), source="self", where="kept.jsonl:1"
    )
    text = demonstration("2 + 2?", "4")
    for fingerprint, action, count in ((renderer.fingerprint, nine, 1), ("another", four, 0)):
        given = Demonstration(text.problem, text.prompt, text.completion, sampled, fingerprint)
        (example,), counts = make_examples([given], renderer, max_length=512)
        assert example.input_ids == (*prompt, *action)
        assert counts.sampled == count
        assert (example is sampled) == bool(count)


def test_an_example_whose_label_is_not_its_token_cannot_be_made():
    with pytest.raises(ValueError, match="label 7 at position 1"):
        TrainingExample("x", "p", (5, 6), (IGNORED, 7))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [(slice(0, -1), "an action ends in label"), (slice(-1, None), "only the stop token carries loss")],
)
def test_labels_that_break_a_promise_are_refused_with_their_place(renderer, labels, reason):
    ids = (*renderer.prompts(["2 + 2?"])[0], *renderer.completions(["four"])[0])
    start = len(ids) - 3
    kept = set(range(len(ids))[start:][labels])
    sampled = TrainingExample(
        "x", "p", ids, tuple(token if i in kept else IGNORED for i, token in enumerate(ids)), where="kept.jsonl:5"
    )
    given = Demonstration(Problem("p", "2 + 2?"), "2 + 2?", (), sampled, renderer.fingerprint)
    with pytest.raises(DataError, match=rf"^kept\.jsonl:5: {reason}"):
        make_examples([given], renderer, max_length=512)


# From trajectories


def renderer_of(template):
    if template == "plain":
        return Renderer(llama_tokenizer(["say a number"], vocabulary=300, chat=False))
    return Renderer(retold(FORGETFUL) if template == "forgetful" else llama_tokenizer(["say a number"], vocabulary=300))


def say(key):
    return f"thinking of {key[5]}> {key[4]}"


@pytest.fixture(params=TEMPLATES, scope="module")
def episodes(request):
    """Return a template's name, its renderer, and trajectories of three turns each."""
    renderer = renderer_of(request.param)
    return request.param, renderer, played(attempts(), Counting, renderer, Scripted(renderer, say=say))


def examples_of(trajectory, train_on="all_turns"):
    """Return the examples of a trajectory at one of the problems of `attempts`."""
    problem = next(a.problem for a in attempts() if a.problem.id == trajectory.problem_id)
    return trajectory_examples(trajectory, problem, reward=1.0, source="self", train_on=train_on)


def last_turn(example):
    """Return the last turn that an example of all turns holds."""
    return example.turn + sum(message["role"] == "assistant" for message in example.completion) - 1


def test_every_sampled_id_is_trained_once_and_nothing_else_is(episodes):
    _, _, trajectories = episodes
    for trajectory in trajectories:
        trained = sum(map(supervised, examples_of(trajectory)), ())
        assert trained == sum((turn.action_ids for turn in trajectory.turns), ())


def test_every_example_is_a_context_the_policy_read_and_the_action_it_sampled(episodes):
    _, _, trajectories = episodes
    for trajectory in trajectories:
        for example in examples_of(trajectory):
            last = last_turn(example)
            assert example.input_ids == contexts(trajectory)[last] + trajectory.turns[last].action_ids
            pairs = zip(example.input_ids, example.labels, strict=True)
            assert all(label in (IGNORED, token) for token, label in pairs)


def test_a_new_example_begins_where_the_template_rewrites_and_nowhere_else(episodes):
    template, _, trajectories = episodes
    for trajectory in trajectories:
        spans = [(example.turn, last_turn(example)) for example in examples_of(trajectory)]
        assert spans == ([(0, 0), (1, 1), (2, 2)] if template == "forgetful" else [(0, 2)])


def test_observations_are_never_trained(episodes):
    _, renderer, trajectories = episodes
    for trajectory in trajectories:
        for example in examples_of(trajectory):
            # Observations end with a question mark, which no action has.
            assert "?" not in renderer.tokenizer.decode(list(supervised(example)))


def test_on_the_last_turn_alone_the_example_ends_with_it_and_trains_it_only(episodes):
    _, _, trajectories = episodes
    for trajectory in trajectories:
        (example,) = examples_of(trajectory, "last_turn")
        assert supervised(example) == trajectory.turns[-1].action_ids
        assert example.input_ids == contexts(trajectory)[-1] + trajectory.turns[-1].action_ids
        assert example.completion == ({"role": "assistant", "content": trajectory.turns[-1].action},)
        assert len(example.prompt) == 5


def test_an_example_has_the_identity_of_its_trajectory_and_comes_back_from_its_line(episodes):
    _, _, trajectories = episodes
    for trajectory in trajectories:
        for example in examples_of(trajectory):
            assert (example.id, example.problem_id) == (trajectory.id, trajectory.problem_id)
            assert (example.source, example.reward, example.weight) == ("self", 1.0, 1.0)
            assert TrainingExample.from_json(example.to_json()) == example


def test_the_text_of_an_example_demonstrates_the_same_ids_again(episodes):
    _, renderer, trajectories = episodes
    for trajectory in trajectories:
        examples = examples_of(trajectory)
        problem = Problem(trajectory.problem_id, "unused")
        given = [Demonstration(problem, example.prompt, example.completion) for example in examples]
        again, _ = make_examples(given, renderer, max_length=10_000)
        assert [(e.input_ids, e.labels) for e in again] == [(e.input_ids, e.labels) for e in examples]


def test_a_demonstrated_conversation_reads_as_a_sampled_one(episodes):
    _, renderer, trajectories = episodes
    for trajectory in trajectories:
        prompt = next(a.problem.prompt for a in attempts() if a.problem.id == trajectory.problem_id)
        turns = conversation_turns(messages(prompt), trajectory.messages, renderer, where="here")
        assert turns == conversation_turns(prompt, trajectory.messages, renderer)
        assert [(t.ids, t.action_ids, t.rewritten) for t in turns] == [
            (t.ids, t.action_ids, t.rewritten) for t in trajectory.turns
        ]


def by_hand(turns, train_on="all_turns"):
    """Return the examples of a trajectory of these turns."""
    trajectory = Trajectory(1, "p", 0, tuple(turns), "done")
    return trajectory_examples(trajectory, Problem("p", "?"), reward=1.0, source="self", train_on=train_on)


def test_an_action_that_says_nothing_is_read_but_not_trained():
    turns = [
        Turn("a", (1,), (2, 3), "stop_token"),
        Turn(" ", (4,), (5, 3), "stop_token"),
        Turn("b", (6,), (7, 3), "stop_token"),
        Turn("", (8,), (3,), "stop_token"),
    ]
    (example,) = by_hand(turns)
    assert example.input_ids == (1, 2, 3, 4, 5, 3, 6, 7, 3)  # no token after the last one that carries loss
    assert example.labels == (IGNORED, 2, 3, IGNORED, IGNORED, IGNORED, IGNORED, 7, 3)
    assert by_hand(turns[1:2]) == by_hand(turns, "last_turn") == []


def test_two_turns_by_hand():
    turns = [Turn("5", (1, 2), (5, 9), "stop_token"), Turn("7", (3, 4), (7, 9), "stop_token")]
    (example,) = by_hand(turns)
    assert example.input_ids == (1, 2, 5, 9, 3, 4, 7, 9)
    assert example.labels == (-100, -100, 5, 9, -100, -100, 7, 9)


@pytest.mark.parametrize("roles", ["assistant", "assistant user", "user assistant assistant", "user assistant user"])
def test_a_conversation_that_does_not_alternate_is_refused(roles):
    first, *others = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(DataError, match="file:3: in a conversation"):
        conversation_turns([first], others, renderer_of("llama"), where="file:3")


# Replay


def test_examples_to_replay_are_numbered_and_drawn_anew_each_round(renderer):
    given = [demonstration(f"{n} + {n}?", str(2 * n), f"file:{n}") for n in range(20)]
    examples = replay_examples(given, renderer, max_length=512, train_on="all_turns")
    assert [example.id for example in examples] == [f"demonstration-{n}" for n in range(20)]
    assert {example.source for example in examples} == {"demonstration"}
    drawn = [draw_replay(examples, number, seed=0, most=5) for number in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len({e.id for e in part}) for part in drawn] == [5, 5, 5]
    assert sorted(e.id for e in draw_replay(examples, 1, seed=0, most=99)) == sorted(e.id for e in examples)
    assert [e.id for e in drawn[0]] == [f"demonstration-{n}" for n in (1, 12, 10, 7, 18)]
    assert replay_examples([], renderer, max_length=512, train_on="all_turns") == []


def test_a_kept_row_that_is_replayed_is_a_demonstration(renderer):
    ids = (*renderer.prompts(["2 + 2?"])[0], *renderer.completions(["4"])[0])
    labels = (*[IGNORED] * (len(ids) - 2), *ids[-2:])
    sampled = TrainingExample("3-p-1", "p", ids, labels, turn=2, source="teacher", reward=0.7, where="kept.jsonl:1")
    text = demonstration("2 + 2?", "4")
    given = Demonstration(text.problem, text.prompt, text.completion, sampled, renderer.fingerprint)
    (example,) = replay_examples([given], renderer, max_length=512, train_on="all_turns")
    assert (example.id, example.turn, example.source, example.reward) == ("demonstration-0", 0, "demonstration", 0.0)
    assert (example.input_ids, example.labels) == (ids, labels)
