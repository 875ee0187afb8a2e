"""Every chat template that TRL has, and four that it has not: a row is what the template renders, or a refusal."""

from datetime import date

import pytest
from helpers.episodes import Counting, Scripted, attempts, played
from helpers.trained_tokenizers import OTHERS, TEMPLATES, TRL, renderer_of, reply, user

from bcft.data.examples import conversation_turns, make_examples, trajectory_examples
from bcft.errors import DataError
from bcft.policy.chat_template import DATE
from bcft.types import IGNORED, Demonstration, Problem, problem_id

# Which kind of tokenizer models with the template have; all others have byte-level BPE.
OWN = {"gemma": "bare", "diffusion_gemma": "bare", "phi3": "legacy", "llava_next": "legacy"}
OWN |= {"llama2": "legacy", "zephyr": "legacy", "mistral_v03": "first"}

LOSES, PARTS, ENDLESS = "loses the text of the user's", "takes messages of text", "emits no stop token"
REFUSED = {
    "idefics3": LOSES, "idefics3_training": LOSES, "smolvlm": LOSES, "smolvlm_training": LOSES,
    "llava_next": PARTS, "llava_next_training": PARTS, "glm4moe": ENDLESS,
}  # fmt: skip
NO_PREFIX, TWICE = "generation prompt is not a prefix", "a <think> of its own"
PLAIN, THOUGHT = "It is 43.", "<think>\nx\n</think>\n\nIt is 43."
# The generation prompt opens a thought that the template does not write for a plain completion, ...
PLAIN_REFUSED = {name: NO_PREFIX for name in TRL if name.startswith(("deepseek", "nemotron"))}
# ... or it closes an empty one, or the template takes the thought off, or does not know that it is one.
THOUGHT_REFUSED = {
    "deepseek_r1_distill": NO_PREFIX, "deepseekv3": NO_PREFIX, "deepseekv3_training": NO_PREFIX,
    "qwen3_5_nothink": NO_PREFIX, "qwen3_5_nothink_training": NO_PREFIX, "qwen3_8": TWICE, "qwen3_8_training": TWICE,
}  # fmt: skip
NO_SYSTEM = {"gemma", "gemma_training", "mistral_v03"}

# What carries loss for PLAIN; for templates that refuse it, for THOUGHT. The first name that a template's begins with.
GOLDEN = {
    "cohere2": "It is 43.<|END_RESPONSE|>",
    "cohere": "It is 43.<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill_training": "x\n</think>\n\nIt is 43.<｜end▁of▁sentence｜>",
    "diffusion_gemma": "It is 43.<turn|>",
    "gemma4": "It is 43.<turn|>",
    "gemma": "It is 43.<end_of_turn>",
    "glm4moe_training": "\n<think></think>\nIt is 43.<|user|>",
    "gptoss": "<|channel|>final<|message|>It is 43.<|return|>",
    "lfm2": "It is 43.<|im_end|>",
    "llama2": " It is 43. </s>",
    "llama3": "It is 43.<|eot_id|>",
    "mistral_v03": " It is 43.</s>",
    "muse_glimmer": " to=user<|message|>It is 43.<|eot|>",
    "nemotron": "x\n</think>\n\nIt is 43.<|im_end|>",
    "phi3": "It is 43.<|end|>",
    "qwen2_5": "It is 43.<|im_end|>",
    "qwen3_5_nothink": "It is 43.<|im_end|>",
    "qwen3_5_think": "\n</think>\n\nIt is 43.<|im_end|>",
    "qwen3_6": "\n</think>\n\nIt is 43.<|im_end|>",
    "qwen3_8": "\n</think>\n\nIt is 43.<|im_end|>",
    "qwen3_instruct": "It is 43.<|im_end|>",
    "qwen3_vl": "It is 43.<|im_end|>",
    "qwen3": "<think>\n\n</think>\n\nIt is 43.<|im_end|>",
    "smollm2": "It is 43.<|im_end|>",
    "zephyr": "\nIt is 43.</s>",
}


