"""The frozen base of an adapter as a directory of its own, without the adapter and without quantization."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bcft.policy.loading import Policy


@torch.no_grad()
def save_base(policy: Policy, directory: Path) -> None:
    """Write a policy's base and tokenizer into a directory, as the numbers that its layers multiply with."""
    base = policy.model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(base)(config)
    plain.save_pretrained(directory, state_dict=dict(_weights(base, set(plain.state_dict()))))
    policy.renderer.tokenizer.save_pretrained(directory)


def _weights(base: Any, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the base's tensors under the names of a model without an adapter."""
    dequantized = {
        f"{name}.weight": module.weight for name, module in base.named_modules() if hasattr(module, "quant_state")
    }
    for name, tensor in base.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if plain in names:
            yield plain, _dequantized(dequantized[name]) if name in dequantized else tensor


def _dequantized(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - most bases are not quantized

    numbers: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return numbers
