"""A policy: its weights with their adapter, its renderer, its precision; loaded, restored and saved.

Functions take the model's name apart from the settings, because a run loads weights under more names than its recipe
gives. Everything that can be refused without weights is refused before they are loaded, in `checks`.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy import cpu
from bcft.policy.adapters import add_adapter, lora_config, saved_modules_in_fp32
from bcft.policy.chat_template import Renderer
from bcft.policy.checks import Checked, check_disk, check_four_bits, check_model
from bcft.policy.gguf import PACKAGE, is_gguf
from bcft.policy.precision import AUTOCAST_DTYPES, Precision, choose_precision, cpu_threads
from bcft.policy.shape import context_length
from bcft.policy.sources import (
    ASSETS,
    adapter_base,
    adapter_errors,
    base_config,
    check_gguf,
    from_pretrained,
    locate,
    refuse_pickles,
    show_progress_of_hub_only,
)
from bcft.policy.tokenizer import load_renderer, load_tokenizer
from bcft.policy.untrained import untrained_stop
from bcft.runs.distributed import connect, local_rank

__all__ = [
    "ASSETS", "AUTOCAST_DTYPES", "Policy", "Precision", "adapter_base", "base_config", "check_disk", "check_four_bits",
    "check_model", "choose_precision", "cpu_threads", "interpolate", "load_adapter", "load_model", "load_policy",
    "load_renderer", "load_served", "load_tokenizer", "locate", "longest_row", "lora_config", "refuse_pickles",
    "restore", "save_policy", "stopping", "with_adapter",
]  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A model ready to be sampled: its weights, the one renderer for it, and the precision it computes in."""

    model: Any
    renderer: Renderer
    precision: Precision
    note: str = ""
    """Lines about dequantized weights, what the model's own generation config holds and is not saved, and a stop token
    that was never trained."""
    served: str = ""
    """The name by which a server knows the model that it samples; with it there is none here."""

    @property
    def adapter(self) -> bool:
        """Whether the model is a PEFT adapter on a frozen base."""
        return hasattr(self.model, "peft_config")

    def words(self, name: str) -> str:
        """Return what is sampled, and where; name: of the model as the recipe has it."""
        return (
            f"{self.served} on a server, its text tokenized for {name}"
            if self.served
            else f"{name} on {self.precision.why}"
        )


def load_policy(name: str, settings: ModelSettings, *, trainable: bool = True) -> Policy:
    """Check the model, load it, and join the group of processes; the model will stop where its template stops.

    trainable: False for a policy that is only sampled. Its generation config holds token ids only, because actions are
    sampled as the recipe says. Raises UsageError and DataError as `check_model` and `load_model` do.
    """
    checked = check_model(name, settings, trainable=trainable)
    precision, tokenizer = choose_precision(name, settings), checked.renderer.tokenizer
    connect(cpu=precision.device == "cpu")
    model = load_model(name, settings, precision, trainable=trainable)
    large = cpu.is_large(model)
    if large:
        cpu.keep_memory()
    if precision.device == "cpu" and precision.autocast == "no" and not large:
        torch.set_num_threads(1)
        precision = dataclasses.replace(precision, why="cpu, float32, one thread (more would slow a model this small)")
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.generation_config = stopping(checked)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    notes = [_dequantized(name, settings, base), checked.generation.note]
    if trainable and (settings.use_peft or base is not model):
        stop = checked.renderer.tail_ids[-1]
        notes.append(untrained_stop(model, stop, tokenizer.convert_ids_to_tokens(stop), settings))
    return Policy(model, checked.renderer, precision, "\n".join(filter(None, notes)))


def stopping(checked: Checked) -> GenerationConfig:
    """Return the generation config of a model that stops where its template does; it holds token ids only."""
    tokenizer = checked.renderer.tokenizer
    return GenerationConfig(
        eos_token_id=list(checked.renderer.stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id if checked.generation.bos_id is None else checked.generation.bos_id,
    )


def load_served(name: str, settings: ModelSettings, *, served: str) -> Policy:
    """Return a policy without weights, whose text a server samples: tokenizer and template are those of `name`.

    served: the server's name of its model. Raises UsageError and DataError as `load_renderer` does.
    """
    return Policy(None, load_renderer(name, settings), Precision("cpu", "no", torch.float32, ""), served=served)


def _dequantized(name: str, settings: ModelSettings, base: Any) -> str:
    """Return one line about the weights of a GGUF file; '' for any other model."""
    source = locate(name, settings)
    source = adapter_base(source) or source
    if not is_gguf(source):
        return ""
    kind = f"{check_gguf(source, settings)} GGUF".strip()
    size = sum(p.numel() for _, p in cpu.base_parameters(base))
    numbers = str(base.dtype).removeprefix("torch.")
    return f"weights: {Path(source).name}, {kind}, dequantized to {numbers}, {size / 1e6:,.1f} M parameters"


def longest_row(name: str, settings: ModelSettings, max_length: int | None) -> int:
    """Return the most tokens a row may have: `max_length`, and no more than the model has positions."""
    positions = context_length(base_config(name, settings))
    return min(max_length or positions, positions)


def load_model(name: str, settings: ModelSettings, precision: Precision, *, trainable: bool = True) -> Any:
    """Load the model in fp32 or as a frozen base in low precision, on its device; an adapter directory with its base.

    Raises DataError when the weights are a pickle, UsageError when they cannot be loaded or are not complete, or for
    trainable 4-bit weights without an adapter.
    """
    source = locate(name, settings)
    if name == "bcft:tiny-init":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    base = adapter_base(source)
    where = base or source
    refuse_pickles(where)
    # With a generation config of its own the model does not read its file, which may be one that cannot be loaded.
    extra: dict[str, Any] = {
        "dtype": precision.weights,
        "use_safetensors": True,
        "generation_config": GenerationConfig(),
        "output_loading_info": True,
    }
    if settings.attn_implementation:
        extra["attn_implementation"] = settings.attn_implementation
    if settings.load_in_4bit:
        if trainable:
            check_four_bits(name, settings)
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=settings.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=precision.weights,
        )
    if precision.device == "cuda":
        extra["device_map"] = {"": local_rank()}
    model, loaded = from_pretrained(AutoModelForCausalLM, where, settings, **extra)
    if missing := sorted(loaded["missing_keys"]):
        raise UsageError(
            f"model_name_or_path: {where!r} has no weights for {len(missing)} tensors of its model, such as "
            f"{missing[0]}, which would be random: give a complete model"
        )
    if is_gguf(where):
        model.name_or_path = _recorded(name, where)
    if precision.device == "cpu":
        cpu.prepare(model)
    if base:
        model = load_adapter(model, source, trainable=trainable)
    return model if settings.load_in_4bit or precision.device == "cuda" else model.to(precision.device)


