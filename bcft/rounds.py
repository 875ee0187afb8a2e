"""The rounds of filtered behaviour cloning: what each phase does, and what of it lies on the disk.

Two things have state here, the weights and the run directory. A phase whose file is there already is read, not done
again: rollouts chunk by chunk, the others as wholes. A round counts once its manifest is there, and the weights a
resumed run goes on with are those of the last round that counts.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from bcft.config import Recipe
from bcft.data import Splits
from bcft.environments.single_turn import SingleTurn
from bcft.errors import FaultError, UsageError
from bcft.evaluation import Measured, measure, stored, success_function
from bcft.generation.hf import HFEngine, sampling_mode
from bcft.journal import (
    append_jsonl,
    committed,
    read_json,
    read_jsonl,
    storage,
    write_json,
    write_jsonl,
    write_manifest,
    write_text,
)
from bcft.model import Policy, load_policy, lora_config, save_policy
from bcft.play import Attempt, play
from bcft.processes import rank, world_size
from bcft.rewards import import_function
from bcft.run import RunDirectory
from bcft.scoring import Score, score
from bcft.selection import Rule, Selection, select
from bcft.summary import conclusion, model_card, percent, print_table
from bcft.types import IGNORED, Problem, Row, Sampling, Trajectory

CHUNK = 128
"""Trajectories written to the journal at once: what a kill can cost."""
MOST_ERRORS = 0.05
"""The share of trajectories whose environment may fail before the run ends."""


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
    ) -> None:
        if not splits.dev:
            raise UsageError("eval_dev_problems: dev problems choose the round to ship, and there are none: raise it")
        self.recipe, self.splits, self.directory, self.console = recipe, splits, directory, console
        self.problems: dict[str, Problem] = {d.problem.id: d.problem for d in splits.train}
        names = recipe["reward_funcs"]
        self.functions = list(reward_funcs or (import_function(name, key="reward_funcs") for name in names))
        self.weights = recipe["reward_weights"] or [1.0] * len(self.functions)
        self.success = success_function(recipe, splits)
        self.committed = 0
        while committed(self.path(self.committed + 1)):
            self.committed += 1
        self.policy: Policy = self._load(self.committed)
        self.trainer: Any = None
        self.selection: Selection | None = None
        self.record: dict[str, Any] = {}
        console.print(f"model: {recipe['model_name_or_path']} on {self.policy.precision.why}", markup=False)
        console.print(f"data: {splits}", markup=False)
        directory.record(splits.held_out, splits.digest)

    def path(self, number: int) -> Path:
        """Return the directory of a round; 0 is before any training."""
        return self.directory.path / f"round_{number:03d}"

    def baseline(self) -> None:
        """Evaluate the policy as it is, on dev and on test, and begin the table."""
        start = self.path(0)
        self.base_test = stored(start / "test") or self._measure(start / "test", "test")
        dev = stored(start) or self._measure(start, "dev")
        self.console.print(
            f"\n{'round':>5} {'played':>7} {'success':>8} {'kept':>6} {'cutoff':>7}  dev greedy  dev sampled"
        )
        self._line(0, {}, dev)
        for number in range(1, self.committed + 1):
            done = stored(self.path(number))
            assert done is not None
            self._line(number, read_json(self.path(number) / "metrics.json"), done)

    def roll_out(self, number: int) -> list[Trajectory]:
        """Attempt problems of training, drawn without replacement; return the trajectories in a fixed order."""
        recipe, start = self.recipe, time.perf_counter()
        drawn = sorted(self.problems, key=lambda key: sha256(f"{recipe['seed']}-{number}-{key}".encode()).digest())
        attempts = [
            Attempt(self.problems[key], number, sample)
            for key in drawn[: recipe["prompts_per_round"]]
            for sample in range(recipe["num_generations"])
        ]
        sealed = self.path(number) / "rollouts.jsonl"
        if sealed.is_file():
            played = [Trajectory.from_json(line) for line in read_jsonl(sealed)]
        else:
            played = self._play(number, attempts)
            if rank() == 0:
                write_jsonl(sealed, (trajectory.to_json() for trajectory in played))
        tokens = sum(len(turn.action_ids) for trajectory in played for turn in trajectory.turns)
        self.record = {"round": number, "rollout": {"played": len(played), "tokens": tokens}, "seconds": {}}
        self._took("rollout", start)
        return played

    def score(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        """Score what was played. Raises FaultError when too many environments failed."""
        start = time.perf_counter()
        errors = [trajectory for trajectory in trajectories if trajectory.ended == "error"]
        if len(errors) > MOST_ERRORS * len(trajectories):
            raise FaultError(
                f"{len(errors)} of {len(trajectories)} trajectories failed; {errors[0].id}: {errors[0].error}"
            )
        scores = score(trajectories, self.problems, self.functions, weights=self.weights, success=self.success)
        rewards = [found.reward for found in scores if found.graded]
        self.record["rollout"] |= {
            "success": sum(found.success == "yes" for found in scores) / len(scores),
            "reward_mean": sum(rewards) / max(len(rewards), 1),
            "reward_max": max(rewards, default=0.0),
            "truncated": sum(trajectory.cut for trajectory in trajectories),
            "ungraded": sum(not found.graded for found in scores),
            "errors": len(errors),
            "stop_rate": sum(not trajectory.cut for trajectory in trajectories) / len(trajectories),
        }
        self._took("score", start)
        return scores

    def select(self, number: int, scores: Sequence[Score]) -> list[Row]:
        """Select; return the kept trajectories as rows, the ids as they were sampled, loss on the actions alone."""
        start, recipe = time.perf_counter(), self.recipe
        rule = Rule(
            keep_quantile=recipe["keep_quantile"],
            min_reward=recipe["min_reward"],
            require_success="auto" if recipe["require_success"] == "auto" else recipe["require_success"] == "true",
            max_per_problem=recipe["max_per_problem"],
            ties=recipe["ties"],
            control=recipe["control"],
            seed=recipe["seed"],
            round=number,
        )
        self.selection = select((found.candidate for found in scores), rule)
        kept = [found for found in scores if self.selection.fates[found.trajectory.id] == "kept"]
        lines = [self._kept_line(found) for found in kept]
        if rank() == 0:
            fates, cutoff = self.selection.fates, self.selection.cutoff
            write_jsonl(self.path(number) / "scores.jsonl", (s.to_json(fates[s.trajectory.id], cutoff) for s in scores))
            write_jsonl(self.path(number) / "kept.jsonl", lines)
        self.record["selection"] = {
            "requested_fraction": self.selection.requested_fraction,
            "cutoff": self.selection.cutoff,
            "kept": len(kept),
            "kept_fraction": self.selection.kept_fraction,
            "problems_covered": self.selection.problems_covered,
            "rejected": self.selection.rejected,
            "note": self.selection.note,
        }
        self._took("select", start)
        return [Row(line["problem_id"], tuple(line["input_ids"]), tuple(line["labels"]), line["id"]) for line in lines]

    def clone(self, number: int, rows: Sequence[Row]) -> None:
        """Train on the rows and save the weights; a round that kept nothing is skipped, or ends the run."""
        start = time.perf_counter()
        assert self.selection is not None
        if not rows:
            if self.recipe["on_empty"] == "stop":
                raise FaultError(f"round {number} kept nothing: {self.selection.note}")
            self.record["train"] = {
                "rows": 0,
                "tokens_supervised": 0,
                "steps": 0,
                "loss": 0.0,
                "weights_changed": False,
            }
            return
        from bcft.training import fit, next_round

        self.trainer = next_round(self.trainer, self._new_trainer, rows, seed=self._seed(number))
        self.policy = dataclasses.replace(self.policy, model=self.trainer.accelerator.unwrap_model(self.trainer.model))
        fitted = fit(self.trainer, rows)
        self.record["train"] = {
            "rows": fitted.rows,
            "tokens_supervised": fitted.tokens_supervised,
            "steps": fitted.steps,
            "loss": fitted.loss_last,
            "weights_changed": fitted.weights_changed,
        }
        if rank() == 0:
            target = self.path(number) / "model"
            with storage(target):
                target.mkdir(exist_ok=True)
                write_manifest(target, save_policy(self.policy, target))
        self._took("train", start)

    def commit(self, number: int) -> None:
        """Evaluate on dev, write the round's metrics and its manifest, add a line to the table, drop older weights."""
        start, place = time.perf_counter(), self.path(number)
        dev = self._measure(place, "dev")
        self._took("evaluate", start)
        self._line(number, self.record, dev)
        if rank() == 0:
            versus = conclusion(stored(self.path(0)) or dev, dev).get("vs_base", {})
            self.record["eval"] = {**dev.summary, "vs_base": versus}
            write_json(place / "metrics.json", self.record)
            write_manifest(place, sorted(file for file in place.iterdir() if file.is_file()))
            done = [read_json(self.path(n) / "metrics.json") for n in range(1, number + 1)]
            write_jsonl(self.directory.path / "metrics.jsonl", done)
            self._prune(number)
        if world_size() > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def conclude(self) -> dict[str, Any]:
        """Test the best round, write it as `best/`; return what `metrics.json` holds."""
        best = self._best(self.recipe["num_rounds"])
        if best:
            self.policy = self._load(best)
            tested = stored(self.path(best) / "test") or self._measure(self.path(best) / "test", "test")
        else:
            tested = self.base_test
        metrics = {"base": self.base_test.summary, "best": tested.summary, "best_round": best}
        metrics |= conclusion(self.base_test, tested)
        if not best:
            metrics["conclusion"] = f"no round was better on dev than the policy it began with; {metrics['conclusion']}"
        if tested.summary:
            print_table({"base": self.base_test.summary, f"round {best}": tested.summary}, self.console)
        if rank() == 0:
            self._ship(best, metrics)
        self.console.print(f"The model is in {self.directory.path / 'best'}, from round {best}", markup=False)
        return metrics

    def _play(self, number: int, attempts: Sequence[Attempt]) -> list[Trajectory]:
        """Play this process's share of the attempts, each chunk journalled; return everybody's, in order."""
        journal = self.path(number) / "journal"
        known = {
            line["id"]: Trajectory.from_json(line) for file in journal.glob("*.jsonl") for line in read_jsonl(file)
        }
        order = {f"{number}-{a.problem.id}-{a.sample}": a for a in attempts}
        mine = [
            a for i, a in enumerate(order.values()) if (i // self.recipe["num_generations"]) % world_size() == rank()
        ]
        left = [a for a in mine if f"{number}-{a.problem.id}-{a.sample}" not in known]
        chunk: list[Trajectory] = []
        with sampling_mode(self.policy.model, autocast=self.policy.precision.autocast):
            for trajectory in play(
                left,
                SingleTurn,
                self.policy.renderer,
                HFEngine(self.policy.model, pad_id=self.policy.renderer.tokenizer.pad_token_id),
                sampling=Sampling(**{f.name: self.recipe[f.name] for f in dataclasses.fields(Sampling)}),
                max_new_tokens=self.recipe["max_completion_length"],
                max_turns=1,
                step_timeout=60.0,
                seed=self.recipe["seed"],
                phase="rollout",
            ):
                chunk.append(trajectory)
                if len(chunk) == CHUNK:
                    append_jsonl(journal / f"{rank():03d}.jsonl", (t.to_json() for t in chunk))
                    known |= {t.id: t for t in chunk}
                    chunk = []
        append_jsonl(journal / f"{rank():03d}.jsonl", (t.to_json() for t in chunk))
        known |= {t.id: t for t in chunk}
        if world_size() > 1:
            from accelerate.utils import gather_object

            known |= {t.id: t for t in gather_object([known[i] for i in order if i in known])}
        return [known[identity] for identity in order]

    def _kept_line(self, found: Score) -> dict[str, Any]:
        """Return a row of `kept.jsonl`: text to read, ids and labels to train on."""
        played = found.trajectory
        context, turn = played.contexts[0], played.turns[0]
        return {
            "id": played.id,
            "problem_id": played.problem_id,
            "turn": 0,
            "source": "self",
            "prompt": self.policy.renderer.text(self.problems[played.problem_id].prompt),
            "completion": turn.action,
            "input_ids": [*context, *turn.action_ids],
            "labels": [*[IGNORED] * len(context), *turn.action_ids],
            "reward": found.reward,
            "weight": 1.0,
        }

    def _new_trainer(self, rows: Sequence[Row]) -> Any:
        from bcft.training import BCTrainer, training_arguments

        values = {**self.recipe.values, "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"}
        arguments = training_arguments(
            values,
            output_dir=self.directory.path / "train",
            autocast=self.policy.precision.autocast,
            use_cpu=self.policy.precision.device == "cpu",
        )
        return BCTrainer(
            self.policy.model,
            arguments,
            rows=rows,
            tokenizer=self.policy.renderer.tokenizer,
            peft_config=None if self.policy.adapter else lora_config(self.recipe),
        )

    def _load(self, number: int) -> Policy:
        """Load the policy as it was after a round: of the last round up to it that trained, else the recipe's own."""
        for past in range(number, 0, -1):
            weights = self.path(past) / "model"
            if committed(weights):
                return load_policy(
                    dataclasses.replace(self.recipe, values={**self.recipe.values, "model_name_or_path": str(weights)})
                )
        return load_policy(self.recipe)

    def _measure(self, place: Path, split: str) -> Measured:
        return measure(
            self.recipe, self.splits, self.policy, split=split, rows=[], directory=place, quiet=split == "dev"
        )

    def _best(self, last: int) -> int:
        """Return the round with the highest sampled pass@1 on dev, the earlier of equals; 0 if none beats the base."""

        def level(number: int) -> float:
            found = stored(self.path(number))
            assert found is not None
            kind = found.summary.get("sampled", found.summary.get("greedy", {}))
            return float(kind.get("pass@1", kind.get("success", 0.0)))

        return max(range(last + 1), key=lambda number: (level(number), -number))

    def _prune(self, number: int) -> None:
        """Remove the weights of rounds that are neither the last nor the best so far."""
        keep = {self._best(number), number if (self.path(number) / "model").is_dir() else 0}
        trained = [n for n in range(1, number + 1) if (self.path(n) / "model").is_dir()]
        for past in trained[:-1]:
            if past not in keep:
                shutil.rmtree(self.path(past) / "model")

    def _ship(self, best: int, metrics: dict[str, Any]) -> None:
        """Write `best/` with its card, `metrics.json`, and the manifest that commits the run."""
        target = self.directory.path / "best"
        with storage(target):
            target.mkdir(exist_ok=True)
            files = save_policy(self.policy if best else load_policy(self.recipe), target)
        data = f"the policy's own attempts, round {best} of {self.recipe['num_rounds']}"
        card = model_card(self.recipe, metrics, data, directory=target, adapter=self.policy.adapter)
        write_text(target / "README.md", card)
        write_json(self.directory.path / "metrics.json", metrics)
        write_manifest(
            self.directory.path, [*files, self.directory.path / "metrics.json", self.directory.path / "config.yaml"]
        )

    def _line(self, number: int, record: dict[str, Any], dev: Measured) -> None:
        """Print one line of the table."""
        rollout, chosen = record.get("rollout", {}), record.get("selection", {})
        played = f"{rollout['played']:>7} {percent(rollout['success']):>8} " if rollout else " " * 17
        kept = f"{chosen['kept']:>6} {chosen['cutoff']:>7.3g}" if chosen else " " * 14
        greedy, sampled = dev.summary.get("greedy"), dev.summary.get("sampled")
        shown = f"  {percent(greedy['success']):>10}" if greedy else ""
        if sampled:
            low, high = sampled["ci95"]
            shown += f"  {percent(sampled['pass@1'])} [{100 * low:.1f}, {100 * high:.1f}]"
        seconds = sum(record.get("seconds", {}).values())
        self.console.print(
            f"{number:>5} {played}{kept}{shown}" + (f"  {seconds:.1f} s" if seconds else ""), markup=False
        )
        if chosen.get("note"):
            self.console.print(f"      {chosen['note']}", markup=False)

    def _seed(self, number: int) -> int:
        return int.from_bytes(sha256(f"{self.recipe['seed']}-{number}-train".encode()).digest()[:4], "big")

    def _took(self, phase: str, start: float) -> None:
        self.record["seconds"][phase] = round(time.perf_counter() - start, 3)
