"""Messages: every role and key is trained as it says, or refused with file, line and number; none is dropped."""

import datasets
import pytest
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.loading import load_splits
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.types import ROLES, Feedback, messages, problem_id

USER, REPLY = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ADD = "remove it, or write it into content"
REFUSED_KEYS = {
    "function_call": ({"name": "add", "arguments": "{}"}, "write it as tool_calls"),
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


@pytest.mark.parametrize("key", [*REFUSED_KEYS, "tool_calls", "reasoning_content", "name", "tool_call_id", "train"])
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
    ("key", "value", "role", "outcome"),
    [
        ("weight", 1, "assistant", {"train": True}),
        ("weight", 1.0, "assistant", {"train": True}),
        ("train", True, "assistant", {"train": True}),
        ("train", "true", "assistant", {"train": True}),
        ("weight", 0, "assistant", {"train": False}),
        ("train", False, "assistant", {"train": False}),
        ("weight", 0, "user", {}),
        ("train", False, "user", {}),
        ("weight", 0.5, "assistant", "a message carries loss or does not: give 1 or 0"),
        ("weight", 2, "assistant", "a message carries loss or does not: give 1 or 0"),
        ("weight", 1, "user", "only the assistant's messages carry loss"),
        ("train", True, "tool", "only the assistant's messages carry loss"),
    ],
)
def test_a_weight_of_a_message_is_the_mark_of_an_assistants_message_or_refused(key, value, role, outcome):
    first, last = (m | ({key: value} if m["role"] == role else {}) for m in (USER | {"role": role}, REPLY))
    if role == "assistant":
        first, last = USER, REPLY | {key: value}
    if isinstance(outcome, dict):
        d = demonstration({"messages": [first, last]}, "file:7")
        assert (d.prompt, d.completion) == ([USER], (REPLY | outcome,))
        assert d.problem.id == problem_id("2 + 2?")
    else:
        assert outcome in refused({"messages": [first, last]})


def test_a_mark_to_train_changes_no_digest_and_one_not_to_train_does():
    both = [{"messages": [USER, REPLY, USER, REPLY | mark]} for mark in ({}, {"weight": 1}, {"weight": 0})]
    plain, trained, left_out = (
        load_splits(DataSettings(), EvaluationSettings(eval_test_problems=0, eval_dev_problems=0), train=[row]).digest
        for row in both
    )
    assert plain == trained != left_out


# Tool calls, results and thoughts
RESULT = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "call-1"}


@pytest.mark.parametrize(
    "given",
    [
        [CALL],
        [CALL | {"id": None, "type": None}],
        [{"function": {"name": "add", "arguments": '{"a": 2}'}}],
        [{"name": "add", "arguments": {"a": 2}}],
        [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "of_another_row": None}}}],
    ],
)
def test_a_tool_call_has_one_form_whatever_form_a_row_gives_it(given):
    d = demonstration({"messages": [USER, {"role": "assistant", "tool_calls": given}, RESULT, REPLY]}, "file:7")
    assert d.completion == ({"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, REPLY)
    kept = demonstration({"messages": [USER, REPLY | {"tool_calls": [CALL | {"id": "call-1"}]}]}, "").completion
    assert kept == (REPLY | {"tool_calls": [CALL | {"id": "call-1"}]},)
    assert demonstration({"messages": [USER, {"role": "assistant", "tool_calls": given}]}, "").answered


def test_a_null_of_arguments_stays_in_json_text_and_is_as_if_absent_in_an_object():
    both = [{"name": "add", "arguments": value} for value in ('{"a": null}', {"a": None})]
    (reply,) = demonstration({"messages": [USER, {"role": "assistant", "tool_calls": both}]}, "").completion
    assert [call["function"]["arguments"] for call in reply["tool_calls"]] == [{"a": None}, {}]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ("add(2)", "tool_calls: expected a list of calls, not str"),
        (["add"], 'a tool call is {"type": "function"'),
        ([{"type": "code", "function": {"name": "add"}}], 'a tool call is {"type": "function"'),
        ([{"function": {"arguments": {"a": 1}}}], 'a tool call is {"type": "function"'),
        ([{"function": {"name": "add", "arguments": "{"}}], "the arguments of add: '{' is not JSON"),
        ([{"function": {"name": "add", "arguments": "[1]"}}], "the arguments of add are an object"),
        ([{"function": {"name": "add", "arguments": '{"a": NaN}'}}], "NaN is not a JSON number"),
        ([{"function": {"name": "add", "arguments": {"a": {1}}}}], "the arguments of add: not JSON"),
        ([{"function": {"name": "add", "arguments": {"a": "\ud800"}}}], "half of a surrogate pair"),
        ([{"function": {"name": "add"}, "index": 1}], "no template reads the key 'index'"),
        ([{"function": {"name": "add", "strict": True}}], "no template reads the key 'strict'"),
        ([CALL | {"id": 3}], 'a tool call is {"type": "function"'),
    ],
)
def test_a_tool_call_of_another_form_is_refused_with_its_message(calls, reason):
    text = refused({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})
    assert text.startswith("file:7: messages: message 1: ")
    assert reason in text


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_apart_from_the_content_has_one_name(key):
    d = demonstration({"messages": [USER, REPLY | {key: "two and two"}]}, "file:7")
    assert d.completion == (REPLY | {"reasoning_content": "two and two"},)
    other = {"reasoning_content": "one", "reasoning": "two"}
    assert "say different things" in refused({"messages": [USER, REPLY | other]})
    assert "is text, not list" in refused({"messages": [USER, REPLY | {key: ["a"]}]})


