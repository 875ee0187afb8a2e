"""Models and tokenizers: precision from the hardware, adapters, 4-bit bases, the embedded policy.

`bcft:tiny-math` is the embedded policy, `bcft:tiny-init` the same model before training. Everything else is
a local directory or a Hub id. Weights come as safetensors only: a pickle is code.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bcft.config.loader import Recipe
from bcft.config.schema import TRAINING
from bcft.errors import DataError, UsageError
from bcft.policy.chat_template import Renderer
from bcft.runs.distributed import connect, local_rank

SMALL = 2_000_000
"""Parameters below which a second CPU thread waits more than it works."""
ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Precision:
    """Where and in what numbers a run computes; `why` is the one line a user reads."""

    device: str
    autocast: str
    """`no`, `bf16` or `fp16`: the mixed precision of training and of sampling alike."""
    weights: torch.dtype
    """Of a full model that trains: fp32, since a bf16 weight loses most small updates; else of the frozen base."""
    why: str


@dataclass(frozen=True)
class Policy:
    """A model that can be asked: its weights, the one renderer for it, and the precision it computes in."""

    model: Any
    renderer: Renderer
    precision: Precision

    @property
    def adapter(self) -> bool:
        """Whether the model is a PEFT adapter on a frozen base."""
        return hasattr(self.model, "peft_config")


def load_policy(recipe: Recipe, *, trainable: bool = True) -> Policy:
    """Load tokenizer and model of a recipe; the model will stop where its tokenizer's template stops."""
    precision = choose_precision(recipe)
    connect(cpu=precision.device == "cpu")
    renderer = load_renderer(recipe)
    model = load_model(recipe, precision, trainable=trainable)
    if precision.device == "cpu" and precision.autocast == "no" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
        precision = dataclasses.replace(precision, why="cpu, float32, one thread (more would slow a model this small)")
    model.generation_config.eos_token_id = list(renderer.stop_ids)
    model.generation_config.pad_token_id = renderer.tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = renderer.tokenizer.pad_token_id
    return Policy(model, renderer, precision)


def longest_row(recipe: Recipe) -> int:
    """Return the most tokens a row may have: `max_length`, and no more than the model has positions."""
    positions = int(base_config(recipe).get_text_config().max_position_embeddings)
    return min(recipe["max_length"] or positions, positions)


def base_config(recipe: Recipe) -> Any:
    """Load the configuration of a recipe's model; of an adapter's base."""
    from transformers import AutoConfig

    name = locate(recipe["model_name_or_path"])
    return _from_pretrained(AutoConfig, adapter_base(name) or name, recipe)


def load_renderer(recipe: Recipe) -> Renderer:
    """Load the tokenizer of a recipe, and the ids at which its model's generation config stops."""
    from transformers import GenerationConfig

    name = locate(recipe["model_name_or_path"])
    try:
        eos = GenerationConfig.from_pretrained(
            adapter_base(name) or name, revision=recipe["model_revision"]
        ).eos_token_id
    except OSError:  # a model without generation_config.json stops at its tokenizer's EOS
        eos = None
    return Renderer(load_tokenizer(recipe), [] if eos is None else [eos] if isinstance(eos, int) else eos)


