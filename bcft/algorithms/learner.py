"""The weights of filtered behavior cloning: one policy and one trainer for all rounds."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from bcft.config.loader import Config
from bcft.policy.loading import Policy, interpolate, restore, save_policy
from bcft.runs.progress import Progress
from bcft.runs.storage import storage, write_manifest
from bcft.types import TrainingExample

if TYPE_CHECKING:
    from bcft.training.trainer import BCTrainer, Fit

OPTIMIZER = "optimizer.safetensors"


class Learner:
    """The weights: the policy, and the one trainer of all rounds once there is something to train on."""

    def __init__(self, config: Config, policy: Policy, directory: Path) -> None:
        self.config = config
        self.policy = policy
        self.directory = directory
        self.trainer: BCTrainer | None = None
        self.logged: tuple[Mapping[str, Any], ...] = ()
        """What the trainer logged at the steps of the last round."""

    def restore(self, weights: str) -> None:
        """Take the weights of a directory or model of the same kind."""
        restore(self.policy, weights, self.config.model)

    def restore_scaled(self, weights: str, base: str, scale: float) -> None:
        """Take weights as `restore` does, and `scale` of their change from a base; 1: as they are."""
        self.restore(weights)
        if scale != 1:
            interpolate(self.policy, base, scale, self.config.model)

    def train(
        self, examples: Sequence[TrainingExample], number: int, *, carry_from: Path | None, progress: Progress
    ) -> "tuple[Fit, dict[str, Any]]":
        """Train for a round; return what training did and the optimizer's state, empty with `reset_optimizer`.

        carry_from: the saved weights whose optimizer state to begin with; None for a fresh optimizer. progress: counts
        the steps.
        """
        if self.trainer is None:
            progress.turn_to("loading trl")
        # trl takes longer to import than everything before: the first evaluations and rollouts do not wait for it.
        from bcft.training import trainer  # noqa: PLC0415 - see above

        training, rounds = self.config.training, self.config.rounds
        if self.trainer is None:
            self.trainer = trainer.BCTrainer(
                self.policy.model,
                self._arguments(trainer.training_arguments),
                examples=examples,
                tokenizer=self.policy.renderer.tokenizer,
                checkpoints=False,
                reduction=training.loss_reduction,
            )
        self.trainer.initial_optimizer_state = load_file(carry_from / OPTIMIZER) if carry_from else None
        rate = training.learning_rate * rounds.learning_rate_decay ** (number - 1)
        trainer.next_round(self.trainer, examples, seed=training_seed(training.seed, number), learning_rate=rate)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.policy = dataclasses.replace(self.policy, model=model)
        fitted = trainer.fit(self.trainer, examples, progress=progress)
        self.logged = tuple(self.trainer.state.log_history)
        state = {} if rounds.reset_optimizer else trainer.optimizer_state(self.trainer)
        trainer.release(self.trainer)
        return fitted, state

    def save(self, directory: Path, state: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        """Write the weights, and the optimizer's state if there is one, and commit them with facts about them."""
        with storage(directory):
            directory.mkdir(parents=True, exist_ok=True)
            files = save_policy(self.policy, directory)
            if state:
                files.append(directory / OPTIMIZER)
                save_file(dict(state), files[-1])
            write_manifest(directory, files, about=about)

    def _arguments(self, training_arguments: Callable[..., Any]) -> Any:
        """Return the settings of the one trainer: without checkpoints, evaluations and bars of its own."""
        settings, precision = self.config.training, self.policy.precision
        return training_arguments(
            settings,
            output_dir=self.directory,
            autocast=precision.autocast,
            use_cpu=precision.device == "cpu",
            disable_tqdm=True,
            save_strategy="no",
            eval_strategy="no",
            eval_on_start=False,
            logging_steps=1 if settings.logging_steps is None else settings.logging_steps,
        )


def training_seed(seed: int, number: int) -> int:
    """Return the seed of a round's training: of the order of its rows and of dropout."""
    return int.from_bytes(sha256(f"{seed}-{number}-train".encode()).digest()[:4], "big")
