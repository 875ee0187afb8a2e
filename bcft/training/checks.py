"""What the Trainer would refuse late, after the first evaluation or a whole round, refused before a model is loaded.

The checks read the settings and look for packages; trl is not imported, and parts of transformers that take seconds
are imported for the settings that need them.
"""

import importlib.util
import inspect
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from bcft.config.keys import TRACKERS
from bcft.config.schema import TrainingSettings
from bcft.errors import UsageError

_PLAIN_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
"""Schedules that take no arguments and never fail."""
_WITH_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the loss of an evaluation."""
_TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_OPTIMIZER_PACKAGES = {
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "schedule_free": ("schedulefree", "schedulefree"),
}
"""An optimizer, or the first word of its name -> the module it needs and the package to install. All others that are
not PyTorch's own are bitsandbytes'."""
_IGNORE_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adafactor", "lomo", "adalomo")
_STEPS = ("save_steps", "eval_steps")
_OF_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_training(training: TrainingSettings) -> None:
    """Refuse trackers, schedules, optimizers and compilers that do not work here.

    Raises UsageError with the key.
    """
    given = training.passed_through
    _check_trackers(given.get("report_to"))
    _check_schedule(training, given.get("lr_scheduler_kwargs") or {})
    _check_optimizer(training, given)
    _check_compilation(given)
    _check_the_rest(training, given)


def _check_trackers(report_to: Any) -> None:
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if not names or names in (["none"], ["all"]):
        return
    from transformers.integrations import integration_utils  # noqa: PLC0415 - takes a second

    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"report_to: {name!r} is not a tracker: use none, all, or {', '.join(TRACKERS)}")
        available = getattr(integration_utils, f"is_{name}_available")
        if not available():
            raise UsageError(
                f"report_to: the package of {name} is not installed or is switched off: install it, or set "
                f"report_to: none"
            )


def _check_schedule(training: TrainingSettings, arguments: Mapping[str, Any]) -> None:
    """Build the schedule on an optimizer without a model, and take it to its end."""
    name = training.lr_scheduler_type
    if name in _PLAIN_SCHEDULES and not arguments:
        return
    if name in ("constant", "constant_with_warmup"):
        raise UsageError(f"lr_scheduler_kwargs: {name} takes none, so {_words(arguments)} would have no effect")
    if name in _WITH_EVALUATION and training.eval_strategy == "no":
        raise UsageError(f"lr_scheduler_type: {name} follows an evaluation's loss: set eval_strategy: steps or epoch")
    from transformers.optimization import get_scheduler  # noqa: PLC0415 - takes a second

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        schedule = get_scheduler(
            name, optimizer, num_warmup_steps=10, num_training_steps=100, scheduler_specific_kwargs=dict(arguments)
        )
        for _ in range(0 if name in _WITH_EVALUATION else 100):
            optimizer.step()
            schedule.step()
    except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
        key = "lr_scheduler_kwargs" if arguments else "lr_scheduler_type"
        reason = " ".join(str(error).split()) or type(error).__name__
        wanted = ", ".join(_schedule_arguments(name))
        raise UsageError(f"{key}: {name} does not work so: {reason}; lr_scheduler_kwargs may hold {wanted}") from error


def _schedule_arguments(name: str) -> list[str]:
    """Return the names of a schedule's own arguments."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION as FUNCTIONS  # noqa: PLC0415 - as above

    function = next((FUNCTIONS[key] for key in FUNCTIONS if key.value == name), None)
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"}
    return [word for word in inspect.signature(function).parameters if word not in ours] if function else []


def _check_optimizer(training: TrainingSettings, given: Mapping[str, Any]) -> None:
    name = training.optim
    if name not in _TORCH_OPTIMIZERS:
        found = (value for key, value in _OPTIMIZER_PACKAGES.items() if name == key or name.startswith(f"{key}_"))
        module, package = next(found, ("bitsandbytes", "bitsandbytes"))
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"optim: {name} needs {package}: run `pip install {package}`, or use adamw_torch")
    if name.startswith(("galore", "apollo")):
        if not given.get("optim_target_modules"):
            raise UsageError(f"optim_target_modules: {name} needs it, such as all-linear")
        if name.endswith("layerwise") and training.gradient_accumulation_steps > 1:
            raise UsageError(f"gradient_accumulation_steps: {name} does not accumulate: set 1, or use another optim")
    elif given.get("optim_target_modules"):
        raise UsageError(f"optim_target_modules: {name} trains all modules: only galore and apollo optimizers read it")
    arguments = given.get("optim_args")
    if arguments and name in _IGNORE_OPTIM_ARGS:
        raise UsageError(f"optim_args: {name} takes none, so {arguments!r} would have no effect")
    if arguments and any(part.count("=") != 1 for part in arguments.replace(" ", "").split(",")):
        raise UsageError(f"optim_args: {arguments!r} is not of the form name=value,name=value")


def _check_compilation(given: Mapping[str, Any]) -> None:
    backend, mode = given.get("torch_compile_backend"), given.get("torch_compile_mode")
    if not (given.get("torch_compile") or backend or mode):
        return
    if mode and mode not in _COMPILE_MODES:
        raise UsageError(f"torch_compile_mode: {mode!r} is not one of {', '.join(_COMPILE_MODES)}")
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend and backend not in known:
        raise UsageError(f"torch_compile_backend: {backend!r} is not one of {', '.join(known)}")
    if (backend or "inductor") == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise UsageError("torch_compile: inductor needs a C++ compiler, and there is none: install g++")


def _check_the_rest(training: TrainingSettings, given: Mapping[str, Any]) -> None:
    """Check numbers and words that the Trainer, its data loader or checkpointing reads late."""
    for key, value in (("logging_steps", training.logging_steps), *((k, given.get(k)) for k in _STEPS)):
        if value is not None and value > 1 and value != int(value):
            raise UsageError(f"{key}: {value} is above 1 and not a whole number of steps")
    if not given.get("dataloader_num_workers"):
        for key in _OF_WORKERS:
            if given.get(key):
                raise UsageError(f"{key}: it is for worker processes: set dataloader_num_workers too")
    if given.get("tf32") and not _has_tf32():
        raise UsageError("tf32: this machine has no GPU with TF32, such as an A100: leave tf32 out")
    unknown = sorted((given.get("gradient_checkpointing_kwargs") or {}).keys() - set(_checkpoint_arguments()))
    if unknown:
        allowed = ", ".join(_checkpoint_arguments())
        raise UsageError(f"gradient_checkpointing_kwargs: {unknown[0]!r} is not one of {allowed}")
    if options := given.get("accelerator_config"):
        from transformers.trainer_pt_utils import AcceleratorConfig  # noqa: PLC0415 - takes a second

        try:
            AcceleratorConfig(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"accelerator_config: {' '.join(str(error).split())}") from error


def _has_tf32() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _checkpoint_arguments() -> list[str]:
    parameters = inspect.signature(torch.utils.checkpoint.checkpoint).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.kind not in variable and p.name != "function"]


def _words(arguments: Mapping[str, Any]) -> str:
    return ", ".join(map(str, arguments))
