"""Rows where templates, tokenizers and data meet: thoughts, channels, spaces, control tokens, arguments, lost text."""

import weakref
from datetime import date

import pytest
from helpers.episodes import retold
from helpers.trained_tokenizers import KINDS, OTHERS, TEMPLATES, TRL, renderer_of, reply, tokenizer, user
from transformers import AddedToken

from bcft.data.checks import check_prompts, without_special_tokens
from bcft.data.examples import make_examples
from bcft.errors import DataError, UsageError
from bcft.policy.chat_template import DATE, Renderer
from bcft.types import IGNORED, Demonstration, Problem, problem_id

ASKED = user("What is 6*7+1?")

CHATML = OTHERS["smollm2"]
NO_THOUGHT = {"enable_thinking": False}


def demonstration(completion, prompt="What is 6*7+1?", where="rows.jsonl:7", **columns):
    return Demonstration(Problem(problem_id(prompt), prompt, columns, where), prompt, (reply(completion),))


def label(renderer, completion, **columns):
    """Return the text that carries loss."""
    (example,), _ = make_examples([demonstration(completion, **columns)], renderer, max_length=4096)
    return renderer.tokenizer.decode([label for label in example.labels if label != IGNORED])


# Thoughts and channels
@pytest.mark.parametrize(
    ("completion", "trained"),
    [
        ("<think>\nx\n</think>\n\n43", "x\n</think>\n\n43<|im_end|>"),
        ("x\n</think>\n\n43", "x\n</think>\n\n43<|im_end|>"),
        ("<think>x</think>43", "x\n</think>\n\n43<|im_end|>"),
        ("<think>\n\n</think>\n\n43", "\n</think>\n\n43<|im_end|>"),
        ("46", "\n</think>\n\n46<|im_end|>"),
        (" 46\n", "\n</think>\n\n46<|im_end|>"),
        ("\n</think>\n\n46", "\n</think>\n\n46<|im_end|>"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6", "qwen3_5_think_training"])
def test_a_thought_that_the_generation_prompt_opens_is_trained_once(name, completion, trained):
    assert label(renderer_of(name, "bytes"), completion) == trained


@pytest.mark.parametrize(
    ("name", "completion", "reason"),
    [
        ("qwen3_8", "<think>\nx\n</think>\n\n43", "a <think> of its own"),
        ("qwen3_8", "x\n</think>\n\n43", "a </think> of its own"),
        ("qwen3_5_nothink", "<think>\nx\n</think>\n\n43", "not a prefix"),
        ("nemotron_3_nano", "43", "not a prefix"),
        ("deepseekv3", "<think>\nx\n</think>\n\n43", "not a prefix"),
        ("deepseek_r1_distill", "43", "not a prefix"),
        ("qwen2_5", "<|im_start|>assistant\n43", r"begins with <\|im_start\|>, as if"),
        ("gptoss", "<|channel|>final<|message|>43", r"begins with <\|channel\|>, as if"),
    ],
)
def test_a_thought_that_cannot_be_trained_once_is_refused_with_place_and_remedy(name, completion, reason):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .*{reason}.*(chat_template_path|special_tokens: strip)"):
        label(renderer_of(name, "bytes"), completion)


@pytest.mark.parametrize("completion", ["a> 43", "a>\n43", "so>43", "1 > 0", "> 43"])
def test_a_template_that_drops_a_part_of_the_answer_is_refused(completion):
    template = CHATML.replace("m.content", "m.content.split('>')[-1]")
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the chat template drops a part of the completion"):
        label(Renderer(tokenizer("bytes", template)), completion)


@pytest.mark.parametrize("completion", ["It is 43.", "4", " 43\n", "a\n\nb", "<think>\nx\n</think>\n\n43"])
@pytest.mark.parametrize("name", ["gptoss", "gptoss_training"])
def test_the_channel_of_an_answer_carries_loss_and_is_not_its_text(name, completion):
    renderer = renderer_of(name, "bytes")
    assert label(renderer, completion) == f"<|channel|>final<|message|>{completion}<|return|>"
    texts = renderer.texts([ASKED], f"{completion}")
    ((_, final),) = renderer.rows([texts])
    analysis = renderer.tokenizer("<|channel|>analysis<|message|>hm<|end|><|start|>assistant")["input_ids"]
    assert renderer.decode(final) == renderer.decode(analysis + final) == completion
    assert renderer.decode(analysis) == "analysishmassistant"


@pytest.mark.parametrize(
    ("name", "kwargs", "trained"),
    [
        ("qwen3", {}, "<think>\n\n</think>\n\n43<|im_end|>"),
        ("qwen3", NO_THOUGHT, "43<|im_end|>"),
        ("qwen3_5_think", NO_THOUGHT, "43<|im_end|>"),
        ("qwen3_6", NO_THOUGHT, "43<|im_end|>"),
        ("qwen3_8", NO_THOUGHT, "43<|im_end|>"),
        ("nemotron_3_nano", NO_THOUGHT, "43<|im_end|>"),
        ("nemotron_3_ultra_training", NO_THOUGHT, "43<|im_end|>"),
        ("qwen3", {"enable_thinking": None}, "<think>\n\n</think>\n\n43<|im_end|>"),
    ],
)
def test_template_arguments_work_as_a_key_and_as_a_column(name, kwargs, trained):
    as_key = Renderer(tokenizer("bytes", TRL[name]), (), kwargs)
    as_column = renderer_of(name, "bytes")
    assert label(as_key, "43") == trained
    assert label(as_column, "43", chat_template_kwargs=kwargs) == trained
    prompts = as_key.prompts(["x"])
    assert prompts == as_column.prompts(["x"], [kwargs])
    assert as_key.text("x") == as_column.text("x", kwargs) == as_key.tokenizer.decode(prompts[0])


def test_a_conversation_has_its_problems_template_arguments_in_every_turn():
    renderer = renderer_of("qwen3_5_think", "bytes")
    problem = Problem("p", [ASKED], {"chat_template_kwargs": NO_THOUGHT}, "rows.jsonl:7")
    completion = (reply("43"), user("Sure?"), reply("Yes"))
    examples, _ = make_examples([Demonstration(problem, [ASKED], completion)], renderer, max_length=4096)
    texts = [renderer.tokenizer.decode([x for x in example.labels if x != IGNORED]) for example in examples]
    assert texts == ["43<|im_end|>", "Yes<|im_end|>"]
    assert renderer.tokenizer.decode(examples[-1].input_ids).endswith("<think>\n\n</think>\n\nYes<|im_end|>")
    added, rewritten = renderer.continuation(
        [ASKED], renderer.completions(["43"])[0], "Sure?", template_kwargs=NO_THOUGHT
    )
    said = [ASKED, reply("43"), user("Sure?")]
    assert (added, rewritten) == (renderer.prompts([said], [NO_THOUGHT])[0], True)
    without, _ = renderer.continuation([ASKED], renderer.completions(["43"])[0], "Sure?")
    assert without == renderer.prompts([said])[0] != added


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_the_template_writes_before_every_answer_are_not_said_twice(kind):
    template = CHATML.replace("m.content", "('Answer: ' if m.role == 'assistant' else '') + m.content")
    renderer = Renderer(tokenizer(kind, template))
    completion = (reply("43"), user("Sure?"), reply("Yes"))
    given = Demonstration(Problem("p", [ASKED], where="here"), [ASKED], completion)
    (example,), _ = make_examples([given], renderer, max_length=4096)
    whole = renderer.tokenizer.apply_chat_template([ASKED, *completion], tokenize=False).rstrip("\n")
    shown = renderer.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert renderer.tokenizer.decode(example.input_ids) == renderer.tokenizer.decode(shown)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "tokenize", "add_generation_prompt", "documents", "chat_template"]
)
def test_arguments_that_decide_what_a_row_is_cannot_be_set(name):
    with pytest.raises(UsageError, match=f"^chat_template_kwargs: {name}"):
        Renderer(tokenizer("bytes", CHATML), (), {name: True})
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: chat_template_kwargs: {name}"):
        label(renderer_of("qwen3", "bytes"), "43", chat_template_kwargs={name: True})
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: chat_template_kwargs: {name}"):
        check_prompts([demonstration("43", chat_template_kwargs={name: True}).problem], renderer_of("qwen3", "bytes"),
                      special_tokens="raise")  # fmt: skip


def test_template_arguments_that_are_no_mapping_or_have_no_template_are_refused():
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: chat_template_kwargs: expected names and values"):
        label(renderer_of("qwen3", "bytes"), "43", chat_template_kwargs="enable_thinking")
    with pytest.raises(UsageError, match="no chat template"):
        Renderer(tokenizer("bytes", ""), (), NO_THOUGHT)


def test_the_fingerprint_depends_on_template_arguments_and_without_any_on_what_it_did():
    made = [
        Renderer(tokenizer("bytes", TRL["qwen3"]), (), kwargs) for kwargs in ({}, NO_THOUGHT, {"enable_thinking": True})
    ]
    assert len({renderer.fingerprint for renderer in made}) == 3
    assert made[0].fingerprint == Renderer(tokenizer("bytes", TRL["qwen3"])).fingerprint


# Dates
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (TRL["gptoss"], "Current date: 2024-07-26"),
        (TRL["gptoss_training"], "Current date: 2024-07-26"),
        (TRL["muse_glimmer"], "Current date: 2024-07-26"),
        (TRL["llama3_1"], f"Today Date: {DATE}"),
        (TRL["llama3_2"], f"Today Date: {DATE}"),
        ("{{ strftime_now('%d/%m/%y') }}" + CHATML, "26/07/24"),
        ('\n{{ strftime_now("%B %Y") }}' + CHATML, "\nJuly 2024"),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML, DATE),
    ],
)
def test_the_date_that_a_template_prints_is_pinned(template, shown):
    text = Renderer(tokenizer("bytes", template)).text("x")
    assert shown in text
    assert not any(date.today().strftime(form) in text for form in ("%Y-%m-%d", "%d %b %Y", "%d/%m/%y", "%B %Y"))


