"""Keys that a command would accept and then not use: each is refused, with what it needs.

A key of a file stays allowed when the caller overrides what it depends on: `use_peft=false` runs a LoRA recipe without
its adapter, and `save_strategy=no` saves nothing whatever the file's `save_total_limit` is. A file may hold keys of
other commands, but for `filtered` none of those with which the Trainer of `sft` saves and evaluates.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bcft.config.declare import SELECTING, TRAINING
from bcft.config.engine import SERVING
from bcft.config.keys import KEYS

Finding = tuple[str, str]
"""A key and the reason why it is refused."""


class _Needs(NamedTuple):
    """Keys that act only with some values of another key."""

    keys: tuple[str, ...]
    other: str
    values: Collection[Any]
    words: str


_GIVEN = {
    "use_peft": (
        (
            "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora",
            "use_dora",
        ),
        "use_peft: true",
    ),
    "load_in_4bit": (("bnb_4bit_quant_type", "use_bnb_nested_quant"), "load_in_4bit: true"),
    "environment": (("environment_args", "max_turns", "step_timeout"), "an environment"),
    "gradient_checkpointing": (("gradient_checkpointing_kwargs",), "gradient_checkpointing: true"),
    "push_to_hub": (("hub_model_id", "hub_dataset_id", "hub_private_repo"), "push_to_hub: true"),
}  # fmt: skip
"""A key -> those that act only where it is given, and what they need."""

_PLAIN_OPTIMIZERS = ("sgd", "adafactor", "adagrad", "rmsprop")
_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_VALUES = (
    _Needs(("eval_steps",), "eval_strategy", ("steps",), "without eval_strategy: steps"),
    _Needs(
        ("eval_delay", "eval_on_start", "per_device_eval_batch_size"), "eval_strategy", ("steps", "epoch"),
        "without eval_strategy: steps or epoch",
    ),
    _Needs(("save_steps",), "save_strategy", ("steps",), "without save_strategy: steps"),
    _Needs(
        ("save_total_limit", "save_on_each_node"), "save_strategy", ("steps", "epoch"),
        "without save_strategy: steps or epoch",
    ),
    _Needs(("logging_steps",), "logging_strategy", ("steps",), "without logging_strategy: steps"),
    _Needs(
        ("warmup_steps",), "lr_scheduler_type", {*KEYS["lr_scheduler_type"].choices} - {*_NO_WARMUP},
        "with this lr_scheduler_type; constant_with_warmup is constant after a warm-up",
    ),
    _Needs(
        ("adam_beta1", "adam_beta2", "adam_epsilon"), "optim", {*KEYS["optim"].choices} - {*_PLAIN_OPTIMIZERS},
        "with this optim, which is not a variant of Adam",
    ),
    _Needs(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), "report_to", ("all", "trackio"),
        "without report_to: trackio",
    ),
    _Needs(
        ("project",), "report_to", ("all", "mlflow", "trackio", "wandb"), "without report_to: wandb, trackio or mlflow",
    ),
    _Needs(
        ("vllm_server_base_url", "vllm_server_timeout", *SERVING), "engine", ("vllm",), "without engine: vllm",
    ),
    _Needs(
        ("base_url", "served_model", "max_requests", "max_total_tokens"), "engine", ("openai",),
        "without engine: openai",
    ),
    _Needs(("weight_temperature",), "row_weight", ("reward",), "without row_weight: reward"),
    _Needs(("concurrency",), "engine", ("vllm", "openai"), "without engine: vllm or openai"),
)  # fmt: skip

GYM = "reasoning-gym:"
"""How the name of a reasoning-gym dataset begins."""
GENERATOR = ("dataset_args", "answer_format", "prompt_suffix")
"""Keys of a reasoning-gym dataset."""


def is_function(dataset_name: str) -> bool:
    """Return whether a dataset is the rows that a function returns: `module:function`."""
    return bool(_FUNCTION.fullmatch(dataset_name)) and not dataset_name.startswith(("bcft:", GYM))


_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""A key -> its name in an adapter's own file."""
_LISTS = ("lora_target_modules", "lora_modules_to_save")


def without_effect(
    command: str, values: Mapping[str, Any], *, in_file: Collection[str], overrides: Collection[str]
) -> Iterator[Finding]:
    """Yield the keys that the command would not use, each with the reason.

    in_file, overrides: the keys that the recipe and the caller set.
    """
    for key, reason in (*_missing(values, in_file, overrides), *_unsuited(values, in_file, overrides)):
        if command in KEYS[key].commands:
            yield key, f"has no effect {reason}"
    for key, reason in _of_generator(values, in_file, overrides):
        if command in KEYS[key].commands:
            yield key, reason
    yield from _single_attempts(command, values, overrides)
    if command == "evaluate":
        split = values["eval_split"]
        other = "eval_dev_samples" if split == "test" else "eval_test_samples"
        if other in overrides:
            yield other, f"has no effect with eval_split: {split}"
    if command in SELECTING and values["train_on"] == "marked":
        yield "train_on", "marked is for demonstrations, and a policy's own turns have no marks: give another"
    if command == "filtered":
        for key in in_file:  # a caller's are refused as keys of another command
            if KEYS[key].section == "training" and command not in KEYS[key].commands:
                yield key, "has no effect in filtered: rounds save and evaluate by themselves, each with its own seed"
        yield from _unscaled(values)
        yield from _unweighted(values)
    if command in TRAINING and values["engine"] == "openai":
        yield (
            "engine",
            f"openai is for collect and evaluate: what it serves cannot be trained: give hf or vllm to {command}",
        )
    if command in TRAINING:
        yield from _continued_adapter(values, {*in_file, *overrides})


