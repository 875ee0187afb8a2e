"""The rounds of filtered behaviour cloning: what each phase does, and what of it lies on the disk.

Two things have state here, the weights and the run directory. A phase whose file is sealed is read, not done again:
rollouts chunk by chunk, the others as wholes. A round counts once its manifest is there; one that was cut trains again
from the weights it began with, on the rows it kept, to the same weights.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bcft.config.loader import Recipe
from bcft.data.examples import draw_replay, replay_lines, row_of
from bcft.data.loading import Splits
from bcft.errors import DataError, FaultError, UsageError
from bcft.evaluation.held_out import Measured, measure, stored
from bcft.evaluation.metrics import diversity, tally
from bcft.policy.loading import Policy, load_policy, restore, save_policy, with_adapter
from bcft.reporting.model_card import model_card
from bcft.reporting.sanity_check import PROBLEMS, probe
from bcft.reporting.tables import ROUNDS, conclusion, print_table, round_line
from bcft.rollout.sample import draw, play_some, roll_out, turns_of
from bcft.runs.clock import Clock
from bcft.runs.directory import RunDirectory
from bcft.runs.distributed import barrier, gather, rank
from bcft.runs.history import Ledger
from bcft.runs.storage import (
    commit_round,
    read_jsonl,
    seal,
    sealed,
    storage,
    write_json,
    write_jsonl,
    write_manifest,
    write_text,
)
from bcft.selection.apply import apply_filter
from bcft.selection.scoring import Grading, Score
from bcft.types import Environment, Problem, Row, Trajectory

if TYPE_CHECKING:
    from bcft.training.trainer import BCTrainer, Fit


class Rounds:
    """A run's weights and directory, and the phases that move them on."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        directory: RunDirectory,
        console: Console,
        *,
        reward_funcs: Sequence[Callable[..., Any]] | None = None,
        environment: Callable[[], Environment] | None = None,
    ) -> None:
        if not splits.dev:
            raise UsageError("eval_dev_problems: dev problems choose the round to ship, and there are none: raise it")
        self.recipe, self.splits, self.directory, self.console = recipe, splits, directory, console
        self.clock = Clock()
        self.problems: dict[str, Problem] = {d.problem.id: d.problem for d in splits.train}
        if not self.problems:
            raise DataError("no problems to attempt: the training split is empty once dev and test are taken out")
        self.make = environment
        turns_of(recipe, environment)  # what cannot be made is told before a model is loaded
        held_out = [d.problem for d in splits.held_out]
        self.grading = Grading.of(recipe, held_out, reward_funcs=reward_funcs)
        self.ledger = Ledger(recipe, directory.path)
        self.path = self.ledger.path
        if directory.drifted and rank() == 0:  # what the next round has so far was made by another recipe
            shutil.rmtree(self.path(self.ledger.last + 1), ignore_errors=True)
        self.policy = self._load()
        self.trainer: BCTrainer | None = None
        self.scored: dict[int, list[Score]] = {}
        self.record: dict[str, Any] = {}
        self.replay = replay_lines(recipe, splits, self.policy.renderer)
        console.print(f"model: {recipe['model_name_or_path']} on {self.policy.precision.why}", markup=False)
        held = f"{len(splits.dev):,} dev and {len(splits.test):,} test problems held out"
        console.print(f"data: {len(self.problems):,} problems to attempt, {held}", markup=False)
        if recipe["environment"]:
            console.print(f"environment: {recipe['environment']}, at most {recipe['max_turns']} turns", markup=False)
        if note := self.grading.check([d.problem for d in splits.train]):
            console.print(note, markup=False)
        barrier()  # every process has seen what the directory held
        directory.record([*splits.train, *splits.held_out], splits.digest)

    def baseline(self) -> None:
        """Evaluate the policy as it is, on dev and on test, and begin the table."""
        start = self.path(0)
        known = None if self.directory.drifted else stored
        self.base_test = (known and known(start / "test")) or self._measure(start / "test", "test")
        self.base_dev = (known and known(start)) or self._measure(start, "dev")
        self.ledger.records[0]["eval"] = dict(self.base_dev.summary)
        self.clock.lap()
        if not self.ledger.last:
            self._probe()
        self.console.print(f"\n{ROUNDS}")
        for record in self.ledger.records:
            self.console.print(round_line(record), markup=False)

    def next(self) -> int:
        """Return the round to play, its weights in the policy; 0 when there is none."""
        ledger, number = self.ledger, self.ledger.last + 1
        if number > self.recipe["num_rounds"] or ledger.stopped():
            return 0
        if ledger.begins(number) != ledger.after(number - 1):
            restore(self.policy, self.recipe, ledger.weights(ledger.begins(number)))
        self.record = {"round": number}
        return number

    def roll_out(self, number: int) -> list[Trajectory]:
        """Attempt problems of training, drawn without replacement; return the trajectories in a fixed order."""
        with self.clock.phase("rollout"):
            attempts = draw(self.recipe, self.problems.values(), number)
            return roll_out(
                self.recipe, self.policy, attempts, place=self.path(number), clock=self.clock, make=self.make
            )

    def score(self, number: int, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score what was played. Raises FaultError when too many environments failed."""
        with self.clock.phase("score"):
            if sealed(self.path(number), "scores.jsonl"):
                scores = self._stored_scores(number)
            else:
                scores = self._score(trajectories)
            self.record |= {"rollout": tally(scores), "diversity": diversity(scores)}
            return scores

    def select(self, number: int, scores: Sequence[Score]) -> list[Row]:
        """Select; return the kept trajectories as rows, the ids as they were sampled, loss on the actions alone."""
        with self.clock.phase("select"):
            scope = self._scope(number, scores)
            found = apply_filter(self.recipe, scope, self.problems, number=number, source="self")
            lines = [*found.lines, *draw_replay(self.recipe, self.replay, number, most=len(found.lines))]
            if rank() == 0:
                with self.clock.phase("other"):
                    found.write(self.path(number), lines)
                    seal(self.path(number), "rollouts.jsonl", "scores.jsonl", "kept.jsonl")
            self.record["selection"] = found.metrics
            return [row_of(line) for line in lines]

    def clone(self, number: int, rows: Sequence[Row]) -> None:
        """Train on the rows and save the weights; a warm-up round does not, nor one that kept nothing."""
        self.record["train"] = {"rows": 0, "tokens_supervised": 0, "steps": 0, "loss": 0.0, "weights_changed": False}
        if number <= self.recipe["warmup_rounds"]:
            return
        if not rows:
            if self.recipe["on_empty"] == "stop":
                raise FaultError(f"round {number} kept nothing: {self.record['selection']['note']}")
            return
        with self.clock.phase("train"):
            fitted = self._fit(number, rows)
            self.record["train"] = {name: getattr(fitted, name) for name in self.record["train"]}
            self.record["diversity"]["entropy"] = fitted.entropy

    def commit(self, number: int) -> float:
        """Evaluate on dev, write the round's metrics and its manifest, add a line to the table, drop older weights.

        Returns the seconds the round took.
        """
        place = self.path(number)
        self.ledger.records.append(self.record)
        if self._due(number):
            with self.clock.phase("evaluate"):
                dev = self._measure(place, "dev")
            versus = conclusion(self.base_dev, dev).get("vs_base", {})
            self.record["eval"] = {**dev.summary, "vs_base": versus}
        self.record["seconds"] = self.clock.lap()
        if rank() == 0:
            write_json(place / "metrics.json", self.record)
            commit_round(place, tokenizer=self.policy.renderer.fingerprint)
            write_jsonl(self.directory.path / "metrics.jsonl", self.ledger.records[1:])
            for past in set(range(number)) - self.ledger.needed():
                shutil.rmtree(self.path(past) / "model", ignore_errors=True)
        barrier()  # the others wait for the files
        self.console.print(round_line(self.record), markup=False)
        return float(sum(self.record["seconds"].values()))

    def conclude(self) -> dict[str, Any]:
        """Test the best round, write it as `best/`; return what `metrics.json` holds."""
        ledger, last = self.ledger, self.ledger.last
        best = ledger.best(last)
        if ledger.after(best) != ledger.after(last):
            restore(self.policy, self.recipe, ledger.weights(ledger.after(best)))
        tested = self.base_test
        if best:
            tested = stored(self.path(best) / "test") or self._measure(self.path(best) / "test", "test")
        metrics = {"base": self.base_test.summary, "best": tested.summary, "best_round": best, "rounds": last}
        metrics |= conclusion(self.base_test, tested)
        if not best and ledger.tells_success:
            metrics["conclusion"] = f"no round was better on dev than the policy it began with; {metrics['conclusion']}"
        if last < self.recipe["num_rounds"] and (reason := ledger.stopped()):
            metrics["stopped"] = reason
            self.console.print(f"stopped after round {last}: {reason}", markup=False)
        if tested.summary:
            print_table({"base": self.base_test.summary, f"round {best}": tested.summary}, self.console)
        if rank() == 0:
            self._ship(best, metrics)
        target = self.directory.path / "best"
        ask = f"bcft evaluate {self.recipe.path or 'RECIPE'} --model_name_or_path {target}"
        self.console.print(f"The model is in {target}, from round {best}; next: {ask}", markup=False)
        return metrics

    # The phases' parts

    def _probe(self) -> None:
        """Play the first problems of round 1, which are then in its journal, and say whether anything can be learned.

        Raises FaultError when nothing can.
        """
        attempts = draw(self.recipe, self.problems.values(), 1)[: PROBLEMS * self.recipe["num_generations"]]
        with self.clock.phase("rollout"):
            played = play_some(self.recipe, self.policy, attempts, place=self.path(1), clock=self.clock, make=self.make)
        found = probe(self.recipe, self._score(played), self.problems, self.base_dev.summary)
        self.console.print("\n".join(found.lines), markup=False)
        if found.hopeless:
            raise FaultError(f"nothing can be learned: {found.hopeless}")

    def _score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Ask the reward functions, on one process: asked twice they might answer twice."""
        scores: list[Score] = []
        if rank() == 0:
            scores = self.grading.score(trajectories, self.problems)
        return gather(scores)

    def _scope(self, number: int, scores: Sequence[Score]) -> list[Score]:
        """Return what is selected from: this round's scores behind those of the earlier rounds that `history` takes."""
        span = number if self.recipe["history"] == "all" else self.recipe["history"]
        first = max(1, number - span + 1)
        past = {n: self.scored.get(n) or self._stored_scores(n) for n in range(first, number)}
        self.scored = past | {number: list(scores)} if span > 1 else {}
        return [found for n in sorted(past) for found in past[n]] + list(scores)

    def _stored_scores(self, number: int) -> list[Score]:
        """Return the scores of a round's own trajectories from its files."""
        played = {line["id"]: Trajectory.from_json(line) for line in read_jsonl(self.path(number) / "rollouts.jsonl")}
        lines = read_jsonl(self.path(number) / "scores.jsonl")
        return [Score.from_json(line, played[line["id"]]) for line in lines if line["id"] in played]

    def _fit(self, number: int, rows: Sequence[Row]) -> "Fit":
        """Train from the weights this round is to begin with; save what came of it."""
        from bcft.training.trainer import fit, next_round, optimizer_state, release

        if self.recipe["init_from"] == "base" and self.ledger.after(number - 1):
            restore(self.policy, self.recipe, self.ledger.weights(0))
        if self.trainer is None:
            self.trainer = self._new_trainer(rows)
        trainer, carries = self.trainer, not self.recipe["reset_optimizer"]
        trainer.carried = self._carried(number) if carries else None
        rate = self.recipe["learning_rate"] * self.recipe["learning_rate_decay"] ** (number - 1)
        next_round(trainer, rows, seed=training_seed(self.recipe, number), learning_rate=rate)
        self.policy = dataclasses.replace(self.policy, model=trainer.accelerator.unwrap_model(trainer.model))
        fitted = fit(trainer, rows)
        state = optimizer_state(trainer) if carries else {}
        release(trainer)
        if rank() == 0:
            with self.clock.phase("other"):
                self._save(self.path(number) / "model", state)
        return fitted

    def _new_trainer(self, rows: Sequence[Row]) -> "BCTrainer":
        from bcft.training.trainer import BCTrainer, training_arguments

        values = {**self.recipe.values, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"}
        values["logging_steps"] = self.recipe["logging_steps"] if "logging_steps" in self.recipe.given else 1
        arguments = training_arguments(
            values,
            output_dir=self.directory.path,
            autocast=self.policy.precision.autocast,
            use_cpu=self.policy.precision.device == "cpu",
        )
        tokenizer = self.policy.renderer.tokenizer
        return BCTrainer(self.policy.model, arguments, rows=rows, tokenizer=tokenizer, checkpoints=False)

    # Weights

    def _load(self) -> Policy:
        """Load the policy as it was after the last committed round; an adapter made for this run is kept as round 0."""
        name = self.ledger.weights(self.ledger.after(self.ledger.last))
        there = dataclasses.replace(self.recipe, values={**self.recipe.values, "model_name_or_path": name})
        loaded = load_policy(there)
        policy = with_adapter(loaded, self.recipe)
        if policy is not loaded and rank() == 0:
            self._save(self.path(0) / "model", {}, policy)
        return policy

    def _save(self, target: Path, state: dict[str, Any], policy: Policy | None = None) -> None:
        """Write weights, and the optimizer's state where it is carried on, and commit them."""
        from safetensors.torch import save_file

        with storage(target):
            target.mkdir(parents=True, exist_ok=True)
            files = save_policy(policy or self.policy, target)
            if state:
                files.append(target / "optimizer.safetensors")
                save_file(state, files[-1])
            write_manifest(target, files)

    def _carried(self, number: int) -> dict[str, Any] | None:
        """Return the optimizer's state at the end of the last round that trained; None before the first."""
        from safetensors.torch import load_file

        before = self.ledger.trained(number - 1)
        return load_file(self.path(before) / "model" / "optimizer.safetensors") if before else None

    # Evaluation and the end

    def _due(self, number: int) -> bool:
        """Tell whether a round is evaluated on dev."""
        played = min(self.recipe["prompts_per_round"], len(self.problems)) * self.recipe["num_generations"]
        each = 1 + (self.recipe["eval_dev_samples"] if self.grading.success or self.recipe["environment"] else 0)
        return self.ledger.due(number, evaluated=len(self.splits.dev) * each, played=played)

    def _measure(self, place: Path, split: str) -> Measured:
        return measure(
            self.recipe,
            self.splits,
            self.policy,
            success=self.grading.success,
            split=split,
            rows=[],
            directory=place,
            quiet=self.console.quiet or split == "dev",
            make=self.make,
        )

    def _ship(self, best: int, metrics: dict[str, Any]) -> None:
        """Write `best/` with its card, `metrics.json`, and the manifest that commits the run."""
        target = self.directory.path / "best"
        with storage(target):
            target.mkdir(exist_ok=True)
            files = save_policy(self.policy, target)
        data = f"the policy's own attempts, round {best} of {metrics['rounds']}"
        card = model_card(self.recipe, metrics, data, directory=target, adapter=self.policy.adapter)
        write_text(target / "README.md", card)
        write_json(self.directory.path / "metrics.json", metrics)
        files += [self.directory.path / "metrics.json", self.directory.path / "config.yaml"]
        write_manifest(self.directory.path, files)


def training_seed(recipe: Recipe, number: int) -> int:
    """Return the seed of a round's training: the order of its rows, and whatever a layer drops."""
    return int.from_bytes(sha256(f"{recipe['seed']}-{number}-train".encode()).digest()[:4], "big")
