"""Columns: what would change training is honored or refused, and a prompt alone is a problem to attempt."""

import json

import pytest
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.loading import load_splits
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.rewards.signature import TRL_ARGUMENTS
from bcft.types import TrainingExample, problem_id

USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
PAIR = {"prompt": "2 + 2?", "completion": "4"}
SHAPES = [
    PAIR,
    {"prompt": [USER], "completion": [REPLY]},
    {"messages": [USER, REPLY]},
    {"question": "?", "answer": "4"},
]
EMPTY = [None, "", [], {}]
REFUSED = {
    "functions": [{"type": "function"}],
    "images": ["a.png"],
    "image": {"bytes": "x", "path": None},
    "videos": ["a.mp4"],
    "audio": {"array": [0.1]},
    "system": "Be brief.",
    "system_prompt": "Be brief.",
    **{key: ["a"] for key in TRL_ARGUMENTS},
}


def refused(row, **how):
    with pytest.raises(DataError) as caught:
        demonstration(row, "file:7", **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("column", REFUSED)
def test_a_column_that_changes_what_the_policy_reads_is_refused_unless_it_is_empty(column, tmp_path):
    for shape in SHAPES:
        for problem_only in (False, True):
            text = refused({**shape, column: REFUSED[column]}, problem_only=problem_only)
            assert text.startswith(f"file:7: column {column!r}: ")
        for value in EMPTY:
            assert demonstration({**shape, column: value}, "").problem.columns[column] == value
    path = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, column: None}, {**PAIR, column: REFUSED[column]}])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: column '{column}'"):
        load_splits(DataSettings(dataset_name=str(path)), EvaluationSettings(), demonstrations=False)


@pytest.mark.parametrize(
    ("column", "refused_values", "harmless"),
    [
        ("label", [False, 0, 0.0, "false", "0", "False"], [True, 1, "true", "cat", 7]),
        ("train", [False, 0, "false", "no", "False"], [True, 1, "true", "True", "1"]),
        ("loss_mask", [[0, 1], "01", 1, [0], {"a": 1}], []),
        ("completion_mask", [[0, 1], [1], [0], "1", 1], []),
        ("assistant_masks", [[0, 1], [1], [0], "1", 1], []),
        ("input_ids", [[1, 2], [0], "1 2", 5, [[1]]], []),
        ("labels", [[1, 2], [True], [0], "a", 5], []),
    ],
)
def test_a_column_that_says_how_to_train_a_row_is_obeyed_or_refused(column, refused_values, harmless):
    for shape in SHAPES:
        for value in refused_values:
            row = {**shape, column: value}
            assert refused(row).startswith(f"file:7: column {column!r} (")
            # An attempt at a problem trains its own text: the column is the reward's.
            assert demonstration(row, "", problem_only=True).problem.columns[column] == value
        for value in [*harmless, *EMPTY]:
            assert demonstration({**shape, column: value}, "").completion == (REPLY,)


@pytest.mark.parametrize("value", ["a\ud800", ["b", {"c": "\udfff"}], {"\ud800": 1}])
def test_a_column_that_no_file_can_hold_is_refused_before_a_run_would_write_it(value):
    for shape in SHAPES:
        for problem_only in (False, True):
            with pytest.raises(DataError, match=r"^file:7: note: .* has half of a surrogate pair: not valid text"):
                demonstration({**shape, "note": value}, "file:7", problem_only=problem_only)


@pytest.mark.parametrize("given", [{"enable_thinking": False}, {"a": 1, "b": [2]}, {"a": {"b": None}, "c": ""}])
def test_arguments_of_the_template_are_the_problems(given):
    for shape in SHAPES:
        problem = demonstration({**shape, "chat_template_kwargs": given}, "").problem
        assert problem.template_kwargs == given == problem.columns["chat_template_kwargs"]
        filled = {**given, "of_another_row": None}
        assert demonstration({**shape, "chat_template_kwargs": filled}, "").problem.template_kwargs == given
        for empty in EMPTY:
            assert demonstration({**shape, "chat_template_kwargs": empty}, "").problem.template_kwargs == {}


