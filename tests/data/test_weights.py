"""Where the loss is: marks of turns are obeyed or refused, and rows weigh what they say, in whatever unit."""

import math
from dataclasses import replace

import pytest
from helpers.rows import many, splits
from helpers.tiny import llama_tokenizer, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.config.schema import TrainingSettings
from bcft.data.examples import held_out_examples, make_examples, replay_examples
from bcft.data.readers import demonstration
from bcft.data.weights import marked_turns, scaled, trained_turns
from bcft.errors import DataError, UsageError
from bcft.policy.chat_template import Renderer
from bcft.types import IGNORED, Demonstration, TrainingExample

LAW = settings(max_examples=60, deadline=None)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)
TOKEN, SUM = TrainingSettings(), TrainingSettings(loss_reduction="sum")


@pytest.fixture(scope="module")
def renderer():
    return Renderer(llama_tokenizer(["what is one two three four"], vocabulary=300))


def talk(marks, **columns):
    """Return a row whose assistant says `one`, `two` …, each message with its mark; None for no mark."""
    said = []
    for word, mark in zip(("one", "two", "three", "four"), marks, strict=False):
        said += [{"role": "user", "content": "what"}, {"role": "assistant", "content": word, "train": mark}]
    return {"messages": said, **columns}


def rows_of(*rows):
    return [demonstration(row, f"file:{number}") for number, row in enumerate(rows, 1)]


def pairs(weights):
    """Return a demonstration for each weight."""
    rows = ({"prompt": f"what is {n}", "completion": str(n), "weight": w} for n, w in enumerate(weights))
    return rows_of(*rows)


def trained_text(example, renderer):
    return renderer.tokenizer.decode([label for label in example.labels if label != IGNORED])


# Turns


@pytest.mark.parametrize(
    ("marks", "marked"),
    [
        ([None, None], [True, True]),
        ([True, True], [True, True]),
        ([False, None], [False, True]),
        ([None, False], [True, False]),
        ([True, None], [True, False]),
        ([None, True, False, None], [False, True, False, False]),
        ([False, False], [False, False]),
        ([1, 0], [True, False]),
        (["true", None], [True, False]),
    ],
)
def test_marked_turns_alone_carry_loss_and_without_a_mark_to_train_all_that_are_not_marked_off(marks, marked):
    (d,) = rows_of(talk(marks))
    assert marked_turns(d.completion) == trained_turns(d, "marked") == marked


@pytest.mark.parametrize("marks", [[None, True, None], [False, True, False], [0, 1, None], [False, None, 0]])
def test_a_marked_turn_alone_trains_that_turn_and_its_stop_token_alone(marks, renderer):
    (example,), counts = make_examples(rows_of(talk(marks)), renderer, max_length=512, train_on="marked")
    assert trained_text(example, renderer) == "two<|eot_id|>"
    (whole,), _ = make_examples(rows_of(talk([None] * 3)), renderer, max_length=512)
    assert whole.input_ids[: len(example.input_ids)] == example.input_ids
    assert trained_text(whole, renderer) == "one<|eot_id|>two<|eot_id|>three<|eot_id|>"
    assert counts.kept == 1
    assert not any("train" in message for message in whole.completion)


def test_marks_and_weights_of_messages_are_one_thing():
    for key in ("train", "weight"):
        said = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "one", key: 0}]
        said += [{"role": "user", "content": "what", key: 0}, {"role": "assistant", "content": "two"}]
        (d,) = rows_of({"messages": said})
        assert trained_turns(d, "marked") == [False, True]


@pytest.mark.parametrize(
    ("marks", "train_on", "number"),
    [([False, None], "all_turns", 0), ([None, 0], "last_turn", 1), ([0], "last_turn", 0)],
)
def test_a_mark_that_would_be_ignored_is_refused_with_its_place(marks, train_on, number, renderer):
    with pytest.raises(DataError, match=rf"^file:1: the assistant's message {number} .*: set train_on: marked"):
        make_examples(rows_of(talk(marks)), renderer, max_length=512, train_on=train_on)


def test_marks_that_change_nothing_are_no_mistake(renderer):
    plain, _ = make_examples(rows_of(talk([None, None])), renderer, max_length=512)
    for marks, train_on in (([1, 1], "all_turns"), ([None, 1], "all_turns"), ([1, 1], "marked")):
        assert make_examples(rows_of(talk(marks)), renderer, max_length=512, train_on=train_on)[0] == plain
    last, _ = make_examples(rows_of(talk([None, None])), renderer, max_length=512, train_on="last_turn")
    assert make_examples(rows_of(talk([0, 1])), renderer, max_length=512, train_on="last_turn")[0] == last


