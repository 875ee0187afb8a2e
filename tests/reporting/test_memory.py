"""Sizes and memory of a planned run, against models that are really built and tensors that autograd really saves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import gsm8k, llama_tokenizer, save_llama, write_jsonl
from peft import get_peft_model

from bcft.config.loader import load
from bcft.generation.hf import HFEngine
from bcft.generation.kv_cache import rows_that_fit
from bcft.policy.loading import Precision, load_model, load_policy, lora_config, with_adapter
from bcft.reporting.memory import memory, outline
from bcft.types import Request, Sampling

DATA = Path(__file__).parents[1] / "data"
RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = str(DATA / "llama-3.2-3b")
TINY = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]"}
GPU = Precision("cuda", "bf16", torch.bfloat16, "a GPU")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return keys for a random two-layer Llama and 50 rows of GSM8K."""
    path = tmp_path_factory.mktemp("llama")
    rows = gsm8k(DATA / "gsm8k_50.jsonl")
    tokenizer = llama_tokenizer([row["question"] for row in rows], vocabulary=300)
    name = save_llama(path / "model", tokenizer, hidden=64, positions=1024)
    return {"model_name_or_path": name, "dataset_name": write_jsonl(path / "rows.jsonl", rows)}


def policy(config):
    return load_policy(config.model.model_name_or_path, config.model)


def adapted(config):
    return with_adapter(policy(config), config.model, seed=config.training.seed).model


def estimate(config, precision=GPU, *, trained=1024, sampled=1024):
    """Return the items of a run by part."""
    return memory(
        outline(config.model), precision, model=config.model, training=config.training, trained=trained,
        sampled=sampled, held_out_loss=config.command == "sft", room=None,
    )  # fmt: skip


def sizes(parts, part):
    return {item.name: item.size for item in parts[part]}


# Against what is really built


