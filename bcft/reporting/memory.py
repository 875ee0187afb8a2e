"""A model's sizes, counted on its configuration, and the memory that training it and sampling from it take.

The model is built without storage, so its counts are exact. Memory is a sum that a reader can check, not a measurement.
"""

from dataclasses import dataclass

import torch

from bcft.config.schema import ModelSettings, TrainingSettings
from bcft.evaluation.divergence import CHUNK, ROW_TOKENS
from bcft.evaluation.held_out import LOSS_TOKENS
from bcft.generation.kv_cache import cached_numbers_per_token, rows_that_fit
from bcft.policy.adapters import trained_parameters
from bcft.policy.checks import check_four_bits
from bcft.policy.precision import Precision
from bcft.policy.shape import build_without_storage, context_length
from bcft.policy.sources import adapter_base, base_config, check_base, locate, refuse_pickles

TILE = (4096, 32768)
"""Tokens and vocabulary of the largest part of the logits that TRL's loss holds at once."""


@dataclass(frozen=True)
class Item:
    """A part of the memory."""

    name: str
    size: float
    """In bytes."""
    formula: str
    """How the size is calculated."""


@dataclass(frozen=True)
class Outline:
    """A model's sizes, counted on its configuration."""

    parameters: int
    """Of the model itself, without an adapter."""
    trainable: int
    adapter: bool
    linear: int
    """Weights of the linear layers without the head: those that `load_in_4bit` quantizes."""
    reads: int
    """Numbers that all these layers together read for one token."""
    writes: int
    """Numbers that they write."""
    layers: int
    hidden: int
    vocabulary: int
    cached: int
    """Numbers in the keys and values of one token."""
    context: int

    def __str__(self) -> str:
        if not self.adapter:
            return f"{self.parameters:,} parameters, all trained"
        share = 100 * self.trainable / (self.parameters + self.trainable)
        return f"{self.parameters:,} parameters, frozen, and {self.trainable:,} of an adapter, trained ({share:.1f} %)"


def outline(settings: ModelSettings) -> Outline:
    """Build the model without storage, with its adapter if it has one, and count.

    Raises UsageError for a configuration that does not define a model, and for an adapter that does not fit the model.
    """
    name = locate(settings.model_name_or_path, settings)
    check_base(name)
    base = adapter_base(name)
    refuse_pickles(base or name)
    check_four_bits(settings.model_name_or_path, settings)
    config = base_config(settings.model_name_or_path, settings)
    model = build_without_storage(base or name, config, settings)
    text, head, adapter = config.get_text_config(), model.get_output_embeddings(), bool(base or settings.use_peft)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return Outline(
        linear=sum(m.weight.numel() for m in linear),
        reads=sum(m.in_features for m in linear),
        writes=sum(m.out_features for m in linear),
        parameters=model.num_parameters(),
        # Counted last, because PEFT changes the model in place.
        trainable=trained_parameters(model, name if base else "", settings) if adapter else model.num_parameters(),
        adapter=adapter,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        cached=cached_numbers_per_token(config),
        context=context_length(config),
    )


