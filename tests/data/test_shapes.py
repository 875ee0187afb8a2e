"""Every shape of a row with five templates: its rows come out, each is the template's rendering, and what carries loss.

Llama-3.2, Qwen3 and Gemma are TRL's copies of their templates; SmolLM2 and Mistral are written here after the formats
of their models.
"""

import json
from datetime import date
from functools import cache

import pytest
from helpers.trained_tokenizers import OTHERS, TRL, tokenizer

from bcft.data.checks import check_prompts
from bcft.data.examples import make_examples
from bcft.data.formats import RowFormat
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.policy.chat_template import DATE, Renderer
from bcft.types import IGNORED

MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported') }}"
    "{% elif m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + ', \"call_id\": ' }}"
    "{{ m.tool_call_id | tojson + '}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('Tool call ids have nine characters') }}{% endif %}"
    "{{ '{\"name\": ' + c.function.name | tojson + ', \"arguments\": ' + c.function.arguments | tojson }}"
    "{{ ', \"id\": ' + c.id | tojson + '}' + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "llama3_2": (TRL["llama3_2"], "bytes"),
    "qwen3": (TRL["qwen3"], "bytes"),
    "gemma": (TRL["gemma"], "bare"),
    "mistral": (MISTRAL, "first"),
    "smollm2": (OTHERS["smollm2"], "bytes"),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <|im_end|> numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}},
    },
}
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "add", "arguments": {"a": 40, "note": "say </s> or <|eot_id|>"}},
}


def user(text):
    return {"role": "user", "content": text}


def reply(text, **more):
    return {"role": "assistant", "content": text, **more}


ASKED, ANSWER = user("What is 40 + 3?"), reply("It is 43.")
TALK = [ASKED, ANSWER, user("Sure?"), reply("Yes.")]
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "43"}
CALLED = [ASKED, reply("", tool_calls=[CALL]), RESULT, ANSWER]
SHAPES = {
    "pair": ({}, {"prompt": "What is 40 + 3?", "completion": "It is 43."}, [ASKED, ANSWER]),
    "question and answer": ({}, {"question": "What is 40 + 3?", "answer": "It is 43."}, [ASKED, ANSWER]),
    "prompt and completion of messages": ({}, {"prompt": [ASKED], "completion": TALK[1:]}, TALK),
    "messages": ({}, {"messages": TALK}, TALK),
    "parts of text": (
        {},
        {"messages": [user([{"type": "text", "text": "What is "}, {"type": "text", "text": "40 + 3?"}]), ANSWER]},
        [ASKED, ANSWER],
    ),
    "columns of other names": (
        {"prompt_column": "q", "completion_column": "a"},
        {"q": "What is 40 + 3?", "a": "It is 43."},
        [ASKED, ANSWER],
    ),
    "system prompt": (
        {"system_prompt": "Be brief."},
        {"prompt": "What is 40 + 3?", "completion": "It is 43."},
        [{"role": "system", "content": "Be brief."}, ASKED, ANSWER],
    ),
    "tools": ({}, {"messages": CALLED, "tools": [TOOL]}, CALLED),
    "tools unused": ({}, {"prompt": [ASKED], "completion": [ANSWER], "tools": [TOOL]}, [ASKED, ANSWER]),
    "a call alone": ({}, {"prompt": [ASKED], "completion": CALLED[1:2], "tools": [TOOL]}, CALLED[:2]),
    "thought": (
        {},
        {"messages": [ASKED, reply("It is 43.", reasoning_content="first 40")]},
        [ASKED, reply("It is 43.", reasoning_content="first 40")],
    ),
    "sharegpt": (
        {"dataset_format": "sharegpt"},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}
                for message in TALK
            ]
        },
        TALK,
    ),
    "alpaca": (
        {"dataset_format": "alpaca"},
        {"instruction": "What is", "input": "40 + 3?", "output": "It is 43."},
        [user("What is\n\n40 + 3?"), ANSWER],
    ),
    "math": (
        {"dataset_format": "math"},
        {"problem": "What is 40 + 3?", "solution": "It is 43."},
        [ASKED, ANSWER],
    ),
    "lines": (
        {"dataset_format": "lines", "prompt_column": "word", "system_prompt": "Guess."},
        {"conversation": ["Big? No.", "Is it 43? Yes."], "word": "43"},
        [user("Guess."), reply("Big?"), user("No."), reply("Is it 43?")],
    ),
}
"""Shape -> the recipe's keys, a row, and the conversation that it states."""

