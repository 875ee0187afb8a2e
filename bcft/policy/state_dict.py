"""Weights that other programs saved with `torch.save`, put into a model that is loaded already."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bcft.errors import DataError

KEY = "model_state_dict"
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")
"""What wrappers put before the names of a model's weights: DDP, torch.compile, PEFT, an object with a `model`."""


def take_state_dict(model: Any, file: Path) -> None:
    """Give a model the weights in a file of `torch.save({"model_state_dict": ...})`, or of the state dict itself.

    Raises DataError for anything else, and names the weights that are missing, unknown or of another shape. The file
    is read with `weights_only=True`: no code in it is run.
    """
    weights = _unwrapped(_read(file), model.state_dict().keys())
    adapter = sorted(name for name in weights if ".lora_" in name or "lora_magnitude_vector" in name)
    if adapter:
        raise DataError(
            f"{file}: {len(adapter)} weights such as {adapter[0]} belong to a LoRA adapter whose scale is not in the "
            f"file: call merge_and_unload() where it was trained, and save the state_dict() of what that returns"
        )
    _check_shapes(model, weights, file)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    loaded = model.load_state_dict(weights, strict=False)
    names = dict(model.named_parameters(remove_duplicate=False))
    given = {names[name].data_ptr() for name in weights if name in names}
    # Of tied weights, one name is enough.
    missing = [name for name in loaded.missing_keys if name not in names or names[name].data_ptr() not in given]
    if missing or loaded.unexpected_keys:
        raise DataError(f"{file} is of another model: {_named('lacks', missing, loaded.unexpected_keys)}")
    if tied:
        both = [weights[name] for name, weight in names.items() if weight is head.weight and name in weights]
        if any(not torch.equal(both[0], other) for other in both[1:]):
            raise DataError(
                f"{file}: embeddings and head differ, and the model has one weight for both: set tie_word_embeddings "
                f"to false in its config.json"
            )


def _read(file: Path) -> Mapping[str, Any]:
    """Return the state dict in a file."""
    wanted = f'a file that torch.save({{"{KEY}": model.state_dict()}}, ...) wrote'
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{file}: there is no such file: give {wanted}") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file}: it holds more than tensors, or is no file of torch.save; loading it could run code: give {wanted}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0][:200]}: give {wanted}") from error
    weights = content.get(KEY, content) if isinstance(content, Mapping) else None
    if (
        not weights
        or not isinstance(weights, Mapping)
        or not all(isinstance(w, torch.Tensor) for w in weights.values())
    ):
        raise DataError(f"{file}: no tensors by name in it: give {wanted}")
    return weights


def _unwrapped(weights: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """Return weights without the beginnings of wrappers, as long as that brings more names to those of the model."""
    best = dict(weights)
    again = True
    while again:
        again = False
        for wrapper in _WRAPPERS:
            shorter = {name.removeprefix(wrapper): weight for name, weight in best.items()}
            known, more = len(best.keys() & names), len(shorter.keys() & names)
            all_wrapped = not known and all(name.startswith(wrapper) for name in best)
            if len(shorter) == len(best) and (more > known or all_wrapped):
                best, again = shorter, True
    return best


def _check_shapes(model: Any, weights: Mapping[str, Any], file: Path) -> None:
    for name, own in model.state_dict().items():
        if name in weights and weights[name].shape != own.shape:
            raise DataError(
                f"{file}: {name} has shape {tuple(weights[name].shape)}, and the model's is {tuple(own.shape)}: give "
                f"the model that was trained as model_name_or_path"
            )


def _named(verb: str, missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"it {verb} {len(missing)} of the model's weights, such as {missing[0]}")
    if unknown:
        parts.append(f"it has {len(unknown)} that the model has not, such as {unknown[0]}")
    return ", and ".join(parts) + ": give the model that was trained as model_name_or_path"
