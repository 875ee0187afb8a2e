"""`export`: a full model, an adapter or a round as one ordinary model directory, compared with what was trained.

The weights are compared by what they compute: the logits on prompts, in fp32, before anything is merged and after the
written files were loaded by plain transformers. The directory appears when all comparisons are within their bounds.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bcft.config.schema import ModelSettings
from bcft.errors import CheckpointError
from bcft.generation.mode import sampling_mode
from bcft.policy.archer import load_archer
from bcft.policy.chat_template import Renderer
from bcft.policy.checks import check_room
from bcft.policy.loading import (
    Policy,
    adapter_base,
    base_config,
    load_policy,
    load_renderer,
    locate,
    save_policy,
)
from bcft.policy.merging import load_dequantized, merge
from bcft.policy.shape import build_without_storage, context_length
from bcft.policy.sources import check_base
from bcft.runs.storage import storage
from bcft.types import Problem

BOUND, FOUR_BIT_BOUND = 1e-5, 1e-3
"""The most that a logit may change, times the largest logit if that is above 1: 4-bit kernels sum in another order."""
POSITIONS, LAST = 512, 64
"""Of a prompt, the tokens that are read, and those whose logits are compared."""
PROMPTS = (
    "What is 17 + 25? Work it out step by step.",
    "Write one sentence about the sea.",
    "def add(a, b):",
    "The capital of France is",
)
"""What is compared where there is no run, or its problems have no prompts."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from those of what was given."""

    directory: Path
    dtype: str
    parameters: int
    prompts: int
    difference: float
    """The largest of a logit, in fp32 compute: by merging, and between what was written and what plain transformers
    loads."""
    largest: float
    """The largest logit."""
    bound: float
    rounding: float
    """The largest difference that `dtype` adds; 0.0 for float32 and for weights that had this dtype."""


@dataclass(frozen=True)
class _Written:
    """A model in a directory aside: what it must compute when it is loaded, and what was compared so far."""

    aside: Path
    ids: Sequence[Sequence[int]]
    logits: Sequence[torch.Tensor]
    """(positions, vocabulary) of each prompt."""
    stop_ids: tuple[int, ...]
    device: torch.device
    so_far: Exported


def export_model(
    source: str, output: Path, settings: ModelSettings, *, dtype: str, problems: Sequence[Problem]
) -> Exported:
    """Write the model of a directory, its adapter merged, to a new directory; return what was compared.

    source: any `model_name_or_path`; settings: how it was loaded in its run, of which the precision is not used.
    dtype: `float32`, `bfloat16`, `float16`, or `auto`: as they are stored, float32 for what is merged.

    Raises CheckpointError beyond the bound, StorageError where the disk is too small; nothing is written then.
    """
    settings = replace(settings, dtype="float32", bf16=False, fp16=False)
    with _aside(output) as aside:
        written = _merged(source, aside, settings, dtype=dtype, problems=problems)
        return _moved(written, output, settings, problems)


def export_archer(file: Path, output: Path, settings: ModelSettings, *, dtype: str, lora_alpha: float) -> Exported:
    """Write the weights of Archer's `bc_model.pt` as a model directory; return what was compared.

    settings: name the base whose configuration, tokenizer and template the directory gets. dtype: as for
    `export_model`; lora_alpha: of the adapter in the file, 0.0 for none. Raises DataError where file and base differ.
    """
    settings = replace(settings, dtype="float32", bf16=False, fp16=False)
    with _aside(output) as aside:
        written = _imported(file, aside, settings, dtype=dtype, lora_alpha=lora_alpha)
        return _moved(written, output, settings, ())


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """Yield a neighbor of the output to write to, which is gone afterwards."""
    aside = output.with_name(f".{output.name}.unfinished")
    try:
        with storage(output):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _merged(source: str, aside: Path, settings: ModelSettings, *, dtype: str, problems: Sequence[Problem]) -> _Written:
    """Load, merge and write a model."""
    check_base(locate(source, settings))
    stored = base_config(source, settings)
    merging = settings.load_in_4bit or adapter_base(locate(source, settings))
    numbers = _numbers(dtype, torch.float32 if merging else stored.dtype)
    planned = build_without_storage(source, stored, settings)
    check_room(aside.parent, planned.num_parameters() * numbers.itemsize)
    policy = load_policy(source, settings, trainable=False)
    ids = _prompt_ids(policy.renderer, problems, stored)
    before = _logits(policy.model, ids)
    if settings.load_in_4bit:
        generation = _base(policy.model).generation_config
        model = load_dequantized(source, settings, policy.precision)
        _base(model).generation_config = generation
        policy = replace(policy, model=model)
    policy = replace(policy, model=merge(policy.model, source))
    return _write(policy, aside, numbers, ids, before, bound=FOUR_BIT_BOUND if settings.load_in_4bit else BOUND)