def choose_precision(recipe: Recipe) -> Precision:
    """Choose device and precision from the hardware, or take the recipe's `bf16`, `fp16`, `dtype`, `use_cpu`."""
    frozen = bool(recipe["use_peft"] or adapter_base(recipe["model_name_or_path"]))
    if recipe["bf16"] and recipe["fp16"]:
        raise UsageError("bf16 and fp16 are both true: set one of them")
    if torch.cuda.is_available() and not recipe["use_cpu"]:
        device, name = "cuda", torch.cuda.get_device_name()
        # `is_bf16_supported()` counts emulation, which a T4 does slowly; compute capability 8.0 is Ampere.
        native = torch.cuda.get_device_capability() >= (8, 0)
        autocast, reason = ("bf16", f"{name} has bf16") if native else ("fp16", f"{name} has no native bf16")
    elif torch.backends.mps.is_available() and not recipe["use_cpu"]:
        device, autocast, reason = "mps", "no", "Apple GPU: fp32 is the safe choice"
    else:
        device, autocast, reason = "cpu", "no", f"CPU with {torch.get_num_threads()} threads"
    for asked in ("bf16", "fp16"):
        if recipe[asked]:
            autocast, reason = asked, f"{asked}: true in the recipe"
        elif recipe[asked] is False and autocast == asked:
            autocast, reason = "no", f"{asked}: false in the recipe"
    low = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[autocast]
    weights = low if frozen else torch.float32
    if recipe["dtype"] not in (None, "auto"):
        weights = getattr(torch, recipe["dtype"])
    words = str(weights).removeprefix("torch.")
    mixed = "" if autocast == "no" else f", {autocast} autocast"
    kind = "frozen base" if frozen else "weights"
    return Precision(device, autocast, weights, f"{device}, {words} {kind}{mixed} ({reason})")


def locate(name: str) -> str:
    """Return what `from_pretrained` takes: the package's directory for a `bcft:` name, else the name itself."""
    if not name.startswith("bcft:"):
        return name
    if name not in ("bcft:tiny-math", "bcft:tiny-init"):
        raise UsageError(f"model_name_or_path: {name!r} is not embedded; there are bcft:tiny-math, bcft:tiny-init")
    return str(ASSETS / "tiny-math")


def adapter_base(name: str) -> str:
    """Return the base model an adapter directory names, '' when `name` is no adapter directory."""
    path = Path(name) / "adapter_config.json"
    return str(json.loads(path.read_text())["base_model_name_or_path"]) if path.is_file() else ""


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the tokenizer, its template replaced by `chat_template_path` where given, and a pad token.

    The pad token is one the vocabulary has already: embeddings are never resized.
    """
    from transformers import AutoTokenizer

    name = locate(recipe["model_name_or_path"])
    if not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter_base(name) or name
    tokenizer = _from_pretrained(AutoTokenizer, name, recipe)
    if recipe["chat_template_path"]:
        try:
            tokenizer.chat_template = Path(recipe["chat_template_path"]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template_path: cannot read {recipe['chat_template_path']!r}: {error}") from error
    if recipe["eos_token"]:
        if recipe["eos_token"] not in tokenizer.get_vocab():
            raise UsageError(f"eos_token: {recipe['eos_token']!r} is not in the tokenizer's vocabulary")
        tokenizer.eos_token = recipe["eos_token"]
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<unk>")
        # Padding carries no label and no attention, so sharing the stop token's id harms nothing.
        tokenizer.pad_token = next((token for token in spare if token in vocabulary), tokenizer.eos_token)
    return tokenizer


def load_model(recipe: Recipe, precision: Precision, *, trainable: bool = True) -> Any:
    """Load the model in fp32 or as a frozen base in low precision, on its device; an adapter directory with its base.

    Raises DataError when the weights are a pickle, UsageError when the name leads nowhere.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = locate(recipe["model_name_or_path"])
    if recipe["model_name_or_path"] == "bcft:tiny-init":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32)
    base = adapter_base(name)
    refuse_pickles(base or name)
    extra: dict[str, Any] = {"dtype": precision.weights, "use_safetensors": True}
    if recipe["attn_implementation"]:
        extra["attn_implementation"] = recipe["attn_implementation"]
    if recipe["load_in_4bit"]:
        extra["quantization_config"] = _nf4(recipe, precision)
    if precision.device == "cuda":
        extra["device_map"] = {"": local_rank()}
    model = _from_pretrained(AutoModelForCausalLM, base or name, recipe, **extra)
    if base:
        from peft import PeftModel

        refuse_pickles(name, stem="adapter_model")
        model = PeftModel.from_pretrained(model, name, is_trainable=trainable)
    return model if recipe["load_in_4bit"] or precision.device == "cuda" else model.to(precision.device)


