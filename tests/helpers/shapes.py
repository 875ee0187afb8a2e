"""Conversations with tools and thoughts, and the law of rows: rendered by the template, the assistant's trained."""

from datetime import date

from bcft.policy.chat_template import DATE
from bcft.types import IGNORED

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
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "43"}


def user(text):
    """Return a user's message."""
    return {"role": "user", "content": text}


def reply(text, **more):
    """Return an assistant's message."""
    return {"role": "assistant", "content": text, **more}


ASKED, ANSWER = user("What is 40 + 3?"), reply("It is 43.")


def rendered(renderer, conversation, *, tools=None, generate=False, thought="reasoning_content", **kwargs):
    """Return what transformers itself renders of a conversation, up to the last stop token.

    thought: what the template calls `reasoning_content`.
    """
    given = [{thought if k == "reasoning_content" else k: v for k, v in message.items()} for message in conversation]
    text = renderer.tokenizer.apply_chat_template(
        given, tools=tools, tokenize=False, add_generation_prompt=generate, date_string=DATE, **kwargs
    ).replace(date.today().isoformat(), "2024-07-26")
    ends = [text.rfind(stop) + len(stop) for stop in renderer.stop_texts if stop in text]
    return text if generate else text[: max(ends)]


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


def check_law(renderer, examples, conversation, **how):
    """Check that each example is the rendering up to an action, the last one all of it, and what carries loss.

    how: as for `rendered`.
    """
    ends = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    expected = [as_text(renderer, rendered(renderer, conversation[: i + 1], **how)) for i in ends]
    whole = {renderer.tokenizer.decode(example.input_ids) for example in examples}
    assert whole <= {*expected}
    assert expected[-1] in whole
    # What the assistant says carries loss, once, and nothing else does.
    said = []
    for i in ends:
        asked = rendered(renderer, conversation[:i], generate=True, **how)
        answered = rendered(renderer, conversation[: i + 1], **how)
        assert answered.startswith(asked)
        said.append(as_text(renderer, answered.removeprefix(asked)).strip(" "))
    assert [span.strip(" ") for example in examples for span in trained(renderer, example)] == said
