"""Formats of rows: a named one is read whole, and a row of another is refused with the name of the one that fits."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest
from helpers.rows import splits
from helpers.tiny import write_jsonl

from bcft.config.declare import SettingError
from bcft.config.keys import KEYS
from bcft.config.schema import DataSettings
from bcft.data.files import read_rows
from bcft.data.formats import FORMATS, DatasetFormat, RowFormat
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.types import TrainingExample, problem_id

USER, REPLY, SYSTEM = (
    {"role": role, "content": text} for role, text in (("user", "2 + 2?"), ("assistant", "4"), ("system", "Be brief."))
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
SHAREGPT = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}
ALPACA = {"instruction": "2 + 2?", "input": "", "output": "4"}
MATH = {"problem": "2 + 2?", "solution": "It is \\boxed{4}.", "level": 1}
LINES = {"conversation": ["Big? No.", "In Asia? Yes, it is.", "Bogota? Yes."], "word": "bogota", "done": True}
ROWS = {
    "trl": {"prompt": "2 + 2?", "completion": "4"},
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "math": MATH,
    "lines": LINES,
}
ASKING = {"prompt_column": "word", "system_prompt": "Guess my city."}


def form(name="trl", **keys):
    return RowFormat(name, **({**ASKING, **keys} if name == "lines" else keys))


def read(row, name="trl", *, problem_only=False, **keys):
    return demonstration(row, "file:7", form=form(name, **keys), problem_only=problem_only)


def refused(row, name="trl", **keys):
    with pytest.raises(DataError) as caught:
        read(row, name, **keys)
    assert str(caught.value).startswith("file:7: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(*texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# Each format
def test_sharegpt_is_messages_under_other_names():
    d = read(SHAREGPT | {"id": "a-1"}, "sharegpt")
    assert (d.prompt, d.completion, d.problem.columns) == ([USER], (REPLY,), {"id": "a-1"})
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2, "b": 2}})},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4", "weight": 1},
    ]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    after = (called, {"role": "tool", "content": "4"}, REPLY | {"train": True})
    for row in ({"conversations": talk}, {"conversations": talk[1:], "system": "Be brief."}):
        d = read(row, "sharegpt")
        assert (d.prompt, d.completion) == ([SYSTEM, USER], after)
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert read(SHAREGPT | {"tools": json.dumps(tools)}, "sharegpt").problem.template_kwargs == {"tools": tools}
    named = read(SHAREGPT | {"prompt": "the secret"}, "sharegpt")
    assert (named.problem.id, named.prompt) == (problem_id("the secret"), [USER])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (ALPACA, "2 + 2?"),
        (ALPACA | {"input": None}, "2 + 2?"),
        ({"instruction": "2 + 2?", "output": "4"}, "2 + 2?"),
        (ALPACA | {"instruction": "Add.", "input": "2, 2"}, "Add.\n\n2, 2"),
        (ALPACA | {"system": "Be brief.", "history": []}, [SYSTEM, USER]),
    ],
)
def test_alpaca_is_instruction_and_input_and_then_the_output(row, prompt):
    d = read(row | {"text": "all of it"}, "alpaca")
    assert (d.prompt, d.problem.prompt, d.completion) == (prompt, prompt, (REPLY,))
    assert d.problem.columns == {"text": "all of it"}
    alone = {key: value for key, value in row.items() if key != "output"}
    assert read(alone, "alpaca", problem_only=True).completion == ()


def test_the_solution_of_a_math_problem_is_trained_and_is_the_reference():
    d = read(MATH, "math")
    assert (d.prompt, d.completion[0]["content"]) == ("2 + 2?", "It is \\boxed{4}.")
    assert d.problem.columns == {"solution": "It is \\boxed{4}.", "level": 1}
    alone = read({"problem": "2 + 2?", "answer": "4"}, "math", problem_only=True)
    assert (alone.completion, alone.problem.columns) == ((), {"answer": "4"})


def test_lines_are_questions_of_the_policy_and_the_replies_between_them():
    d = read(LINES, "lines")
    talk = said("Guess my city.", "Big?", "No.", "In Asia?", "Yes, it is.", "Bogota?")
    assert [*d.prompt, *d.completion] == talk
    assert d.problem.prompt == d.prompt == talk[:1]
    assert d.problem.columns == {"word": "bogota", "done": True}
    assert d.problem.id == problem_id("bogota")  # what is held out is a city, not a way to ask for it
    assert "bogota" not in str(d.problem.prompt)


@pytest.mark.skipif("BCFT_TEST_DATA" not in os.environ, reason="BCFT_TEST_DATA does not name the large data")
def test_real_dialogues_are_read_whole_and_held_out_by_the_city():
    path = Path(os.environ["BCFT_TEST_DATA"]) / "guess_my_city.json"
    dialogues = json.loads(path.read_text(encoding="utf-8"))
    made = [demonstration(row, where, form=form("lines")) for row, where in read_rows(path)]
    assert len(made) == len(dialogues) == 950
    for d, dialogue in zip(made, dialogues, strict=True):
        talk = [message["content"] for message in d.completion]
        lines = [" ".join(talk[i : i + 2]) for i in range(0, len(talk), 2)]
        assert lines[:-1] == dialogue["conversation"][:-1]
        assert dialogue["conversation"][-1].startswith(lines[-1])
    assert sum(message["role"] == "assistant" for d in made for message in d.completion) == 17_606
    held = splits(path, dev=19, test=19, dataset_format="lines", **ASKING)
    train, dev, test = ({d.problem.columns["word"] for d in part} for part in (held.train, held.dev, held.test))
    assert (len(train), len(dev), len(test), len(train | dev | test)) == (61, 19, 19, 99)


# Rows that do not fit
@pytest.mark.parametrize("given", ROWS)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_another_format_is_refused_with_the_name_of_the_one_that_fits(given, name):
    if given == name:
        assert read(ROWS[given], name).completion
        return
    text = refused(ROWS[given], name)
    assert f"set dataset_format: {given}" in text
    assert f"columns {', '.join(sorted(ROWS[given]))}: " in text


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("sharegpt", {"a": 1}, "columns a: dataset_format: sharegpt reads conversations"),
        ("sharegpt", {"conversations": [USER, REPLY]}, "message 0: a message is {from, value}, not dict"),
        ("sharegpt", {"conversations": [USER, REPLY]}, "rename the column to messages, and set dataset_format: trl"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "a"}]}, "from 'robot' is not one of human, gpt"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "a message is {role, content}"),
        ("sharegpt", {"conversations": SHAREGPT["conversations"][1:]}, "the first is the assistant's"),
        ("sharegpt", {"conversations": SHAREGPT["conversations"][:1]}, "the last message is the user's"),
        ("sharegpt", {"conversations": []}, "expected a string or a list of messages, not list"),
        ("sharegpt", {"conversations": "a"}, "a message is {from, value}, not str"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "add("}]}, "is JSON, not 'add('"),
        ("sharegpt", SHAREGPT | {"system": 4}, "system: expected text, not int 4"),
        ("sharegpt", SHAREGPT | {"messages": [USER, REPLY]}, "columns messages and conversations are two shapes"),
        ("alpaca", ALPACA | {"prompt": "a"}, "columns prompt and instruction are two shapes of one row"),
        ("alpaca", ALPACA | {"history": [["a", "b"]]}, "column 'history': write the earlier turns into messages"),
        ("alpaca", ALPACA | {"instruction": 4}, "instruction: expected text, not int 4"),
        ("alpaca", ALPACA | {"instruction": " "}, "prompt: empty"),
        ("alpaca", {"instruction": "a"}, "no completion"),
        ("math", MATH | {"messages": [USER, REPLY]}, "or set dataset_format: trl, which reads messages"),
        ("math", {"problem": "a"}, "no completion"),
        ("math", {"problem": "a", "solution": None}, "solution: null: give every row its reference answer"),
        ("lines", LINES | {"conversation": ["Big? No.", "It is."]}, "line 1: a line is a question that ends in a"),
        ("lines", LINES | {"conversation": ["Big?", "Old? Yes."]}, "line 0: a line is a question"),
        ("lines", LINES | {"conversation": [["Big?"]]}, "line 0: a line is a question"),
        ("lines", LINES | {"conversation": []}, "expected a string or a list of messages, not list []"),
        ("lines", LINES | {"word": None}, "there is no text in the column 'word'"),
        ("lines", LINES | {"prompt": "Guess"}, "column 'prompt': prompt_column is word, and nothing else reads it"),
    ],
)
def test_a_row_that_is_not_as_its_format_says_is_refused(name, row, reason):
    assert reason in refused(row, name)


# Columns of other names
def test_columns_of_other_names_are_read_as_the_recipe_says():
    row = {"q": "2 + 2?", "a": "It is 4", "gold": "4", "level": 3}
    keys = {"prompt_column": "q", "completion_column": "a", "answer_column": "gold"}
    d = read(row, **keys)
    assert (d.prompt, d.completion[0]["content"]) == ("2 + 2?", "It is 4")
    assert d.problem.columns == {"answer": "4", "level": 3}
    assert d == read({"prompt": "2 + 2?", "completion": "It is 4", "answer": "4", "level": 3})
    del row["a"]
    assert read(row, problem_only=True, **keys).completion == ()


def test_one_column_may_be_the_completion_and_the_reference():
    d = read({"question": "2?", "answer": "4"}, prompt_column="question", completion_column="answer")
    assert d.problem.columns == {}
    for keys in ({"completion_column": "answer", "answer_column": "answer"}, {}):
        d = read({"question": "2?", "answer": "4"}, **keys)
        assert (d.completion[0]["content"], d.problem.columns) == ("4", {"answer": "4"})
    d = read({"question": "2?", "answer": "long", "gold": "4"}, completion_column="answer", answer_column="gold")
    assert (d.completion[0]["content"], d.problem.columns) == ("long", {"answer": "4"})


@pytest.mark.parametrize("name", ["sharegpt", "alpaca", "math", "lines"])
def test_the_reference_of_any_format_may_have_another_name(name):
    assert read(ROWS[name] | {"gold": "4"}, name, answer_column="gold").problem.columns["answer"] == "4"


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ({"q": "a", "completion": "b"}, {"prompt_column": "p"}, "prompt_column: there is no column 'p'; the row has "),
        ({"prompt": "a", "completion": "b"}, {"answer_column": "gold"}, "answer_column: there is no column 'gold'"),
        ({"prompt": "a", "q": "c", "completion": "b"}, {"prompt_column": "q"}, "the row has a column prompt too"),
        ({"prompt": "a"}, {"completion_column": "c"}, "completion_column: there is no column 'c'; the row has prompt"),
    ],
)
def test_a_column_that_is_not_there_or_there_twice_is_refused(row, keys, reason):
    assert reason in refused(row, **keys)


# The system message
def test_a_system_prompt_begins_every_prompt_and_changes_no_split(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": "4"} for i in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    plain, briefed = (splits(path, dev=5, test=5, **keys) for keys in ({}, {"system_prompt": "Be brief."}))
    for part in ("train", "dev", "test"):
        for a, b in zip(getattr(plain, part), getattr(briefed, part), strict=True):
            assert b.prompt == b.problem.prompt == [SYSTEM, {"role": "user", "content": a.prompt}]
            assert (a.problem.id, a.completion) == (b.problem.id, b.completion)
    assert plain.digest != briefed.digest
    talk = read({"messages": [USER, REPLY], "prompt": "the secret"}, system_prompt="Be brief.")
    assert (talk.prompt, talk.problem.prompt) == ([SYSTEM, USER], "the secret")
    assert "the row has a system message" in refused({"messages": [SYSTEM, USER, REPLY]}, system_prompt="Be brief.")
    assert "the row has a system message" in refused(ALPACA | {"system": "a"}, "alpaca", system_prompt="Be brief.")


def test_a_kept_row_is_read_as_it_is_whatever_format_its_run_read():
    tools = [{"type": "function", "function": {"name": "add"}}]
    kept = TrainingExample(
        "1-p-0", "p", (1, 2), (-100, 2), source="self", prompt=(SYSTEM, USER), completion=(REPLY,),
        template_kwargs={"tools": tools, "enable_thinking": False},
    )  # fmt: skip
    row = json.loads(json.dumps(kept.to_json()))
    for name in ROWS.keys() - {"lines"}:
        d = read(row, name, prompt_column="q", system_prompt="Be brief.")
        assert (d.sampled.to_json(), d.prompt) == (kept.to_json(), [SYSTEM, USER])
        assert d.problem.template_kwargs == kept.template_kwargs
    assert (row["tools"], row["chat_template_kwargs"]) == (tools, {"enable_thinking": False})
    assert "sampled without this system_prompt" in refused(row, system_prompt="Be long.")


# Settings
def test_every_word_of_the_key_has_a_reader():
    assert KEYS["dataset_format"].choices == get_args(DatasetFormat)
    assert {*FORMATS, "trl"} == {*get_args(DatasetFormat)} == {*ROWS}


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"dataset_format": "alpaca", "prompt_column": "q"}, "prompt_column: dataset_format: alpaca names its own"),
        ({"dataset_format": "math", "completion_column": "q"}, "completion_column: dataset_format: math names its own"),
        ({"dataset_format": "lines", "system_prompt": "a"}, "lines needs prompt_column"),
        ({"dataset_format": "lines", "prompt_column": "word"}, "lines needs system_prompt"),
        ({"system_prompt": " "}, "system_prompt: is empty"),
    ],
)
def test_keys_that_a_format_has_no_use_for_or_needs_are_refused(keys, reason):
    with pytest.raises(SettingError, match=reason):
        DataSettings(**keys)
