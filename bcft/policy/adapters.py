"""LoRA adapters before weights are loaded: the settings, what they would train, whether a saved one fits its base."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.sources import adapter_errors, refuse_pickles

WEIGHTS = "adapter_model.safetensors"


def lora_config(settings: ModelSettings, *, tied: bool = False) -> Any:
    """Return the LoRA settings as peft's `LoraConfig`.

    tied: whether the model's embeddings and its head are the same weights. Then `lora_modules_to_save` trains them as
    one copy, whichever of the two it names: PEFT would train two that differ, of which a merged model keeps one.
    """
    # peft takes seconds to import, and most runs have no adapter.
    from peft import LoraConfig  # noqa: PLC0415
    from peft.utils.constants import EMBEDDING_LAYER_NAMES  # noqa: PLC0415

    # peft takes lists, not tuples, and reads `all-linear` or a regular expression from a string only; it would read one
    # module's name as an expression for whole paths, which matches nothing.
    targets, saved = (
        None if words is None else list(words)
        for words in (settings.lora_target_modules, settings.lora_modules_to_save)
    )
    # The only names by which PEFT knows tied weights.
    embeddings = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in saved or ())
    alone = targets is not None and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0])
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets and alone else targets,
        modules_to_save=saved,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        ensure_weight_tying=tied and embeddings,
    )


def is_tied(model: Any) -> bool:
    """Return whether a model's embeddings and its head are the same weights."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def add_adapter(model: Any, settings: ModelSettings) -> Any:
    """Add a new adapter of the settings to a model, which changes in place; return the whole, the adapter in fp32."""
    from peft import get_peft_model  # noqa: PLC0415 - as in lora_config

    adapted = get_peft_model(model, lora_config(settings, tied=is_tied(model)))
    saved_modules_in_fp32(adapted)
    return adapted


def saved_modules_in_fp32(model: Any) -> bool:
    """Turn whole modules of an adapter into fp32, as PEFT does with LoRA's own weights; return whether any was not."""
    low = [p for name, p in model.named_parameters() if ".modules_to_save." in name and p.dtype != torch.float32]
    for parameter in low:
        parameter.data = parameter.data.float()
    return bool(low)


def adapt_without_storage(model: Any, settings: ModelSettings) -> Any:
    """Add the adapter of the settings to a model without storage, which it changes in place; return the whole.

    Raises UsageError when a name in `lora_target_modules` or `lora_modules_to_save` matches no module, and for what
    would not train or not be tied any more.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: PLC0415 - as in lora_config

    tied = is_tied(model)
    names, config = [name for name, _ in model.named_modules()], lora_config(settings)
    targets, saved = config.target_modules, config.modules_to_save
    # A string is `all-linear` or a regular expression; peft itself refuses it when it matches nothing.
    for key, words in (
        ("lora_target_modules", () if isinstance(targets, str) else targets),
        ("lora_modules_to_save", saved),
    ):
        for word in sorted(words or ()):
            if not any(name == word or name.endswith(f".{word}") for name in names):
                raise UsageError(f"{key}: no module of the model is named {word!r}: {_choices(model)}")
    _check_saved_modules(model, saved or (), settings)
    try:
        with torch.device("meta"):  # PEFT's own `low_cpu_mem_usage` would take tied modules apart
            adapted = add_adapter(model, settings)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"lora_target_modules: {reason[:240].rstrip('.')}: {_choices(model)}") from error
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise UsageError(
            "lora_target_modules: TRL's loss reads the weights of the model's head themselves, so an adapter on it "
            "would not train: leave the head out, or give lora_modules_to_save: [lm_head]"
        )
    if tied and saved and not is_tied(adapted):
        raise UsageError(
            "lora_modules_to_save: the model's embeddings and its head are the same weights, and PEFT would train a "
            "copy of one of them: give lora_modules_to_save: [lm_head], which trains both as one"
        )
    return adapted


def _check_saved_modules(model: Any, saved: Collection[str], settings: ModelSettings) -> None:
    """Raise UsageError for whole modules that are to train and are in 4 bits."""
    head = model.get_output_embeddings()
    for word in sorted(saved if settings.load_in_4bit else ()):
        for name, module in model.named_modules():
            quantized = any(isinstance(part, torch.nn.Linear) and part is not head for part in module.modules())
            if quantized and (name == word or name.endswith(f".{word}")):
                raise UsageError(
                    f"lora_modules_to_save: {word} is in 4 bits, which cannot train: only embeddings, norms and the "
                    f"head are not; leave it out, or leave load_in_4bit out"
                )


def trained_parameters(model: Any, adapter: str, settings: ModelSettings) -> int:
    """Return how many parameters of an adapter train, on a model without storage, which it changes in place.

    adapter: a saved adapter's directory; '' for a new one by the settings.
    """
    if not adapter:
        adapted = adapt_without_storage(model, settings)
    else:
        from peft import PeftConfig, get_peft_model  # noqa: PLC0415 - as in lora_config

        with adapter_errors(adapter):
            saved = PeftConfig.from_pretrained(adapter)
            saved.inference_mode = False
            with torch.device("meta"):
                adapted = get_peft_model(model, saved)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def check_adapter(name: str, model: Any) -> None:
    """Raise UsageError when a saved adapter is damaged or does not fit its base; model: the base without storage.

    Only the header of its weights is read.
    """
    from peft import PeftConfig  # noqa: PLC0415 - as in lora_config

    refuse_pickles(name, stem="adapter_model")
    with adapter_errors(name):
        config = PeftConfig.from_pretrained(name)
        with safe_open(Path(name) / WEIGHTS, "pt") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
        modules = dict(model.named_modules())
        for key, shape in shapes.items():
            place, found, which = key.removeprefix("base_model.model.").partition(".lora_")
            if not found:
                continue
            module = modules.get(place)
            if module is None:
                raise ValueError(f"its base {config.base_model_name_or_path!r} has no module {place}")
            across = {"A.weight": 1, "B.weight": 0}.get(which)
            if (
                across is not None
                and isinstance(module, torch.nn.Linear)
                and shape[across] != module.weight.shape[across]
            ):
                raise ValueError(
                    f"its lora_{which[0]} of {place} is {shape[0]} x {shape[1]}, and the layer of its base "
                    f"{config.base_model_name_or_path!r} is {module.out_features} x {module.in_features}"
                )


def _choices(model: Any) -> str:
    """Return the names that linear layers have, for an error."""
    names = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and not name.rpartition(".")[2].isdigit()
        }
    )
    return f"use all-linear, or names among {', '.join(names[:12])}"