def test_a_mark_to_train_in_a_prompt_is_refused_and_one_not_to_is_true_anyway(renderer):
    shot = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "one"}]
    rows = [
        {"prompt": [shot[0], shot[1] | {"train": mark}, shot[0]], "completion": [shot[1] | {"train": True}]}
        for mark in (False, True)
    ]
    (example,), _ = make_examples(rows_of(rows[0]), renderer, max_length=512, train_on="marked")
    assert trained_text(example, renderer) == "one<|eot_id|>"
    with pytest.raises(DataError, match=r"^file:2: an assistant's message of the prompt is marked"):
        make_examples(rows_of(*rows), renderer, max_length=512, train_on="marked")


def test_marks_that_are_asked_for_and_absent_are_refused(renderer):
    given = rows_of(talk([None, None]))
    with pytest.raises(DataError, match=r"^train_on: marked: no message of 1 rows is marked"):
        make_examples(given, renderer, max_length=512, train_on="marked")
    assert make_examples(given, renderer, max_length=512, train_on="marked", may_be_empty=True)[1].kept == 1


def test_a_conversation_that_is_marked_off_is_a_row_of_weight_0(renderer):
    given = rows_of(talk([0, 0]), talk([None, 1]))
    examples, counts = make_examples(given, renderer, max_length=512, train_on="marked")
    assert examples == make_examples(given[1:], renderer, max_length=512, train_on="marked")[0]
    assert (counts.given, counts.kept, counts.weightless, counts.unsupervised) == (2, 1, 1, 0)


def test_the_same_words_with_other_marks_are_no_duplicate(renderer):
    given = rows_of(talk([1, 0, 1]), talk([0, 1, 1]), talk([0, 1, 1]))
    examples, counts = make_examples(given, renderer, max_length=512, train_on="marked")
    texts = ["one<|eot_id|>three<|eot_id|>", "two<|eot_id|>three<|eot_id|>"]
    assert [trained_text(example, renderer) for example in examples] == texts
    assert examples[0].input_ids == examples[1].input_ids
    assert counts.duplicate == 1


# Rows


def test_a_row_has_its_weight_in_its_example_and_a_row_of_weight_0_is_not_there(renderer):
    """The rows around it, their counts and their scaled weights are those of the data without it."""
    given, without = (pairs(weights) for weights in ([0.5, 0, 2, "1.5", 0.0], [0.5, 2, 1.5]))
    without = [replace(d, problem=g.problem, prompt=g.prompt, completion=g.completion) for d, g in
               zip(without, [given[0], *given[2:4]], strict=True)]  # fmt: skip
    examples, counts = make_examples(given, renderer, max_length=512)
    assert [example.weight for example in examples] == [0.5, 2.0, 1.5]
    others, others_counts = make_examples(without, renderer, max_length=512)
    assert examples == others
    assert scaled(examples, TOKEN) == scaled(others, TOKEN)
    assert counts == replace(others_counts, given=5, weightless=2)
    assert "(dropped: 2 of weight 0)" in str(counts)


def test_a_held_out_loss_is_of_all_rows_and_none_weighs_more(renderer):
    held_out = held_out_examples(
        pairs([0, 3, 1]), renderer, special_tokens="raise", max_length=512, train_on="all_turns"
    )
    assert [example.weight for example in held_out] == [1.0, 1.0, 1.0]


def test_nothing_but_rows_of_weight_0_is_an_error_that_says_so(renderer):
    with pytest.raises(DataError, match=r"^file:1: nothing to train on in 2 rows: .* 2 of weight 0"):
        make_examples(pairs([0, 0]), renderer, max_length=512)


def test_a_row_of_weight_0_may_be_too_long(renderer):
    given = pairs([1, 0])
    given[1] = replace(given[1], completion=({"role": "assistant", "content": "one " * 600},))
    assert make_examples(given, renderer, max_length=100, overlength="raise")[1].kept == 1


def test_a_duplicate_adds_its_weight_where_rows_have_weights_and_is_dropped_where_they_have_none(renderer):
    """A row of weight 0 is not there, so it does not make the others rows with weights."""
    for weights, total in (([1, 1, 1], 1.0), ([2, 1, 0.5], 3.5), ([2, 0, 2], 4.0), ([1, 0, 1], 1.0)):
        same = [
            replace(d, completion=({"role": "assistant", "content": "one"},), prompt="what") for d in pairs(weights)
        ]
        (example,), counts = make_examples(same, renderer, max_length=512)
        assert (example.weight, counts.duplicate) == (total, sum(map(bool, weights)) - 1)