NO_TOOLS, NO_SYSTEM, NO_THOUGHT = "no place for them", "takes no system message", "does not render the thought"
REFUSED = {
    **{(shape, name): NO_TOOLS for shape in ("tools", "tools unused", "a call alone") for name in ("gemma", "smollm2")},
    **{("system prompt", name): NO_SYSTEM for name in ("gemma", "mistral")},
    **{("thought", name): NO_THOUGHT for name in TEMPLATES if name != "qwen3"},
}

# What carries loss. Qwen3 writes an empty thought before its last answer alone, so that each is an example.
ENDS = {
    "llama3_2": "{}<|eot_id|>",
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    "gemma": "{}<end_of_turn>",
    "mistral": "{}</s>",
    "smollm2": "{}<|im_end|>",
}
CALLS = {
    "llama3_2": '{"name": "add", "parameters": {"a": 40, "note": "say </s> or <|eot_id|>"}}<|eot_id|>',
    "qwen3": '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 40, "note": "say </s> or '
    '<|eot_id|>"}}\n</tool_call><|im_end|>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 40, "note": "say </s> or <|eot_id|>"}, "id": '
    '"call00001"}]</s>',
}


@cache
def renderer_of(name, kind=None):
    template, own = TEMPLATES[name]
    made = tokenizer(kind or own, template)
    if name == "mistral":
        words = ("AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS", "/TOOL_RESULTS")
        made.add_special_tokens({"additional_special_tokens": [f"[{word}]" for word in words]}, False)
    return Renderer(made)


def read(shape):
    keys, row, _ = SHAPES[shape]
    return demonstration(dict(row), "rows.jsonl:7", form=RowFormat(**keys))


def rendered(renderer, conversation, row, *, generate=False):
    """Return what transformers itself renders of a conversation, up to the last stop token."""
    text = renderer.tokenizer.apply_chat_template(
        conversation, tools=row.get("tools"), tokenize=False, add_generation_prompt=generate, date_string=DATE
    )
    return text if generate else text.rstrip("\n")


def as_text(renderer, text):
    """Return a text as the tokenizer decodes it: some put a space behind a special token."""
    return renderer.tokenizer.decode(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])


def trained(renderer, example):
    """Return the texts that carry loss, one for each run of labels."""
    spans, span = [], []
    for label in (*example.labels, IGNORED):
        if label != IGNORED:
            span.append(label)
        elif span:
            spans.append(renderer.tokenizer.decode(span))
            span = []
    return spans


CASES = [(shape, name) for name in TEMPLATES for shape in SHAPES]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_a_row_of_every_shape_is_the_templates_rendering_or_refused_by_name(shape, name):
    renderer, (_, row, conversation) = renderer_of(name), SHAPES[shape]
    if (shape, name) in REFUSED:
        with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .*{REFUSED[shape, name]}") as caught:
            make_examples([read(shape)], renderer, max_length=4096)
        assert "\n" not in str(caught.value)
        return
    examples, counts = make_examples([read(shape)], renderer, max_length=4096)
    assert counts.given == counts.kept == len(examples)
    # Each example ends with an action, and is the whole conversation up to it.
    ends = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    whole = {renderer.tokenizer.decode(example.input_ids) for example in examples}
    expected = [as_text(renderer, rendered(renderer, conversation[: i + 1], row)) for i in ends]
    assert whole <= {*expected}
    assert expected[-1] in whole
    # What the assistant says carries loss, once, and nothing else does.
    said = []
    for i in ends:
        asked = rendered(renderer, conversation[:i], row, generate=True)
        answered = rendered(renderer, conversation[: i + 1], row)
        assert answered.startswith(asked)
        said.append(answered.removeprefix(asked))
    spans = [span for example in examples for span in trained(renderer, example)]
    assert [span.strip(" ") for span in spans] == [as_text(renderer, text).strip(" ") for text in said]


