"""Messages: every role and key is trained as it says, or refused with file, line and number; none is dropped."""

import datasets
import pytest
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.loading import load_splits
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.types import ROLES, Feedback, messages

USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CALL = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
THOUGHT = "write it into content as the model's template does"
ADD = "remove it, or write it into content"
REFUSED_KEYS = {
    "tool_calls": (CALL, "write the call into content"),
    "function_call": ({"name": "add", "arguments": "{}"}, "write the call into content"),
    "reasoning_content": ("two and two", THOUGHT),
    "thinking": ("two and two", THOUGHT),
    "reasoning": ("two and two", THOUGHT),
    "name": ("Ada", ADD),
    "tool_call_id": ("call-1", ADD),
    "prefix": (True, ADD),
    "loss": (0, ADD),
    "images": (["a.png"], ADD),
}


def refused(row, **how):
    with pytest.raises(DataError) as caught:
        demonstration(row, "file:7", **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_that_would_be_dropped_is_refused_with_its_message_and_a_remedy(key, tmp_path):
    value, remedy = REFUSED_KEYS[key]
    rows = [
        {"messages": [USER, REPLY | {key: value}]},
        {"prompt": [USER], "completion": [REPLY | {key: value}]},
        {"messages": [USER, REPLY | {"content": None, key: value}]},
        {"messages": [USER, {"role": "assistant", key: value}]},
        {"prompt": [USER | {key: value}], "completion": "4"},
    ]
    places = ["messages: message 1", "completion: message 0", *["messages: message 1"] * 2, "prompt: message 0"]
    for row, place in zip(rows, places, strict=True):
        text = refused(row)
        assert text.startswith(f"file:7: {place}: its key {key!r} (")
        assert remedy in text
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, rows[0]])
    with pytest.raises(DataError, match=r"a\.jsonl:2: messages: message 1: its key"):
        load_splits(DataSettings(dataset_name=str(path)), EvaluationSettings())
    with pytest.raises(ValueError, match=f"message 0: its key '{key}'"):
        Feedback([USER | {key: value}], None, done=False)


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_a_key_without_a_value_is_as_if_absent(key):
    for value in (None, "", [], {}, {"name": None, "arguments": None}, [None]):
        row = {"messages": [USER | {key: value}, REPLY | {key: value}]}
        d = demonstration(row, "file:7")
        assert (d.prompt, d.completion) == ([USER], (REPLY,))
        assert messages([USER | {key: value}]) == [USER]


def test_keys_that_datasets_fills_with_null_are_as_if_absent():
    rows = [{"messages": [USER, REPLY]}, {"messages": [USER | {"name": None}, REPLY]}]
    kinds = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string"),
                                    "name": datasets.Value("string"), "tool_calls": datasets.List(
                                        {"name": datasets.Value("string")})})}
    )  # fmt: skip
    filled = [{"messages": [{"name": None, "tool_calls": None, **m} for m in row["messages"]]} for row in rows]
    table = datasets.Dataset.from_list(filled, features=kinds)
    parts = load_splits(DataSettings(), EvaluationSettings(eval_test_problems=0, eval_dev_problems=0), train=table)
    assert all("tool_calls" in message for message in table[0]["messages"])
    assert [(d.prompt, d.completion) for d in parts.train] == [([USER], (REPLY,))] * 2


@pytest.mark.parametrize(
    ("key", "value", "role", "passes"),
    [
        ("weight", 1, "assistant", True),
        ("weight", 1.0, "assistant", True),
        ("train", True, "assistant", True),
        ("train", "true", "assistant", True),
        ("weight", 0, "user", True),
        ("train", False, "user", True),
        ("weight", 0, "assistant", False),
        ("weight", 0.5, "assistant", False),
        ("weight", 2, "assistant", False),
        ("train", False, "assistant", False),
        ("weight", 1, "user", False),
        ("train", True, "user", False),
    ],
)
def test_a_weight_of_a_message_passes_where_it_says_what_is_trained_anyway(key, value, role, passes):
    first, last = (m | ({key: value} if m["role"] == role else {}) for m in (USER, REPLY))
    if passes:
        d = demonstration({"messages": [first, last]}, "file:7")
        assert (d.prompt, d.completion) == ([USER], (REPLY,))
    else:
        assert "assistant messages carry loss, and no others do" in refused({"messages": [first, last]})


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_every_known_role_is_data_in_rows_and_in_observations(role):
    other = {"role": role, "content": "observed"}
    assert role in ROLES
    d = demonstration({"messages": [USER, REPLY, other, REPLY]}, "file:7")
    assert d.completion == (REPLY, other, REPLY)
    assert demonstration({"prompt": [USER, REPLY, other], "completion": "4"}, "").prompt == [USER, REPLY, other]
    assert messages([other]) == [other]
    assert Feedback([other], None, done=False).observation == [other]


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("human", ": rename it to user"),
        ("gpt", ": rename it to assistant"),
        ("developer", ": rename it to system"),
        ("function", ": rename it to tool"),
        ("model", ": rename it to assistant"),
        ("robot", ""),
        ("Assistant", ""),
    ],
)
def test_another_role_is_refused_everywhere_with_the_known_ones(role, hint):
    wrong = {"role": role, "content": "x"}
    known = f"role '{role}' is not one of system, user, assistant, tool{hint}"
    assert refused({"messages": [USER, wrong, REPLY]}) == f"file:7: messages: message 1: {known}"
    assert refused({"prompt": [wrong]}, problem_only=True) == f"file:7: prompt: message 0: {known}"
    with pytest.raises(ValueError, match=f"message 0: {known}$"):
        Feedback([wrong], None, done=False)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"from": "human", "value": "2 + 2?"}, "a ShareGPT message: rename from to role and value to content"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "join the texts into one string"),
        ({"role": "user", "content": ["a", "b"]}, "join the texts into one string"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "image cannot be trained"),
        ({"role": "user", "content": [{"type": "image_url"}, {"type": "audio"}]}, "audio, image_url cannot be trained"),
        ({"role": "user", "content": None}, "a message is {role, content}, both text, not dict"),
        ({"role": "user"}, "a message is {role, content}, both text, not dict"),
        ({"role": None, "content": "a"}, "a message is {role, content}, both text, not dict"),
        ({"role": "user", "content": 4}, "a message is {role, content}, both text, not dict"),
        ("2 + 2?", "a message is {role, content}, both text, not str"),
        ({"role": "user", "content": "a\ud800"}, "half of a surrogate pair at character 1: not valid text"),
    ],
)
def test_a_message_that_is_not_role_and_text_is_refused_with_the_remedy(message, reason):
    text = refused({"messages": [USER, REPLY, message, REPLY]})
    assert text.startswith("file:7: messages: message 2: ")
    assert reason in text


def test_an_observation_is_never_the_assistants():
    for observation in ([REPLY], [USER, REPLY], [REPLY, USER]):
        with pytest.raises(ValueError, match="an observation holds no assistant message"):
            Feedback(observation, None, done=False)
