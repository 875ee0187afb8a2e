"""What a model's configuration says without its weights: positions, and whether the engine can sample it."""

import copy
import inspect
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.sources import first_line

WITHOUT_POSITIONS = 2048
"""The context of a model whose configuration gives none: BLOOM computes positions, and was trained on this length."""
_INSTEAD = "use another model, such as Llama, Qwen3, Gemma 3, OLMo 2 or gpt-oss"
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
"""What the engine can select rows of."""
_OWN_STATE = ("minimax",)
_IGNORES_PADDING = ("recurrent_gemma",)
"""Their classes do not show it; a test compares these models with transformers' `generate`."""


def context_length(config: Any) -> int:
    """Return how many tokens a model reads at most, given its configuration."""
    text = config.get_text_config()
    given = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return int(given or getattr(text, "seq_length", None) or WITHOUT_POSITIONS)


def check_engine(name: str, config: Any) -> None:
    """Raise UsageError for a model that the engine cannot sample, with what to use instead.

    The engine reads a batch of prompts padded on the left, and selects rows of transformers' cache. The cache made from
    the configuration shows which states a model keeps; its class shows whether it takes that cache and a mask.
    """
    label = f"model_name_or_path: {name!r} ({config.model_type})"
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if known is None and not remote:
        raise UsageError(f"{label} is not a causal language model that transformers knows: {_INSTEAD}")
    model = known[0] if isinstance(known, (tuple, list)) else known
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if encoder or getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{label} has an encoder, which reads the text in both directions: {_INSTEAD}")
    takes = {"past_key_values", "attention_mask"} if model is None else inspect.signature(model.forward).parameters
    if not {"past_key_values", "attention_mask"} <= set(takes):
        raise UsageError(f"{label} takes no `past_key_values`, or no mask of padded tokens: {_INSTEAD}")
    try:
        layers = DynamicCache(config=config).layers
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{label}: transformers makes no cache for its configuration: {first_line(error)}") from error
    if unknown := sorted({type(layer).__name__ for layer in layers if type(layer) not in _LAYERS}):
        raise UsageError(f"{label} caches what the engine cannot share between attempts ({unknown[0]}): {_INSTEAD}")
    linear = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
    if (getattr(model, "_is_stateful", False) and not linear) or config.model_type in _OWN_STATE:
        raise UsageError(f"{label} keeps a state of its own, apart from transformers' cache: {_INSTEAD}")
    if config.get_text_config().model_type in _IGNORES_PADDING:
        raise UsageError(f"{label} does not mask padded tokens, so a batch would change its answers: {_INSTEAD}")


def build_without_storage(name: str, config: Any, settings: ModelSettings, *, attention: bool = False) -> Any:
    """Return the model that a configuration defines, without storage for its weights.

    attention: with `attn_implementation`, which a machine that only plans need not have. Raises UsageError for a
    configuration that does not define a model.
    """
    if attention and settings.attn_implementation:
        _check_attention(config, settings)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model_name_or_path: {name!r} does not define a model: {reason}") from error


def _check_attention(config: Any, settings: ModelSettings) -> None:
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                trust_remote_code=settings.trust_remote_code,
                attn_implementation=settings.attn_implementation,
            )
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        raise UsageError(f"attn_implementation: {' '.join(str(error).split())[:240]}") from error