@pytest.mark.parametrize("given", ['{"enable_thinking": false}', ["a"], 1, True, {1: 2}, "x"])
def test_arguments_of_the_template_that_are_no_object_are_refused(given):
    for shape in SHAPES:
        text = refused({**shape, "chat_template_kwargs": given})
        assert text.startswith("file:7: chat_template_kwargs: expected an object with names as keys")
        assert ("write it as an object" in text) == isinstance(given, str)


PROMPTS_ALONE = [
    ({"prompt": "2 + 2?"}, "2 + 2?", {}),
    ({"prompt": "2 + 2?", "answer": "4"}, "2 + 2?", {"answer": "4"}),
    ({"prompt": [USER], "answer": "4", "level": 3}, [USER], {"answer": "4", "level": 3}),
    ({"prompt": "2 + 2?", "completion": None, "answer": 4}, "2 + 2?", {"answer": 4}),
    ({"question": "2 + 2?"}, "2 + 2?", {}),
    ({"question": "2 + 2?", "ground_truth": "4"}, "2 + 2?", {"ground_truth": "4"}),
    ({"prompt": "2 + 2?", "question": "two?", "tests": ["a"]}, "2 + 2?", {"question": "two?", "tests": ["a"]}),
    ({"messages": [USER]}, [USER], {}),
    ({"messages": [USER, REPLY, USER], "answer": "4"}, [USER, REPLY, USER], {"answer": "4"}),
    ({"messages": [USER], "prompt": "the secret", "label": False}, "the secret", {"label": False}),
    ({"prompt": "2 + 2?", "reward_model": {"ground_truth": "4"}}, "2 + 2?", {"reward_model": {"ground_truth": "4"}}),
    ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, "2 + 2?", {"chosen": "4", "rejected": "5"}),
]


@pytest.mark.parametrize(("row", "prompt", "columns"), PROMPTS_ALONE)
def test_a_prompt_alone_is_a_problem_to_attempt_and_no_demonstration(row, prompt, columns, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    data, none = DataSettings(dataset_name=str(path)), EvaluationSettings(eval_dev_problems=0, eval_test_problems=1)
    (d,) = load_splits(data, none, demonstrations=False).train
    assert (d.problem.prompt, d.problem.columns, d.completion) == (prompt, columns, ())
    assert (d.problem.id, d.problem.where) == (problem_id(prompt), f"{path}:1")
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        load_splits(data, none)


def test_a_completion_is_kept_where_a_prompt_alone_would_do():
    for shape in SHAPES:
        assert demonstration(shape, "", problem_only=True) == demonstration(shape, "")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, "set dataset_format: sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "set dataset_format: alpaca"),
        ({"problem": "a", "solution": "b"}, "set dataset_format: math"),
        ({"conversation": ["a? b"], "word": "c"}, "set dataset_format: lines"),
        ({"text": "a"}, "split text into prompt and completion"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "a preference pair"),
    ],
)
def test_a_row_of_another_format_is_refused_with_what_to_rename(row, hint):
    for problem_only in (False, True):
        text = refused(row, problem_only=problem_only)
        assert text.startswith(f"file:7: columns {', '.join(sorted(row))}: expected prompt")
        assert hint in text


def test_messages_and_completion_may_say_the_same_and_nothing_else():
    talk = [USER, REPLY, USER, {"role": "assistant", "content": "5"}]
    for completion in ("5", talk[1:], talk[3:], talk[2:], None):
        assert demonstration({"messages": talk, "completion": completion}, "").completion == tuple(talk[1:])
    for completion in ("6", [REPLY], [*talk[1:], USER, REPLY], " 5", ""):
        row = {"messages": talk, "completion": completion}
        assert "messages and completion say different things" in refused(row)


def test_a_question_beside_a_prompt_is_a_column_and_no_part_of_the_digest(tmp_path):
    digests = set()
    for question in ("a", "b"):
        path = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "question": question}])
        parts = load_splits(DataSettings(dataset_name=str(path)), EvaluationSettings())
        assert parts.train[0].problem.columns == {"question": question}
        digests.add(parts.digest)
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR])
    assert digests == {load_splits(DataSettings(dataset_name=str(path)), EvaluationSettings()).digest}