@LAW
@given(WEIGHTS)
def test_scaled_weights_have_the_mean_1_and_the_same_ratios(weights):
    examples = [TrainingExample(f"{n}", "p", (1, 2, 3), (IGNORED, 2, 3), weight=w) for n, w in enumerate(weights)]
    made, note = scaled(examples, TOKEN)
    assert math.isclose(sum(example.weight for example in made) / len(made), 1.0, rel_tol=1e-9)
    for example, weight in zip(made, weights, strict=True):
        assert math.isclose(example.weight / made[0].weight, weight / weights[0], rel_tol=1e-9)
    assert bool(note) == any(weight != 1.0 for weight in weights)
    assert [example.weight for example in scaled(examples, SUM)[0]] == weights


@LAW
@given(st.floats(1e-300, 1e300), st.integers(1, 9))
def test_equal_weights_are_bit_for_bit_none(weight, number):
    plain = [TrainingExample(f"{n}", "p", (1, 2, 3), (IGNORED, 2, 3)) for n in range(number)]
    assert scaled([replace(example, weight=weight) for example in plain], TOKEN)[0] == plain


def test_weights_are_scaled_in_one_line_that_says_by_how_much():
    examples = [TrainingExample("1", "p", (1, 2, 3), (IGNORED, 2, 3), weight=w) for w in (1.0, 2.0, 6.0)]
    assert scaled(examples, TOKEN)[1] == "weights: rows weigh 1 to 6 in the loss, divided by their mean 3"
    assert scaled(examples, SUM)[1] == "weights: rows weigh 1 to 6 in the loss, not scaled: loss_reduction is sum"
    assert scaled(scaled(examples, TOKEN)[0], TOKEN)[1].endswith("1 in the mean")
    huge = [replace(example, weight=1.7e308 * (example.weight / 6)) for example in examples]
    assert [example.weight for example in scaled(huge, TOKEN)[0]] == pytest.approx([1 / 3, 2 / 3, 2])


def test_a_loss_that_takes_no_weights_is_refused_only_where_there_are_some():
    examples = [TrainingExample("1", "p", (1, 2, 3), (IGNORED, 2, 3), weight=w) for w in (1.0, 2.0)]
    dft = TrainingSettings(loss_type="dft")
    smooth = TrainingSettings(passed_through={"label_smoothing_factor": 0.1})
    for loss, key in ((dft, "loss_type: dft"), (smooth, "label_smoothing_factor")):
        with pytest.raises(UsageError, match=f"^{key}.*remove the weights"):
            scaled(examples, loss)
        assert scaled(examples[:1], loss) == (examples[:1], "")


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf])
def test_an_example_has_a_weight_that_a_loss_can_have(weight):
    with pytest.raises(ValueError, match="is not a finite number >= 0"):
        TrainingExample("1", "p", (1, 2, 3), (IGNORED, 2, 3), weight=weight)


def test_kept_rows_bring_their_weights_and_replayed_ones_too(renderer):
    ids = (*renderer.prompts(["what"])[0], *renderer.completions(["one"])[0])
    labels = (*[IGNORED] * (len(ids) - 2), *ids[-2:])
    (text,) = pairs([2.5])
    sampled = TrainingExample("3-p-1", "p", ids, labels, weight=2.5)
    for fingerprint in (renderer.fingerprint, "another"):
        given = Demonstration(text.problem, text.prompt, text.completion, sampled, fingerprint, weight=2.5)
        ((example,), _), (again,) = (
            make_examples([given], renderer, max_length=512),
            replay_examples([given], renderer, max_length=512, train_on="all_turns"),
        )
        assert (example.weight, again.weight) == (2.5, 2.5)


def test_a_weight_of_1_and_marks_that_train_all_are_no_part_of_the_digest_and_others_are(tmp_path):
    def digest(rows, **keys):
        return splits(write_jsonl(tmp_path / "rows.jsonl", rows), **keys).digest

    rows = many(9)
    plain = digest(rows)
    assert plain == digest([row | {"weight": 1} for row in rows]) == digest([row | {"weight": None} for row in rows])
    assert len({plain, *(digest([rows[0] | {"weight": w}, *rows[1:]]) for w in (0, 0.5, 2))}) == 4
    talks = [talk(marks) for marks in ([None, None], [1, 1], [0, None], [1, None], [None, 1])]
    none, every, *others = (digest([row], train_on="marked") for row in talks)
    assert none == every == digest([talks[0]])
    assert len({none, *others}) == 4
    none, *every, left_out = (digest([talk(marks)]) for marks in ([None, None], [1, 1], [1, None], [0, None]))
    assert {*every} == {none} != {left_out}
