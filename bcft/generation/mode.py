"""The mode in which a model is sampled and evaluated, restored for training afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bcft.policy.precision import AUTOCAST_DTYPES


@contextmanager
def sampling_mode(model: Any, *, autocast: str = "no") -> Iterator[None]:
    """Put a model into eval mode, gradient checkpointing off, under the training's autocast; restore all afterwards.

    autocast: `no`, `bf16` or `fp16`. Before its first `train()` a Trainer's model is not under autocast: the first
    evaluation would compute in another precision than the later ones.
    """
    training, checkpointing = model.training, model.is_activation_checkpointing
    mixed = autocast != "no"
    model.eval()
    if checkpointing:
        model.activation_checkpointing_disable()
    if model.device.type == "cpu":
        for module in model.modules():
            # In eval mode bitsandbytes repacks 4-bit weights for CPUs with bf16, which rounds their scales for good.
            # The layer does not read the mode for anything else. PEFT's wrapper has the same name, and `train()` on it
            # would turn the adapter's dropout on.
            if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
                module.training = True
    try:
        with torch.autocast(model.device.type, dtype=AUTOCAST_DTYPES[autocast] if mixed else None, enabled=mixed):
            yield
    finally:
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train(training)