def _unweighted(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield `row_weight` with a loss that takes no weights of rows."""
    if values["row_weight"] == "none":
        return
    for key, plain in (("loss_type", "nll"), ("label_smoothing_factor", 0.0)):
        if values[key] != plain:
            words = f"{key}: {values[key]} takes no weights of rows: set {key}: {plain}, or row_weight: none"
            yield "row_weight", words


def _single_attempts(command: str, values: Mapping[str, Any], overrides: Collection[str]) -> Iterator[Finding]:
    """Yield `row_weight: maxrl` where every problem has one attempt in scope: of one right attempt the weight is 1."""
    single = values["num_generations"] == 1 and (command == "collect" or values["history"] == 1)
    only_in_file = "row_weight" not in overrides and "num_generations" in overrides
    if command in ("filtered", "collect") and values["row_weight"] == "maxrl" and single and not only_in_file:
        yield "row_weight", "maxrl has no effect with num_generations: 1: a right attempt weighs 1"


def _missing(values: Mapping[str, Any], in_file: Collection[str], overrides: Collection[str]) -> Iterator[Finding]:
    given = {*in_file, *overrides}
    continued = bool(adapter_keys(values["model_name_or_path"]))
    for other, (keys, words) in _GIVEN.items():
        if other in given or (other == "use_peft" and continued):  # it needs nothing: `_continued_adapter` looks at it
            continue
        for key in keys:
            # A default is what a run has anyway; but whoever writes any key of an adapter wants one.
            if key in given and (other == "use_peft" or values[key] != KEYS[key].default):
                yield key, f"without {words}"


def _of_generator(values: Mapping[str, Any], in_file: Collection[str], overrides: Collection[str]) -> Iterator[Finding]:
    """Yield the keys of a generated dataset without one, and those of other datasets with one.

    Demonstrations of a reasoning-gym dataset to replay are asked and stated in these forms as well.
    """
    keys: tuple[str, ...]
    name, replayed = values["dataset_name"], str(values["replay_dataset"]).startswith(GYM)
    if name.startswith(GYM):
        keys, words = ("dataset_config", "dataset_test_split"), "with a reasoning-gym dataset"
    elif is_function(name):
        keys, words = ("dataset_config", "dataset_test_split"), "with a function"
        if not replayed:
            keys += ("answer_format", "prompt_suffix")
    else:
        keys, words = ("dataset_args",) if replayed else GENERATOR, "without a reasoning-gym dataset"
    for key in keys:
        only_in_file = key in in_file and key not in overrides and "dataset_name" in overrides
        if (key in in_file or key in overrides) and values[key] != KEYS[key].default and not only_in_file:
            more = " or a function" if key == "dataset_args" else ""
            yield key, f"has no effect {words}{more}"


def _unsuited(values: Mapping[str, Any], in_file: Collection[str], overrides: Collection[str]) -> Iterator[Finding]:
    for keys, other, suited, words in _VALUES:
        value = values[other]
        if any(word in suited for word in (value if isinstance(value, list) else [value])):
            continue
        for key in keys:
            only_in_file = key in in_file and key not in overrides and other in overrides
            if (key in in_file or key in overrides) and values[key] != KEYS[key].default and not only_in_file:
                yield key, words


def _unscaled(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield `ship_scale` with an adapter whose scale is no way between the base and the chosen round."""
    if values["ship_scale"] in (None, [1.0]):
        return
    name = values["model_name_or_path"]
    own = adapter_keys(name)
    if own:
        yield (
            "ship_scale",
            f"{name} is an adapter, and its scale 0 is the model below it, not where the run begins: leave ship_scale "
            f"out, or give the adapter's base model to begin a new one",
        )
    elif values["use_peft"] and values["use_dora"]:
        yield "ship_scale", "a DoRA adapter has no scale, since it norms the weights: leave ship_scale or use_dora out"


def _continued_adapter(values: Mapping[str, Any], given: Collection[str]) -> Iterator[Finding]:
    """Yield the keys of an adapter that differ from those of the adapter directory that is trained further."""
    name = values["model_name_or_path"]
    own = adapter_keys(name)
    for key, theirs in own.items():
        ours = values[key]
        if key not in given or ours == ["all-linear"]:  # its modules are listed by name in the adapter's file
            continue
        if isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs:
            yield (
                key,
                f"has no effect: {name} is an adapter with {_ADAPTER[key]} {theirs}, which is trained further as it "
                f"is: leave {key} out, or give the adapter's base model to begin a new one",
            )


def adapter_keys(name: str) -> dict[str, Any]:
    """Return the keys of a recipe that an adapter directory decides, with its values; {} for any other model."""
    file = Path(name) / "adapter_config.json"
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not an adapter, or one whose damage is reported where it is loaded
        return {}
    if not isinstance(own, dict):
        return {}
    values = {key: own[its_name] for key, its_name in _ADAPTER.items() if its_name in own}
    if values:  # a file of an earlier peft lacks them
        values = {"use_rslora": False, "use_dora": False} | values
    return {key: [value] if key in _LISTS and isinstance(value, str) else value for key, value in values.items()}
