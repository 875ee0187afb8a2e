"""The trainer: TRL's `SFTTrainer` on ids and labels that were checked before.

The loss is TRL's: the mean over all supervised tokens of an optimizer step, whatever the micro-batches; with weights of
rows, the sum of the weighted losses over the same number of tokens. Truncation and packing do not happen; tokenization
and labels are made earlier, in `bcft.data.examples`.
"""

import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from bcft.config.schema import TrainingSettings
from bcft.errors import DivergedError, Preempted, StorageError, UsageError
from bcft.policy import cpu
from bcft.runs.progress import Progress
from bcft.runs.storage import MANIFEST, committed, read_json, storage, write_manifest
from bcft.training.callbacks import AtTheEnd, CountSteps, StopGently
from bcft.training.lean import isolates, labeled_positions_only, pack
from bcft.training.loss import WEIGHT, Reduction, WithWeights, count_rows, row_weights, weighted
from bcft.training.tokens import supervised_tokens, tokens_of
from bcft.types import IGNORED, TrainingExample


class BCTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on training examples; stops at the first loss that is not finite, commits its checkpoints.

    LoRA adapters are kept in fp32: TRL casts them to bf16 on a quantized base, where most small updates vanish.
    `initial_optimizer_state`, as `optimizer_state` returns one, is what the next optimizer starts from.
    reduction: of a step's loss, as `loss_reduction` describes it. The logged loss is per token also under `sum`.
    """

    initial_optimizer_state: Mapping[str, torch.Tensor] | None = None
    _total_train_tokens: int
    _signature_columns: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        examples: Sequence[TrainingExample],
        tokenizer: Any,
        held_out: Sequence[TrainingExample] = (),
        checkpoints: bool = True,
        reduction: Reduction = "token",
    ) -> None:
        self.reduction = reduction
        # TRL's cast to bf16 cannot be undone: it drops 16 of the 24 bits of an adapter's weights.
        named = model.named_parameters() if hasattr(model, "peft_config") else ()
        exact = {name: p.detach().clone() for name, p in named if p.requires_grad}
        super().__init__(
            model=model,
            args=args,
            train_dataset=to_dataset(examples, reduction),
            eval_dataset=to_dataset(held_out) if held_out else None,
            processing_class=tokenizer,
        )
        self.data_collator = WithWeights(self.data_collator)
        if reduction != "token" and not self.model_accepts_loss_kwargs:
            raise UsageError(f"loss_reduction: {reduction}: this model's micro-batches are averaged alone: give token")
        # The Trainer's own callbacks print every log as a dictionary, or as a table in a notebook.
        for callback in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
            self.pop_callback(callback)
        self.stop_gently = StopGently(self.accelerator, checkpoints=checkpoints)
        self.add_callback(self.stop_gently)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = exact.get(name, parameter.data).float()
        # A small model gains nothing, and its weights are known to the bit.
        self.lean = cpu.is_large(self.model)
        # The loss of a mixture's router is a mean over the batch, and the noise of NEFTune depends on the padded width.
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        self.packs = self.lean and not self.aux_loss_enabled and not args.neftune_noise_alpha and isolates(base)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch; raise DivergedError, on every process, before a bad gradient reaches the weights.

        On a CPU its rows are packed, to the same loss and gradient but for rounding.
        """
        packs = self.packs and self.accelerator.num_processes == 1 and num_items_in_batch is not None
        groups, before = pack(inputs) if packs else [inputs], self._total_train_tokens
        with labeled_positions_only() if self.lean else nullcontext():
            losses = [super(BCTrainer, self).training_step(model, group, num_items_in_batch) for group in groups]
        loss = torch.stack(losses).sum()
        if packs:
            _join(self._metrics["train"], [int((group["labels"] != IGNORED).sum()) for group in groups])
            # TRL would count what the mask holds.
            self._total_train_tokens = before + int(inputs["attention_mask"].sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        if not bool(torch.isfinite(self.accelerator.reduce(loss.detach()))):
            raise DivergedError(
                f"step {self.state.global_step + 1}: the loss is not finite, and no weights were saved from "
                f"it: lower learning_rate (now {self._get_learning_rate():.2g}) or max_grad_norm, or use bf16, not fp16"
            )
        return loss / num_items_in_batch if self.reduction == "sum" else loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss of a micro-batch, its rows weighted.

        num_items_in_batch: what a step's sum is divided by; None in an evaluation, which is a mean over tokens.
        """
        weights = inputs.pop(WEIGHT, None)
        model = model if weights is None else weighted(model, weights)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * num_items_in_batch if self.reduction == "sum" and num_items_in_batch is not None else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, and their supervised tokens in all processes; the rows for `sequence`."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.reduction == "sequence" and items is not None:
            items = self.accelerator.reduce(torch.tensor(float(count_rows(batches)), device=device))
        return batches, items

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the weights: the Trainer removes columns that it does not know."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys((*self._signature_columns, WEIGHT))]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, with the moments of `initial_optimizer_state` if there is one."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.initial_optimizer_state:
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, tensor in self.initial_optimizer_state.items():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: TRL writes a card at every checkpoint, ours comes with the figures at the end."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, commit with a manifest, and only then delete older checkpoints.

        A checkpoint without a manifest is incomplete; a run never resumes from it.
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
    """The figures of a training run; `train` of `metrics.json`."""

    rows: int
    tokens_supervised: int
    steps: int
    loss_first: float
    loss_last: float
    loss: float
    """Mean of the logged losses; exact with `logging_steps: 1`, the default in rounds."""
    seconds: float
    tokens_per_second: float
    weights_changed: bool
    entropy: float
    """In nats per token, mean over the steps: of the policy on the examples it was trained on."""


def to_dataset(examples: Sequence[TrainingExample], reduction: Reduction = "token") -> Dataset:
    """Return examples as the columns that the trainer reads; there are no weights where all would be 1."""
    tokens, numbers = tokens_of(examples)
    table, weights = tokens.table, row_weights(examples, reduction)
    if weights is not None:
        column = np.ones(len(table))
        column[numbers] = weights
        table = table.append_column(WEIGHT, pa.array(column))
    # A fingerprint of the content would read the whole table.
    dataset = Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex[:16])
    return dataset if len(numbers) == len(table) else dataset.select(numbers)


def training_arguments(
    settings: TrainingSettings, *, output_dir: Path, autocast: str, use_cpu: bool, **overrides: Any
) -> SFTConfig:
    """Return the settings as TRL's configuration, with the fields that this package decides itself.

    autocast: `no`, `bf16` or `fp16`; overrides: fields of SFTConfig that replace those of the settings.
    """
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    values |= values.pop("passed_through")
    del values["loss_reduction"]  # the trainer's own
    if values["logging_steps"] is None:
        del values["logging_steps"]  # leaves TRL's default
    ours = {
        "output_dir": str(output_dir),
        "bf16": autocast == "bf16",
        "fp16": autocast == "fp16",
        "use_cpu": use_cpu,
        "report_to": "none",  # `reporting.trackers` hears of all rounds on one axis
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "max_length": None,
        "chat_template_path": None,
        "eos_token": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig(**values | overrides | ours)


def fit(
    trainer: BCTrainer,
    examples: Sequence[TrainingExample],
    *,
    resume: str = "",
    save: Callable[[Fit], None] | None = None,
    progress: Progress | None = None,
) -> Fit:
    """Train, from a checkpoint directory if `resume` names one; return what training did.

    save: called with it on every process as soon as training has ended. A tracker hears of the end later: one that
    fails then loses no weights. progress: counts the steps.

    Raises DivergedError when a loss or a weight is not finite, or when no weight changed, Preempted when a signal
    stopped the training before its end, UsageError when memory runs out, StorageError when the disk is full.
    """
    before = _fingerprint(trainer.model)
    # Read now: the checkpoint may be rotated away during training.
    epoch = read_json(Path(resume) / "trainer_state.json")["epoch"] if resume else 0.0
    start = time.perf_counter()
    ended: list[Fit] = []

    def end() -> None:
        if trainer.stop_gently.requested:
            return
        seconds = time.perf_counter() - start
        ended.append(_figures(trainer, examples, before=before, epoch=epoch, seconds=seconds))
        if save:
            save(ended[0])

    first, steps = AtTheEnd(end), CountSteps(progress or Progress(""))
    trainer.callback_handler.callbacks.insert(0, first)
    trainer.add_callback(steps)
    try:
        with storage(Path(trainer.args.output_dir)), trainer.stop_gently.listening():
            _train(trainer, resume)
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"out of memory with {trainer.args.per_device_train_batch_size} examples at once: halve "
            f"per_device_train_batch_size and double gradient_accumulation_steps, or set gradient_checkpointing: true"
        ) from error
    finally:
        trainer.remove_callback(first)
        trainer.remove_callback(steps)
    if trainer.stop_gently.requested:
        saved = "and saved " if trainer.stop_gently.checkpoints else ""
        raise Preempted(f"stopped {saved}at step {trainer.state.global_step}; re-run the same command to resume")
    if not ended:  # the checkpoint was of the last step
        end()
    return ended[0]


def _figures(
    trainer: BCTrainer, examples: Sequence[TrainingExample], *, before: Sequence[float], epoch: float, seconds: float
) -> Fit:
    """Return what training did. before: the sums of the weights; epoch: from which it resumed.

    Raises DivergedError when a weight is not finite, or when none changed.
    """
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
    supervised = supervised_tokens(examples)
    return Fit(
        rows=len(examples),
        tokens_supervised=supervised,
        steps=trainer.state.global_step,
        loss_first=losses[0] if losses else 0.0,
        loss_last=losses[-1] if losses else 0.0,
        loss=round(sum(losses) / max(len(losses), 1), 6),
        seconds=round(seconds, 3),
        tokens_per_second=round(supervised * (trainer.state.epoch - epoch) / seconds, 1),
        weights_changed=True,
        entropy=round(sum(entropies) / max(len(entropies), 1), 6),
    )


def next_round(trainer: BCTrainer, examples: Sequence[TrainingExample], *, seed: int, learning_rate: float) -> None:
    """Give the one trainer of all rounds this round's examples, a fresh schedule from `learning_rate`, and a seed.

    A new trainer for each round would nest the model's forward, lose autocast from the second round on and draw the
    same random numbers in every round.
    """
    trainer.train_dataset = to_dataset(examples, trainer.reduction)
    trainer.args.learning_rate = learning_rate
    trainer.args.data_seed = seed % 2**31
    set_seed(seed)


def optimizer_state(trainer: BCTrainer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors on the CPU, as `PARAMETER.NAME`: `0.exp_avg` is the first parameter's.

    Raises UsageError for an optimizer that keeps anything but tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor):
                raise UsageError(
                    f"reset_optimizer: false carries over tensors only, and the state {name!r} of "
                    f"{trainer.args.optim} is not a tensor: set reset_optimizer: true or another optim"
                )
            tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def release(trainer: BCTrainer) -> None:
    """Free the optimizer and the gradients, so that sampling can use their memory."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model.zero_grad(set_to_none=True)
    trainer.accelerator.free_memory()


def _join(metrics: dict[str, list[float]], weights: Sequence[int]) -> None:
    """Replace the last values of entropy and accuracy, one of each group, by their mean over the labels."""
    for name in ("entropy", "mean_token_accuracy"):
        values = metrics[name][-len(weights) :]
        mean = sum(value * weight for value, weight in zip(values, weights, strict=True)) / max(sum(weights), 1)
        metrics[name][-len(weights) :] = [mean]


def _train(trainer: BCTrainer, resume: str) -> None:
    """Train; only load a checkpoint of the last step, from which the Trainer would take one more."""
    state = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json")) if resume else None
    if state and state.global_step >= state.max_steps:
        trainer._load_from_checkpoint(resume)
        trainer.state = state
        return
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except RuntimeError as error:
        if "inline_container" in str(error):  # torch.save's error for a full disk
            raise StorageError(
                f"cannot write {trainer.args.output_dir}: make room or give another output_dir"
            ) from error
        raise


def newest_checkpoint(directory: Path) -> str:
    """Return the newest checkpoint with a valid manifest, '' when there is none."""
    checkpoints = [path for path in directory.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda p: -int(p.name.split("-")[-1])):
        if committed(path):
            return str(path)
    return ""


def _fingerprint(model: Any) -> list[float]:
    """Return a sum for every trainable tensor: any real update changes one of them."""
    return [float(p.detach().sum(dtype=torch.float64)) for p in model.parameters() if p.requires_grad]