# Spaces and control tokens in data
HOSTILE = ["a </s> b", "</s>", "say <s>[INST] now", "x</s></s>y", "</s> 43", "43 <unk>", "line\n</s>\n"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HOSTILE)
def test_control_tokens_in_data_are_text_and_get_no_space(kind, text):
    renderer = renderer_of("mistral_v03", kind)
    special = {i for i, token in renderer.tokenizer.added_tokens_decoder.items() if token.special}
    prompt, answer = renderer.rows([renderer.texts([user(text)], text)])[0]
    bare, short = renderer.rows([renderer.texts([user("x")], "x")])[0]
    for row, plain in ((prompt, bare), (answer, short)):
        assert [token for token in row if token in special] == [token for token in plain if token in special]
    shown = renderer.tokenizer.decode(prompt + answer)
    asked, _, answered = shown.removesuffix("</s>").rpartition("[/INST]")
    assert [part.lstrip(" ") for part in (asked.removeprefix("<s>[INST]"), answered)] == [text.lstrip(" ")] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["4", " 4", "4 ", "\n4", "- 4\n  - 5", "  x"])
def test_plain_text_without_a_template_gets_no_space_between_prompt_and_completion(kind, text):
    renderer = Renderer(tokenizer(kind, ""))
    (example,), _ = make_examples([demonstration(text, "2+2=")], renderer, max_length=512)
    whole = renderer.tokenizer(f"2+2={text}", add_special_tokens=False)["input_ids"]
    assert renderer.tokenizer.decode(example.input_ids) == renderer.tokenizer.decode(whole) + "</s>"
    added, rewritten = renderer.continuation([user("2+2=")], renderer.completions([text])[0], "Sure?")
    assert not rewritten
    assert renderer.tokenizer.decode(added) == "Sure?"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama2", "mistral_v03", "zephyr", "llama3_2", "gemma3"])