def test_parameters_are_those_of_the_loaded_model(llama):
    for keys in (TINY, llama):
        config = load("sft", None, keys)
        loaded = policy(config).model
        assert outline(config.model).parameters == loaded.num_parameters()
        assert outline(config.model).trainable == sum(p.numel() for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_an_adapter_is_counted_as_peft_makes_it_and_by_hand(llama, targets):
    config = load("sft", None, llama | {"use_peft": True, "lora_r": 4, "lora_target_modules": targets})
    trained = sum(p.numel() for p in adapted(config).parameters() if p.requires_grad)
    ends = tuple(targets) if targets != ["all-linear"] else ("_proj",)
    layers = [m for name, m in policy(config).model.named_modules() if name.endswith(ends)]
    assert outline(config.model).trainable == trained == sum(4 * (m.in_features + m.out_features) for m in layers)


def test_an_adapter_directory_is_counted_with_its_base(llama, tmp_path):
    config = load("sft", None, llama | {"use_peft": True, "lora_r": 2, "lora_target_modules": ["all-linear"]})
    adapted(config).save_pretrained(tmp_path)
    counted = outline(load("filtered", None, llama | {"model_name_or_path": str(tmp_path)}).model)
    assert counted == outline(config.model)
    assert counted.adapter


@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_base_is_estimated_at_the_bytes_it_takes(llama, nested):
    keys = {"load_in_4bit": True, "use_bnb_nested_quant": nested, "use_peft": True}
    config = load("sft", None, llama | keys)
    four = [m.weight for m in policy(config).model.modules() if type(m).__name__ == "Linear4bit"]
    states = [weight.quant_state for weight in four]
    held = sum(weight.numel() for weight in four) + sum(s.absmax.numel() * s.absmax.itemsize for s in states)
    held += sum(s.state2.absmax.numel() * 4 for s in states) if nested else 0
    shape = outline(config.model)
    assert shape.linear == 2 * sum(weight.numel() for weight in four)
    items = sizes(estimate(config, trained=8, sampled=8), "always")
    assert items["4-bit weights"] == pytest.approx(held, rel=0.01)
    assert items["weights"] == 2 * (shape.parameters - shape.linear)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", ["no", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_what_autograd_saves_within_a_fifth(tmp_path, adapter, autocast, checkpointed):
    """Weights that autocast copied are among what is saved, and an item of their own."""
    name = save_llama(tmp_path, llama_tokenizer(["a b"], vocabulary=270), hidden=96, layers=8)
    keys = {"use_peft": adapter, "lora_target_modules": ["all-linear"]} if adapter else {}
    config = load("sft", None, TINY | keys | {
        "model_name_or_path": name, "gradient_checkpointing": checkpointed, "per_device_train_batch_size": 4,
    })  # fmt: skip
    low = torch.bfloat16 if adapter and autocast == "bf16" else torch.float32
    precision = Precision("cpu", autocast, low, "")
    base = load_model(name, config.model, precision)
    whole = get_peft_model(base, lora_config(config.model)) if adapter else base
    if checkpointed:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
        whole.enable_input_require_grads()
    parameters = {p.untyped_storage().data_ptr() for p in whole.parameters()}
    kept = []
    ids = torch.randint(0, 200, (4, 256))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        whole.train()
        base.model(input_ids=ids, use_cache=False)
    saved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    measured = sum(size for place, size in saved.items() if place not in parameters)
    parts = estimate(config, precision, trained=256, sampled=256)
    copies = sizes(parts, "always").get("16-bit copies", 0)
    expected = sizes(parts, "training")["activations"] + copies
    if checkpointed:  # nothing is saved inside a block, and the block that is computed again is not there yet
        plain = replace(config, training=replace(config.training, gradient_checkpointing=False))
        block = sizes(estimate(plain, precision, trained=256, sampled=256), "training")["activations"] / 8
        expected -= block + copies
    assert expected == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("tokens", [40, 512])
def test_as_many_rows_are_sampled_together_as_the_engine_takes(llama, tokens):
    config = load("sft", None, llama)
    engine = HFEngine(policy(config).model, pad_id=0)
    request = Request(("a",), tuple(range(30)), Sampling(), (0,), tokens - 30)
    shape = outline(config.model)
    rows = rows_that_fit(cached=shape.cached, vocabulary=shape.vocabulary, tokens=tokens, free=2**30)
    assert rows == engine._rows_that_fit([request])
    cache = next(item for item in estimate(config, sampled=tokens)["sampling"] if item.name == "cache")
    assert cache.formula.startswith(f"{rows} rows x {tokens:,} tokens")


# Worked examples


def test_llama_3b_has_3_212_749_824_parameters_and_its_adapter_24_313_856():
    """28 x 16 x (q 6144 + k 4096 + v 4096 + o 6144 + gate 11264 + up 11264 + down 11264) = 24,313,856."""
    plain = outline(load("sft", None, TINY | {"model_name_or_path": SHAPE}).model)
    assert plain.parameters == plain.trainable == 3_212_749_824
    lora = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc.yaml", {"model_name_or_path": SHAPE})
    shape = outline(lora.model)
    assert (shape.parameters, shape.trainable) == (3_212_749_824, 24_313_856)
    assert shape.linear == 28 * 3072 * (2 * 3072 + 2 * 1024 + 3 * 8192)
    assert shape.parameters - shape.linear == 128_256 * 3072 + 57 * 3072  # embeddings, which are the head, and norms
    assert shape.cached * 2 == 114_688  # bytes of a token's keys and values
    assert str(shape) == "3,212,749,824 parameters, frozen, and 24,313,856 of an adapter, trained (0.8 %)"


def test_the_3b_model_in_bf16_in_4_bits_and_trained_in_full():
    full = estimate(load("sft", None, TINY | {"model_name_or_path": SHAPE}))
    assert sizes(full, "always")["weights"] == 4 * 3_212_749_824
    assert sizes(full, "training")["gradients"] + sizes(full, "training")["optimizer"] == 12 * 3_212_749_824
    lora = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc.yaml", {"model_name_or_path": SHAPE})
    held = sizes(estimate(lora), "always")
    assert (held["weights"], held["adapter"]) == (2 * 3_212_749_824, 4 * 24_313_856)
    four = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc_qlora.yaml", {"model_name_or_path": SHAPE})
    held = sizes(estimate(four), "always")
    assert held["4-bit weights"] == pytest.approx(2_818_572_288 * 0.5159, rel=1e-4)
    assert held["weights"] == 2 * 394_177_536


def test_checkpointing_an_8_bit_optimizer_and_shorter_rows_take_less():
    def training(tokens=1024, **keys):
        config = load("sft", None, TINY | {"model_name_or_path": SHAPE} | keys)
        parts = estimate(config, Precision("cpu", "bf16", torch.float32, ""), trained=tokens, sampled=tokens)
        return sum(item.size for item in parts["training"])

    most = training()
    assert training(gradient_checkpointing=True) < most
    assert training(optim="adamw_bnb_8bit") == most - 6 * 3_212_749_824
    assert training(512) < most


def test_what_a_run_measures_with_the_logits_of_whole_rows_has_memory_of_its_own():
    """What a policy forgets takes a row's logits in bf16 twice, and four fp32 tensors of a part of them."""
    assert estimate(load("sft", None, TINY)).keys() == {"always", "training", "sampling", "loss"}
    llama = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc.yaml", {"model_name_or_path": SHAPE})
    parts = estimate(llama)
    assert parts.keys() == {"always", "training", "sampling", "divergence"}
    assert sizes(parts, "divergence") == {
        "logits": 1024 * 128_256 * 4,
        "log-probabilities": 256 * 128_256 * 16,
    }
    assert sizes(estimate(llama, sampled=100), "divergence")["logits"] == 100 * 128_256 * 4