def _imported(file: Path, aside: Path, settings: ModelSettings, *, dtype: str, lora_alpha: float) -> _Written:
    """Read and write the model in one of Archer's files."""
    policy, stored = load_archer(file, settings, lora_alpha=lora_alpha)
    numbers = _numbers(dtype, stored)
    check_room(aside.parent, policy.model.num_parameters() * numbers.itemsize)
    ids = _prompt_ids(policy.renderer, (), policy.model.config)
    return _write(policy, aside, numbers, ids, _logits(policy.model, ids), bound=BOUND)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _numbers(dtype: str, stored: torch.dtype | None) -> torch.dtype:
    """Return the number format to write."""
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


def _prompt_ids(renderer: Renderer, problems: Sequence[Problem], config: Any) -> list[list[int]]:
    """Return the ids of the problems' prompts, of `PROMPTS` where there are none."""
    asked = [problem for problem in problems if problem.prompt]
    prompts = [problem.prompt for problem in asked] or list(PROMPTS)
    given = [problem.template_kwargs for problem in asked] or None
    most = min(POSITIONS, context_length(config))
    return [ids[-most:] for ids in renderer.prompts(prompts, given)]


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the logits at the last positions of each prompt, (positions, vocabulary) in fp32 on the CPU."""
    with sampling_mode(model):
        return [
            model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, -LAST:].float().cpu()
            for ids in prompts
        ]


def _difference(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of a logit; infinite where one is not a number."""
    largest = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))
    return math.inf if math.isnan(largest) else largest


def _round(model: Any, numbers: torch.dtype) -> None:
    """Give the weights another number format in place; buffers, such as rotary frequencies, are not stored."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(numbers)


def _write(
    policy: Policy,
    aside: Path,
    numbers: torch.dtype,
    ids: Sequence[Sequence[int]],
    before: Sequence[torch.Tensor],
    *,
    bound: float,
) -> _Written:
    """Compare a merged model with the logits before, round it, and write it."""
    model, largest = policy.model, max(float(one.abs().max()) for one in before)
    allowed = bound * max(1.0, largest)
    exact = _logits(model, ids)
    difference = _difference(before, exact)
    _refuse(difference, allowed, largest, "merged")
    rounded = exact
    if numbers != torch.float32:
        _round(model, numbers)
        _round(model, torch.float32)
        rounded = _logits(model, ids)
        _round(model, numbers)
    model.config.dtype = numbers
    with storage(aside):
        save_policy(policy, aside)
    name, rounding = str(numbers).removeprefix("torch."), _difference(exact, rounded)
    so_far = Exported(aside, name, model.num_parameters(), len(ids), difference, largest, allowed, rounding)
    return _Written(aside, ids, rounded, policy.renderer.stop_ids, model.device, so_far)


def _moved(written: _Written, output: Path, settings: ModelSettings, problems: Sequence[Problem]) -> Exported:
    """Load what was written with plain transformers, compare it, and put it in place."""
    aside, so_far = written.aside, written.so_far
    trust = settings.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(aside, dtype=torch.float32, trust_remote_code=trust)
    difference = _difference(written.logits, _logits(model.to(written.device), written.ids))
    _refuse(difference, so_far.bound, so_far.largest, "written and loaded")
    here = ModelSettings(str(aside), trust_remote_code=trust, chat_template_kwargs=settings.chat_template_kwargs)
    renderer = load_renderer(str(aside), here)
    if renderer.stop_ids != written.stop_ids or _prompt_ids(renderer, problems, model.config) != written.ids:
        raise CheckpointError(
            "export: the written tokenizer makes other ids than the model's own, or stops elsewhere: it was removed"
        )
    with storage(output):
        aside.replace(output)
    return replace(so_far, directory=output, difference=max(difference, so_far.difference))


def _refuse(difference: float, allowed: float, largest: float, what: str) -> None:
    """Raise CheckpointError for logits beyond the bound."""
    if not difference <= allowed:
        raise CheckpointError(
            f"export: the {what} model's logits differ from those of the trained one by {difference:.2g}, and "
            f"{allowed:.2g} is allowed (the largest is {largest:.3g}): nothing was written"
        )