def test_the_words_of_an_action_have_no_space_of_the_templates(name, kind):
    renderer = renderer_of(name, kind)
    for words in ("It is 43.", "- 4\n  - 5", "x", "4 and\n\n3"):
        ((_, action),) = renderer.rows([renderer.texts([ASKED], words)])
        assert renderer.decode(action).rstrip(" ") == words


# BOS tokens
@pytest.mark.parametrize(
    ("name", "bos", "count"),
    [
        ("smollm2", "<|im_start|>", 1),
        ("qwen2_5", "<|im_start|>", 1),
        ("qwen3", "<|im_start|>", 1),
        ("llama2", "<s>", 1),
        ("zephyr", "<s>", 0),
        ("llama3_2", "<|begin_of_text|>", 1),
        ("llama3", "<s>", 1),
    ],
)
def test_only_the_bos_at_the_head_of_a_row_is_counted(name, bos, count):
    renderer = Renderer(tokenizer("bytes", TEMPLATES[name], bos=bos))
    prompt = [{"role": "system", "content": "Be brief."}, ASKED]
    completion = (reply("43"), user("Sure?"), reply("Yes"))
    given = Demonstration(Problem("p", prompt, where="here"), prompt, completion)
    examples, counts = make_examples([given], renderer, max_length=4096)
    assert counts.bos == renderer.bos_count == count
    for example in examples:
        assert [token == renderer.tokenizer.bos_token_id for token in example.input_ids[: count + 1]] == [
            True
        ] * count + [False]


