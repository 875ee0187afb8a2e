"""Where and in which number formats a run computes, chosen from the hardware."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.sources import adapter_base

AUTOCAST_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`Precision.autocast` -> the number format that matrices are multiplied in."""


@dataclass(frozen=True)
class Precision:
    """Where and in which number formats a run computes."""

    device: str
    autocast: str
    """`no`, `bf16` or `fp16`: the mixed precision of training and of sampling alike."""
    weights: torch.dtype
    """fp32 for a full model that trains, since a bf16 weight loses most small updates; else the frozen base's."""
    why: str
    """One line for the user."""


def choose_precision(name: str, settings: ModelSettings) -> Precision:
    """Choose device and precision from the hardware; the settings `bf16`, `fp16`, `dtype` and `use_cpu` override it."""
    frozen = bool(settings.use_peft or adapter_base(name))
    if torch.cuda.is_available() and not settings.use_cpu:
        device, gpu = "cuda", torch.cuda.get_device_name()
        # `is_bf16_supported()` counts emulation, which a T4 does slowly; compute capability 8.0 is Ampere.
        native = torch.cuda.get_device_capability() >= (8, 0)
        autocast, reason = ("bf16", f"{gpu} has bf16") if native else ("fp16", f"{gpu} has no native bf16")
    elif torch.backends.mps.is_available() and not settings.use_cpu:
        device, autocast, reason = "mps", "no", "Apple GPU: fp32 is the safe choice"
    else:
        device, autocast, reason = "cpu", "no", f"CPU with {torch.get_num_threads()} threads"
    for mode, wanted in (("bf16", settings.bf16), ("fp16", settings.fp16)):
        if wanted:
            autocast, reason = mode, f"{mode}: true in the recipe"
        elif wanted is False and autocast == mode:
            autocast, reason = "no", f"{mode}: false in the recipe"
    weights = AUTOCAST_DTYPES[autocast] if frozen else torch.float32
    if settings.dtype != "auto":
        weights = getattr(torch, settings.dtype)
    numbers = str(weights).removeprefix("torch.")
    mixed = "" if autocast == "no" else f", {autocast} autocast"
    kind = "frozen base" if frozen else "weights"
    return Precision(device, autocast, weights, f"{device}, {numbers} {kind}{mixed} ({reason})")


def check_dtype(name: str, settings: ModelSettings) -> None:
    """Raise UsageError for a full model to be trained in 16 bits: the trainer keeps trained weights in fp32."""
    if settings.dtype in ("auto", "float32") or settings.use_peft or adapter_base(name):
        return
    mode = "bf16" if settings.dtype == "bfloat16" else "fp16"
    raise UsageError(
        f"dtype: {settings.dtype} weights lose most small updates, so a full model is trained and saved in float32: "
        f"leave dtype out, and set {mode}: true to multiply in {mode}; with use_peft: true, dtype is the frozen base's"
    )


def check_saved_modules(precision: Precision) -> None:
    """Raise UsageError when whole modules of an adapter, which train in fp32, do not fit the numbers of its base."""
    if precision.autocast == "no" and precision.weights != torch.float32:
        numbers = str(precision.weights).removeprefix("torch.")
        raise UsageError(
            f"lora_modules_to_save: whole modules train in float32, and the frozen base in {numbers} cannot be "
            f"multiplied with them: leave dtype out, or set bf16: true"
        )


@contextmanager
def cpu_threads() -> Iterator[None]:
    """Restore torch's number of threads afterwards: loading a small model sets it to one."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