def with_adapter(policy: Policy, recipe: Recipe) -> Policy:
    """Return the policy as the recipe trains it: with `use_peft` and no adapter yet, behind one that changes nothing.

    The adapter's weights are fp32 and a function of the recipe's seed alone.
    """
    if policy.adapter or not recipe["use_peft"]:
        return policy
    from peft import get_peft_model

    torch.manual_seed(recipe["seed"])
    return dataclasses.replace(policy, model=get_peft_model(policy.model, lora_config(recipe)))


def restore(policy: Policy, recipe: Recipe, name: str) -> None:
    """Give the policy the weights of another directory or model of its kind, in place: whoever holds it sees them.

    name: an adapter directory for a policy with an adapter, else whatever `model_name_or_path` may be.
    """
    if policy.adapter:
        from peft import load_peft_weights, set_peft_model_state_dict

        refuse_pickles(name, stem="adapter_model")
        set_peft_model_state_dict(policy.model, load_peft_weights(name, device=str(policy.model.device)))
        return
    there = dataclasses.replace(recipe, values={**recipe.values, "model_name_or_path": name})
    weights = load_model(there, dataclasses.replace(policy.precision, device="cpu")).state_dict()
    policy.model.load_state_dict(weights)


def lora_config(recipe: Recipe) -> Any:
    """Return the LoRA settings of the recipe."""
    from peft import LoraConfig

    targets = recipe["lora_target_modules"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe["lora_r"],
        lora_alpha=recipe["lora_alpha"],
        lora_dropout=recipe["lora_dropout"],
        target_modules=targets[0] if targets and len(targets) == 1 else targets,
        modules_to_save=recipe["lora_modules_to_save"],
        use_rslora=recipe["use_rslora"],
        use_dora=recipe["use_dora"],
    )


def save_policy(policy: Policy, directory: Path) -> list[Path]:
    """Write model or adapter, tokenizer and template so that `from_pretrained` loads them and stops where this does.

    They are written aside and moved in; returns the files.
    """
    _hide_bars(str(directory))
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
    """Raise DataError for a local directory whose weights are pickles only: loading one runs its code."""
    path = Path(name)
    if not path.is_dir() or any(path.glob(f"{stem}*.safetensors")):
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise DataError(f"{path / pickles[0]}: pickled weights can run code: convert them to safetensors")


def check_four_bits(recipe: Recipe) -> None:
    """Raise UsageError for 4-bit weights that a run would have to train without an adapter."""
    adapter = recipe["use_peft"] or adapter_base(recipe["model_name_or_path"])
    if recipe["load_in_4bit"] and recipe.command in TRAINING and not adapter:
        raise UsageError("load_in_4bit: 4-bit weights cannot train by themselves: set use_peft: true")


def _nf4(recipe: Recipe, precision: Precision) -> Any:
    from transformers import BitsAndBytesConfig

    check_four_bits(recipe)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=recipe["use_bnb_nested_quant"],
        bnb_4bit_compute_dtype=precision.weights,
    )


def _from_pretrained(auto: Any, name: str, recipe: Recipe, **extra: Any) -> Any:
    """Call `from_pretrained`, turning what a user can cause into one line."""
    trust = bool(recipe["trust_remote_code"])
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "runs/"))):
        raise UsageError(f"model_name_or_path: there is no directory {name!r}: run first what makes it")
    _hide_bars(name)
    try:
        return auto.from_pretrained(name, revision=recipe["model_revision"], trust_remote_code=trust, **extra)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model_name_or_path: cannot load {name!r}: {reason}") from error


def _hide_bars(name: str) -> None:
    """Show progress bars for what comes from the Hub only: a local file is there at once."""
    from transformers.utils import logging

    if Path(name).is_dir():
        logging.disable_progress_bar()
    else:
        logging.enable_progress_bar()
