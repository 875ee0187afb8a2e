"""What `export` writes is what was trained, loaded by plain transformers; what would not be is not written."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bcft import cli, export
from bcft.algorithms import export as exporting
from bcft.config.schema import ModelSettings
from bcft.errors import CheckpointError, StorageError, UsageError
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import interpolate, load_policy, save_policy, with_adapter
from bcft.runs.storage import read_json

LORA = ModelSettings(use_peft=True, lora_r=4, lora_dropout=0.1, lora_target_modules=("q_proj", "v_proj"), use_cpu=True)
IDS = torch.tensor([[0, 9, 17, 30, 44, 120, 7, 4]])
BOTH = ("embed_tokens", "lm_head")
KINDS = {
    "lora": (False, {}),
    "rslora": (False, {"use_rslora": True, "lora_r": 9}),
    "dora": (False, {"use_dora": True, "lora_target_modules": ("all-linear",)}),
    "on the embeddings": (True, {"lora_target_modules": ("q_proj", "embed_tokens")}),
    "embeddings and head": (False, {"lora_modules_to_save": BOTH}),
    "tied": (True, {"lora_modules_to_save": ("lm_head",), "use_dora": True}),
    "4-bit": (False, {"load_in_4bit": True, "lora_target_modules": ("all-linear",)}),
    "4-bit, tied, nested, dora": (
        True,
        {"load_in_4bit": True, "use_bnb_nested_quant": True, "use_dora": True, "lora_modules_to_save": ("lm_head",)},
    ),
}
"""Name -> whether the base's embeddings and head are tied, and the keys."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base whose embeddings and head are tied, and one whose are not."""
    tokenizer, paths = llama_tokenizer(["a b"], vocabulary=300), {}
    for tied in (False, True):
        paths[tied] = path = save_llama(tmp_path_factory.mktemp("base") / "m", tokenizer, hidden=64)
        config = LlamaConfig.from_pretrained(path, tie_word_embeddings=tied, initializer_range=0.2)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return paths


def adapted(base, settings, directory, *, scale=1.0):
    """Save an adapter that changes its base, as after training; return the policy."""
    policy = with_adapter(load_policy(base, settings), settings, seed=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    if scale != 1:
        interpolate(policy, base, scale, settings)
    directory.mkdir()
    save_policy(policy, directory)
    return policy


@torch.no_grad()
def logits(model):
    with sampling_mode(model):
        return model(input_ids=IDS).logits


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_is_one_plain_model_with_the_same_logits(bases, tmp_path, kind):
    tied, keys = KINDS[kind]
    settings = replace(LORA, **keys)
    policy = adapted(bases[tied], settings, tmp_path / "adapter")
    names = ("load_in_4bit", "use_bnb_nested_quant")
    export.run(tmp_path / "adapter", tmp_path / "out", **{name: keys[name] for name in names if name in keys})
    model = loaded(tmp_path / "out")
    bound = 1e-3 if settings.load_in_4bit else 1e-5
    assert (logits(model) - logits(policy.model)).abs().max() <= bound
    assert (logits(loaded(bases[tied])) - logits(model)).abs().max() > 0.1  # the adapter is in there
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    config = read_json(tmp_path / "out" / "config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] == tied
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.chat_template == policy.renderer.tokenizer.chat_template
    assert model.generation_config.eos_token_id == list(policy.renderer.stop_ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