# Text that a template loses
@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("phi3", "tool"),
        ("phi3_5", "tool"),
        ("cohere2", "tool"),
        ("gemma4", "tool"),
        ("diffusion_gemma", "tool"),
        ("silent", "system"),
    ],
)
def test_a_message_whose_text_the_template_loses_is_refused_with_its_place(name, role):
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    renderer = Renderer(tokenizer("bytes", TRL.get(name, silent)))
    lost = {"role": role, "content": "the words"}
    prompt = [lost, ASKED] if role == "system" else [ASKED, reply("call"), lost]
    problem = Problem("p", prompt, where="rows.jsonl:7")
    reason = rf"^rows\.jsonl:7: the chat template does not render the {role}'s text 'the words'"
    with pytest.raises(DataError, match=reason):
        make_examples([Demonstration(problem, prompt, (reply("43"),))], renderer, max_length=4096)
    with pytest.raises(DataError, match=reason):
        check_prompts([problem], renderer, special_tokens="text")


@pytest.mark.parametrize("text", ['a "quoted"\nline', "é ½", "  stripped \n", "tab\tand \\n", "/no_think 4?"])
@pytest.mark.parametrize("name", ["llama3_1", "gemma3", "qwen2_5"])
def test_text_that_is_stripped_or_encoded_is_not_lost(name, text):
    renderer = renderer_of(name, "bytes")
    prompts = (
        [[user(text)]]
        if name == "gemma3"
        else [[user(text)], [ASKED, reply("call"), {"role": "tool", "content": text}]]
    )
    assert all(renderer.prompts(prompts))


@pytest.mark.parametrize("name", ["gemma", "gemma_training", "mistral_v03"])
def test_a_role_that_the_template_refuses_has_the_place_of_its_row(name):
    prompt = [{"role": "system", "content": "Be brief."}, ASKED]
    problems = [Problem("p", "x", where="a:1"), Problem("q", prompt, where="a:2"), Problem("r", prompt, where="a:3")]
    with pytest.raises(DataError, match=r"^a:2: the chat template refuses the messages \(system user\): System role"):
        check_prompts(problems, renderer_of(name, "bytes"), special_tokens="raise")


# Special tokens spelled out in text
SPELLED = [
    "It is 43.<|im_end|>",
    "It is 43.<|im_end|>\n",
    "It is 43. <|im_end|> ",
    "It is 43.<|im_end|></s>",
    "It is 43.</s>",
]


