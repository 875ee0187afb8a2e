"""Readers: every format, every shape of a row, and every malformed one refused with file and line."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.files import read_json_rows, read_rows
from bcft.data.loading import load_splits
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.types import TrainingExample, problem_id

GOOD = {"prompt": "2 + 2?", "completion": "4", "answer": "4"}
USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
KEPT = TrainingExample(
    "1-p-0", "p", (1, 2, 3), (-100, 2, 3), turn=1, source="self", prompt=(USER,), completion=(REPLY,), reward=0.5
)


def splits(path):
    return load_splits(
        DataSettings(dataset_name=str(path)), EvaluationSettings(eval_dev_problems=0, eval_test_problems=0)
    )


BAD_LINES = {
    "torn": '{"prompt": "a", "compl',
    "not an object": '["a", "b"]',
    "null completion": '{"prompt": "a", "completion": null}',
    "number as completion": '{"prompt": "a", "completion": 4}',
    "no completion": '{"prompt": "a"}',
    "other columns": '{"input": "a", "output": "b"}',
    "empty prompt": '{"prompt": "  ", "completion": "b"}',
    "duplicate key": '{"prompt": "a", "prompt": "b", "completion": "c"}',
    "NaN": '{"prompt": "a", "completion": "b", "score": NaN}',
    "half a surrogate pair": '{"prompt": "a\\ud800", "completion": "b"}',
    "NUL tail": '{"prompt": "a", "completion": "b"}\x00\x00',
    "null reference": '{"prompt": "a", "completion": "b", "answer": null}',
    "list of strings as prompt": '{"prompt": ["a"], "completion": "b"}',
    "empty list of messages": '{"prompt": [], "completion": "b"}',
    "message without content": '{"prompt": [{"role": "user"}], "completion": "b"}',
    "unknown role": '{"prompt": [{"role": "robot", "content": "a"}], "completion": "b"}',
    "content that is a list": '{"prompt": [{"role": "user", "content": ["a"]}], "completion": "b"}',
    "prompt of the assistant's": '{"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}',
    "completion of two messages": (
        '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}'
    ),
    "question without answer": '{"question": "a"}',
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_malformed_row_is_refused_with_its_file_and_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        splits(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "missing.jsonl": None,
    "empty.jsonl": b"",
    "latin1.jsonl": '{"prompt": "é", "completion": "b"}'.encode("latin-1"),
    "utf16.jsonl": '{"prompt": "a", "completion": "b"}'.encode("utf-16"),
    "ragged.csv": b"prompt,completion\na,b\nc\n",
    "quotes.csv": b'prompt,completion\n"a,b\n',
    "noise.parquet": b"PAR1 but not really",
    "array.json": b'[{"prompt": "a", "completion": "b"},\n{"prompt"',
    "columns.csv": b"input,output\na,b\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name):
    if BAD_FILES[name] is not None:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(DataError) as caught:
        splits(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_format_gives_the_same_rows_with_their_places(tmp_path):
    rows = [{"prompt": f"{i}, twice?", "completion": f"{2 * i}\n", "answer": str(2 * i)} for i in range(5)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    lines = "".join('"{prompt}","{completion}",{answer}\n'.format(**row) for row in rows)
    (tmp_path / "c.csv").write_text("prompt,completion,answer\n" + lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    places = {"a.jsonl": ":2", "b.json": ": row 1", "c.csv": ":5", "d.parquet": ": row 1"}
    for name, place in places.items():
        path = tmp_path / name
        read = list(read_rows(path))
        assert [row for row, _ in read] == rows
        assert read[1][1] == f"{path}{place}"


def test_question_and_answer_keep_the_worked_solution_as_completion_and_reference():
    d = demonstration({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}, "file:1")
    assert (d.problem.prompt, d.prompt) == ("2 + 2?", "2 + 2?")
    assert d.completion == ({"role": "assistant", "content": "2 + 2 = 4\n#### 4"},)
    assert d.problem.columns == {"answer": "2 + 2 = 4\n#### 4"}
    assert (d.problem.id, d.problem.where) == (problem_id("2 + 2?"), "file:1")


def test_messages_are_kept_as_messages():
    prompt = [{"role": "system", "content": "Be brief."}, USER]
    d = demonstration({"prompt": prompt, "completion": [REPLY]}, "file:1")
    assert (d.problem.prompt, d.prompt, d.completion) == (prompt, prompt, (REPLY,))


def test_a_conversation_has_one_form_whatever_columns_hold_it():
    after = [{"role": "user", "content": "Sure?"}, REPLY]
    apart = demonstration({"prompt": "2 + 2?", "completion": [REPLY, *after], "level": 3}, "file:1")
    together = demonstration({"messages": [USER, REPLY, *after], "level": 3}, "file:1")
    assert apart.completion == together.completion == (REPLY, *after)
    assert (apart.prompt, together.prompt) == ("2 + 2?", [USER])
    assert apart.problem.id == together.problem.id
    assert apart.problem.columns == together.problem.columns == {"level": 3}


def test_a_prompt_beside_messages_names_the_problem_and_is_not_read_by_the_policy():
    d = demonstration({"prompt": "The secret is 4.", "messages": [USER, REPLY]}, "file:1")
    assert (d.problem.prompt, d.problem.id) == ("The secret is 4.", problem_id("The secret is 4."))
    assert (d.prompt, d.completion) == ([USER], (REPLY,))


def test_a_problem_alone_has_no_completion_and_a_demonstration_needs_one():
    assert demonstration({"prompt": "2 + 2?"}, "file:1", problem_only=True).completion == ()
    with pytest.raises(DataError, match=r"^file:1: no completion"):
        demonstration({"prompt": "2 + 2?"}, "file:1")
    assert [demonstration({"prompt": "?", "completion": c}, "").answered for c in (" ", "4")] == [False, True]


def test_a_kept_row_is_a_demonstration_with_the_ids_that_were_sampled(tmp_path):
    path = write_jsonl(tmp_path / "kept.jsonl", [KEPT.to_json()])
    ((row, where),) = read_json_rows(tmp_path / "kept.jsonl")
    d = demonstration(row, where)
    assert where == f"{path}:1"
    assert (d.problem.id, d.prompt, d.completion, d.tokenizer) == ("p", [USER], (REPLY,), "")
    assert d.sampled is not None
    assert (d.sampled.to_json(), d.sampled.where) == (KEPT.to_json(), where)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [-100, 2]}, "not a row of kept.jsonl: 3 input_ids but 2 labels"),
        ({"labels": [-100, 7, 3]}, "not a row of kept.jsonl: label 7 at position 1 is not its token 2"),
        ({"input_ids": ["a", 2, 3]}, "not a row of kept.jsonl: invalid literal"),
        ({"input_ids": 5}, "not a row of kept.jsonl: 'int' object is not iterable"),
        ({"reward": None}, "not a row of kept.jsonl: float"),
        ({"turn": ...}, "not a row of kept.jsonl: no turn"),
        ({"completion": "4"}, "completion: expected a list of messages, not '4'"),
        ({"completion": [USER]}, "completion: the last message is the user's"),
        ({"prompt": [REPLY]}, "prompt: the last message is the assistant's"),
    ],
)
def test_a_malformed_kept_row_is_refused_with_its_place(change, reason):
    row = {key: value for key, value in (KEPT.to_json() | change).items() if value is not ...}
    with pytest.raises(DataError) as caught:
        demonstration(row, "kept.jsonl:7")
    assert str(caught.value).startswith(f"kept.jsonl:7: {reason}")


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([USER], "messages: the last message is the user's"),
        ([REPLY, USER, REPLY], "messages: the first is the assistant's"),
        ([], "messages: expected a string or a list of messages"),
    ],
)
def test_a_conversation_begins_with_a_prompt_and_ends_with_an_action(conversation, reason):
    with pytest.raises(DataError) as caught:
        demonstration({"messages": conversation}, "file:3")
    assert str(caught.value).startswith(f"file:3: {reason}")
