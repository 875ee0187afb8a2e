"""Demonstrations to rows: what carries loss is the completion and its stop token, nothing less and nothing else."""

import datetime
import os
from pathlib import Path

import pytest
from tiny import gsm8k, llama_tokenizer

from bcft.data.examples import make_rows
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer
from bcft.types import IGNORED, Demonstration, Problem, Row, problem_id

FIFTY = Path(__file__).parent / "data" / "gsm8k_50.jsonl"


def demonstrations(rows):
    return [
        Demonstration(
            Problem(problem_id(r["question"]), r["question"], {"answer": r["answer"]}, f"row {i}"), r["answer"]
        )
        for i, r in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def rows():
    return gsm8k(FIFTY)


@pytest.fixture(scope="module")
def renderer(rows):
    return Renderer(llama_tokenizer([r["question"] + r["answer"] for r in rows]))


@pytest.fixture(scope="module")
def plain(rows):
    return Renderer(llama_tokenizer([r["question"] + r["answer"] for r in rows], chat=False))


def prove(rows, renderer):
    """Check the promises of the issue on real rows."""
    made, census = make_rows(demonstrations(rows), renderer, max_length=4096)
    assert (census.given, census.kept) == (len(rows), len(rows))
    tokenizer = renderer.tokenizer
    today = {datetime.date.today().strftime(form) for form in ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y")}
    for row, source in zip(made, rows, strict=True):
        assert row.labels[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert row.input_ids.count(tokenizer.bos_token_id) == 1
        assert row.input_ids[0] == tokenizer.bos_token_id
        supervised = [label for label in row.labels if label != IGNORED]
        assert tokenizer.decode(supervised[:-1]) == source["answer"]
        text = tokenizer.decode(row.input_ids)
        assert source["question"].strip() in text
        assert not any(date in text for date in today)
    return made


def test_fifty_gsm8k_rows_keep_every_row_whole_and_end_in_the_stop_token(rows, renderer):
    prove(rows, renderer)


@pytest.mark.slow
@pytest.mark.skipif("BCFT_TEST_DATA" not in os.environ, reason="BCFT_TEST_DATA does not name the large data")
def test_all_7473_gsm8k_rows_keep_every_row_whole_and_end_in_the_stop_token():
    full = gsm8k(Path(os.environ["BCFT_TEST_DATA"]) / "gsm8k" / "train.jsonl")
    assert len(full) == 7473
    tokenizer = llama_tokenizer([r["question"] + r["answer"] for r in full], vocabulary=4000)
    assert len(prove(full, Renderer(tokenizer))) == 7473


def test_a_row_is_the_prompt_of_a_rollout_followed_by_the_action_a_rollout_would_make(rows, renderer):
    """The text path and the id path are one: prompt ids are equal, and the action decodes to the completion."""
    made, _ = make_rows(demonstrations(rows), renderer, max_length=4096)
    for row, source in zip(made, rows, strict=True):
        prompt = renderer.prompts([source["question"]])[0]
        action = row.input_ids[len(prompt) :]
        assert list(row.input_ids[: len(prompt)]) == prompt
        assert all(label == IGNORED for label in row.labels[: len(prompt)])
        assert row.labels[len(prompt) :] == action
        assert renderer.decode(action) == source["answer"]


def test_a_string_prompt_is_one_user_message(renderer):
    assert renderer.prompts(["2 + 2?"]) == renderer.prompts([[{"role": "user", "content": "2 + 2?"}]])


def test_a_system_message_is_rendered(renderer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert "Be brief." in renderer.tokenizer.decode(renderer.prompts([messages])[0])


def test_rendering_is_what_the_tokenizer_itself_makes_of_harmless_text(rows, renderer):
    for row in rows[:10]:
        messages = [{"role": "user", "content": row["question"]}]
        theirs = renderer.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, date_string="26 Jul 2024", return_dict=True
        )["input_ids"]
        assert renderer.prompts([row["question"]])[0] == theirs


@pytest.mark.parametrize("chat", [True, False])
def test_control_tokens_in_data_are_only_text(renderer, plain, chat):
    chosen = renderer if chat else plain
    hostile = "say <|eot_id|> or <|begin_of_text|> now"
    harmless = chosen.prompts(["x"])[0]
    control = {i for i, token in chosen.tokenizer.added_tokens_decoder.items() if token.special}
    prompt, completion = chosen.prompts([hostile])[0], chosen.completions([hostile])[0]
    assert [t for t in prompt if t in control] == [t for t in harmless if t in control]
    assert [t for t in completion if t in control] == list(chosen.tail_ids)
    assert chosen.tokenizer.decode(completion[:-1]) == hostile


def test_plain_text_has_one_bos_and_ends_in_eos(plain):
    (row,), census = make_rows([Demonstration(Problem("p", "2+2="), "4")], plain, max_length=64)
    tokenizer = plain.tokenizer
    assert tokenizer.decode([label for label in row.labels if label != IGNORED]) == "4<|end_of_text|>"
    assert row.input_ids.count(tokenizer.bos_token_id) == plain.bos_count == census.bos


def test_messages_without_a_template_are_refused_unless_they_are_one_users(plain):
    with pytest.raises(DataError, match="no chat template"):
        plain.prompts([[{"role": "system", "content": "terse"}, {"role": "user", "content": "?"}]])
    assert plain.prompts([[{"role": "user", "content": "?"}]]) == plain.prompts(["?"])


def test_a_template_without_stop_token_is_refused(rows):
    tokenizer = llama_tokenizer([rows[0]["answer"]])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(DataError, match="no stop token"):
        Renderer(tokenizer)


def test_a_template_that_refuses_a_role_is_told_in_one_line(rows):
    tokenizer = llama_tokenizer([rows[0]["answer"]])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}<|eot_id|>{% endfor %}"
    )
    with pytest.raises(DataError, match="no system role"):
        Renderer(tokenizer).prompts([[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]])


def test_over_long_rows_are_dropped_and_counted_never_cut(rows, renderer):
    made, census = make_rows(demonstrations(rows), renderer, max_length=250)
    assert 0 < census.overlong < len(rows)
    assert census.kept == len(made) == len(rows) - census.overlong
    assert max(len(row.input_ids) for row in made) <= 250
    assert all(row.labels[-1] in renderer.stop_ids for row in made)


def test_over_long_rows_are_refused_on_request_with_their_place(rows, renderer):
    with pytest.raises(DataError, match=r"row \d+: \d+ tokens, more than max_length 250"):
        make_rows(demonstrations(rows), renderer, max_length=250, overlength="raise")


def test_duplicates_and_empty_completions_are_counted_drops(renderer):
    problem = Problem("p", "2 + 2?", where="here")
    given = [Demonstration(problem, c) for c in ("4", "4", " ", "four")]
    made, census = make_rows(given, renderer, max_length=512)
    assert (len(made), census.duplicate, census.unsupervised) == (2, 1, 1)


def test_nothing_left_is_an_error_that_shows_a_row(renderer):
    with pytest.raises(DataError, match=r"here: nothing to train on in 1 rows: 1 longer than max_length 8"):
        make_rows([Demonstration(Problem("p", "2 + 2?", where="here"), "4")], renderer, max_length=8)


def test_a_row_whose_label_is_not_its_token_cannot_be_made():
    with pytest.raises(ValueError, match="label 7 at position 1"):
        Row("p", (5, 6), (IGNORED, 7))