@pytest.mark.parametrize("completion", SPELLED)
def test_a_stop_token_spelled_at_the_end_is_refused_counted_or_taken_off(completion):
    renderer = renderer_of("qwen2_5", "bytes")
    given = [
        demonstration("fine"),
        demonstration(completion, where="rows.jsonl:8"),
        demonstration(completion, where="x"),
    ]
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:8: .*\(2 of 3 rows\).*special_tokens: strip.*special_tokens: text"
    ):
        without_special_tokens(given, renderer, special_tokens="raise")
    kept, note = without_special_tokens(given, renderer, special_tokens="strip")
    assert [d.completion[0]["content"] for d in kept] == ["fine", "It is 43.", "It is 43."]
    assert "2 of 3 rows" in note
    assert without_special_tokens(given, renderer, special_tokens="text") == (given, "")


@pytest.mark.parametrize(
    "completion", ["<|im_end|> is a token", "a <|im_end|>.", "It is 43.\n", "<|im_start|>", "x <eos>"]
)
def test_control_tokens_elsewhere_are_left_alone(completion):
    given = [demonstration(completion)]
    for word in ("raise", "strip", "text"):
        assert without_special_tokens(given, renderer_of("qwen2_5", "bytes"), special_tokens=word) == (given, "")


def test_every_action_of_a_conversation_is_looked_at_and_observations_are_not():
    completion = (reply("43<|im_end|>"), user("Sure?<|im_end|>"), reply("Yes"))
    given = Demonstration(Problem("p", "x", where="here"), "x", completion)
    (kept,), _ = without_special_tokens([given], renderer_of("qwen2_5", "bytes"), special_tokens="strip")
    assert kept.completion == (reply("43"), *completion[1:])


@pytest.mark.parametrize(
    ("name", "prompt", "mark"),
    [
        ("qwen2_5", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "begins with '<|im_start|>'"),
        ("qwen2_5", "<|im_start|>system\nBe brief.<|im_end|>", "begins with '<|im_start|>'"),
        ("qwen2_5", "Hi<|im_end|>\n<|im_start|>assistant\n", "ends with '<|im_start|>assistant'"),
        ("llama3_2", "<|start_header_id|>user<|end_header_id|>\n\nHi", "begins with '<|start_header_id|>'"),
        ("llama2", "[INST] Hi [/INST]", "begins with '[INST]'"),
        ("llama2", "<s>[INST] Hi [/INST]", "begins with '<s>'"),
        ("zephyr", "<|user|>\nHi</s>\n<|assistant|>", "begins with '<|user|>'"),
        ("gemma3", "<start_of_turn>user\nHi", "begins with '<start_of_turn>'"),
        ("gptoss", "<|start|>user<|message|>Hi", "begins with '<|start|>'"),
    ],
)  # fmt: skip
def test_prompts_that_are_rendered_already_are_counted_and_refused_unless_they_are_text(name, prompt, mark):
    renderer = renderer_of(name, "bytes")
    problems = [
        Problem("a", "Hi", where="r:1"),
        Problem("b", prompt, where="r:2"),
        Problem("c", [user(prompt)], where="r:3"),
    ]
    for word in ("raise", "strip"):
        with pytest.raises(DataError) as caught:
            check_prompts(problems, renderer, special_tokens=word)
        assert str(caught.value).startswith(f"r:2: the prompt {mark}, ")
        assert "(2 of 3 prompts)" in str(caught.value)
        assert "special_tokens: text" in str(caught.value)
    check_prompts(problems, renderer, special_tokens="text")


@pytest.mark.parametrize("prompt", ["user", "What does <|im_start|> mean?", "assistant:", "[INST", "Hi <s>"])
@pytest.mark.parametrize("name", ["qwen2_5", "llama2", "zephyr", "llama3_2"])
def test_ordinary_prompts_are_not_taken_for_rendered_ones(name, prompt):
    check_prompts([Problem("a", prompt, where="r:1")], renderer_of(name, "bytes"), special_tokens="raise")


