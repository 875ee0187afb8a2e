"""An adapter, a round or a foreign state dict as one ordinary model, which is compared with what it came from."""

import dataclasses
import gc
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bcft.config.schema import ModelSettings
from bcft.errors import CheckpointError, StorageError, UsageError
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import Policy, adapter_base, load_model, load_policy, locate, save_policy
from bcft.policy.sources import adapter_errors
from bcft.policy.state_dict import take_state_dict

BOUND, BOUND_OF_FOUR_BITS = 1e-5, 1e-3
"""The most that logits may differ in fp32, as a share of the largest one, and of 1 if that is larger."""
_POSITIONS = 32
"""Of each prompt, from its end."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from those of what it came from."""

    what: str
    """How the weights were made, in words."""
    size: int
    """Bytes of weights."""
    apart: float
    """The largest difference of a logit in fp32."""
    rounded: float
    """The same after the weights were rounded to the numbers that are written."""
    largest: float
    """The largest logit, to compare with."""


def export_model(
    name: str, settings: ModelSettings, output: Path, *, prompts: Sequence[Any], dtype: str, weights: Path | None = None
) -> Exported:
    """Write one ordinary model directory: adapters are merged, 4-bit bases dequantized before.

    name: a model, or an adapter with its base; settings: of the run that made it, which say how its base is quantized;
    prompts: texts or messages; dtype: of the weights that are written; weights: a file of `torch.save` with the weights
    of a model like this one.

    The model is written beside `output` and takes its name when it has proved equal. Raises CheckpointError if it has
    not, StorageError when the disk is too small, and the errors of loading.
    """
    settings = dataclasses.replace(settings, dtype="float32", bf16=False, fp16=False)
    policy = load_policy(name, settings, trainable=False)
    if weights:
        take_state_dict(policy.model, weights)
    rows = policy.renderer.prompts(list(prompts), [{}] * len(prompts))
    before = _logits(policy.model, rows)
    policy, what = _whole(policy, name, settings)
    apart, largest = _apart(before, _logits(policy.model, rows)), max(float(logits.abs().max()) for logits in before)
    bound = (BOUND_OF_FOUR_BITS if settings.load_in_4bit else BOUND) * max(1.0, largest)
    _refuse(apart, bound, what)
    policy.model.to(getattr(torch, dtype))
    size = sum(parameter.nbytes for parameter in policy.model.parameters())
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < 1.05 * size:
        raise StorageError(f"output_dir: the model takes {size / 1e9:.1f} GB, and {output.parent} has {free / 1e9:.1f}")
    aside = output.with_name(f".{output.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        save_policy(policy, aside)
        device = policy.model.device
        del policy
        gc.collect()
        written = AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32, use_safetensors=True).to(device)
        rounded = _apart(before, _logits(written, rows))
        if dtype == "float32":
            _refuse(rounded, bound, f"{what} and written")
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(what, size, apart, rounded, largest)


def _whole(policy: Policy, name: str, settings: ModelSettings) -> tuple[Policy, str]:
    """Return a policy whose model is an ordinary one, and how it was made."""
    if not policy.adapter:
        return policy, "full weights"
    config, model = policy.model.get_base_model().generation_config, policy.model
    if settings.load_in_4bit:  # merged into 4 bits, the adapter would be rounded to them
        from peft import PeftModel  # noqa: PLC0415 - peft takes seconds to import, and most runs have no adapter

        source = locate(name, settings)
        base = load_model(str(adapter_base(source)), settings, policy.precision, trainable=False)
        with adapter_errors(source):
            model = PeftModel.from_pretrained(base.dequantize(), source)
    _part_from_head(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UsageError(f"{name}: the adapter cannot be merged: {str(error).splitlines()[0]}") from error
    merged.generation_config = config
    _separate(merged)
    what = "4-bit base dequantized, adapter merged" if settings.load_in_4bit else "adapter merged"
    return dataclasses.replace(policy, model=merged), what


def _part_from_head(model: Any) -> None:
    """Give the head a weight of its own where a LoRA of tied embeddings would be merged into both."""
    base = model.get_base_model()
    head, adapted = base.get_output_embeddings(), getattr(base.get_input_embeddings(), "base_layer", None)
    if head is not None and adapted is not None and head.weight is adapted.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _separate(model: Any) -> None:
    """Keep both weights where an adapter trained embeddings or head of a model that has one weight for both."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    if head is None or not text.tie_word_embeddings or head.weight is embeddings.weight:
        return
    if torch.equal(head.weight, embeddings.weight):
        head.weight = embeddings.weight
        return
    text.tie_word_embeddings = model.config.tie_word_embeddings = False


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits `(at most 32, vocabulary)` at the ends of rows, in fp32 on the CPU."""
    with sampling_mode(model):
        return [
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
            .logits[0, -_POSITIONS:]
            .float()
            .cpu()
            for ids in rows
        ]


def _apart(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def _refuse(apart: float, bound: float, what: str) -> None:
    if not apart <= bound:  # a difference that is no number is refused too
        raise CheckpointError(
            f"{what}: a logit differs by {apart:.1e} from that of the model it came from, more than {bound:.1e}, so "
            f"nothing was exported: report it with the model's name"
        )