@pytest.mark.parametrize(
    ("given", "weight"),
    [(1, 1.0), ("1.0", 1.0), (True, 1.0), ("true", 1.0), (0, 0.0), (False, 0.0), ("false", 0.0), (0.5, 0.5), ("2", 2.0),
     (1e300, 1e300), (-0.0, 0.0), *((empty, 1.0) for empty in EMPTY)],
)  # fmt: skip
def test_a_weight_is_the_demonstrations_and_no_column_of_its_problem(given, weight):
    for shape in SHAPES:
        d = demonstration({**shape, "weight": given}, "file:7")
        assert (d.weight, "weight" in d.problem.columns) == (weight, False)
        # An attempt at a problem trains its own text: the column is the reward's.
        attempted = demonstration({**shape, "weight": given}, "file:7", problem_only=True)
        assert (attempted.weight, attempted.problem.columns["weight"]) == (1.0, given)


@pytest.mark.parametrize("given", [-1, -1e-9, float("nan"), float("inf"), "nan", "-inf", "high", [1.0], {"a": 1}])
def test_a_weight_that_no_loss_can_have_is_refused_with_its_place(given):
    for shape in SHAPES:
        assert refused({**shape, "weight": given}).startswith("file:7: weight ")
        assert demonstration({**shape, "weight": given}, "", problem_only=True).weight == 1.0


def test_the_same_prompt_may_have_demonstrations_of_other_weights(tmp_path):
    rows = [{**PAIR, "weight": 2}, {**PAIR, "completion": "five", "weight": 0.5}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    parts = load_splits(DataSettings(dataset_name=str(path)), EvaluationSettings(eval_dev_problems=0))
    assert (parts.note_conflicts(None), [d.weight for d in parts.train]) == ("", [2.0, 0.5])


def test_a_kept_row_has_the_weight_that_it_was_kept_with():
    kept = TrainingExample(
        "1-p-0", "p", (1, 2, 3), (-100, 2, 3), source="self", prompt=(USER,), completion=(REPLY,)
    ).to_json()
    for weight in (1, 1.0, "1.0", True, 0, 0.5, 2, "0.9", False):
        d = demonstration(kept | {"weight": weight}, "kept:1")
        assert d.weight == d.sampled.weight == float(weight)
        assert d.sampled.input_ids == (1, 2, 3)
    for weight in (-1, "nan", float("inf"), "high", None):
        assert refused(kept | {"weight": weight}).startswith("file:7: not a row of kept.jsonl: ")
    assert json.loads(json.dumps(kept)) == kept


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"question": "q", "answer": "5", "completion": "It is 5"}, "It is 5"),
        ({"question": "q", "completion": "It is 5"}, "It is 5"),
        ({"question": "q", "answer": "It is 5"}, "It is 5"),
        ({"question": "q", "answer": "It is 5", "completion": None}, "It is 5"),
        ({"question": "q", "answer": "5", "completion": [REPLY]}, "4"),
    ],
)
def test_the_completion_of_a_question_is_trained_and_its_answer_is_the_reference(row, completion):
    made = demonstration(row, "file:7")
    assert [message["content"] for message in made.completion] == [completion]
    assert made.problem.columns.get("answer") == row.get("answer")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thought_or_a_call_beside_a_completion_is_refused_and_beside_a_problem_is_a_column(key, shape):
    assert f"column {key!r}" in refused({**shape, key: "hm"})
    assert demonstration({**shape, key: ""}, "file:7").completion
    assert demonstration({**shape, key: "hm"}, "file:7", problem_only=True).problem.columns[key] == "hm"


def test_a_kept_row_keeps_its_arguments_for_the_template():
    example = TrainingExample(
        "1-a-0", "a", (1, 2), (-100, 2), prompt=(USER,), completion=(REPLY,), template_kwargs={"enable_thinking": False}
    )
    line = example.to_json()
    assert TrainingExample.from_json(line) == example
    made = demonstration(json.loads(json.dumps(line)), "kept.jsonl:1")
    assert made.problem.template_kwargs == {"enable_thinking": False}
    assert "chat_template_kwargs" not in TrainingExample("1-a-0", "a", (1, 2), (-100, 2)).to_json()


@pytest.mark.parametrize("text", ["\ufdd0x", "x\ufdd1", "a\ufdefb", "\ufdd0", "x \ufdda"])
def test_a_noncharacter_is_no_text(text):
    assert "the noncharacter" in refused({"prompt": "q", "completion": text})
    assert "the noncharacter" in refused({"prompt": text, "completion": "a"})