def load_adapter(model: Any, source: str, *, trainable: bool = True) -> Any:
    """Add the adapter of a directory to its base, which changes in place; return the whole."""
    from peft import PeftModel  # noqa: PLC0415 - peft takes seconds to import, and most runs have no adapter

    refuse_pickles(source, stem="adapter_model")
    with adapter_errors(source):
        model = PeftModel.from_pretrained(model, source, is_trainable=trainable)
        if saved_modules_in_fp32(model):  # they were rounded to the base's numbers
            _load_adapter_weights(model, source)
    return model


def _recorded(name: str, where: str) -> str:
    """Return how an adapter names the GGUF file that is its base: as the recipe does, so that others find it too."""
    if name.startswith(PACKAGE):
        return name
    # PEFT would ask the Hub for a path that reads like a Hub id.
    return where if where.startswith(("/", ".")) or ":" in where or where.count("/") > 1 else f"./{where}"


def with_adapter(policy: Policy, settings: ModelSettings, *, seed: int) -> Policy:
    """Return the policy that trains: with `use_peft` and without an adapter yet, it gets one that changes nothing.

    The adapter's weights are fp32 and depend on the seed alone.
    """
    if policy.adapter or not settings.use_peft:
        return policy
    torch.manual_seed(seed)
    return dataclasses.replace(policy, model=add_adapter(policy.model, settings))


def restore(policy: Policy, name: str, settings: ModelSettings) -> None:
    """Give the policy the weights of another directory or model of its kind, in place, for all that hold the policy.

    name: an adapter directory for a policy with an adapter, else any `model_name_or_path`.
    """
    if policy.adapter:
        refuse_pickles(name, stem="adapter_model")
        with adapter_errors(name):
            _load_adapter_weights(policy.model, name)
        return
    weights = load_model(name, settings, dataclasses.replace(policy.precision, device="cpu")).state_dict()
    policy.model.load_state_dict(weights)


def _load_adapter_weights(model: Any, name: str) -> None:
    """Give a model's adapter the weights in a directory."""
    from peft import load_peft_weights, set_peft_model_state_dict  # noqa: PLC0415 - as in load_model

    set_peft_model_state_dict(model, load_peft_weights(name, device=str(model.device)))


@torch.no_grad()
def interpolate(policy: Policy, base: str, scale: float, settings: ModelSettings) -> None:
    """Take a policy's weights back toward those of its base, in place: to base + scale x (policy - base), in fp32.

    Wortsman et al. 2022 (https://arxiv.org/abs/2109.01903, section 3), with its alpha as scale. The update of a LoRA
    adapter is linear in `lora_B`; whole modules that are saved with it begin as those of its base. Weights that are
    tied stay so. base: the directory or model whose full weights the policy began with; an adapter needs none.
    """
    named = dict(policy.model.named_parameters())  # tied weights once
    if policy.adapter:
        for name, parameter in named.items():
            if ".lora_B." in name or ".lora_embedding_B." in name:
                parameter.mul_(scale)
            elif ".modules_to_save." in name:
                module, _, own = name.partition(".modules_to_save.")
                original = policy.model.get_parameter(f"{module}.original_module.{own.partition('.')[2]}")
                parameter.copy_(torch.lerp(original.float(), parameter.float(), scale))
        return
    weights = load_model(base, settings, dataclasses.replace(policy.precision, device="cpu")).state_dict()
    for name, parameter in named.items():
        began = weights[name].to(parameter.device).float()
        parameter.copy_(torch.lerp(began, parameter.float(), scale))


def save_policy(policy: Policy, directory: Path) -> list[Path]:
    """Write model or adapter, tokenizer and template so that `from_pretrained` loads them and stops where this does.

    They are written to a subdirectory and moved; returns the files.
    """
    show_progress_of_hub_only(str(directory))
    aside = directory / ".model"
    shutil.rmtree(aside, ignore_errors=True)
    policy.model.save_pretrained(aside)
    policy.renderer.tokenizer.save_pretrained(aside)
    policy.model.generation_config.save_pretrained(aside)
    (aside / "README.md").unlink(missing_ok=True)  # peft's card is empty, ours has the figures
    files = [file.replace(directory / file.name) for file in sorted(aside.iterdir())]
    aside.rmdir()
    return files
