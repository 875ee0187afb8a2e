"""An adapter merged into its base: one ordinary model. A 4-bit base is dequantized first, never merged into."""

from typing import Any

import torch

from bcft.config.schema import ModelSettings
from bcft.errors import CheckpointError, UsageError
from bcft.policy.adapters import is_tied
from bcft.policy.loading import load_adapter, load_model
from bcft.policy.precision import Precision
from bcft.policy.sources import adapter_base, locate


def load_dequantized(name: str, settings: ModelSettings, precision: Precision) -> Any:
    """Load a model in 4 bits and turn its weights into those that its layers multiply with; with its adapter, if any.

    The adapter is added afterwards: on a 4-bit layer, merging would round the sum to 4 bits again.
    """
    source = locate(name, settings)
    base = adapter_base(source)
    model = load_model(base or source, settings, precision, trainable=False).dequantize(torch.float32)
    return load_adapter(model, source, trainable=False) if base else model


def merge(model: Any, name: str) -> Any:
    """Return the base of an adapter with the adapter in its weights; the model changes in place. name: for errors.

    Raises UsageError for an adapter that cannot be merged, CheckpointError when a weight would not be finite.
    """
    if not hasattr(model, "peft_config"):
        return model
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()})
    if not hasattr(model.base_model, "merge_and_unload"):
        raise UsageError(f"{name}: an adapter of the kind {', '.join(kinds)} cannot be merged")
    base = model.get_base_model()
    tied = base.config.get_text_config().tie_word_embeddings
    _untie(base)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error
    if tied:
        _tie(merged)
    return merged


def _untie(base: Any) -> None:
    """Give the head weights of its own if an adapter is on it or on the embeddings that it shares them with.

    The adapter acts at its own place; merged into weights that both have, it would act at the other as well.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - peft takes seconds to import

    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if is_tied(base) and (isinstance(head, BaseTunerLayer) or isinstance(embeddings, BaseTunerLayer)):
        own = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        own.weight = torch.nn.Parameter(own.weight.detach().clone())


def _tie(model: Any) -> None:
    """Make embeddings and head of a tied model one again, or say in its configuration that they differ.

    Whole modules that train beside an adapter may be copies of tied weights.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    same = torch.equal(head.weight, embeddings.weight)
    if same:
        head.weight = embeddings.weight
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = same
