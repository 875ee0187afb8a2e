"""A model's sizes, counted on its configuration, and the memory that training it and sampling from it would take.

The model is built without storage, so its counts are exact. Memory is a sum that a reader can check, not a measurement.
"""

from dataclasses import dataclass
from typing import Any

import torch

from bcft.config.loader import Recipe
from bcft.errors import UsageError
from bcft.generation.hf import rows_that_fit
from bcft.policy.loading import (
    Precision,
    adapter_base,
    base_config,
    check_four_bits,
    locate,
    lora_config,
    refuse_pickles,
)

TILE = (4096, 32768)
"""Tokens and vocabulary of the largest part of the logits that TRL's loss holds at once."""

Item = tuple[str, float, str]
"""A part of the memory: its name, its bytes, and how they come about."""
Lengths = tuple[int, int]
"""Tokens of the longest row that is trained on, and of the longest that may be sampled, prompt included."""


@dataclass(frozen=True)
class Outline:
    """A model's sizes, counted on its configuration."""

    parameters: int
    """Of the model itself, without an adapter."""
    trainable: int
    adapter: bool
    linear: int
    """Weights of the linear layers but the head: those that `load_in_4bit` quantises."""
    reads: int
    """Numbers that these layers read for one token, all of them together."""
    writes: int
    layers: int
    hidden: int
    vocabulary: int
    cached: int
    """Numbers that the keys and values of one token are."""
    context: int

    def __str__(self) -> str:
        if not self.adapter:
            return f"{self.parameters:,} parameters, all trained"
        share = 100 * self.trainable / (self.parameters + self.trainable)
        return (
            f"{self.parameters:,} parameters, and {self.trainable:,} of an adapter, which alone train ({share:.1f} %)"
        )


def outline(recipe: Recipe) -> Outline:
    """Build the model without storage, behind its adapter if it has one, and count.

    Raises UsageError for a configuration that makes no model, and for an adapter that does not fit it.
    """
    from transformers import AutoModelForCausalLM

    name = locate(recipe["model_name_or_path"])
    base = adapter_base(name)
    refuse_pickles(base or name)
    check_four_bits(recipe)
    config = base_config(recipe)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=bool(recipe["trust_remote_code"]))
    except (ValueError, KeyError, ImportError) as error:
        raise UsageError(f"model_name_or_path: {name!r} makes no model: {' '.join(str(error).split())}") from error
    text, head, adapter = config.get_text_config(), model.get_output_embeddings(), bool(base or recipe["use_peft"])
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Outline(
        linear=sum(m.weight.numel() for m in linear),
        reads=sum(m.in_features for m in linear),
        writes=sum(m.out_features for m in linear),
        parameters=model.num_parameters(),
        # Behind what counts the model itself, for PEFT puts its layers into it.
        trainable=_adapter(model, name if base else lora_config(recipe)) if adapter else model.num_parameters(),
        adapter=adapter,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        cached=2 * text.num_hidden_layers * heads * size,
        context=text.max_position_embeddings,
    )