@pytest.mark.parametrize(("shape", "name"), [case for case in CASES if case not in REFUSED])
def test_what_carries_loss_is_known_for_one_row_of_each_shape(shape, name):
    renderer = renderer_of(name, "bytes")
    examples, _ = make_examples([read(shape)], renderer, max_length=4096)
    golden = [
        CALLS[name] if "tool_calls" in message else ENDS[name].format(message["content"])
        for message in SHAPES[shape][2]
        if message["role"] == "assistant"
    ]
    if shape == "thought":
        golden = ["<think>\nfirst 40\n</think>\n\nIt is 43.<|im_end|>"]
    spans = [span for example in examples for span in trained(renderer, example)]
    assert [span.removeprefix(" ") for span in spans] == golden


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_in_calls_and_tools_are_only_text(name):
    renderer = renderer_of(name)
    if ("tools", name) in REFUSED:
        return
    plain = [
        ASKED,
        reply("", tool_calls=[CALL | {"function": {"name": "add", "arguments": {"a": 40}}}]),
        RESULT,
        ANSWER,
    ]
    bare = {"type": "function", "function": {"name": "add"}}
    counts = []
    for row in ({"messages": CALLED, "tools": [TOOL]}, {"messages": plain, "tools": [bare]}):
        examples, _ = make_examples([demonstration(row, "")], renderer, max_length=4096)
        counts.append([sum(token in renderer.stop_ids for token in example.input_ids) for example in examples])
        special = renderer.tokenizer.all_special_ids
        counts.append([sum(token in special for token in example.input_ids) for example in examples])
    assert counts[:2] == counts[2:]


# Refusals
@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("smollm2", {"messages": CALLED}, "the chat template renders no tool calls, and would drop them"),
        ("smollm2", {"prompt": CALLED[:3], "completion": [ANSWER]}, "the chat template renders no tool calls"),
        ("llama3_2", {"messages": [ASKED, reply("", tool_calls=[CALL, CALL])]}, "only supports single tool-calls"),
        (
            "llama3_2",
            {"messages": [ASKED, reply("Let me see.", tool_calls=[CALL])]},
            "drops 'Let me see.' of a message",
        ),
        ("mistral", {"messages": [ASKED, reply("", tool_calls=[CALL | {"id": "1"}])]}, "ids have nine characters"),
        ("qwen3", {"messages": [ASKED, reply("x", tool_calls=[CALL]), ANSWER]}, "must follow another role's"),
    ],
)
def test_what_a_template_would_lose_of_a_call_is_refused_with_the_place(name, row, reason):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .*{reason}") as caught:
        make_examples([demonstration(row, "rows.jsonl:7")], renderer_of(name), max_length=4096)
    assert "\n" not in str(caught.value)


def test_a_tool_that_the_template_does_not_print_is_refused_before_any_row_is_made():
    template = OTHERS["smollm2"].replace("{% for m in messages %}", "{{ 'tools' if tools }}{% for m in messages %}", 1)
    problem = demonstration({"prompt": "x", "tools": [TOOL]}, "rows.jsonl:7", problem_only=True).problem
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: tools: the chat template does not render 'add'"):
        check_prompts([problem], Renderer(tokenizer("bytes", template)), special_tokens="raise")


def test_tools_and_calls_without_a_template_are_refused():
    plain = Renderer(tokenizer("bytes", ""))
    for row in (
        {"prompt": "x", "completion": "y", "tools": [TOOL]},
        {"prompt": "x", "completion": [reply("", tool_calls=[CALL])]},
        {"prompt": "x", "completion": [reply("y", reasoning_content="z")]},
    ):
        with pytest.raises(DataError, match=r"^rows\.jsonl:7: .*no chat template: set chat_template_path"):
            make_examples([demonstration(row, "rows.jsonl:7")], plain, max_length=4096)


@pytest.mark.parametrize("name", ["gptoss", "muse_glimmer", "lfm2_2_5_v2", "qwen3_5_think", "gemma4_v5"])
def test_a_thought_has_the_name_that_the_template_knows(name):
    thought = "first 40"
    renderer = Renderer(tokenizer("bytes", TRL[name]))
    made = demonstration({"messages": [ASKED, reply("It is 43.", reasoning_content=thought)]}, "")
    (example,), _ = make_examples([made], renderer, max_length=4096)
    (span,) = trained(renderer, example)
    assert span.index(thought) < span.index("It is 43.")


def test_a_call_may_end_in_another_stop_token_of_the_model():
    made = tokenizer("bytes", TRL["gptoss"])
    rows = [demonstration({"messages": CALLED, "tools": [TOOL]}, "rows.jsonl:7")]
    with pytest.raises(DataError, match=r"emits no stop token .*<\|call\|>': leave rows with tool calls out"):
        make_examples(rows, Renderer(made), max_length=4096)
    examples, _ = make_examples(rows, Renderer(made, [made.convert_tokens_to_ids("<|call|>")]), max_length=4096)
    spans = [span for example in examples for span in trained(Renderer(made), example)]
    head = "to=functions.add<|channel|>commentary json<|message|>"
    called = f"{head}{json.dumps(CALL['function']['arguments'])}<|call|>"
    assert [span.strip() for span in spans] == [called, "<|channel|>final<|message|>It is 43.<|return|>"]