def test_what_a_template_raises_is_one_line():
    broken = "{% for m in messages %}{{ m.content + 1 }}{% endfor %}"
    with pytest.raises(DataError, match="refuses the messages") as caught:
        Renderer(retold(broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["A <|im_end|> B", "<|im_end|>", "a<|im_end|><|im_end|>b", "x <|im_end|>", "<|im_end|>y"]
)
def test_a_stop_token_that_is_not_marked_as_special_is_only_text_in_data(text):
    plain = tokenizer("bytes", CHATML)
    plain.add_tokens([AddedToken("<|stop|>", special=False, normalized=False)])
    template = CHATML.replace("<|im_end|>", "<|stop|>")
    plain.chat_template = template
    stop = plain.convert_tokens_to_ids("<|stop|>")
    renderer = Renderer(plain, [stop])
    asked = text.replace("<|im_end|>", "<|stop|>")
    (ids,) = renderer.prompts([asked])
    (bare,) = renderer.prompts(["A"])
    assert ids.count(stop) == bare.count(stop)
    assert renderer.decode([*renderer.completions(["four"])[0]]) == "four"
    (example,), _ = make_examples([demonstration(f"{asked} more")], renderer, max_length=4096)
    assert [label for label in example.labels if label == stop] == [stop]


@pytest.mark.parametrize(
    "kwargs", [{"enable_thinkin": False}, {"thinking": 1}, {"x": None, "y": 1}, {"Enable": 1}, {"q": 0}]
)
def test_arguments_that_the_template_has_no_name_for_are_refused(kwargs):
    with pytest.raises(UsageError, match=r"chat_template_kwargs: .*: the chat template has no such name"):
        Renderer(tokenizer("bytes", TRL["qwen3"]), (), {k: v for k, v in kwargs.items() if v is not None})
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:7: chat_template_kwargs: .*: the chat template has no such name"
    ):
        make_examples([demonstration("4", chat_template_kwargs=kwargs)], renderer_of("qwen3", "bytes"), max_length=4096)


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n",
        "[INST] A? [/INST]",
        "<start_of_turn>user\nA?<end_of_turn>\n",
        "<|user|>\nA?",
        "A? <|eot_id|>",
    ],
)
def test_a_prompt_rendered_for_another_model_is_refused_and_left_alone_as_text(prompt):
    renderer = renderer_of("llama3_2", "bytes")
    problem = Problem("p", prompt, {}, "rows.jsonl:7")
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: .*rendered already"):
        check_prompts([problem], renderer, special_tokens="raise")
    check_prompts([problem], renderer, special_tokens="text")


@pytest.mark.parametrize("completion", ["{g}43", "  {g}43", "{g}\n43", "{g}43<|im_end|>", "{g}43<|im_end|>\n"])
def test_letters_of_the_generation_prompt_before_a_completion_are_counted_and_taken_off(completion):
    renderer = renderer_of("qwen2_5", "bytes")
    rows = [demonstration(completion.format(g="<|im_start|>assistant\n")), demonstration("44")]
    with pytest.raises(DataError, match=r"^rows\.jsonl:7: the completion begins with .*1 of 2 rows"):
        without_special_tokens(rows, renderer, special_tokens="raise")
    bare, note = without_special_tokens(rows, renderer, special_tokens="strip")
    assert [d.completion[0]["content"].strip() for d in bare] == ["43", "44"]
    assert "1 of 2 rows" in note


def test_rows_that_all_have_arguments_of_their_own_are_not_held():
    """Where each has its own tools, each is a kind of prompt, with a generation prompt of its own."""

    class Columns(dict):
        """That can be referred to weakly."""

    renderer, alive = renderer_of("qwen3", "bytes"), []

    def problems():
        for number in range(300):
            columns = Columns(tools=[{"type": "function", "function": {"name": f"add_{number}"}}])
            alive.append(weakref.ref(columns))
            renderer.texts([ASKED], "43", {**columns})
            yield Problem("p", [ASKED], columns, f"rows.jsonl:{number}")
            del columns
            assert sum(reference() is not None for reference in alive) <= 2

    check_prompts(problems(), renderer, special_tokens="raise")
    assert len(alive) == 300
    assert len(renderer._template._generation) <= 256
