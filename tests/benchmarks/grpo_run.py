"""One run of TRL's `GRPOTrainer` on a recipe's problems, measured as `filtered` measures itself; `grpo.py` starts it.

    python tests/benchmarks/grpo_run.py '{"recipe": "filtered_bc.yaml", "place": "runs/grpo/one", "seed": 0, ...}'

The argument is a `Plan` as JSON. The same base weights, problems, prompts (checked token by token), sampling, stop
tokens, limit and reward as in the recipe, and dev as often as the recipe's rounds; the best weights on dev within each
budget are saved. The clock runs from the import of trl on, as in a first round, and stops while dev is evaluated and
weights are saved. A finished run leaves `run.json`; an interrupted one resumes from its last look at dev.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from bcft.config.loader import Config, load
from bcft.data.loading import Splits, load_splits
from bcft.environments.base import rollout_settings
from bcft.evaluation.budget import samples_of
from bcft.evaluation.held_out import evaluate
from bcft.policy.chat_template import DATE, Renderer
from bcft.policy.loading import Policy, load_policy, save_policy
from bcft.runs.storage import write_json
from bcft.selection.scoring import Scorer
from bcft.types import Problem, Stop, Trajectory, Turn, messages

ROOT = Path(__file__).parents[2]
STATE = "watch.json"
"""Beside a checkpoint, written last: what was measured until then."""


@dataclass(frozen=True)
class Plan:
    """What one run of GRPO is given."""

    recipe: str
    place: str
    seed: int
    learning_rate: float
    attempts_per_step: int
    num_generations: int
    micro_batch: int
    """Attempts in one forward and backward pass; changes memory and speed only."""
    attempts: int
    """The budget of attempts."""
    seconds: float
    """The budget of seconds; 0.0 for none."""
    latest: float
    """The seconds until which a look at dev counts for that budget: the step that spends it ends a little later."""


@dataclass
class Played:
    """What the reward function has seen; owned by one run."""

    attempts: int = 0
    truncated: int = 0
    reward: float = 0.0
    taken: int = 0
    """Attempts at the last look."""

    def resume(self, attempts: int) -> None:
        """Count on from so many attempts."""
        self.attempts = self.taken = attempts

    def take(self) -> dict[str, float]:
        """Return the figures since the last call, without the attempts, which are counted on."""
        count = max(self.attempts - self.taken, 1)
        figures = {"reward": round(self.reward / count, 4), "truncated": round(self.truncated / count, 4)}
        self.taken, self.truncated, self.reward = self.attempts, 0, 0.0
        return figures


def reward_function(
    scorer: Scorer, problems: Mapping[str, Problem], renderer: Renderer, played: Played
) -> Callable[..., list[float | None]]:
    """Return the recipe's scorer as a reward function for TRL; a truncated attempt gets 0.0, since no filter keeps one.

    It sees what the scorer sees after a rollout: the problem's own prompt and the renderer's text of the sampled ids.
    """

    def reward(completion_ids: Sequence[Sequence[int]], problem_id: Sequence[str], **_: Any) -> list[float | None]:
        trajectories = []
        for sample, (ids, identity) in enumerate(zip(completion_ids, problem_id, strict=True)):
            stop: Stop = "stop_token" if ids[-1] in renderer.stop_ids else "max_tokens"
            turn = Turn(renderer.decode(list(ids)), ids=(), action_ids=tuple(ids), stop=stop)
            trajectories.append(Trajectory(0, identity, sample, (turn,), "done"))
        scores = scorer.score(trajectories, {identity: problems[identity] for identity in problem_id})
        values = [(0.0 if s.trajectory.truncated else s.reward) if s.graded else None for s in scores]
        played.attempts += len(values)
        played.truncated += sum(trajectory.truncated for trajectory in trajectories)
        played.reward += sum(value or 0.0 for value in values)
        return values

    return reward


class Watch(TrainerCallback):  # type: ignore[misc]
    """Takes the time, looks at dev when it is due, keeps the best weights of each budget, ends a run that used both."""

    def __init__(
        self,
        plan: Plan,
        *,
        every: int,
        played: Played,
        dev: Callable[[], dict[str, float]],
        save: Callable[[Path], None],
    ) -> None:
        self.plan, self.every, self.played = plan, every, played
        self.dev, self.save = dev, save
        self.start = time.perf_counter()
        self.left_out, self.due = 0.0, every
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, dict[str, float]] = {}
        self.late = not plan.seconds
        """Whether the budget of seconds is spent."""
        self.diverged = False
        self.saving_since = 0.0

    def resume(self, checkpoint: Path) -> None:
        """Go on from what was measured until a checkpoint."""
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        self.curve, self.best, self.due, self.late = (state[name] for name in ("curve", "best", "due", "late"))
        self.played.resume(int(self.curve[-1]["attempts"]))
        self.left_out = time.perf_counter() - self.start - state["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds since the start, without evaluations and saving."""
        return time.perf_counter() - self.start - self.left_out

    def look(self) -> None:
        """Evaluate on dev; save the weights for each budget that is not spent and has no better ones."""
        begin, seconds, attempts = time.perf_counter(), self.seconds, self.played.attempts
        point = {"attempts": attempts, "seconds": round(seconds, 2), **self.played.take(), **self.dev()}
        self.curve.append(point)
        within = {"attempts": attempts <= self.plan.attempts, "seconds": seconds <= self.plan.latest}
        for budget, fits in within.items():
            if fits and point["dev"] > self.best.get(budget, {"dev": -1.0})["dev"]:
                self.best[budget] = point
                if attempts:  # the base is there already
                    self.save(Path(self.plan.place) / budget)
        print(f"{Path(self.plan.place).name}: {json.dumps(point)}", flush=True)
        self.left_out += time.perf_counter() - begin

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at dev when it is due; stop when both budgets are spent, or when a weight is not finite."""
        self.diverged = not all(math.isfinite(float(p.detach().sum())) for p in model.parameters())
        late = self.seconds >= self.plan.seconds
        if not self.diverged and (self.played.attempts >= self.due or (late and not self.late)):
            self.due += self.every if self.played.attempts >= self.due else 0
            self.look()
            control.should_save, self.saving_since = True, time.perf_counter()
        self.late = late
        control.should_training_stop = self.diverged or (late and self.played.attempts >= self.plan.attempts)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Complete a checkpoint with what was measured; its time does not count."""
        self.left_out += time.perf_counter() - self.saving_since
        measured = {"curve": self.curve, "best": self.best, "due": self.due, "late": self.late}
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(place / STATE, {**measured, "seconds": self.seconds})


