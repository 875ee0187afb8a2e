"""What the Trainer would refuse after the first evaluation is refused before a model is loaded, with its key."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from transformers.integrations import integration_utils

from bcft.config.keys import KEYS, PASSED_THROUGH, TRACKERS
from bcft.config.schema import TrainingSettings
from bcft.errors import UsageError
from bcft.training import checks
from bcft.training.checks import check_training


def settings_of(**fields):
    """Return training settings; the Trainer's own fields go to `passed_through`, as in a recipe."""
    through = {name: fields.pop(name) for name in tuple(fields) if name in PASSED_THROUGH}
    return TrainingSettings(**fields, passed_through=through)


REFUSED = {
    "unknown tracker": ("report_to", "'wandbb' is not a tracker", {"report_to": "wandbb"}),
    "unknown tracker in a list": ("report_to", "'x' is not a tracker", {"report_to": ["x"]}),
    "min_lr is missing": (
        "lr_scheduler_type", "may hold num_cycles, min_lr, min_lr_rate", {"lr_scheduler_type": "cosine_with_min_lr"},
    ),
    "min_lr is missing in its variant": (
        "lr_scheduler_type", "does not work so", {"lr_scheduler_type": "cosine_warmup_with_min_lr"},
    ),
    "num_decay_steps is missing": (
        "lr_scheduler_type", "num_decay_steps", {"lr_scheduler_type": "warmup_stable_decay"},
    ),
    "an unknown argument": (
        "lr_scheduler_kwargs", "no_such",
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"no_such": 1}},
    ),
    "an end above the start": (
        "lr_scheduler_kwargs", "lr_end",
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}, "learning_rate": 0.1},
    ),
    "a word for a number": (
        "lr_scheduler_kwargs", "num_cycles",
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": "two"}},
    ),
    "a division by zero later": (
        "lr_scheduler_kwargs", "timescale",
        {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
    ),
    "arguments without effect": (
        "lr_scheduler_kwargs", "constant takes none",
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
    ),
    "a plateau of nothing": (
        "lr_scheduler_type", "follows an evaluation's loss", {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ),
    "greedy without evaluation": ("lr_scheduler_type", "eval_strategy", {"lr_scheduler_type": "greedy"}),
    "galore": ("optim", "needs galore-torch", {"optim": "galore_adamw"}),
    "apollo": ("optim", "needs apollo-torch", {"optim": "apollo_adamw_layerwise"}),
    "lomo": ("optim", "needs lomo-optim", {"optim": "adalomo"}),
    "schedule free": ("optim", "needs schedulefree", {"optim": "schedule_free_adamw"}),
    "grokadamw": ("optim", "needs grokadamw", {"optim": "grokadamw"}),
    "optimi": ("optim", "needs torch-optimi", {"optim": "stable_adamw"}),
    "xla": ("optim", "needs torch_xla", {"optim": "adamw_torch_xla"}),
    "torchao": ("optim", "needs torchao", {"optim": "adamw_torch_4bit"}),
    "malformed arguments": ("optim_args", "name=value", {"optim": "sgd", "optim_args": "momentum:0.9"}),
    "arguments that AdamW ignores": ("optim_args", "no effect", {"optim": "adamw_torch", "optim_args": "beta1=0.9"}),
    "targets that AdamW ignores": ("optim_target_modules", "galore", {"optim_target_modules": "all-linear"}),
    "unknown backend": ("torch_compile_backend", "'x' is not one of", {"torch_compile_backend": "x"}),
    "unknown mode": ("torch_compile_mode", "'x' is not one of default", {"torch_compile_mode": "x"}),
    "half a step": ("save_steps", "not a whole number", {"save_steps": 2.5}),
    "half a step of evaluation": ("eval_steps", "not a whole number", {"eval_steps": 1.5}),
    "half a step of logging": ("logging_steps", "not a whole number", {"logging_steps": 10.5}),
    "prefetch": ("dataloader_prefetch_factor", "dataloader_num_workers", {"dataloader_prefetch_factor": 2}),
    "persistent": ("dataloader_persistent_workers", "dataloader_num_workers", {"dataloader_persistent_workers": True}),
    "fork": ("dataloader_multiprocessing_context", "workers", {"dataloader_multiprocessing_context": "fork"}),
    "tf32": ("tf32", "no GPU with TF32", {"tf32": True}),
    "checkpointing": (
        "gradient_checkpointing_kwargs", "'x' is not one of use_reentrant",
        {"gradient_checkpointing_kwargs": {"x": 1}},
    ),
    "accelerator": ("accelerator_config", "no_such", {"accelerator_config": {"no_such": 1}}),
}  # fmt: skip
ACCEPTED = [
    {},
    {"report_to": "none"},
    {"report_to": ["none"]},
    {"report_to": "all"},
    {"report_to": None},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
    {"lr_scheduler_type": "polynomial"},
    {"lr_scheduler_type": "inverse_sqrt"},
    {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
    {"optim": "adamw_bnb_8bit"},
    {"optim": "lion_32bit"},
    {"save_steps": 0.5, "eval_steps": 10},
    {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
    {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    {"accelerator_config": {"split_batches": False}},
    {"torch_compile_backend": "eager"},
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_fail_late_is_refused_in_one_line_with_its_key(monkeypatch, case):
    key, reason, fields = REFUSED[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError) as caught:
        check_training(settings_of(**fields))
    assert str(caught.value).startswith(f"{key}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_what_works_is_accepted(fields):
    check_training(settings_of(**fields))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_is_accepted_where_transformers_says_that_it_is_installed(monkeypatch, name):
    function = f"is_{name}_available"
    for installed in (True, False):
        monkeypatch.setattr(integration_utils, function, lambda installed=installed: installed)
        if installed:
            check_training(settings_of(report_to=[name]))
        else:
            with pytest.raises(UsageError, match=f"^report_to: the package of {name} is not installed"):
                check_training(settings_of(report_to=name))


@pytest.mark.parametrize("name", KEYS["optim"].choices)
def test_every_optimizer_has_the_module_it_needs_or_is_refused_with_the_package(monkeypatch, name):
    found = importlib.util.find_spec
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: asked.append(module))
    settings = settings_of(optim=name)
    if name in checks._TORCH_OPTIMIZERS:
        check_training(settings)
        assert not asked
        return
    with pytest.raises(UsageError, match=f"^optim: {name} needs .*: run `pip install"):
        check_training(settings)
    bitsandbytes = name.startswith(("paged", "lion", "ademamix", "rmsprop_bnb")) or name in (
        "adamw_bnb_8bit", "adamw_8bit",
    )  # fmt: skip
    assert (asked == ["bitsandbytes"]) == bitsandbytes
    assert found("torch")


@pytest.mark.parametrize("fields", [{"optim_target_modules": None}, {"gradient_accumulation_steps": 2}])
def test_a_layerwise_optimizer_that_is_installed_still_needs_its_targets_and_no_accumulation(monkeypatch, fields):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    given = {"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}
    check_training(settings_of(**given))
    (key,) = fields
    with pytest.raises(UsageError, match=f"^{key}: "):
        check_training(settings_of(**given | fields))


def test_inductor_without_a_compiler_is_refused(monkeypatch):
    check_training(settings_of(torch_compile=True))
    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match=r"^torch_compile: inductor needs a C"):
        check_training(settings_of(torch_compile=True))
    check_training(settings_of(torch_compile=True, torch_compile_backend="eager"))


def test_the_checks_load_no_trl_and_a_plain_recipe_no_trainer():
    code = (
        "import sys; from bcft.training.checks import check_training; from bcft.config.schema import TrainingSettings;"
        "check_training(TrainingSettings(lr_scheduler_type='cosine'));"
        "print([m for m in ('trl', 'transformers', 'accelerate', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