def _adapter(model: Any, settings: Any) -> int:
    """Return how many parameters train behind an adapter; settings: PEFT's, or the directory of an adapter."""
    from peft import PeftConfig, get_peft_model

    if isinstance(settings, str):
        settings = PeftConfig.from_pretrained(settings)
        settings.inference_mode = False
    try:
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UsageError(f"lora_target_modules: {' '.join(str(error).split())}") from error
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def memory(
    recipe: Recipe, shape: Outline, precision: Precision, lengths: Lengths, *, room: int | None = None
) -> dict[str, list[Item]]:
    """Estimate what one process holds: `always`, and besides in `training`, in `sampling` and in `loss`, one at a time.

    What trains is fp32, and so are gradients; the rest is `precision.weights`, or numbers of 4 bits, 64 of which share
    an fp32 scale, or one of 8 bits that shares a scale with 255. Autocast makes 16-bit copies of what is fp32. For the
    backward pass each linear layer leaves what it reads and what it writes, for each token of a micro-batch; under
    autocast what it reads twice, for it is cast first, and with dropout before an adapter once more, with a byte each
    for its mask. (What several layers read is counted for each, which stands for norms and activation functions: right
    within a fifth for Llamas.) With gradient checkpointing these are one block's, and of all blocks their inputs, and
    the last one's output and norm. Logits are there as tiles, without autocast with four more tensors of their size.
    While attempts are sampled, keys and values are held twice, as they grow, and six fp32 rows of the vocabulary each.

    room: free bytes of the GPU, half of what is left of it is for attempts; None: 1 GiB is, as on a CPU.

    Not counted: what allocator and driver take, attention's scores (sdpa keeps none), workspaces.
    """
    mixed, stored = precision.autocast != "no", precision.weights.itemsize if shape.adapter else 4
    compute, plain, always = 2 if mixed else stored, shape.parameters, []
    if recipe["load_in_4bit"]:
        each = 0.5 + (1 / 64 + 4 / (64 * 256) if recipe["use_bnb_nested_quant"] else 4 / 64)
        plain -= shape.linear
        always.append(("4-bit weights", each * shape.linear, f"{shape.linear:,} x {each:.4f} bytes, scales included"))
    always.append(("weights", stored * plain, f"{plain:,} x {stored} bytes"))
    if shape.adapter:
        always.append(("adapter", 4 * shape.trainable, f"{shape.trainable:,} x 4 bytes"))
    if mixed:
        single = shape.trainable if shape.adapter else 0
        single += shape.linear if stored == 4 and not recipe["load_in_4bit"] else 0
        always.append(("16-bit copies", 2 * single, f"{single:,} fp32 weights x 2 bytes, by autocast"))
    found = {"always": always, "training": _training(recipe, shape, lengths[0], stored, mixed=mixed)}

    width = min(lengths[1], shape.context)
    free = 2**30 if room is None else int(max(room - sum(size for _, size, _ in always), 0)) // 2
    rows = rows_that_fit(cached=shape.cached, vocabulary=shape.vocabulary, tokens=width, free=free)
    each, wide = 2 * shape.cached * stored, f"{shape.vocabulary:,}"
    found["sampling"] = [
        ("cache", rows * width * each, f"{rows} rows x {width:,} tokens x {each:,} bytes; more rows if there is room"),
        ("logits", 24 * rows * shape.vocabulary, f"{rows} rows x {wide} of vocabulary x 24 bytes"),
    ]
    if recipe.command == "sft":
        size, how = compute + 8, "of vocabulary"
        found["loss"] = [("logits", 2048 * shape.vocabulary * size, f"2,048 tokens x {wide} {how} x {size} bytes")]
    return found


def _training(recipe: Recipe, shape: Outline, longest: int, stored: int, *, mixed: bool) -> list[Item]:
    batch, width, compute = recipe["per_device_train_batch_size"], min(longest, shape.context), 2 if mixed else stored
    left, how = (shape.reads * (2 if mixed else 1) + shape.writes) * compute, ""
    if shape.adapter and recipe["lora_dropout"]:
        left += shape.reads * (compute + 1)
    if recipe["gradient_checkpointing"]:
        left, how = left // shape.layers + (shape.layers + 2) * shape.hidden * stored, ", checkpointed"
    tokens, words, tile = min(batch * width, TILE[0]), min(shape.vocabulary, TILE[1]), 2 if mixed else compute + 16
    moments = 0 if recipe["optim"] in ("sgd", "adafactor") else 2 if "8bit" in recipe["optim"] else 8
    return [
        ("gradients", 4 * shape.trainable, f"{shape.trainable:,} x 4 bytes"),
        ("optimizer", moments * shape.trainable, f"{shape.trainable:,} x {moments} bytes, {recipe['optim']}"),
        ("activations", batch * width * left, f"{batch} rows x {width:,} tokens x {left:,} bytes{how}"),
        ("logits", tile * tokens * words, f"{tokens:,} tokens x {words:,} of vocabulary x {tile} bytes, a tile"),
    ]
