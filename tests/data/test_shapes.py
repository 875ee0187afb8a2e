"""Every shape of a row with five templates: its rows come out, each is the template's rendering, and what carries loss.

Llama-3.2, Qwen3 and Gemma are TRL's copies of their templates; SmolLM2 and Mistral are written here after the formats
of their models.
"""

from functools import cache

import pytest
from helpers.shapes import ANSWER, ASKED, CALL, RESULT, TOOL, check_law, reply, trained, user
from helpers.trained_tokenizers import OTHERS, TRL, tokenizer

from bcft.data.examples import check_prompts, make_examples
from bcft.data.formats import RowFormat
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer

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
TALK = [ASKED, ANSWER, user("Sure?"), reply("Yes.")]
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
    check_law(renderer, examples, conversation, tools=row.get("tools"))


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
