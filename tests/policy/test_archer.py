"""The `bc_model.pt` of an Archer user becomes a model directory with the same logits, or is refused by name."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bcft import export
from bcft.config.schema import ModelSettings
from bcft.errors import DataError
from bcft.policy.archer import load_archer

IDS = torch.tensor([[0, 9, 17, 30, 44, 120, 7, 4]])


class Agent(nn.Module):
    """As Archer's: the policy is its `model`."""

    def __init__(self, model):
        super().__init__()
        self.model = model


class Parallel(nn.Module):
    """As DDP: what it wraps is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("base") / "m", llama_tokenizer(["a b"], vocabulary=300))


def trained(base, *, kind=LlamaForCausalLM, config=LlamaConfig, **keys):
    """Return a model of the base's configuration with other weights."""
    torch.manual_seed(1)
    return kind(config.from_pretrained(base, **keys)).eval()


def saved(path, model):
    """Save weights as Archer does: `torch.save` of `{"model_state_dict": ...}`."""
    torch.save({"model_state_dict": model.state_dict()}, path)
    return str(path)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def exported(path, base, tmp_path, **options):
    export.run(path, tmp_path / "out", model_name_or_path=base, use_cpu=True, **options)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, Agent, lambda model: Parallel(Agent(model)), lambda model: Agent(Parallel(model))],
    ids=["plain", "agent", "ddp of the agent", "agent of ddp"],
)
def test_the_logits_are_those_of_the_model_that_was_saved(base, tmp_path, wrap):
    model = trained(base)
    again = exported(saved(tmp_path / "bc_model.pt", wrap(model)), base, tmp_path)
    assert (logits(model) - logits(again)).abs().max() <= 1e-6
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}


def test_a_lora_adapter_in_the_file_is_added_to_the_weights(base, tmp_path):
    model = get_peft_model(
        trained(base), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    path = saved(tmp_path / "bc_model.pt", Parallel(Agent(model)))
    with pytest.raises(
        DataError, match=r"has a LoRA adapter, such as at model\.layers\.0\..*_proj.*: give --lora_alpha"
    ):
        exported(path, base, tmp_path)
    assert (logits(model) - logits(exported(path, base, tmp_path, lora_alpha=32.0))).abs().max() <= 1e-6


def test_tied_weights_and_buffers_of_an_older_transformers_load(tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=4, bos_token_id=0)
    gpt2 = tmp_path / "gpt2"
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    llama_tokenizer(["a b"], vocabulary=300).save_pretrained(gpt2)
    model = trained(gpt2, kind=GPT2LMHeadModel, config=GPT2Config)
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=8, target_modules=["c_proj"], fan_in_fan_out=True)
    ).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    state = {**adapted.state_dict(), "base_model.model.transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    torch.save({"model_state_dict": state}, tmp_path / "bc_model.pt")
    again = exported(str(tmp_path / "bc_model.pt"), str(gpt2), tmp_path, lora_alpha=8.0)
    assert (logits(adapted) - logits(again)).abs().max() <= 1e-6
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def refused(path, base):
    with pytest.raises(DataError) as caught:
        load_archer(Path(path), ModelSettings(base, use_cpu=True, dtype="float32"), lora_alpha=0.0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_and_shapes_that_do_not_fit_are_refused_by_name(base, tmp_path):
    state = {f"model.{name}": weight for name, weight in trained(base).state_dict().items()}
    missing = "model.model.layers.0.mlp.up_proj.weight"
    state["model.model.norm.weight"] = torch.ones(7)
    state["critic.base_lm.weight"] = torch.ones(1)
    torch.save({"model_state_dict": {k: v for k, v in state.items() if k != missing}}, tmp_path / "m.pt")
    message = refused(tmp_path / "m.pt", base)
    for words in (
        "model.layers.0.mlp.up_proj.weight is missing",
        "critic.base_lm.weight is no weight of the base",
        "model.norm.weight is 7, in the base 32",
    ):
        assert words in message


def test_a_pad_token_that_was_added_is_recognized(base, tmp_path):
    model = trained(base)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 1)
    message = refused(saved(tmp_path / "m.pt", model), base)
    words = f"model.embed_tokens.weight is {rows + 1} x 32, in the base {rows} x 32 (a pad token was added: give a base"
    assert words in message


def test_what_is_no_file_of_weights_is_refused_and_never_run(base, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"\x80\x04not a file")
    assert "not a file of weights that torch.save wrote" in refused(path, base)
    torch.save({"model_state_dict": Agent(nn.Linear(1, 1))}, path)
    assert "with more than tensors, which could run code" in refused(path, base)
    torch.save({"policy": {}}, path)
    assert "has no 'model_state_dict' with tensors, as Archer writes it; it holds policy" in refused(path, base)
