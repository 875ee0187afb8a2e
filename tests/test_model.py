"""Precision follows the hardware and is said in one line; adapters and pads never resize a model."""

import pytest
import torch
from tiny import llama_tokenizer, save_llama

from bcft.config.loader import load
from bcft.errors import UsageError
from bcft.policy.loading import choose_precision, load_model, load_policy, load_tokenizer

KEYS = {"model_name_or_path": "bcft:tiny-init", "dataset_name": "bcft:arithmetic"}


def chosen(monkeypatch, hardware, **keys):
    capability = {"T4": (7, 5), "A100": (8, 0)}.get(hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: hardware == "M2")
    return choose_precision(load("sft", None, KEYS | keys))


@pytest.mark.parametrize(
    ("hardware", "keys", "device", "autocast", "weights"),
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
def test_precision_follows_the_hardware_unless_told(monkeypatch, hardware, keys, device, autocast, weights):
    """A T4 only emulates bf16, and `torch.cuda.is_bf16_supported()` counts that."""
    found = chosen(monkeypatch, hardware, **keys)
    assert (found.device, found.autocast, found.weights) == (device, autocast, weights)
    assert found.why.startswith(device)
    assert "\n" not in found.why


def test_a_missing_pad_token_is_taken_from_the_vocabulary_and_resizes_nothing(tmp_path):
    tokenizer = llama_tokenizer(["a b"])
    directory = save_llama(tmp_path / "m", tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    recipe = load("sft", None, KEYS | {"model_name_or_path": directory})
    policy = load_policy(recipe)
    assert load_tokenizer(recipe).pad_token == "<|finetune_right_pad_id|>"
    assert policy.model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_four_bits_without_an_adapter_are_refused(tmp_path):
    directory = save_llama(tmp_path / "m", llama_tokenizer(["a b"]))
    recipe = load("sft", None, KEYS | {"model_name_or_path": directory, "load_in_4bit": True})
    with pytest.raises(UsageError, match="set use_peft: true"):
        load_model(recipe, choose_precision(recipe))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "bcft:huge"])
def test_a_model_that_is_not_there_is_told_with_its_key_in_one_line(name):
    with pytest.raises(UsageError, match="model_name_or_path") as found:
        load_policy(load("sft", None, KEYS | {"model_name_or_path": name}))
    assert "\n" not in str(found.value)


def test_a_run_that_was_not_made_yet_is_told_at_once():
    recipe = load("sft", None, {"model_name_or_path": "runs/nowhere/bc", "dataset_name": "bcft:grid-walk"})
    with pytest.raises(UsageError, match="there is no directory 'runs/nowhere/bc': run first what makes it"):
        load_policy(recipe)