def memory(
    shape: Outline,
    precision: Precision,
    *,
    model: ModelSettings,
    training: TrainingSettings,
    trained: int,
    sampled: int,
    held_out_loss: bool,
    room: int | None,
) -> dict[str, list[Item]]:
    """Estimate what one process holds: `always`, and in addition one of the other parts at a time.

    These are `training`, `sampling`, and `loss` or `divergence`, whichever of the two the run measures.

    Trained weights and gradients are fp32. Other weights are `precision.weights`, or have 4 bits: 64 of these share an
    fp32 scale, or an 8-bit scale that shares its own fp32 scale with 255 others. Autocast makes 16-bit copies of fp32
    weights. For the backward pass each linear layer saves its input and its output for each token of a micro-batch:
    under autocast it saves the input twice because the input is cast first, and with dropout before an adapter once
    more, with one byte each for the mask. (An input that layers share is counted for each, which roughly makes up for
    norms and activation functions.) With gradient checkpointing the saved tensors are those of one block, the inputs of
    all blocks, and the last block's output and norm. Logits are held in tiles, without autocast with four more tensors
    of their size. Sampling holds keys and values twice while they grow, and six fp32 rows of logits for each attempt.
    For the divergence from the base, the logits of a row are held twice, and four fp32 tensors of a part of them.

    trained, sampled: tokens of the longest example, and of the longest attempt with its prompt; held_out_loss: whether
    the run measures it, as `sft` does, or the divergence from the base, as `filtered` does; room: free bytes of the
    GPU, where attempts take half of what `always` leaves; None on a CPU, where attempts take 1 GiB.

    Not counted: allocator and driver, attention scores (sdpa keeps none), workspaces.
    """
    mixed, stored = precision.autocast != "no", precision.weights.itemsize if shape.adapter else 4
    compute, plain, always = 2 if mixed else stored, shape.parameters, []
    if model.load_in_4bit:
        each = 0.5 + (1 / 64 + 4 / (64 * 256) if model.use_bnb_nested_quant else 4 / 64)
        plain -= shape.linear
        always.append(Item("4-bit weights", each * shape.linear, f"{shape.linear:,} x {each:.4f} bytes, with scales"))
    always.append(Item("weights", stored * plain, f"{plain:,} x {stored} bytes"))
    if shape.adapter:
        always.append(Item("adapter", 4 * shape.trainable, f"{shape.trainable:,} x 4 bytes"))
    if mixed:
        single = shape.trainable if shape.adapter else 0
        single += shape.linear if stored == 4 and not model.load_in_4bit else 0
        always.append(Item("16-bit copies", 2 * single, f"{single:,} fp32 weights x 2 bytes, by autocast"))
    parts = {
        "always": always,
        "training": _training(shape, model, training, longest=trained, stored=stored, mixed=mixed),
    }

    width = min(sampled, shape.context)
    free = 2**30 if room is None else int(max(room - sum(item.size for item in always), 0)) // 2
    rows = rows_that_fit(cached=shape.cached, vocabulary=shape.vocabulary, tokens=width, free=free)
    each = 2 * shape.cached * stored
    cache = f"{rows} rows x {width:,} tokens x {each:,} bytes; more rows if there is room"
    parts["sampling"] = [
        Item("cache", rows * width * each, cache),
        Item("logits", 24 * rows * shape.vocabulary, f"{rows} rows x {shape.vocabulary:,} of vocabulary x 24 bytes"),
    ]
    return parts | (_loss(shape, compute) if held_out_loss else _divergence(shape, compute, width))


def _loss(shape: Outline, compute: int) -> dict[str, list[Item]]:
    return {"loss": [_logits("logits", LOSS_TOKENS, shape, compute + 8)]}


def _divergence(shape: Outline, compute: int, width: int) -> dict[str, list[Item]]:
    read = min(ROW_TOKENS, width)
    whole, part = _logits("logits", read, shape, 2 * compute), _logits("log-probabilities", min(CHUNK, read), shape, 16)
    return {"divergence": [whole, part]}


def _logits(name: str, tokens: int, shape: Outline, size: int) -> Item:
    formula = f"{tokens:,} tokens x {shape.vocabulary:,} of vocabulary x {size} bytes"
    return Item(name, tokens * shape.vocabulary * size, formula)


def free_memory(precision: Precision) -> int | None:
    """Return the free bytes of the GPU; None on other devices."""
    return torch.cuda.mem_get_info()[0] if precision.device == "cuda" else None


def _training(
    shape: Outline, model: ModelSettings, training: TrainingSettings, *, longest: int, stored: int, mixed: bool
) -> list[Item]:
    batch, width, compute = training.per_device_train_batch_size, min(longest, shape.context), 2 if mixed else stored
    saved, how = (shape.reads * (2 if mixed else 1) + shape.writes) * compute, ""
    if shape.adapter and model.lora_dropout:
        saved += shape.reads * (compute + 1)
    if training.gradient_checkpointing:
        saved, how = saved // shape.layers + (shape.layers + 2) * shape.hidden * stored, ", checkpointed"
    tokens, words, tile = min(batch * width, TILE[0]), min(shape.vocabulary, TILE[1]), 2 if mixed else compute + 16
    moments = 0 if training.optim in ("sgd", "adafactor") else 2 if "8bit" in training.optim else 8
    return [
        Item("gradients", 4 * shape.trainable, f"{shape.trainable:,} x 4 bytes"),
        Item("optimizer", moments * shape.trainable, f"{shape.trainable:,} x {moments} bytes, {training.optim}"),
        Item("activations", batch * width * saved, f"{batch} rows x {width:,} tokens x {saved:,} bytes{how}"),
        Item("logits", tile * tokens * words, f"{tokens:,} tokens x {words:,} of vocabulary x {tile} bytes, a tile"),
    ]
