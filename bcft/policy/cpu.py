"""What makes a model fast on a CPU: oneDNN's matrix products, and memory that the process keeps.

torch takes MKL's products in fp32, and oneDNN's for compiled models only. MKL runs AVX2 code on AMD processors that
have AVX-512: oneDNN is more than twice as fast there, and no slower elsewhere (`tests/benchmarks/README.md`). Weights,
gradients and what is saved stay as they are.
"""

import ctypes
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
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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


def prepare(model: nn.Module) -> None:
    """Make a model on a CPU fast; one with few parameters is left as it is, since its weights are known to the bit.

    Linear layers use oneDNN where this torch has it; quantized ones keep their own products.
    """
    if sum(parameter.numel() for parameter in model.parameters()) < SMALL:
        return
    _keep_memory()
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


def _keep_memory() -> None:
    """Let glibc keep freed memory: each step would have the kernel clear gigabytes of pages that the last one freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