def check_prompts(trainer: Any, rows: Sequence[Mapping[str, Any]], problems: Sequence[Problem], policy: Policy) -> None:
    """Raise AssertionError unless the trainer reads the very prompts and stop tokens that a rollout has."""
    theirs, _, _ = trainer._tokenize_prompts([row["prompt"] for row in rows])
    ours = policy.renderer.prompts([p.prompt for p in problems], [p.template_kwargs for p in problems])
    assert [list(ids) for ids in theirs] == ours, "GRPOTrainer's prompt ids are not those of the renderer"
    assert set(trainer.eos_token_ids) == set(policy.renderer.stop_ids), "other stop tokens than the renderer's"


def arguments(plan: Plan, config: Config, directory: Path) -> Any:
    """Return GRPO's settings: the recipe's sampling and optimizer, TRL's defaults for the loss, all explicit."""
    from trl import GRPOConfig

    sampling, training = config.sampling, config.training
    return GRPOConfig(
        output_dir=str(directory), seed=plan.seed, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", save_total_limit=2, logging_steps=100, disable_tqdm=True,
        max_steps=1_000_000, learning_rate=plan.learning_rate, lr_scheduler_type="constant", optim=training.optim,
        weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
        # One batch of attempts, one optimizer step on it: on-policy.
        per_device_train_batch_size=plan.micro_batch, num_iterations=1,
        gradient_accumulation_steps=plan.attempts_per_step // plan.micro_batch,
        steps_per_generation=plan.attempts_per_step // plan.micro_batch, num_generations=plan.num_generations,
        max_completion_length=sampling.max_completion_length, temperature=sampling.temperature, top_p=sampling.top_p,
        top_k=sampling.top_k, min_p=sampling.min_p or None, repetition_penalty=sampling.repetition_penalty,
        beta=0.0, epsilon=0.2, loss_type="dapo", scale_rewards="group", mask_truncated_completions=False,
        chat_template_kwargs={"date_string": DATE} | dict(config.model.chat_template_kwargs or {}),
    )  # fmt: skip


def run(plan: Plan) -> None:
    """Train until both budgets are spent; write `run.json` with the curve on dev and the chosen points."""
    place = Path(plan.place)
    checkpoints = place / "checkpoints"
    found = sorted(checkpoints.glob(f"checkpoint-*/{STATE}"), key=lambda file: file.stat().st_mtime)
    config = load("filtered", ROOT / "recipes" / plan.recipe, {"seed": plan.seed, "output_dir": str(place)})
    splits: Splits = load_splits(config.data, config.evaluation, demonstrations=False)
    problems = splits.problems_to_attempt()
    settings = rollout_settings(config.sampling, config.environment, seed=plan.seed)
    scorer = Scorer.of(config.selection, [d.problem for d in splits.held_out], environment=None, own=splits.reward)
    samples = samples_of(config.evaluation, "dev", graded=True)
    policy, played = load_policy(config.model.model_name_or_path, config.model), Played()

    def dev() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as directory:
            summary = evaluate(
                policy, splits.dev, settings,
                scorer=scorer, samples=samples, phase="dev", label="", directory=Path(directory),
            ).summary(scorer.answers)  # fmt: skip
        return {"dev": summary["sampled"]["pass@1"], "greedy": summary["greedy"]["success"]}

    def save(directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_policy(policy, directory)

    every = config.rounds.prompts_per_round * config.sampling.num_generations
    watch = Watch(plan, every=every, played=played, dev=dev, save=save)
    if not found:
        shutil.rmtree(place, ignore_errors=True)
        watch.look()  # the base
    from datasets import Dataset
    from trl import GRPOTrainer

    rows = [{"prompt": messages(p.prompt), "problem_id": identity} for identity, p in problems.items()]
    trainer = GRPOTrainer(
        policy.model,
        reward_function(scorer, problems, policy.renderer, played),
        arguments(plan, config, checkpoints),
        train_dataset=Dataset.from_list(rows),
        processing_class=policy.renderer.tokenizer,
        callbacks=[watch],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.pop_callback(callback)
    begin = time.perf_counter()
    check_prompts(trainer, rows, list(problems.values()), policy)
    watch.left_out += time.perf_counter() - begin
    if found:  # what it takes to start again does not count
        watch.resume(found[-1].parent)
    trainer.train(resume_from_checkpoint=str(found[-1].parent) if found else None)
    used = {"attempts": played.attempts, "seconds": round(watch.seconds, 2), "steps": trainer.state.global_step}
    record = {"plan": dataclasses.asdict(plan), "used": used, "diverged": watch.diverged, "best": watch.best}
    write_json(place / "run.json", {**record, "curve": watch.curve})
    shutil.rmtree(checkpoints, ignore_errors=True)


if __name__ == "__main__":
    run(Plan(**json.loads(sys.argv[1])))
