"""TRL's page on dataset formats and types: each documented type runs, or is refused by name."""

from datetime import date

import pytest
from helpers.shapes import reply, user
from helpers.trained_tokenizers import TRL, tokenizer

from bcft.data.examples import make_examples
from bcft.data.readers import demonstration
from bcft.errors import DataError
from bcft.policy.chat_template import DATE, Renderer

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
