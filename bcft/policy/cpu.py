"""What makes a model fast on a CPU: oneDNN's matrix products, and memory that the process keeps.

torch takes MKL's products in fp32, and oneDNN's for compiled models only. MKL runs AVX2 code on AMD processors that
have AVX-512, which oneDNN uses (`tests/benchmarks/real_model.py` compares both). Weights, gradients and what is saved
stay as they are.
"""

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

SMALL = 2_000_000
"""Models with fewer parameters gain nothing, and run faster on one thread."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class OneDNNLinear(nn.Linear):
    """`nn.Linear` in fp32 on a CPU; under autocast and in other number formats it is `nn.Linear` itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return (..., N) for an input (..., K)."""
        plain = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not plain or not input.numel():
            return super().forward(input)
        if not torch.is_grad_enabled():
            return _product(input, self.weight, self.bias)
        output: torch.Tensor = _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Product(torch.autograd.Function):
    """x (..., K), weight (N, K), bias (N,) or None -> x @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # A frozen layer's input is not kept: with an adapter that is most of what a step would hold.
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, weight and bias, given that of the output (..., N); None where none is wanted."""
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t()) if wants_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def is_large(model: nn.Module) -> bool:
    """Return whether a model is on a CPU and has at least `SMALL` parameters, those of an adapter not counted.

    Smaller ones gain nothing from what is done for others, and their weights are known to the bit.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return False
    return sum(_count(parameter) for _, parameter in base_parameters(model)) >= SMALL


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are no adapter's, with their names."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            yield name, parameter


def _count(parameter: nn.Parameter) -> int:
    """Return how many numbers a parameter holds: of bitsandbytes' packed ones two in each byte."""
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)


def prepare(model: nn.Module) -> None:
    """Make the products of a large model fast; call it before an adapter is added or loaded.

    Linear layers use oneDNN where this torch has it; quantized ones keep their own products. An adapter's small layers
    stay those of torch, in a new adapter and in one that a run resumes with.
    """
    if not is_large(model) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


def keep_memory() -> None:
    """Let glibc keep freed memory: each step would have the kernel clear gigabytes of pages that the last one freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # glibc alone has it
    # An older glibc refuses so high a threshold. Set alone, the second would fix the first at its low default.
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, 2**30) == 1:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
