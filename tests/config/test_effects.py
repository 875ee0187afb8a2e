"""A key that a command would not use is refused with the key and what it needs; in a shared file it may stand."""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.recipes import BASE, BASE_KEYS, findings

from bcft.config.effects import adapter_keys
from bcft.config.keys import COMMANDS, KEYS
from bcft.config.loader import load, parse

Write = Callable[[str | bytes], str]

# A key that needs another one

ALONE: list[tuple[str, dict[str, Any], str]] = [
    ("sft", {"lora_r": 8}, "without use_peft: true"),
    ("sft", {"lora_alpha": 8}, "without use_peft: true"),
    ("filtered", {"use_dora": True}, "without use_peft: true"),
    ("filtered", {"use_rslora": True}, "without use_peft: true"),
    ("filtered", {"lora_modules_to_save": ["lm_head"]}, "without use_peft: true"),
    ("sft", {"bnb_4bit_quant_type": "fp4"}, "without load_in_4bit: true"),
    ("evaluate", {"use_bnb_nested_quant": True}, "without load_in_4bit: true"),
    ("filtered", {"max_turns": 3}, "without an environment"),
    ("evaluate", {"step_timeout": 1.0}, "without an environment"),
    ("collect", {"environment_args": {"size": 3}}, "without an environment"),
    ("sft", {"eval_steps": 5}, "without eval_strategy: steps"),
    ("sft", {"eval_steps": 5, "eval_strategy": "epoch"}, "without eval_strategy: steps"),
    ("sft", {"eval_delay": 2}, "without eval_strategy: steps or epoch"),
    ("sft", {"eval_on_start": True}, "without eval_strategy: steps or epoch"),
    ("sft", {"per_device_eval_batch_size": 2, "eval_strategy": "no"}, "without eval_strategy: steps or epoch"),
    ("sft", {"save_steps": 5, "save_strategy": "epoch"}, "without save_strategy: steps"),
    ("sft", {"save_steps": 5, "save_strategy": "no"}, "without save_strategy: steps"),
    ("sft", {"save_total_limit": 1, "save_strategy": "no"}, "without save_strategy: steps or epoch"),
    ("filtered", {"logging_steps": 5, "logging_strategy": "epoch"}, "without logging_strategy: steps"),
    ("sft", {"warmup_steps": 5, "lr_scheduler_type": "constant"}, "with this lr_scheduler_type; constant_with_warmup"),
    ("filtered", {"warmup_steps": 0.1, "lr_scheduler_type": "greedy"}, "with this lr_scheduler_type"),
    ("filtered", {"adam_beta2": 0.99, "optim": "sgd"}, "with this optim, which is not a variant of Adam"),
    ("sft", {"adam_epsilon": 1e-6, "optim": "adafactor"}, "with this optim"),
    ("sft", {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "without gradient_checkpointing: true"),
    ("sft", {"project": "p"}, "without report_to: wandb, trackio or mlflow"),
    ("sft", {"trackio_space_id": "a/b", "report_to": ["wandb"]}, "without report_to: trackio"),
    ("refilter", {"weight_temperature": 0.5}, "without row_weight: reward"),
    ("evaluate", {"eval_dev_samples": 2}, "with eval_split: test"),
    ("evaluate", {"eval_test_samples": 2, "eval_split": "dev"}, "with eval_split: dev"),
]


@pytest.mark.parametrize(("command", "keys", "reason"), ALONE)
def test_a_key_without_effect_is_refused_with_what_it_needs(command: str, keys: dict[str, Any], reason: str) -> None:
    (line,) = findings(lambda: load(command, None, BASE_KEYS | keys))
    assert line.startswith(f"override: {next(iter(keys))}: has no effect {reason}")


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        ("sft", {"lora_r": 8, "use_peft": True}),
        ("sft", {"bnb_4bit_quant_type": "fp4", "load_in_4bit": True}),
        ("filtered", {"max_turns": 3, "environment": "a.B"}),
        ("sft", {"eval_steps": 5, "eval_strategy": "steps"}),
        ("sft", {"eval_delay": 2, "eval_strategy": "epoch"}),
        ("sft", {"save_steps": 5}),
        ("sft", {"save_total_limit": 1}),
        ("sft", {"logging_steps": 5}),
        ("sft", {"warmup_steps": 5}),
        ("sft", {"warmup_steps": 0, "lr_scheduler_type": "constant"}),
        ("sft", {"adam_beta2": 0.99, "optim": "adamw_8bit"}),
        ("sft", {"project": "p", "report_to": ["wandb", "trackio"]}),
        ("evaluate", {"eval_dev_samples": 2, "eval_split": "dev"}),
        ("evaluate", {"eval_test_samples": 2}),
        ("sft", {"max_turns": 20}),  # the default: a run has it anyway
    ],
)
def test_with_what_it_needs_it_is_accepted(command: str, keys: dict[str, Any]) -> None:
    config = load(command, None, BASE_KEYS | keys)
    assert {key: config.values[key] for key in keys} == keys


