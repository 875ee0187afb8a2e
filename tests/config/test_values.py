"""A value means the same in a file, on the command line and in Python."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.recipes import BASE, BASE_KEYS, BASE_TOKENS, SAME, findings
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.config.keys import KEYS, REFUSED_VALUES
from bcft.config.loader import load, parse
from bcft.config.schema import REQUIRED
from bcft.errors import UsageError

Write = Callable[[str | bytes], str]


NEEDED = {"lora_": "use_peft", "gradient_checkpointing_kwargs": "gradient_checkpointing"}
"""The beginning of a key -> the key without which it is refused."""


@pytest.mark.parametrize(("key", "text", "value"), SAME)
def test_a_value_means_the_same_in_a_file_on_the_command_line_and_in_python(
    write: Write, key: str, text: str, value: Any
) -> None:
    base = BASE + next((f"{needed}: true\n" for prefix, needed in NEEDED.items() if key.startswith(prefix)), "")
    path = write(base)
    recipes = [
        parse("sft", [path, f"--{key}", text]),
        parse("sft", [path, f"--{key}={text}"]),
        parse("sft", [f"{key}={text}", "--config", path]),
        load("sft", path, {key: value}),
        load("sft", write(f"{base}{key}: {text}\n"), {}),
    ]
    for recipe in recipes:
        assert recipe.values[key] == value
        assert type(recipe.values[key]) is type(value)
        assert key in recipe.given
    assert len({str(recipe.resolved) for recipe in recipes}) == 1


@settings(max_examples=100, deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_float_comes_back_as_python_and_yaml_write_it(value: float) -> None:
    for text in (repr(value), yaml.safe_dump(value).split("\n")[0]):
        assert parse("sft", [*BASE_TOKENS, f"learning_rate={text}"]).values["learning_rate"] == value


@settings(max_examples=50, deadline=None)
@given(st.integers(min_value=0, max_value=10**18 - 1))
def test_every_integer_comes_back(value: int) -> None:
    assert parse("sft", [*BASE_TOKENS, "--max_steps", str(value)]).values["max_steps"] == value


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_command_line_ends_in_anything_but_a_recipe_or_findings(key: str, value: str) -> None:
    for tokens in ([f"--{key}", value], [f"{key}={value}"], [value]):
        try:
            parse("sft", [*BASE_TOKENS, *tokens])
        except UsageError as error:
            lines = str(error).split("\n")
        else:
            lines = []
        assert all(": " in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        ("max_length", np.int64(64), 64),
        ("max_length", np.uint8(64), 64),
        ("max_steps", np.int32(-1), -1),
        ("seed", np.array([7, 8])[0], 7),
        ("use_peft", np.bool_(True), True),
        ("bf16", np.array([1, 2]).sum() > 5, False),
        ("learning_rate", np.float64(0.5), 0.5),
        ("learning_rate", np.float32(0.5), 0.5),
        ("learning_rate", np.int64(1), 1.0),
        ("reward_weights", [np.float64(1.0), np.int64(2)], [1.0, 2.0]),
        ("lr_scheduler_kwargs", {"n": np.int64(3), "x": np.float64(0.5)}, {"n": 3, "x": 0.5}),
    ],
)
def test_a_number_of_numpy_is_that_number(key: str, value: Any, plain: Any) -> None:
    recipes = [load("filtered", None, BASE_KEYS | {key: number}) for number in (value, plain)]
    assert recipes[0].values == recipes[1].values
    assert type(recipes[0].values[key]) is type(plain)
    assert yaml.safe_load(yaml.safe_dump(recipes[0].resolved))[key] == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", np.float64(64.0)),
        ("max_length", np.bool_(True)),
        ("max_length", np.array([64])),
        ("max_length", np.int64(0)),
        ("use_peft", np.int64(1)),
        ("learning_rate", np.float64("nan")),
        ("learning_rate", np.bool_(True)),
        ("seed", np.datetime64("2026-11-26")),
        ("lr_scheduler_kwargs", {"n": np.arange(3)}),
    ],
)
def test_of_numpy_no_more_is_taken_than_of_python(key: str, value: Any) -> None:
    (line,) = findings(lambda: load("filtered", None, BASE_KEYS | {key: value}))
    assert line.startswith(f"override: {key}: ")


def test_every_default_is_a_value_its_own_key_accepts() -> None:
    assert {key.name for key in KEYS.values() if key.default == ""} == {*REQUIRED, "output_dir"}
    for key in KEYS.values():
        if key.default not in (None, ""):
            adapter = {"use_peft": False} if key.name.startswith(("lora_", "use_")) else {}
            recipe = load(key.commands[0], None, {**BASE_KEYS, **adapter, key.name: key.default})
            assert recipe.values[key.name] == key.default


def test_every_word_of_a_choice_stays_the_word(write: Write) -> None:
    for key in KEYS.values():
        base = BASE.replace("bcft:arithmetic", "reasoning-gym:gcd") if key.name == "answer_format" else BASE
        for word in key.choices:
            needs = "base_url: http://a:1/v1\nserved_model: b\n" if word == "openai" else ""
            needs = "prompt_column: word\nsystem_prompt: Ask.\n" if word == "lines" else needs
            needs = 'require_success: "true"\n' if word == "maxrl" else needs
            if (key.name, word) not in REFUSED_VALUES:
                assert load("preview", write(f"{base}{needs}{key.name}: {word}\n"), {}).values[key.name] == word


@pytest.mark.parametrize("text", ['"x"', "'x'", ' "x"', '"x" ', " x", "x  ", "x"])
def test_quotes_and_spaces_around_a_value_mean_on_the_command_line_what_they_mean_in_a_file(
    write: Write, text: str
) -> None:
    for tokens in ([f"run_name={text}"], [f"--run_name={text}"], ["--run_name", text]):
        assert parse("sft", [*BASE_TOKENS, *tokens]).values["run_name"] == "x"
    assert load("sft", write(f"{BASE}run_name: {text}\n"), {}).values["run_name"] == "x"


def test_quotation_marks_of_a_python_string_are_part_of_it() -> None:
    assert load("sft", None, {**BASE_KEYS, "run_name": '"x"'}).values["run_name"] == '"x"'


@pytest.mark.parametrize("text", ["'x", '"x', "'x' y", '"x": y', '"\\q"'])
def test_text_that_only_begins_with_a_quotation_mark_is_refused_on_the_command_line_as_in_a_file(
    write: Write, text: str
) -> None:
    (line,) = findings(lambda: parse("sft", [*BASE_TOKENS, f"run_name={text}"]))
    assert line.startswith("command line: run_name: ")
    assert "is not readable: not valid YAML" in line
    (line,) = findings(lambda: load("sft", write(f"{BASE}run_name: {text}\n"), {}))
    assert "not valid YAML" in line


def test_an_empty_quoted_value_is_empty() -> None:
    assert parse("sft", [*BASE_TOKENS, "success_func=''"]).values["success_func"] == ""
    assert (
        "run_name: wants text or null, and is empty" in findings(lambda: parse("sft", [*BASE_TOKENS, 'run_name=""']))[0]
    )
