"""The trainer: TRL's `SFTTrainer`, fed ids and labels that are proved already.

The loss is TRL's: the mean over all supervised tokens of an optimizer step, whatever the micro-batches. Left out:
truncation, packing, tokenisation and label making, which happen before (or not at all).
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from bcft.errors import DivergedError, Preempted, StorageError, UsageError
from bcft.runs.storage import MANIFEST, committed, read_json, storage, write_manifest
from bcft.training.callbacks import Progress, StopGently
from bcft.types import Row


class BCTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on rows of ids and labels; stops at the first loss that is not finite, commits its checkpoints.

    LoRA adapters are kept in fp32: TRL casts them to bf16 on a quantised base, where most small updates vanish.
    `carried` is an optimizer state, as `optimizer_state` returns it, that the next optimizer begins with.
    """

    carried: Mapping[str, torch.Tensor] | None = None

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        rows: Sequence[Row],
        tokenizer: Any,
        held_out: Sequence[Row] = (),
        checkpoints: bool = True,
    ) -> None:
        # What TRL casts cannot be cast back: 16 of 24 bits of an adapter's weights are gone.
        named = model.named_parameters() if hasattr(model, "peft_config") else ()
        exact = {name: p.detach().clone() for name, p in named if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            train_dataset=to_dataset(rows),
            eval_dataset=to_dataset(held_out) if held_out else None,
            processing_class=tokenizer,
        )
        # The Trainer's own callbacks print every log as a dictionary, or draw a table of them into a notebook.
        for callback in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
            self.pop_callback(callback)
        if not args.disable_tqdm:
            self.add_callback(Progress())
        self.stop_gently = StopGently(self.accelerator, checkpoints=checkpoints)
        self.add_callback(self.stop_gently)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = exact.get(name, parameter.data).float()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch; raise DivergedError, on every process, before a bad gradient reaches the weights."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(self.accelerator.reduce(loss.detach()))):
            raise DivergedError(
                f"step {self.state.global_step + 1}: the loss is not finite; no weights were saved from it: "
                f"lower learning_rate (now {self._get_learning_rate():.2g}) or max_grad_norm, or set bf16 over fp16"
            )
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create it, with the moments carried on from the round before where there are any."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.carried:
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, tensor in self.carried.items():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL makes one at every checkpoint, ours comes with the figures at the end."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, commit with a manifest, and only then let older checkpoints go.

        A checkpoint without a manifest is a torn one and never resumed from.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and directory.is_dir():
            write_manifest(directory, [f for f in directory.iterdir() if f.is_file() and f.name != MANIFEST])
            rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=limit, use_mtime=True)


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a training run did; goes into `metrics.json` as `train`."""

    rows: int
    tokens_supervised: int
    steps: int
    loss_first: float
    loss_last: float
    loss: float
    """Mean of what was logged; exact with `logging_steps: 1`, as rounds have it."""
    seconds: float
    tokens_per_second: float
    weights_changed: bool
    entropy: float
    """Mean over the steps, in nats a token: of the policy on the rows it was trained on."""


def to_dataset(rows: Sequence[Row]) -> Dataset:
    """Return rows as the columns the trainer reads."""
    return Dataset.from_dict(
        {"input_ids": [list(row.input_ids) for row in rows], "labels": [list(row.labels) for row in rows]}
    )


def training_arguments(values: Mapping[str, Any], *, output_dir: Path, autocast: str, use_cpu: bool) -> SFTConfig:
    """Return the recipe's values as TRL's configuration, precision and what the package decides itself filled in."""
    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    ours = {
        "output_dir": str(output_dir),
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        "use_cpu": use_cpu,
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "max_length": None,
        "chat_template_path": None,
        "eos_token": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig(**{key: value for key, value in values.items() if key in names} | ours)


def fit(trainer: BCTrainer, rows: Sequence[Row], *, resume: str = "") -> Fit:
    """Train, from a checkpoint directory if `resume` names one.

    Raises DivergedError when a loss or a weight is not finite, or when no weight changed, Preempted when asked to
    stop before the end.
    """
    before = _fingerprint(trainer.model)
    # Read now: the checkpoint may be rotated away while training goes on from it.
    resumed = read_json(Path(resume) / "trainer_state.json")["epoch"] if resume else 0.0
    start = time.perf_counter()
    try:
        with storage(Path(trainer.args.output_dir)), trainer.stop_gently.listening():
            _train(trainer, resume)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"out of memory with {trainer.args.per_device_train_batch_size} rows at once: halve "
            f"per_device_train_batch_size and double gradient_accumulation_steps, or set gradient_checkpointing: true"
        ) from error
    seconds = time.perf_counter() - start
    if trainer.stop_gently.asked:
        saved = "and saved " if trainer.stop_gently.checkpoints else ""
        raise Preempted(f"stopped {saved}at step {trainer.state.global_step}; the same command goes on from here")
    after = _fingerprint(trainer.model)
    if not all(map(math.isfinite, after)):
        raise DivergedError(f"step {trainer.state.global_step}: a weight is not finite: lower learning_rate")
    if before == after:
        raise DivergedError(
            f"{trainer.state.global_step} optimizer steps changed no weight: raise learning_rate, "
            f"now {trainer.args.learning_rate}"
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    entropies = [entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry]
    supervised = sum(row.supervised for row in rows)
    return Fit(
        rows=len(rows),
        tokens_supervised=supervised,
        steps=trainer.state.global_step,
        loss_first=losses[0] if losses else 0.0,
        loss_last=losses[-1] if losses else 0.0,
        loss=round(sum(losses) / max(len(losses), 1), 6),
        seconds=round(seconds, 3),
        tokens_per_second=round(supervised * (trainer.state.epoch - resumed) / seconds, 1),
        weights_changed=True,
        entropy=round(sum(entropies) / max(len(entropies), 1), 6),
    )


def next_round(trainer: BCTrainer, rows: Sequence[Row], *, seed: int, learning_rate: float) -> None:
    """Give the one trainer of all rounds this round's rows, a fresh schedule from `learning_rate`, and its own seed.

    A trainer a round would nest the model's forward, lose autocast from the second on and draw the same noise in each.
    """
    trainer.train_dataset = to_dataset(rows)
    trainer.args.learning_rate = learning_rate
    trainer.args.data_seed = seed % 2**31
    set_seed(seed)


def optimizer_state(trainer: BCTrainer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors on the CPU, as `PARAMETER.NAME`: `0.exp_avg` is the first parameter's.

    Raises UsageError for an optimizer that keeps something else than tensors.
    """
    found: dict[str, torch.Tensor] = {}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise UsageError(f"reset_optimizer: false carries tensors on, and {trainer.args.optim} keeps a {name}")
            found[f"{index}.{name}"] = value.detach().cpu().contiguous()
    return found


def release(trainer: BCTrainer) -> None:
    """Let go of optimizer and gradients, so that sampling has their memory."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model.zero_grad(set_to_none=True)
    trainer.accelerator.free_memory()


def _train(trainer: BCTrainer, resume: str) -> None:
    """Train, or only load a checkpoint that was the last one: the Trainer would take one step more."""
    state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json")) if resume else None
    if state and state.global_step >= state.max_steps:
        trainer._load_from_checkpoint(resume)
        trainer.state = state
        return
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except RuntimeError as error:
        if "inline_container" in str(error):  # how torch.save says that the disk is full
            raise StorageError(
                f"cannot write {trainer.args.output_dir}: make room or give another output_dir"
            ) from error
        raise


def newest_checkpoint(directory: Path) -> str:
    """Return the newest checkpoint whose manifest verifies, '' when there is none."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda p: -int(p.name.split("-")[-1])):
        if committed(path):
            return str(path)
    return ""


def _fingerprint(model: Any) -> list[float]:
    """Return a sum for every trainable tensor: any real update changes one of them."""
    return [float(p.detach().sum(dtype=torch.float64)) for p in model.parameters() if p.requires_grad]
