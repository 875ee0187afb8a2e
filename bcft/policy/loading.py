"""Models and tokenizers: precision from the hardware, adapters, 4-bit bases, the embedded policy.

`bcft:tiny-math` is the embedded policy, `bcft:tiny-init` the same model before training. Any other name is a local
directory or a Hub id. Functions take the name apart from the settings, because a run loads weights under more names
than its recipe gives. Weights must be safetensors: loading a pickle runs its code.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging

from bcft.config.schema import ModelSettings
from bcft.errors import DataError, UsageError
from bcft.policy.chat_template import Renderer
from bcft.runs.distributed import connect, local_rank

ONE_THREAD_BELOW = 2_000_000
"""Models with fewer parameters run faster on one CPU thread."""
ASSETS = Path(__file__).parents[1] / "assets"
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


@dataclass(frozen=True)
class Policy:
    """A model ready to be sampled: its weights, the one renderer for it, and the precision it computes in."""

    model: Any
    renderer: Renderer
    precision: Precision

    @property
    def adapter(self) -> bool:
        """Whether the model is a PEFT adapter on a frozen base."""
        return hasattr(self.model, "peft_config")


def load_policy(name: str, settings: ModelSettings, *, trainable: bool = True) -> Policy:
    """Load tokenizer and model, and join the group of processes; the model will stop where its template stops.

    trainable: False for a policy that is only sampled. Raises UsageError and DataError as `load_model` does.
    """
    precision = choose_precision(name, settings)
    connect(cpu=precision.device == "cpu")
    renderer = load_renderer(name, settings)
    model = load_model(name, settings, precision, trainable=trainable)
    if precision.device == "cpu" and precision.autocast == "no" and model.num_parameters() < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
        precision = dataclasses.replace(precision, why="cpu, float32, one thread (more would slow a model this small)")
    model.generation_config.eos_token_id = list(renderer.stop_ids)
    model.generation_config.pad_token_id = renderer.tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = renderer.tokenizer.pad_token_id
    return Policy(model, renderer, precision)


def longest_row(name: str, settings: ModelSettings, max_length: int | None) -> int:
    """Return the most tokens a row may have: `max_length`, and no more than the model has positions."""
    positions = int(base_config(name, settings).get_text_config().max_position_embeddings)
    return min(max_length or positions, positions)


def base_config(name: str, settings: ModelSettings) -> Any:
    """Load the configuration of a model; of an adapter's base."""
    name = locate(name)
    return _from_pretrained(AutoConfig, adapter_base(name) or name, settings)


def load_renderer(name: str, settings: ModelSettings) -> Renderer:
    """Load a model's tokenizer, and the ids at which its generation config stops.

    A model without a generation_config.json stops at its tokenizer's EOS. Raises UsageError when one of the files
    cannot be loaded: with other stop ids the policy would act otherwise.
    """
    tokenizer = load_tokenizer(name, settings)
    source = locate(name)
    config = _generation_config(adapter_base(source) or source, settings)
    eos = config.eos_token_id if config else None
    return Renderer(tokenizer, [] if eos is None else [eos] if isinstance(eos, int) else eos)


def _generation_config(name: str, settings: ModelSettings) -> GenerationConfig | None:
    """Load the generation config of a directory or a Hub id; None where the model has none."""
    file, revision, path = "generation_config.json", settings.model_revision, Path(name)
    if path.is_dir() and not (path / file).is_file():
        return None
    try:
        directory = path if path.is_dir() else Path(hf_hub_download(name, file, revision=revision)).parent
        return GenerationConfig.from_pretrained(directory)
    except (EntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, LocalEntryNotFoundError):  # the Hub was not reached, and the cache has no copy
            missing = is_offline_mode() or try_to_load_from_cache(name, file, revision=revision) is _CACHED_NO_EXIST
        else:
            missing = isinstance(error, EntryNotFoundError)
        if missing:
            return None
        reason = _first_line(error)
        raise UsageError(f"model_name_or_path: cannot load {file} of {name!r}: {reason}") from error


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


def locate(name: str) -> str:
    """Return the name that `from_pretrained` takes: for a `bcft:` name the directory in this package."""
    if not name.startswith("bcft:"):
        return name
    if name not in ("bcft:tiny-math", "bcft:tiny-init"):
        raise UsageError(
            f"model_name_or_path: {name!r} is not embedded; the embedded models are bcft:tiny-math and bcft:tiny-init"
        )
    return str(ASSETS / "tiny-math")


def adapter_base(name: str) -> str:
    """Return the base model that an adapter directory names; '' when `name` is not an adapter directory.

    Raises UsageError when its adapter_config.json cannot be read or names no base model.
    """
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return ""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path: cannot read {str(path)!r}: {_first_line(error)}") from error
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(base, str) or not base:
        raise UsageError(f"model_name_or_path: {str(path)!r} has no base_model_name_or_path")
    return base


def load_tokenizer(name: str, settings: ModelSettings) -> Any:
    """Load the tokenizer with a pad token, its template replaced by `chat_template_path` where given.

    The pad token is taken from the vocabulary: embeddings are never resized.
    """
    name = locate(name)
    if not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter_base(name) or name
    tokenizer = _from_pretrained(AutoTokenizer, name, settings)
    if template := settings.chat_template_path:
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template_path: cannot read {template!r}: {error}") from error
    if settings.eos_token:
        if settings.eos_token not in tokenizer.get_vocab():
            raise UsageError(f"eos_token: {settings.eos_token!r} is not in the tokenizer's vocabulary")
        tokenizer.eos_token = settings.eos_token
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<unk>")
        # Padding has no label and no attention, so sharing the stop token's id does no harm.
        tokenizer.pad_token = next((token for token in spare if token in vocabulary), tokenizer.eos_token)
    return tokenizer


