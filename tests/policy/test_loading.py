"""Precision follows the hardware and is stated in one line; adapters and pads never resize a model."""

import dataclasses

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.loading import (
    check_four_bits,
    choose_precision,
    load_model,
    load_policy,
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