def test_the_place_is_the_line_of_the_key(write: Write) -> None:
    path = write(BASE + "seed: 1\neval_steps: 5\n")
    assert findings(lambda: load("sft", path, {})) == [
        f"{path}:4: eval_steps: has no effect without eval_strategy: steps"
    ]


@pytest.mark.parametrize(
    ("line", "override"),
    [
        ("use_peft: true\nlora_r: 8", "use_peft=false"),
        ("load_in_4bit: true\nuse_peft: true\nbnb_4bit_quant_type: fp4", "load_in_4bit=false"),
        ("environment: a.B\nmax_turns: 3", "environment=null"),
        ("eval_strategy: steps\neval_steps: 5", "eval_strategy=no"),
        ("save_strategy: epoch\nsave_total_limit: 1", "save_strategy=no"),
        ("warmup_steps: 5", "lr_scheduler_type=constant"),
        ("adam_beta2: 0.99", "optim=sgd"),
    ],
)
def test_what_an_override_makes_useless_in_a_file_may_stand(write: Write, line: str, override: str) -> None:
    assert parse("sft", [write(f"{BASE}{line}\n"), override])


@pytest.mark.parametrize("command", ["filtered", "collect", "refilter"])
def test_marks_are_for_demonstrations(command: str, write: Write) -> None:
    (line,) = findings(lambda: load(command, write(f"{BASE}train_on: marked\n"), {}))
    assert "train_on: marked is for demonstrations" in line
    assert load("sft", write(f"{BASE}train_on: marked\n"), {}).data.train_on == "marked"


@pytest.mark.parametrize("command", ["filtered", "collect"])
def test_maxrl_needs_several_attempts_at_a_problem(command: str, write: Write) -> None:
    keys = BASE_KEYS | {"row_weight": "maxrl", "require_success": "true"}
    (line,) = findings(lambda: load(command, None, keys | {"num_generations": 1}))
    assert line == "override: row_weight: maxrl has no effect with num_generations: 1: a right attempt weighs 1"
    assert load(command, write(yaml.safe_dump(keys)), {"num_generations": 1}).selection.row_weight == "maxrl"
    assert load("refilter", None, keys).selection.most_per_problem is None


# A key of another command

