"""The weights of Archer's behavior cloning: a `torch.save` of `{"model_state_dict": ...}`, such as `bc_model.pt`.

The names in it begin with those of what the model was wrapped in: `module.` by DDP, `model.` by the agent,
`base_model.model.` by PEFT. A LoRA adapter's parts are added to the weights; its `lora_alpha` is not in the file. This
is the one place that calls `torch.load`, with `weights_only=True`: nothing in a file runs as code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from bcft.config.schema import ModelSettings
from bcft.errors import DataError
from bcft.policy.checks import check_model
from bcft.policy.loading import Policy, stopping
from bcft.policy.precision import choose_precision
from bcft.policy.shape import build_without_storage
from bcft.policy.sources import base_config

KEY = "model_state_dict"
_WRAPPERS = {"module", "model", "base_model", "_orig_mod"}
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.\w+\.weight")
_BASE_LAYER = re.compile(r"(.+)\.base_layer\.(\w+)")
_SAVED_MODULE = re.compile(r"(.+)\.modules_to_save\.\w+\.(\w+)")
_ORIGINAL = re.compile(r".+\.original_module\.\w+")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$",)
"""Of earlier versions of transformers, which saved what they compute."""


def load_archer(file: Path, settings: ModelSettings, *, lora_alpha: float) -> tuple[Policy, torch.dtype]:
    """Return the policy in a file in fp32, and the number format of its weights.

    settings: name the base: its configuration, tokenizer and template; its weights are not read. lora_alpha: 0.0 where
    none was given. Raises DataError for a file that is not Archer's, or whose names and shapes are not the base's.
    """
    name = settings.model_name_or_path
    checked = check_model(name, settings, trainable=False)
    config = base_config(name, settings)
    planned = build_without_storage(name, config, settings)
    weights = _fitted(file, _read(file), planned, name=name, lora_alpha=lora_alpha)
    kinds = {weight.dtype for weight in weights.values()}
    stored = kinds.pop() if len(kinds) == 1 else torch.float32
    model = type(planned).from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.generation_config = stopping(checked)
    precision = choose_precision(name, settings)
    return Policy(model.to(precision.device), checked.renderer, precision), stored


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by name."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise DataError(
            f"{file}: not a file of weights that torch.save wrote, or one with more than tensors, which could run code"
        ) from error
    weights = content.get(KEY) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        held = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise DataError(f"{file}: has no {KEY!r} with tensors, as Archer writes it; it holds {held:.200}")
    return {str(key): weight for key, weight in weights.items()}


def _fitted(
    file: Path, weights: Mapping[str, torch.Tensor], model: Any, *, name: str, lora_alpha: float
) -> dict[str, torch.Tensor]:
    """Return the weights under the model's own names. Raises DataError that names each that does not fit."""
    expected = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    own = _merged(file, _unwrapped(weights, next(iter(expected))), model, lora_alpha)
    ignored = [*_OLD_BUFFERS, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    own = {key: w for key, w in own.items() if key in expected or not any(re.search(i, key) for i in ignored)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    findings = [f"{key} is missing" for key in expected if key not in own and key not in tied]
    findings += [f"{key} is no weight of the base" for key in own if key not in expected]
    findings += [
        f"{key} is {_by(tuple(w.shape))}, in the base {_by(expected[key])}{_padding(w, expected[key])}"
        for key, w in own.items()
        if key in expected and tuple(w.shape) != expected[key]
    ]
    if findings:
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        raise DataError(f"{file}: does not fit {name!r}: {'; '.join(findings[:5])}{more}")
    _check_tied(file, own, model)
    return own


def _unwrapped(weights: Mapping[str, torch.Tensor], first: str) -> dict[str, torch.Tensor]:
    """Return the weights without the names of what wrapped the model; first: a name that the model itself has."""
    anchors = (
        first,
        first.replace(".weight", ".base_layer.weight"),
        first.replace(".weight", ".original_module.weight"),
    )
    for key in weights:
        for anchor in anchors:  # such as `model.embed_tokens.weight`, behind `module.model.`
            before = key.removesuffix(anchor)
            if before != key and set(before.rstrip(".").split(".")) <= {*_WRAPPERS, ""}:
                return {name.removeprefix(before): weight for name, weight in weights.items()}
    return dict(weights)


def _merged(file: Path, weights: Mapping[str, torch.Tensor], model: Any, lora_alpha: float) -> dict[str, torch.Tensor]:
    """Return the weights with an adapter's parts added to those that they belong to."""
    own: dict[str, torch.Tensor] = {}
    factors: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        if match := _ADAPTER.fullmatch(key):
            factors.setdefault(match[1], {})[match[2]] = weight
        elif match := _SAVED_MODULE.fullmatch(key):
            saved[f"{match[1]}.{match[2]}"] = weight
        elif not _ORIGINAL.fullmatch(key):
            own[_BASE_LAYER.sub(r"\1.\2", key)] = weight
    if factors and not lora_alpha:
        place = next(iter(factors))
        raise DataError(
            f"{file}: has a LoRA adapter, such as at {place}, and not how much it counts: give --lora_alpha, as the "
            f"run had it"
        )
    modules = dict(model.named_modules())
    for place, factor in factors.items():
        key = f"{place}.weight"
        if set(factor) != {"A", "B"} or key not in own:
            raise DataError(f"{file}: the LoRA adapter at {place} is not complete")
        a, b = factor["A"].float(), factor["B"].float()
        change = (lora_alpha / a.shape[0]) * (b @ a)
        across = isinstance(modules.get(place), Conv1D)  # GPT-2 stores its weights the other way round
        own[key] = own[key].float() + (change.t() if across else change)
    return own | saved


def _check_tied(file: Path, own: Mapping[str, torch.Tensor], model: Any) -> None:
    """Raise DataError where weights that the base ties differ in the file."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for key, source in tied.items():
        if key in own and source in own and not torch.equal(own[key], own[source]):
            raise DataError(f"{file}: {key} and {source} differ, and are the same weights in the base")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def _padding(weight: torch.Tensor, expected: tuple[int, ...]) -> str:
    """Return what to do where Archer added a pad token: its embeddings then have rows more than the base's."""
    more = weight.shape[0] - expected[0] if weight.dim() == 2 and len(expected) == 2 else 0
    if more < 1 or tuple(weight.shape)[1:] != expected[1:]:
        return ""
    return (
        " (a pad token was added: give a base with `tokenizer.add_special_tokens({'pad_token': '[PAD]'})` and "
        f"`model.resize_token_embeddings({weight.shape[0]})`, saved)"
    )