def first_of(table, name, default=None):
    return next((value for prefix, value in table.items() if name.startswith(prefix)), default)


def kinds(name):
    """Return the template's own kind of tokenizer and another one."""
    own = first_of(OWN, name, "bytes")
    others = {"bytes": ("first", "character"), "bare": ("first", "bytes"), "legacy": ("bytes",), "first": ("bare",)}[
        own
    ]
    return own, others[sum(map(ord, name)) % len(others)]


CASES = [(name, kind) for name in TEMPLATES for kind in kinds(name)]
ACCEPTED = [case for case in CASES if case[0] not in REFUSED]
every_template = pytest.mark.parametrize(("name", "kind"), ACCEPTED)


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = user("What is 6*7+1?")


def demonstration(prompt, *completion):
    return Demonstration(Problem(problem_id(prompt), prompt, where="rows.jsonl:7"), prompt, completion)


def rendered(renderer, conversation):
    """Return what transformers renders of a conversation, in the form of the tokenizer's own decoding, and its ids."""
    chosen = renderer.tokenizer
    text = chosen.apply_chat_template(conversation, tokenize=False, date_string=DATE)
    text = text.replace(date.today().isoformat(), "2024-07-26")
    answer = text.rindex(conversation[-1]["content"].split("\n")[-1])
    stops = chosen.convert_ids_to_tokens(list(renderer.stop_ids))
    ends = [text.find(stop, answer) + len(stop) for stop in stops if text.find(stop, answer) >= 0]
    return text[: min(ends)]


def ids_of(renderer, text):
    return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


def check_row(renderer, example, conversation):
    """Check that a row is the rendering: decoded, and in ids wherever no merge crosses the generation prompt's end."""
    chosen, ids = renderer.tokenizer, list(example.input_ids)
    text = rendered(renderer, conversation)
    whole = ids_of(renderer, text)
    lossless = chosen.decode(whole) == text  # some tokenizers add a space behind a special token
    assert chosen.decode(ids) == (text if lossless else chosen.decode(whole))
    asked = chosen.apply_chat_template(
        conversation[:-1], tokenize=False, add_generation_prompt=True, date_string=DATE
    ).replace(date.today().isoformat(), "2024-07-26")
    start = ids_of(renderer, asked)
    assert ids[: len(start)] == start
    assert whole[: len(start)] != start or whole == ids
    assert example.labels == (*[IGNORED] * len(start), *ids[len(start) :])
    assert example.labels[-1] in renderer.stop_ids
    return lossless


def test_the_tables_name_templates_that_exist():
    assert len(TRL) >= 70
    assert {*REFUSED, *PLAIN_REFUSED, *THOUGHT_REFUSED, *NO_SYSTEM} <= TEMPLATES.keys()


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] in REFUSED])
def test_a_template_that_cannot_be_trained_with_is_refused_by_name(name, kind):
    with pytest.raises(DataError, match=REFUSED[name]) as caught:
        renderer_of(name, kind)
    assert "set chat_template_path" in str(caught.value)
    assert "\n" not in str(caught.value)


@every_template
@pytest.mark.parametrize("words", [PLAIN, THOUGHT], ids=["plain", "thought"])
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_a_row_is_what_the_template_renders_or_a_refusal_by_name(name, kind, words, system):
    renderer = renderer_of(name, kind)
    prompt = [SYSTEM, ASKED] if system else [ASKED]
    given = [demonstration(prompt, reply(words))]
    reason = "ystem role" if system and name in NO_SYSTEM else None
    reason = reason or (PLAIN_REFUSED if words == PLAIN else THOUGHT_REFUSED).get(name)
    if reason:
        with pytest.raises(DataError, match=reason) as caught:
            make_examples(given, renderer, max_length=4096)
        assert str(caught.value).startswith("rows.jsonl:7: ")
        assert "\n" not in str(caught.value)
        return
    (example,), _ = make_examples(given, renderer, max_length=4096)
    lossless = check_row(renderer, example, [*prompt, reply(words)])
    assert lossless or kind == "legacy" or "▁" in TEMPLATES[name]