OF_SFT = {
    "eval_strategy": "steps", "eval_steps": 5, "eval_delay": 1, "eval_on_start": True, "per_device_eval_batch_size": 2,
    "save_strategy": "epoch", "save_steps": 5, "save_total_limit": 1, "save_on_each_node": True, "data_seed": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", OF_SFT)
def test_rounds_take_no_key_of_the_trainers_own_saving_and_evaluating(key: str, write: Write) -> None:
    """`algorithms.learner` gives the Trainer `no` for both, and a seed of each round."""
    (line,) = findings(lambda: parse("filtered", [write(BASE), f"{key}={OF_SFT[key]}"]))
    assert line == f"command line: {key}: not used here; it is a key of bcft sft"


@pytest.mark.parametrize("key", OF_SFT)
def test_nor_does_a_file_or_a_dict_give_rounds_such_a_key(key: str, write: Write) -> None:
    path = write(f"{BASE}{key}: {json.dumps(OF_SFT[key])}\n")
    (line,) = findings(lambda: load("filtered", path, {}))
    assert line.startswith(f"{path}:3: {key}: has no effect in filtered: ")
    (line,) = findings(lambda: load("filtered", BASE_KEYS | {key: OF_SFT[key]}, {}))
    assert line.startswith(f"recipe: {key}: has no effect in filtered: ")


def test_those_are_all_keys_of_training_that_rounds_lack() -> None:
    training = (key for key in KEYS.values() if key.section == "training")
    assert {key.name for key in training if "filtered" not in key.commands} == {*OF_SFT}


def test_a_file_is_shared_between_all_commands_but_filtered(write: Write) -> None:
    text = BASE + yaml.safe_dump({**OF_SFT, "save_strategy": "steps", "num_rounds": 3})
    for command in {*COMMANDS} - {"filtered"}:
        assert load(command, write(text), {}).path


@pytest.mark.parametrize("command", ["evaluate", "collect", "refilter", "preview"])
@pytest.mark.parametrize("key", ["learning_rate", "lora_r", "max_steps", "optim", "adam_beta2", "report_to"])
def test_a_command_that_trains_nothing_takes_no_key_of_training(command: str, key: str) -> None:
    lines = findings(partial(load, command, None, BASE_KEYS | {key: KEYS[key].default}))
    assert lines == [f"override: {key}: not used here; it is a key of bcft sft and filtered"]


@pytest.mark.parametrize("key", ["disable_tqdm", "logging_first_step", "load_best_model_at_end"])
@pytest.mark.parametrize("command", ["sft", "filtered"])
def test_what_the_package_decides_itself_is_refused_with_the_reason(command: str, key: str) -> None:
    (line,) = findings(lambda: load(command, None, BASE_KEYS | {key: True}))
    assert line.startswith(f"override: {key}: refused: ")


# An adapter that is trained further


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """Return the directory of an adapter of rank 16."""
    own = {"base_model_name_or_path": "x", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "use_dora": False}
    own |= {"target_modules": ["v_proj", "q_proj"], "modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    return str(tmp_path)


OTHERS = {
    "lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "use_dora": True, "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["lm_head"],
}  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("command", ["sft", "filtered"])
def test_an_adapter_is_trained_further_with_its_own_keys(adapter: str, command: str, key: str) -> None:
    keys = {"model_name_or_path": adapter, "dataset_name": "d.jsonl", "use_peft": True}
    (line,) = findings(lambda: load(command, None, keys | {key: OTHERS[key]}))
    assert line.startswith(f"override: {key}: has no effect: {adapter} is an adapter with ")
    assert "trained further as it is" in line


@pytest.mark.parametrize("key", [*OTHERS, "use_rslora"])
@pytest.mark.parametrize("command", ["sft", "filtered"])
def test_an_adapter_needs_no_use_peft_for_its_own_keys(adapter: str, command: str, key: str) -> None:
    """Obeying `without use_peft: true` would only end in the refusal of the adapter's key."""
    keys = {"model_name_or_path": adapter, "dataset_name": "d.jsonl"}
    (line,) = findings(lambda: load(command, None, keys | {key: {**OTHERS, "use_rslora": True}[key]}))
    assert line.startswith(f"override: {key}: has no effect: {adapter} is an adapter with ")
    own = adapter_keys(adapter)[key]
    if own is not None:
        assert load(command, None, keys | {key: own}).values[key] == own


def test_keys_that_an_adapter_has_may_be_given_and_are_recorded(adapter: str, write: Write) -> None:
    keys = {"model_name_or_path": adapter, "dataset_name": "d.jsonl"}
    same = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj", "v_proj"]}
    assert load("filtered", None, keys | same).model.lora_r == 16
    assert load("filtered", None, keys | {"use_peft": True, "lora_target_modules": ["all-linear"]})
    plain = load("sft", None, keys)
    assert (plain.resolved["lora_dropout"], plain.resolved["lora_target_modules"]) == (0.0, ["v_proj", "q_proj"])
    assert load("sft", write(yaml.safe_dump(plain.resolved)), {}).resolved == plain.resolved
    assert load("evaluate", None, keys).values["lora_dropout"] == KEYS["lora_dropout"].default


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "{}"])
def test_a_damaged_adapter_is_reported_where_it_is_loaded(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    assert adapter_keys(str(tmp_path)) == {}
    assert load("sft", None, BASE_KEYS | {"model_name_or_path": str(tmp_path)})


def test_the_command_line_of_a_recipe_that_is_a_dict_has_its_own_keys_only() -> None:
    config = load("sft", BASE_KEYS | {"num_rounds": 3, "preview_rows": 2, "max_steps": 1}, {"seed": 1})
    _, command, *tokens = shlex.split(config.command_line)
    assert parse(command, tokens).training == config.training
    assert "num_rounds" not in config.command_line


@pytest.mark.parametrize(("key", "value"), [("loss_type", "dft"), ("label_smoothing_factor", 0.1)])
def test_a_loss_without_weights_of_rows_refuses_those_of_the_filter(key: str, value: object) -> None:
    weights = {"row_weight": "reward", key: value}
    (line,) = findings(lambda: load("filtered", None, BASE_KEYS | weights))
    assert f"row_weight: {key}: {value} takes no weights of rows" in line
    assert load("filtered", None, BASE_KEYS | {key: value}).selection.row_weight == "none"