@pytest.mark.parametrize(
    ("role", "key", "value", "owner"),
    [
        ("user", "tool_calls", [CALL], "assistant"),
        ("tool", "tool_calls", [CALL], "assistant"),
        ("system", "reasoning_content", "hm", "assistant"),
        ("user", "thinking", "hm", "assistant"),
        ("assistant", "name", "Ada", "tool"),
        ("user", "name", "Ada", "tool"),
        ("user", "tool_call_id", "call-1", "tool"),
    ],
)
def test_a_key_of_another_roles_message_is_refused(role, key, value, owner):
    wrong = {"role": role, "content": "x", key: value}
    rows = [USER, wrong] if role == "assistant" else [USER, REPLY, wrong, REPLY]
    text = refused({"messages": rows})
    assert f"its key '{key}' (" in text
    assert text.endswith(f"it belongs to the {owner}'s message")
    with pytest.raises(ValueError, match=f"its key '{key}'"):
        messages([wrong])


def test_the_identity_of_a_prompt_depends_on_calls_names_and_thoughts_but_on_no_ids_and_marks():
    def asked(call=None, result=None, **said):
        calls = {"tool_calls": call} if call else {}
        conversation = [USER, {"role": "assistant", "content": "x"} | calls | said, {"role": "tool", "content": "4"}]
        return problem_id(messages([*conversation[:2], conversation[2] | (result or {})]))

    other = {"function": {"name": "add", "arguments": {"a": 3}}}
    different = [asked(), asked([CALL]), asked([other]), asked([CALL, CALL]), asked(result={"name": "add"})]
    different.append(asked(reasoning_content="hm"))
    assert len(set(different)) == len(different)
    swapped = [{"name": "add", "arguments": text} for text in ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}')]
    assert asked(swapped[:1]) == asked(swapped[1:])
    assert asked([CALL]) == asked([CALL | {"id": "call-1"}])
    assert asked() == asked(result={"tool_call_id": "call-1"}) == asked(train=False)
    # Frozen: these are the ids that earlier versions gave.
    assert asked() == "aebc5ff8c30eea4c"
    assert problem_id([USER]) == problem_id("2 + 2?") == "70b499c547e0a11f"


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
        (
            {"from": "human", "value": "2 + 2?"},
            "a ShareGPT message: rename the column to conversations and set dataset",
        ),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "join the texts into one string"),
        ({"role": "user", "content": []}, "join the texts into one string"),
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


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?", "image": None}]
    assert messages([{"role": "user", "content": parts}]) == [USER]
    assert demonstration({"messages": [{"role": "user", "content": parts}, REPLY]}, "").problem.id == problem_id(
        "2 + 2?"
    )


def test_an_observation_is_never_the_assistants():
    for observation in ([REPLY], [USER, REPLY], [REPLY, USER]):
        with pytest.raises(ValueError, match="an observation holds no assistant message"):
            Feedback(observation, None, done=False)