@every_template
def test_what_carries_loss_is_known_for_one_row_of_each_template(name, kind):
    renderer = renderer_of(name, kind)
    if name in PLAIN_REFUSED and name in THOUGHT_REFUSED:
        return
    words = THOUGHT if name in PLAIN_REFUSED else PLAIN
    (example,), _ = make_examples([demonstration([ASKED], reply(words))], renderer, max_length=4096)
    labels = [label for label in example.labels if label != IGNORED]
    golden = first_of(GOLDEN, name)
    # Decoders strip the first space, and take the letter `▁` of a special token for one.
    shown = renderer.tokenizer.decode(labels)
    assert shown.lstrip(" ").replace("▁", " ") == golden.lstrip(" ").replace("▁", " ")


@every_template
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_every_action_of_a_conversation_is_what_the_template_renders_behind_its_context(name, kind, system):
    renderer = renderer_of(name, kind)
    if (system and name in NO_SYSTEM) or (name in PLAIN_REFUSED and name in THOUGHT_REFUSED):
        return
    words = THOUGHT if name in PLAIN_REFUSED else PLAIN
    prompt = [SYSTEM, ASKED] if system else [ASKED]
    completion = [reply(words), user("And 40 + 3?"), reply(words.replace("43", "the same")), user("Hi!"), reply(words)]
    context = []
    for number, turn in enumerate(conversation_turns(prompt, completion, renderer, where="here")):
        context = [*([] if turn.rewritten else context), *turn.ids]
        text = rendered(renderer, [*prompt, *completion[: 2 * number + 1]])
        whole = renderer.tokenizer.decode(ids_of(renderer, text))
        context += turn.action_ids
        assert renderer.tokenizer.decode(context) == whole
    examples, _ = make_examples([demonstration(prompt, *completion)], renderer, max_length=4096)
    assert all(example.labels[-1] in renderer.stop_ids for example in examples)


@every_template
def test_what_collect_writes_sft_takes(name, kind):
    renderer = renderer_of(name, kind)
    requested = attempts(2, 1)
    trajectories = played(requested, Counting, renderer, Scripted(renderer, say=lambda key: f"x\n</think>\n\n{key[5]}"))
    problems = {attempt.problem.id: attempt.problem for attempt in requested}
    assert [trajectory.ended for trajectory in trajectories] == ["done", "done"]
    given = []
    for trajectory in trajectories:
        problem = problems[trajectory.problem_id]
        for row in trajectory_examples(trajectory, problem, reward=1.0, source="self"):
            given.append(Demonstration(problem, row.prompt, row.completion, row, renderer.fingerprint))
    examples, counts = make_examples(given, renderer, max_length=4096)
    assert counts.sampled == len(examples) == len(given) >= 2


@pytest.mark.parametrize("kind", ["bytes", "first", "legacy", "bare", "character"])
@pytest.mark.parametrize("name", ["llama3_2", "qwen2_5", "gemma3", "phi3", *OTHERS])
def test_a_policy_that_writes_as_its_template_does_is_never_rewritten(name, kind):
    renderer = renderer_of(name, kind)
    conversation = [ASKED]
    for words in (PLAIN, "3", "  x  ", "It is 12."):
        history, asked = list(conversation), user(f"Then {words}?")
        ((context, action),) = renderer.rows([renderer.texts(history, words)])
        added, rewritten = renderer.continuation(history, action, [asked])
        assert not rewritten
        conversation += [reply(words), asked]
        whole = renderer.prompts([conversation])[0]
        assert renderer.tokenizer.decode(context + action + added) == renderer.tokenizer.decode(whole)
        unended = renderer.continuation(history, action[: -len(renderer.tail_ids)], [asked])
        assert unended == (renderer.tail_ids + added, False) or kind == "legacy"