def load_model(name: str, settings: ModelSettings, precision: Precision, *, trainable: bool = True) -> Any:
    """Load the model in fp32 or as a frozen base in low precision, on its device; an adapter directory with its base.

    Raises DataError when the weights are a pickle, UsageError when they cannot be loaded, or for trainable 4-bit
    weights without an adapter.
    """
    source = locate(name)
    if name == "bcft:tiny-init":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    base = adapter_base(source)
    refuse_pickles(base or source)
    extra: dict[str, Any] = {"dtype": precision.weights, "use_safetensors": True}
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
    model = _from_pretrained(AutoModelForCausalLM, base or source, settings, **extra)
    if base:
        from peft import PeftModel  # noqa: PLC0415 - peft takes seconds to import, and most runs have no adapter

        refuse_pickles(source, stem="adapter_model")
        with _adapter_errors(source):
            model = PeftModel.from_pretrained(model, source, is_trainable=trainable)
    return model if settings.load_in_4bit or precision.device == "cuda" else model.to(precision.device)


def with_adapter(policy: Policy, settings: ModelSettings, *, seed: int) -> Policy:
    """Return the policy that trains: with `use_peft` and without an adapter yet, it gets one that changes nothing.

    The adapter's weights are fp32 and depend on the seed alone.
    """
    if policy.adapter or not settings.use_peft:
        return policy
    from peft import get_peft_model  # noqa: PLC0415 - as in load_model

    torch.manual_seed(seed)
    return dataclasses.replace(policy, model=get_peft_model(policy.model, lora_config(settings)))


def restore(policy: Policy, name: str, settings: ModelSettings) -> None:
    """Give the policy the weights of another directory or model of its kind, in place, for all that hold the policy.

    name: an adapter directory for a policy with an adapter, else any `model_name_or_path`.
    """
    if policy.adapter:
        from peft import load_peft_weights, set_peft_model_state_dict  # noqa: PLC0415 - as in load_model

        refuse_pickles(name, stem="adapter_model")
        with _adapter_errors(name):
            set_peft_model_state_dict(policy.model, load_peft_weights(name, device=str(policy.model.device)))
        return
    weights = load_model(name, settings, dataclasses.replace(policy.precision, device="cpu")).state_dict()
    policy.model.load_state_dict(weights)


def lora_config(settings: ModelSettings) -> Any:
    """Return the LoRA settings as peft's `LoraConfig`."""
    from peft import LoraConfig  # noqa: PLC0415 - as in load_model

    # peft takes lists, not tuples, and reads `all-linear` or a regular expression from a string only.
    targets, saved = (
        None if words is None else list(words)
        for words in (settings.lora_target_modules, settings.lora_modules_to_save)
    )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets[0] if targets and len(targets) == 1 else targets,
        modules_to_save=saved,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def save_policy(policy: Policy, directory: Path) -> list[Path]:
    """Write model or adapter, tokenizer and template so that `from_pretrained` loads them and stops where this does.

    They are written to a subdirectory and moved; returns the files.
    """
    _show_progress_of_hub_only(str(directory))
    aside = directory / ".model"
    shutil.rmtree(aside, ignore_errors=True)
    policy.model.save_pretrained(aside)
    policy.renderer.tokenizer.save_pretrained(aside)
    policy.model.generation_config.save_pretrained(aside)
    (aside / "README.md").unlink(missing_ok=True)  # peft's card is empty, ours has the figures
    files = [file.replace(directory / file.name) for file in sorted(aside.iterdir())]
    aside.rmdir()
    return files


def refuse_pickles(name: str, *, stem: str = "") -> None:
    """Raise DataError for a local directory with pickled weights only: loading a pickle runs its code."""
    path = Path(name)
    if not path.is_dir() or any(path.glob(f"{stem}*.safetensors")):
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise DataError(f"{path / pickles[0]}: pickled weights can run code: convert them to safetensors")


def check_four_bits(name: str, settings: ModelSettings) -> None:
    """Raise UsageError for 4-bit weights that a run would have to train without an adapter."""
    if settings.load_in_4bit and not (settings.use_peft or adapter_base(name)):
        raise UsageError("load_in_4bit: 4-bit weights cannot train by themselves: set use_peft: true")


def _from_pretrained(auto: Any, name: str, settings: ModelSettings, **extra: Any) -> Any:
    """Call `from_pretrained`; raise UsageError of one line for the errors that a user can cause."""
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "runs/"))):
        raise UsageError(f"model_name_or_path: there is no directory {name!r}: run the recipe that makes it first")
    _show_progress_of_hub_only(name)
    trust = settings.trust_remote_code
    try:
        return auto.from_pretrained(name, revision=settings.model_revision, trust_remote_code=trust, **extra)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UsageError(f"model_name_or_path: cannot load {name!r}: {_first_line(error)}") from error


@contextmanager
def _adapter_errors(name: str) -> Iterator[None]:
    """Raise UsageError of one line for what peft raises when an adapter is damaged or does not fit its base."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:297]}..."  # torch lists every weight that does not fit
        raise UsageError(f"model_name_or_path: cannot load the adapter {name!r}: {reason}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _show_progress_of_hub_only(name: str) -> None:
    """Show progress bars for downloads only: a local file loads at once."""
    if Path(name).is_dir():
        logging.disable_progress_bar()
    else:
        logging.enable_progress_bar()
