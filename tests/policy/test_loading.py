"""Precision follows the hardware and is stated in one line; adapters and pads never resize a model."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from huggingface_hub import _CACHED_NO_EXIST
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from transformers import AutoTokenizer

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy import cpu
from bcft.policy import tokenizer as tokenizers
from bcft.policy.loading import (
    adapter_base,
    check_four_bits,
    choose_precision,
    load_model,
    load_policy,
    load_renderer,
    load_tokenizer,
    longest_row,
    lora_config,
    restore,
    save_policy,
    with_adapter,
)

ADAPTER = ModelSettings(use_peft=True, lora_r=4, lora_target_modules=("q_proj", "v_proj"))


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "m", llama_tokenizer(["a b"]))


def chosen(monkeypatch, hardware, **fields):
    capability = {"T4": (7, 5), "A100": (8, 0)}.get(hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: hardware == "M2")
    return choose_precision("bcft:tiny-init", ModelSettings(**fields))


@pytest.mark.parametrize(
    ("hardware", "fields", "device", "autocast", "weights"),
    [
        ("CPU", {}, "cpu", "no", torch.float32),
        ("T4", {}, "cuda", "fp16", torch.float32),
        ("A100", {}, "cuda", "bf16", torch.float32),
        ("M2", {}, "mps", "no", torch.float32),
        ("T4", {"use_peft": True}, "cuda", "fp16", torch.float16),
        ("A100", {"use_peft": True}, "cuda", "bf16", torch.bfloat16),
        ("A100", {"use_peft": True, "dtype": "float32"}, "cuda", "bf16", torch.float32),
        ("A100", {"bf16": False}, "cuda", "no", torch.float32),
        ("A100", {"use_cpu": True}, "cpu", "no", torch.float32),
        ("CPU", {"bf16": True}, "cpu", "bf16", torch.float32),
    ],
)
def test_precision_follows_the_hardware_unless_the_recipe_sets_it(
    monkeypatch, hardware, fields, device, autocast, weights
):
    """A T4 only emulates bf16, and `torch.cuda.is_bf16_supported()` counts that."""
    precision = chosen(monkeypatch, hardware, **fields)
    assert (precision.device, precision.autocast, precision.weights) == (device, autocast, weights)
    assert precision.why.startswith(device)
    assert "\n" not in precision.why


def test_a_missing_pad_token_is_taken_from_the_vocabulary_and_resizes_nothing(llama):
    tokenizer = llama_tokenizer(["a b"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(llama)
    policy = load_policy(llama, ModelSettings())
    assert load_tokenizer(llama, ModelSettings()).pad_token == "<|finetune_right_pad_id|>"
    assert policy.model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_four_bits_without_an_adapter_are_refused_for_training_only(llama, tmp_path):
    settings = ModelSettings(load_in_4bit=True)
    with pytest.raises(UsageError, match="set use_peft: true"):
        load_model(llama, settings, choose_precision(llama, settings))
    check_four_bits(llama, dataclasses.replace(settings, use_peft=True))
    save_policy(with_adapter(load_policy(llama, ADAPTER), ADAPTER, seed=0), tmp_path / "adapter")
    check_four_bits(str(tmp_path / "adapter"), settings)
    sampled = load_model(llama, settings, choose_precision(llama, settings), trainable=False)
    assert sampled.is_loaded_in_4bit


@pytest.mark.parametrize("name", ["/nowhere/at/all", "bcft:huge"])
def test_a_model_that_does_not_exist_is_refused_in_one_line_that_names_the_key(name):
    with pytest.raises(UsageError, match="model_name_or_path") as caught:
        load_policy(name, ModelSettings())
    assert "\n" not in str(caught.value)


def test_the_directory_of_a_run_that_was_not_made_yet_is_refused():
    with pytest.raises(UsageError, match="there is no directory 'runs/nowhere/bc': run the recipe that makes it first"):
        load_policy("runs/nowhere/bc", ModelSettings())


@pytest.mark.parametrize(("max_length", "longest"), [(None, 512), (64, 64), (9999, 512)])
def test_a_row_is_no_longer_than_max_length_and_the_models_positions(llama, max_length, longest):
    assert longest_row(llama, ModelSettings(), max_length) == longest


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), (("all-linear",), "all-linear"), (("q_proj", "v_proj"), {"q_proj", "v_proj"})]
)
def test_lora_targets_reach_peft_as_it_reads_them(given, expected):
    config = lora_config(ModelSettings(lora_target_modules=given, lora_modules_to_save=("lm_head",)))
    assert config.target_modules == expected
    assert config.modules_to_save == ["lm_head"]


def test_a_new_adapter_depends_on_the_seed_alone_and_changes_nothing(llama):
    bare = load_policy(llama, ADAPTER)
    ids = torch.tensor([[1, 2, 3]])
    before = bare.model(ids).logits
    first, again, other = (with_adapter(load_policy(llama, ADAPTER), ADAPTER, seed=seed) for seed in (0, 0, 1))
    weights = [[p for p in policy.model.parameters() if p.requires_grad] for policy in (first, again, other)]
    assert all(p.dtype == torch.float32 for p in weights[0])
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))
    assert torch.equal(first.model(ids).logits, before)
    assert with_adapter(first, ADAPTER, seed=5) is first
    assert with_adapter(bare, ModelSettings(), seed=5) is bare


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_an_adapter_of_a_large_model_computes_the_same_when_it_is_loaded_again(llama, tmp_path, monkeypatch, saved):
    """A run that resumes must have the products of the one that was interrupted, to end in the same bits."""
    monkeypatch.setattr(cpu, "SMALL", 1)
    settings = dataclasses.replace(ADAPTER, lora_modules_to_save=saved)
    fresh = with_adapter(load_policy(llama, settings), settings, seed=0)
    save_policy(fresh, tmp_path / "adapter")
    again = load_policy(str(tmp_path / "adapter"), settings)
    kinds = [{name: type(module) for name, module in policy.model.named_modules()} for policy in (fresh, again)]
    assert kinds[0] == kinds[1]
    assert cpu.OneDNNLinear in kinds[0].values()
    assert all(kind is torch.nn.Linear for name, kind in kinds[0].items() if name.endswith("lora_A.default"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(fresh.model.eval()(ids).logits, again.model.eval()(ids).logits)


@pytest.mark.parametrize("settings", [ModelSettings(), ADAPTER], ids=["full", "adapter"])
def test_saved_weights_are_restored_in_place(llama, tmp_path, settings):
    policy = with_adapter(load_policy(llama, settings), settings, seed=0)
    weights = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    saved = {name: p.detach().clone() for name, p in weights.items()}
    save_policy(policy, tmp_path / "saved")
    with torch.no_grad():
        for p in weights.values():
            p.add_(1.0)
    restore(policy, str(tmp_path / "saved"), settings)
    assert saved.keys() == weights.keys() != set()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


# Stop ids


@pytest.mark.parametrize(("eos", "more"), [(7, {7}), ([7, 9], {7, 9}), (None, set()), ("no file", set())])
def test_the_policy_stops_at_the_ids_of_its_generation_config_if_it_has_one(llama, eos, more):
    file = Path(llama, "generation_config.json")
    file.unlink()
    expected = set(load_renderer(llama, ModelSettings()).stop_ids)
    if eos != "no file":
        file.write_text(json.dumps({"eos_token_id": eos}))
    assert set(load_renderer(llama, ModelSettings()).stop_ids) == expected | more


def test_a_generation_config_that_cannot_be_read_is_an_error_of_one_line(llama):
    Path(llama, "generation_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"model_name_or_path: cannot load generation_config\.json of") as caught:
        load_renderer(llama, ModelSettings())
    assert "\n" not in str(caught.value)


def not_found(kind):
    """Return an error of the Hub without a response."""
    return kind.__new__(kind, "no such file")


@pytest.mark.parametrize(
    ("error", "cached", "offline", "refused"),
    [
        (RemoteEntryNotFoundError, None, False, False),
        (LocalEntryNotFoundError, None, False, True),
        (LocalEntryNotFoundError, _CACHED_NO_EXIST, False, False),
        (LocalEntryNotFoundError, None, True, False),
        (ConnectionError, None, False, True),
    ],
    ids=["the Hub has none", "no network", "no network, but known to be missing", "offline on purpose", "broken line"],
)
def test_only_a_missing_generation_config_is_the_default_and_a_network_error_is_reported(
    llama, monkeypatch, error, cached, offline, refused
):
    def download(*_, **__):
        raise not_found(error)

    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda *_: AutoTokenizer.from_pretrained(llama))
    monkeypatch.setattr(tokenizers, "hf_hub_download", download)
    monkeypatch.setattr(tokenizers, "try_to_load_from_cache", lambda *_, **__: cached)
    monkeypatch.setattr(tokenizers, "is_offline_mode", lambda: offline)
    if refused:
        with pytest.raises(UsageError, match=r"cannot load generation_config\.json of 'someone/model'"):
            load_renderer("someone/model", ModelSettings())
    else:
        assert load_renderer("someone/model", ModelSettings()).stop_ids


def test_the_generation_config_of_a_model_on_the_hub_is_read_from_its_download(llama, monkeypatch):
    Path(llama, "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    asked = []

    def download(*arguments, revision):
        asked.append((*arguments, revision))
        return str(Path(llama, "generation_config.json"))

    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda *_: AutoTokenizer.from_pretrained(llama))
    monkeypatch.setattr(tokenizers, "hf_hub_download", download)
    assert 7 in load_renderer("someone/model", ModelSettings(model_revision="v1")).stop_ids
    assert asked == [("someone/model", "generation_config.json", "v1")]


# Damaged adapters


@pytest.fixture
def adapter(llama, tmp_path):
    """A saved adapter's directory."""
    save_policy(with_adapter(load_policy(llama, ADAPTER), ADAPTER, seed=0), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot read"),
        ("[]", "has no base_model_name_or_path"),
        ('{"base_model_name_or_path": null}', "has no base_model_name_or_path"),
        (b"\xff", "cannot read"),
    ],
)
def test_an_adapters_configuration_that_names_no_base_is_an_error_of_one_line(tmp_path, text, reason):
    file = tmp_path / "adapter_config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=f"model_name_or_path: .*{reason}") as caught:
        adapter_base(str(tmp_path))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "torn", "of another rank", "unknown type"])
def test_a_damaged_adapter_is_an_error_of_one_line(adapter, damage):
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "torn":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        change = {"r": 8} if damage == "of another rank" else {"peft_type": "SOMETHING"}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
    with pytest.raises(UsageError, match="model_name_or_path: cannot load the adapter") as caught:
        load_policy(str(adapter), ModelSettings())
    assert "\n" not in str(caught.value)


def test_a_damaged_adapter_is_not_restored(adapter):
    policy = load_policy(str(adapter), ADAPTER)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="model_name_or_path: cannot load the adapter"):
        restore(policy, str(adapter), ADAPTER)
