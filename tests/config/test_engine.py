"""The engine's keys: what a server needs, what has no effect, and that no secret stands in a recipe."""

from typing import Any

import pytest
from helpers.recipes import BASE_KEYS, findings

from bcft.config.declare import SettingError
from bcft.config.engine import EngineSettings, key_from
from bcft.config.loader import load
from bcft.errors import UsageError

SERVED = {"engine": "openai", "base_url": "http://127.0.0.1:8000/v1", "served_model": "teacher"}


def test_without_a_key_the_program_samples_itself() -> None:
    settings = load("collect", None, BASE_KEYS).engine
    assert settings == EngineSettings()
    assert (settings.engine, settings.served, settings.noise, settings.at_once) == ("hf", "", "", None)


def test_a_served_model_takes_the_place_of_the_recipes() -> None:
    settings = load("collect", None, BASE_KEYS | SERVED | {"concurrency": 8}).engine
    assert (settings.served, settings.at_once) == ("teacher", 16)
    assert "openai draws its own noise" in settings.noise


REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "collect",
        {"engine": "openai"},
        [
            "engine: openai needs base_url, such as http://127.0.0.1:8000/v1",
            "engine: openai needs served_model, the server's name of its model",
        ],
    ),
    (
        "filtered",
        SERVED | {"base_url": None, "served_model": None, "engine": "openai"},
        [
            "base_url: not used here; it is a key of bcft collect and evaluate",
            "served_model: not used here; it is a key of bcft collect and evaluate",
        ],
    ),
    ("collect", {"base_url": "http://h/v1"}, ["base_url: has no effect without engine: openai"]),
    ("evaluate", {"max_requests": 3}, ["max_requests: has no effect without engine: openai"]),
    ("filtered", {"concurrency": 3}, ["concurrency: has no effect without engine: vllm or openai"]),
    ("sft", {"vllm_max_model_length": 99}, ["vllm_max_model_length: has no effect without engine: vllm"]),
    (
        "filtered",
        {"engine": "vllm", "vllm_server_base_url": "http://h:8000", "vllm_tensor_parallel_size": 2},
        [
            "vllm_tensor_parallel_size: has no effect with vllm_server_base_url, a server that runs already: leave it "
            "out"
        ],
    ),
    (
        "collect",
        SERVED | {"base_url": "127.0.0.1:8000"},
        ["base_url: wants an address such as http://127.0.0.1:8000"],
    ),
    (
        "collect",
        SERVED | {"base_url": "http://h:port"},
        ["base_url: wants an address such as http://127.0.0.1:8000"],
    ),
    ("collect", SERVED | {"engine": "sglang"}, ["engine: wants one of hf, vllm, openai, not 'sglang'"]),
]


@pytest.mark.parametrize(("command", "keys", "expected"), REFUSED)
def test_what_does_not_fit_together_is_refused(command: str, keys: dict[str, Any], expected: list[str]) -> None:
    found = [line.removeprefix("override: ") for line in findings(lambda: load(command, None, BASE_KEYS | keys))]
    assert found[: len(expected)] == expected


@pytest.mark.parametrize("command", ["sft", "filtered"])
def test_what_is_trained_cannot_be_behind_an_api(command: str) -> None:
    (line,) = findings(lambda: load(command, BASE_KEYS | SERVED, {}))
    assert "engine: openai is for collect and evaluate" in line
    assert load(command, BASE_KEYS | SERVED, {"engine": "hf"}).engine.served == ""


@pytest.mark.parametrize(
    ("keys", "secret"),
    [
        ({"api_key": "abcdef"}, "abcdef"),
        ({"openai_api_key": "abcdef"}, "abcdef"),
        (SERVED | {"base_url": "http://user:abcdef@h/v1"}, "abcdef"),
        (SERVED | {"base_url": "http://h/v1?api-key=abcdef"}, "abcdef"),
        ({"engine": "vllm", "vllm_server_base_url": "http://user:abcdef@h"}, "abcdef"),
        ({"engine": "vllm", "vllm_command": "vllm serve --api-key abcdef"}, "abcdef"),
        ({"engine": "vllm", "vllm_command": ["vllm", "serve", "--api_key=abcdef"]}, "abcdef"),
        ({"engine": "vllm", "vllm_command": ["python", "--hf-token", "abcdef"]}, "abcdef"),
        ({"engine": "vllm", "vllm_command": "env VLLM_API_KEY=abcdef 'python"}, "abcdef"),
        (SERVED | {"served_model": "sk-abcdefabcdefabcdefabcdef"}, "abcdef"),
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(keys: dict[str, Any], secret: str) -> None:
    found = findings(lambda: load("collect", None, BASE_KEYS | keys))
    assert not any(secret in line for line in found)
    assert "environment instead" in found[0]


@pytest.mark.parametrize(
    ("keys", "variable"),
    [
        (SERVED | {"base_url": "http://user:abcdef@h/v1"}, "OPENAI_API_KEY"),
        ({"engine": "vllm", "vllm_server_base_url": "http://user:abcdef@h"}, "VLLM_API_KEY"),
    ],
)
def test_the_variable_for_a_servers_key_is_that_of_its_engine(keys: dict[str, Any], variable: str) -> None:
    (line,) = findings(lambda: load("collect", None, BASE_KEYS | keys))
    assert f"set {variable} in the environment instead" in line


@pytest.mark.parametrize(
    ("given", "words"), [("python 'a b", "has a quote or a backslash without"), (" ", "is empty: give the words")]
)
def test_a_command_that_no_shell_would_read_is_refused_in_a_line(given: str, words: str) -> None:
    (line,) = findings(lambda: load("collect", None, BASE_KEYS | {"engine": "vllm", "vllm_command": [given]}))
    assert f"vllm_command: {words}" in line


def test_a_key_comes_from_the_environment_without_the_space_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert key_from("VLLM_API_KEY") == ""
    monkeypatch.setenv("VLLM_API_KEY", " abc-def\r\n")
    assert key_from("VLLM_API_KEY") == "abc-def"


@pytest.mark.parametrize("key", ["abc def", "abc\ndef", "abc\x7fdef", "abc\u00e9def"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(UsageError, match=r"^VLLM_API_KEY: holds a space") as raised:
        key_from("VLLM_API_KEY")
    assert "abc" not in str(raised.value)
    assert "def" not in str(raised.value)


def test_one_word_of_vllm_command_is_read_as_a_shell_would() -> None:
    assert EngineSettings().command == ()
    assert EngineSettings(vllm_command=("/v/python -m 'a b'",)).command == ("/v/python", "-m", "a b")
    assert EngineSettings(vllm_command=("/v x/python", "-m")).command == ("/v x/python", "-m")


def test_settings_that_are_made_in_python_are_checked_as_well() -> None:
    with pytest.raises(SettingError, match="openai needs base_url"):
        EngineSettings(engine="openai", served_model="teacher")
