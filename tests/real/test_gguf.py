"""A GGUF file is a model: its weights are dequantized, trained, and saved as an ordinary model."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.functions import odd
from helpers.gguf_files import make_package, write_gguf
from helpers.hub import ask, local_hub
from helpers.runs import LLAMA, LOOP, interrupted
from helpers.tiny import gsm8k, llama_tokenizer, save_llama, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft import evaluate, filtered, preview, sft
from bcft.algorithms import filtered_bc
from bcft.algorithms import sft as sft_algorithm
from bcft.cli import main
from bcft.config.schema import ModelSettings, TrainingSettings
from bcft.errors import UsageError
from bcft.policy import loading, sources
from bcft.policy.loading import (
    base_config,
    check_disk,
    check_model,
    load_policy,
    longest_row,
    restore,
    save_policy,
)
from bcft.reporting.memory import outline
from bcft.runs.storage import read_json

gguf = pytest.importorskip("gguf")
ROWS = gsm8k(Path(__file__).parents[1] / "data" / "gsm8k_50.jsonl")
IDS = torch.tensor([[1, 5, 9, 20, 77, 3]])
CHAT = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "It is 3."}]
KINDS = ["F32", "F16", "Q8_0", "Q4_1"]
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The directory of a random Llama."""
    tokenizer = llama_tokenizer([row["question"] for row in ROWS], vocabulary=300)
    return save_llama(tmp_path_factory.mktemp("original"), tokenizer, positions=1024)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of problems with solutions."""
    kept = [{**row, "question": f"Page {page}. {row['question'][:60]}"} for page in range(6) for row in ROWS]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", kept)


@pytest.fixture(params=["path", "directory", "package"])
def named(request, original, tmp_path, monkeypatch):
    """The keys of a recipe that name the same file in each of the three ways."""
    if request.param == "package":
        write_gguf(
            original, make_package(tmp_path / "site", "has_a_model", monkeypatch) / "tiny.Q8_0.gguf", kind="Q8_0"
        )
        return {"model_name_or_path": "package:has_a_model/tiny.Q8_0.gguf"}
    path = write_gguf(original, tmp_path / "files" / "tiny.Q8_0.gguf", kind="Q8_0")
    if request.param == "path":
        return {"model_name_or_path": path}
    write_gguf(original, tmp_path / "files" / "other.F32.gguf")
    return {"model_name_or_path": str(tmp_path / "files"), "gguf_file": "tiny.Q8_0.gguf"}


def loaded(keys):
    settings = ModelSettings(**keys)
    return load_policy(settings.model_name_or_path, settings)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def refused(keys, monkeypatch):
    """Return the line with which a model is refused before its weights are loaded."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UsageError) as caught:
        loaded(keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Loading and saving


def test_the_weights_of_an_f32_file_are_the_original_ones(original, tmp_path):
    ours = loaded({"model_name_or_path": write_gguf(original, tmp_path / "m.gguf")}).model.state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(original).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_an_ordinary_model_with_equal_logits_and_rendering(original, tmp_path, kind):
    policy = loaded({"model_name_or_path": write_gguf(original, tmp_path / "m.gguf", kind=kind)})
    assert policy.note.startswith(f"weights: m.gguf, {kind} GGUF, dequantized to float32, 0.0 M parameters")
    (tmp_path / "saved").mkdir()
    save_policy(policy, tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(policy.model), logits(model))
    ours = policy.renderer.tokenizer
    for text in (row["question"] for row in ROWS[:20]):
        assert ours(text).input_ids == tokenizer(text).input_ids
    assert ours.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert model.generation_config.eos_token_id == list(policy.renderer.stop_ids)
    again = loaded({"model_name_or_path": str(tmp_path / "saved")})
    assert again.note == ""
    assert again.renderer.fingerprint == policy.renderer.fingerprint


def test_what_is_loaded_is_what_plain_transformers_loads(original, tmp_path):
    policy = loaded({"model_name_or_path": write_gguf(original, tmp_path / "m.gguf", kind="Q4_1")})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.equal(logits(policy.model), logits(theirs))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert tokenizer.get_vocab() == policy.renderer.tokenizer.get_vocab()
    assert tokenizer.chat_template == policy.renderer.tokenizer.chat_template


def test_the_three_names_of_a_file_give_the_same_model(original, named, tmp_path):
    plain = loaded({"model_name_or_path": write_gguf(original, tmp_path / "plain.gguf", kind="Q8_0")})
    assert torch.equal(logits(loaded(named).model), logits(plain.model))
    assert "has_a_model" not in sys.modules


def test_restoring_the_base_gives_back_its_weights(named):
    policy = loaded(named)
    before = logits(policy.model)
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    restore(policy, named["model_name_or_path"], ModelSettings(**named))
    assert torch.equal(logits(policy.model), before)


def test_a_file_of_a_hub_repository_is_a_model_and_the_base_of_an_adapter(original, tmp_path, monkeypatch):
    content = Path(write_gguf(original, tmp_path / "tiny.gguf")).read_bytes()
    keys = {"model_name_or_path": "some/model", "gguf_file": "tiny.gguf"}
    adapter = ModelSettings(**keys, use_peft=True, lora_target_modules=("q_proj",))
    with local_hub(monkeypatch, tmp_path / "cache", files={"some/model": {"tiny.gguf": content}}):
        policy = loaded(keys)
        (tmp_path / "adapter").mkdir()
        save_policy(loading.with_adapter(load_policy("some/model", adapter), adapter, seed=0), tmp_path / "adapter")
    assert torch.equal(logits(policy.model), logits(AutoModelForCausalLM.from_pretrained(original)))
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == "some/model:tiny.gguf"
    # now from the cache
    ask(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache", offline=True)
    assert torch.equal(logits(loaded({"model_name_or_path": str(tmp_path / "adapter")}).model), logits(policy.model))
    assert "it is not on this machine" in refused(keys | {"gguf_file": "other.gguf"}, monkeypatch)


# Without weights


def test_a_file_is_read_once_in_a_process_whatever_is_checked(named, tmp_path, monkeypatch):
    settings, read = ModelSettings(**named), []
    name = settings.model_name_or_path
    reader = gguf.GGUFReader
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: read.append(path) or reader(path))
    for _ in range(2):
        check_model(name, settings)
        assert base_config(name, settings).hidden_size == 32
        assert longest_row(name, settings, None) == 1024
        check_disk(tmp_path / "run", name, settings, TrainingSettings(), copies=2)
        assert outline(settings).parameters == outline(settings).trainable > 0
    assert len(read) == 1


def test_a_file_that_has_changed_is_read_again(original, tmp_path):
    path = write_gguf(original, tmp_path / "m.gguf")
    settings = ModelSettings(model_name_or_path=path)
    assert longest_row(path, settings, None) == 1024
    other = save_llama(tmp_path / "other", AutoTokenizer.from_pretrained(original), positions=256)
    write_gguf(other, path)
    assert longest_row(path, settings, None) == 256


def test_preview_and_dry_run_need_no_weights(named, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    first, *_ = preview.run(named | {"dataset_name": rows, "max_length": 512})
    assert any(token["label"] != -100 for token in first["tokens"])
    words = [f"--{key}={value}" for key, value in named.items()]
    keys = LLAMA | {"num_rounds": 1, "prompts_per_round": 4, "num_generations": 2}
    words += [f"--{key}={json.dumps(value)}" for key, value in keys.items()]
    code = main(["filtered", *words, f"--dataset_name={rows}", f"--output_dir={tmp_path / 'run'}", "--dry-run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "parameters, all trained" in printed.out
    assert "unknown" not in printed.out


# Adapters


def test_an_adapter_trains_and_loads_in_plain_peft_as_its_card_says(named, rows, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(
        sft_algorithm, "save_policy", lambda policy, path: held.append(policy) or save_policy(policy, path)
    )
    keys = {key: LLAMA[key] for key in ("learning_rate", "max_completion_length", "per_device_train_batch_size")}
    keys |= {
        "eval_dev_problems": 4,
        "eval_test_problems": 4,
        "eval_test_samples": 2,
        "max_steps": 3,
        "success_func": "",
    }
    sft.run(None, output_dir=str(tmp_path / "run"), dataset_name=rows, quiet=True, **named, **ADAPTER, **keys)
    recorded = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded == str(Path(named["model_name_or_path"], named.get("gguf_file", "")))
    card = re.search(r"```python\n(.+?)```", (tmp_path / "run" / "README.md").read_text(), flags=re.S)[1]
    names: dict = {}
    exec(compile(card, "card", "exec"), names)
    assert torch.equal(logits(names["model"]), logits(held[-1].model))
    assert not torch.equal(logits(names["model"]), logits(loaded(named).model))
    ours = loaded({"model_name_or_path": str(tmp_path / "run")})
    assert torch.equal(logits(ours.model), logits(held[-1].model))
    assert ours.note == loaded(named).note  # the base's parameters alone are counted
    # The adapter names its base, so the recipe's `gguf_file` is not needed, and does no harm.
    summary = evaluate.run(
        None, model_name_or_path=str(tmp_path / "run"), against=recorded, dataset_name=rows,
        output_dir=str(tmp_path / "evaluated"), quiet=True, max_completion_length=16,
        eval_test_problems=4, eval_test_samples=2, eval_dev_problems=4,
    )  # fmt: skip
    assert summary["model"]["n"] == summary["against"]["n"] == 4


@pytest.mark.parametrize("adapter", [{}, ADAPTER])
@pytest.mark.slow
def test_rounds_are_resumed_and_the_best_is_evaluated(named, rows, tmp_path, monkeypatch, adapter):
    keys = LLAMA | LOOP | adapter | named | {"dataset_name": rows, "reward_funcs": [odd], "quiet": True}
    filtered.run(None, output_dir=str(tmp_path / "whole"), **keys)
    interrupted(monkeypatch, tmp_path / "cut", filtered_bc, "commit", when="after", **keys)
    filtered.run(None, output_dir=str(tmp_path / "cut"), **keys)
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    for number in (1, 2):
        place = Path(f"round_{number:03d}", "model", weights)
        if (tmp_path / "whole" / place).is_file():
            assert (tmp_path / "whole" / place).read_bytes() == (tmp_path / "cut" / place).read_bytes()
    assert read_json(tmp_path / "whole" / "metrics.json") == read_json(tmp_path / "cut" / "metrics.json")
    assert torch.isfinite(logits(loaded({"model_name_or_path": str(tmp_path / "cut" / "best")}).model)).all()


@pytest.mark.parametrize("name", ["m.gguf", "models/m.gguf", "./m.gguf"])
def test_the_hub_is_not_asked_about_the_base_of_an_adapter_that_is_a_path(original, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_gguf(original, name)
    settings = ModelSettings(model_name_or_path=name, use_peft=True, lora_target_modules=("q_proj",))
    (tmp_path / "adapter").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with local_hub(monkeypatch, tmp_path / "cache") as hub:
        save_policy(loading.with_adapter(load_policy(name, settings), settings, seed=0), tmp_path / "adapter")
        assert loaded({"model_name_or_path": "adapter"}).adapter
    assert not hub.asked
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(recorded) == Path(name)


def test_an_adapter_whose_file_is_gone_says_where_it_was(original, tmp_path, monkeypatch):
    path = Path(write_gguf(original, tmp_path / "m.gguf"))
    settings = ModelSettings(model_name_or_path=str(path), use_peft=True, lora_target_modules=("q_proj",))
    (tmp_path / "adapter").mkdir()
    save_policy(loading.with_adapter(load_policy(str(path), settings), settings, seed=0), tmp_path / "adapter")
    path.unlink()
    line = refused({"model_name_or_path": str(tmp_path / "adapter")}, monkeypatch)
    assert line.endswith(
        f"names the base '{path}', and there is no such file: move it back, or set base_model_name_or_path there to "
        f"where the base is now"
    )


# What is refused


def test_an_architecture_that_transformers_cannot_dequantize_is_refused(original, tmp_path, monkeypatch):
    path = write_gguf(original, tmp_path / "m.gguf", architecture="rwkv7")
    assert refused({"model_name_or_path": path}, monkeypatch) == (
        f"model_name_or_path: transformers cannot dequantize '{path}' (GGUF model with architecture rwkv7 is not "
        f"supported yet): give the model as safetensors"
    )


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.1, 0.5, 0.999])
def test_a_file_that_is_truncated_is_refused_wherever_it_ends(original, tmp_path, monkeypatch, share):
    path = Path(write_gguf(original, tmp_path / "m.gguf"))
    whole = path.read_bytes()
    path.write_bytes(whole[: max(5, int(share * len(whole)))])
    line = refused({"model_name_or_path": str(path)}, monkeypatch)
    assert line.startswith(f"model_name_or_path: '{path}' is damaged or truncated (")
    assert line.endswith("): download or copy it again")


@pytest.mark.parametrize("place", [4, 8, 16, 24, 40, 200])
def test_a_file_that_is_overwritten_is_refused(original, tmp_path, monkeypatch, place):
    path = Path(write_gguf(original, tmp_path / "m.gguf"))
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
    assert "is damaged or truncated" in refused({"model_name_or_path": str(path)}, monkeypatch)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "'{path}' does not fit into memory when it is dequantized: give a"),
        (OSError(5, "Input/output error"), "cannot load m.gguf of '{path.parent}': [Errno 5] Input/output error"),
    ],
)
def test_a_whole_file_is_not_called_damaged_where_memory_or_disk_fail(original, tmp_path, monkeypatch, error, words):
    path = Path(write_gguf(original, tmp_path / "m.gguf"))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sources.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UsageError) as caught:
        loaded({"model_name_or_path": str(path)})
    assert str(caught.value).startswith(f"model_name_or_path: {words.format(path=path)}")
    assert "\n" not in str(caught.value)


def test_four_bits_of_an_adapter_with_such_a_base_are_refused(original, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    path = write_gguf(original, tmp_path / "m.gguf")
    (tmp_path / "adapter").mkdir()
    settings = ModelSettings(model_name_or_path=path, use_peft=True, lora_target_modules=("q_proj",))
    save_policy(loading.with_adapter(load_policy(path, settings), settings, seed=0), tmp_path / "adapter")
    line = refused({"model_name_or_path": str(tmp_path / "adapter"), "load_in_4bit": True}, monkeypatch)
    assert line == (
        f"load_in_4bit: '{path}' is a GGUF file, whose weights are dequantized: save them as an ordinary model first, "
        f"or leave load_in_4bit out"
    )
