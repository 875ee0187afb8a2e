"""What the Hub answers becomes one line that says what to do, for a model and for an adapter's base alike."""

import json

import pytest
from helpers.hub import COMMIT, GATED, NO_REPOSITORY, ask, local_hub
from helpers.tiny import llama_tokenizer, save_llama

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.hub_errors import hub_reason
from bcft.policy.loading import adapter_base, check_model, load_policy

NAME = "some/model"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def refusal(name=NAME, **fields):
    with pytest.raises(UsageError) as caught:
        check_model(name, ModelSettings(**fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["model", "adapter"])
def name(request, tmp_path):
    """The Hub id itself, or a directory of an adapter whose base it is."""
    if request.param == "model":
        return NAME
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": NAME}))
    assert adapter_base(str(tmp_path)) == NAME
    return str(tmp_path)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, GATED, f"ask for access at https://huggingface.co/{NAME}, then set HF_TOKEN or run `hf auth login`"),
        (403, GATED, f"has no access yet: ask at https://huggingface.co/{NAME}"),
        (401, NO_REPOSITORY, "check the spelling; if it is private, set HF_TOKEN or run `hf auth login`"),
        (404, NO_REPOSITORY, "the Hub has no such model repository: check the spelling"),
        (401, "", "set HF_TOKEN to a valid token, or run `hf auth login`"),
        (403, "", f"ask for access at https://huggingface.co/{NAME}"),
        (429, "", "too many requests: wait"),
        (503, "", "the Hub answers 503: try again later"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line_that_says_what_to_do(monkeypatch, tmp_path, name, status, code, expected):
    with local_hub(monkeypatch, tmp_path / "cache", refused={NAME: (status, code)}) as hub:
        line = refusal(name)
    assert hub.asked
    assert line.startswith(f"model_name_or_path: cannot load '{NAME}': ")
    assert expected in line


def test_a_revision_that_does_not_exist_is_refused_with_its_key(monkeypatch, tmp_path):
    with local_hub(monkeypatch, tmp_path, files={NAME: {"config.json": b'{"model_type": "llama"}'}}):
        line = refusal(model_revision="v9")
    assert line == (
        f"model_revision: cannot load '{NAME}': the Hub has no revision 'v9' of it: see "
        f"https://huggingface.co/{NAME}/tree/main"
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "it has no tokenizer that transformers can load"),
        (
            {"adapter_config.json": b"{}", **dict.fromkeys(TOKENIZER)},
            "hf download some/model --local-dir DIRECTORY",
        ),
        ({"README.md": b"# none"}, "no tokenizer|no config.json"),
    ],
    ids=["no tokenizer", "an adapter", "nothing"],
)
def test_a_repository_without_a_file_that_is_needed_is_refused(monkeypatch, tmp_path, files, expected):
    model = save_llama(tmp_path / "m", llama_tokenizer(["a b"]))
    files = {
        file: (tmp_path / "m" / file).read_bytes() if content is None else content for file, content in files.items()
    }
    with local_hub(monkeypatch, tmp_path / "cache", files={NAME: files}):
        line = refusal()
    assert model
    assert line.startswith(f"model_name_or_path: cannot load '{NAME}': ")
    assert any(words in line for words in expected.split("|"))


@pytest.mark.parametrize("offline", [False, True], ids=["no network", "HF_HUB_OFFLINE"])
def test_a_model_is_loaded_from_the_cache_without_network_and_named_where_it_is_not_there(
    monkeypatch, tmp_path, offline
):
    directory = tmp_path / "m"
    save_llama(directory, llama_tokenizer(["a b"]))
    files = {file.name: file.read_bytes() for file in directory.iterdir()}
    cache = tmp_path / "cache"
    with local_hub(monkeypatch, cache, files={NAME: files}):
        first = load_policy(NAME, ModelSettings())
    assert (cache / "models--some--model" / "snapshots" / COMMIT / "model.safetensors").is_file()
    ask(monkeypatch, "http://127.0.0.1:9", cache, offline=offline)
    again = load_policy(NAME, ModelSettings())
    assert again.renderer.fingerprint == first.renderer.fingerprint
    line = refusal("another/model")
    expected = "HF_HUB_OFFLINE is set" if offline else "the Hub does not answer: check the network"
    assert line.startswith("model_name_or_path: cannot load 'another/model': it is not on this machine")
    assert expected in line


@pytest.mark.parametrize("name", ["some/model/part", "./nowhere", "runs/nowhere", "/nowhere", "~/models/llama"])
def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        line = refusal(name)
    assert line.startswith(f"model_name_or_path: there is no directory {name!r}")
    assert not hub.asked


def test_an_error_that_the_hub_did_not_cause_has_no_reason_of_the_hub():
    assert hub_reason(ValueError("bad value"), NAME) == ""


def test_a_dataset_is_named_as_one():
    class RepositoryNotFoundError(Exception):
        pass

    assert hub_reason(RepositoryNotFoundError(), "some/data", kind="dataset") == (
        "the Hub has no such dataset repository: check the spelling, or give a directory that exists"
    )
