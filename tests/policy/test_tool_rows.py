"""Rows with tool calls and thoughts in TRL's templates: the template's rendering, or a refusal by name."""

import json

import pytest
from helpers.shapes import ANSWER, ASKED, CALL, RESULT, TOOL, check_law, reply, trained, user
from helpers.trained_tokenizers import TRL, renderer_of, tokenizer

from bcft.data.examples import make_examples
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer

CONVERSATIONS = {
    "calls": [
        *(ASKED, reply("", tool_calls=[CALL]), RESULT, ANSWER),
        *(user("And 3?"), reply("", tool_calls=[CALL]), RESULT, reply("It is 46.")),
    ],
    "two calls at once": [
        *(ASKED, reply("", tool_calls=[CALL, CALL | {"id": "call00002"}])),
        *(RESULT, RESULT | {"tool_call_id": "call00002"}, ANSWER),
    ],
    "thoughts": [
        *(ASKED, reply("It is 43.", reasoning_content="first 40")),
        *(user("Sure?"), reply("Yes.", reasoning_content="so yes")),
    ],
    "calls with thoughts": [
        *(ASKED, reply("", reasoning_content="first 40", tool_calls=[CALL]), RESULT),
        *(reply("It is 43.", reasoning_content="good"), user("Sure?"), reply("Yes.", reasoning_content="so yes")),
    ],
}
NO_PLACE, NO_THOUGHT, NO_CALL = "no place for them", "does not render the thought", "renders no tool calls"
NO_STOP, NO_PREFIX, ONE = "emits no stop token", "not a prefix", "only supports single tool-calls"
# What refuses "calls", "two calls at once", "thoughts" and "calls with thoughts"; '': nothing does.
REFUSED = {
    "llama3_2": ("", ONE, NO_THOUGHT, NO_THOUGHT),
    "llama3": (NO_PLACE, NO_PLACE, NO_THOUGHT, NO_PLACE),
    "qwen2_5": ("", "", NO_THOUGHT, NO_THOUGHT),
    "qwen3": ("", "", "", ""),
    "qwen3_training": ("", "", "", ""),
    "qwen3_5_think": ("", "", "", ""),
    "qwen3_5_nothink": ("", "", NO_PREFIX, NO_PREFIX),
    "qwen3_8": ("", "", "", ""),
    "gptoss": (NO_STOP, NO_STOP, "", NO_STOP),
    "gemma4_v2": ("", "", NO_THOUGHT, NO_THOUGHT),
    "gemma4_v5": (NO_STOP, NO_STOP, "", NO_STOP),
    "lfm2": (NO_CALL, NO_CALL, NO_THOUGHT, NO_THOUGHT),
    "lfm2_2_5_v2": ("", "", "", ""),
    "muse_glimmer": ("", "", "", ""),
    "nemotron_3_nano": (NO_PREFIX, NO_PREFIX, "", ""),
    "phi3": (NO_PLACE, NO_PLACE, NO_THOUGHT, NO_PLACE),
}
OWN_NAME = {"gptoss": "thinking"}
"""What a template calls a thought, if not reasoning_content."""


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_row_with_calls_or_thoughts_is_what_the_template_renders_or_a_refusal_by_name(name, kind):
    renderer, conversation = renderer_of(name, "bytes"), CONVERSATIONS[kind]
    row = {"messages": conversation} | ({} if kind == "thoughts" else {"tools": [TOOL]})
    reason = REFUSED[name][[*CONVERSATIONS].index(kind)]
    if reason:
        with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .*{reason}") as caught:
            make_examples([demonstration(row, "rows.jsonl:7")], renderer, max_length=4096)
        assert "\n" not in str(caught.value)
        return
    examples, _ = make_examples([demonstration(row, "rows.jsonl:7")], renderer, max_length=4096)
    thought = OWN_NAME.get(name, "reasoning_content")
    check_law(renderer, examples, conversation, tools=row.get("tools"), thought=thought)


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
    rows = [demonstration({"messages": CONVERSATIONS["calls"][:4], "tools": [TOOL]}, "rows.jsonl:7")]
    with pytest.raises(DataError, match=r"emits no stop token .*<\|call\|>': leave rows with tool calls out"):
        make_examples(rows, Renderer(made), max_length=4096)
    examples, _ = make_examples(rows, Renderer(made, [made.convert_tokens_to_ids("<|call|>")]), max_length=4096)
    spans = [span for example in examples for span in trained(Renderer(made), example)]
    head = "to=functions.add<|channel|>commentary json<|message|>"
    called = f"{head}{json.dumps(CALL['function']['arguments'])}<|call|>"
    assert [span.strip() for span in spans] == [called, "<|channel|>final<|message|>It is 43.<|return|>"]