# TRL's page on dataset formats and types
SKY, BLUE, GREEN = user("What color is the sky?"), reply("It is blue."), reply("It is green.")
SCHEMA = {
    "type": "function",
    "function": {
        "name": "control_light",
        "description": "Controls the lights in a room.",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string", "description": "The room."}},
            "required": ["room"],
        },
        "return": {"type": "string", "description": "What was done."},
    },
}
LIGHTS = [
    user("Turn on the lights."),
    {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": "control_light", "arguments": {"room": "kitchen"}}}]},
    {"role": "tool", "name": "control_light", "content": "They are on."},
    reply("Done!"),
]  # fmt: skip
HARMONY = [user("Why?"), {"role": "assistant", "thinking": "Deep.", "content": "Because."}]
EFFORT = {"reasoning_effort": "low", "model_identity": "You are a lamp."}
IMAGE = [{"type": "image"}, {"type": "text", "text": "What color?"}]
RUNS = {
    "language modeling, conversational": ({"messages": [SKY, BLUE]}, "llama3_2"),
    "prompt-completion, standard": ({"prompt": "The sky is", "completion": " blue."}, "llama3_2"),
    "prompt-completion, conversational": ({"prompt": [SKY], "completion": [BLUE]}, "gemma3"),
    "unpaired preference, standard": ({"prompt": "The sky is", "completion": " blue.", "label": True}, "llama3_2"),
    "tool calling": ({"messages": LIGHTS, "tools": [SCHEMA]}, "qwen3"),
    "tool calling, one call at once": ({"messages": LIGHTS, "tools": [SCHEMA]}, "llama3_2"),
    "harmony": ({"messages": HARMONY, "chat_template_kwargs": EFFORT}, "gptoss"),
    "harmony, instructions": ({"messages": [{"role": "system", "content": "Be kind."}, *HARMONY]}, "gptoss"),
}
NOT_TRAINED = {
    "language modeling, standard": ({"text": "The sky is blue."}, "split text into prompt and completion"),
    "prompt-only, standard": ({"prompt": "The sky is"}, "no completion: a demonstration is a prompt and a completion"),
    "prompt-only, conversational": ({"prompt": [SKY]}, "no completion: a demonstration is a prompt and a completion"),
    "preference, standard": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "a preference pair"),
    "preference, implicit": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "a preference pair"),
    "preference, conversational": ({"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]}, "a preference pair"),
    "preference, conversational, implicit": ({"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}, "a preference pair"),
    "unpaired preference, conversational": (
        {"prompt": [SKY], "completion": [GREEN], "label": False},
        "an example not to follow, as in KTO",
    ),
    "stepwise supervision": (
        {"prompt": "Which is larger?", "completions": ["The first.", "So it is 9.8."], "labels": [True, False]},
        "the steps of a process reward model",
    ),
    "harmony, developer": ({"messages": [{"role": "developer", "content": "x"}, *HARMONY]}, "rename it to system"),
    "vision": ({"messages": [user(IMAGE), BLUE], "images": ["a.png"]}, "column 'images': only text is trained"),
    "vision, parts": ({"messages": [user(IMAGE), BLUE]}, "image cannot be trained"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_type_that_trl_documents_and_that_demonstrates_something_runs(kind):
    row, name = RUNS[kind]
    renderer = Renderer(tokenizer("bytes", TRL[name]))
    examples, _ = make_examples([demonstration(row, "rows.jsonl:7")], renderer, max_length=4096)
    conversation = row.get("messages") or [
        *([user(row["prompt"])] if isinstance(row["prompt"], str) else row["prompt"]),
        *([reply(row["completion"])] if isinstance(row["completion"], str) else row["completion"]),
    ]
    theirs = renderer.tokenizer.apply_chat_template(
        conversation, tools=row.get("tools"), tokenize=False, date_string=DATE, **row.get("chat_template_kwargs", {})
    )
    shown = renderer.tokenizer.decode(examples[-1].input_ids)
    assert shown == theirs.rstrip("\n").replace(date.today().isoformat(), "2024-07-26")


@pytest.mark.parametrize("kind", NOT_TRAINED)
def test_a_type_that_trl_documents_and_that_demonstrates_nothing_is_refused_by_name(kind):
    row, reason = NOT_TRAINED[kind]
    with pytest.raises(DataError) as caught:
        demonstration(row, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind.startswith(("prompt-only", "preference, standard")):
        assert demonstration(row, "", problem_only=True).problem.prompt == row["prompt"]
