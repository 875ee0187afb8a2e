"""Held-out evaluation: one function for every model, split and command, so that figures are comparable.

Greedy decoding gives one attempt a problem, sampling several. An attempt is solved when it stopped by itself and its
environment or the success function reports success; an ungraded attempt is counted and never solved. Where an
environment gives rewards, the return of an attempt is measured too, and policies are compared by it; without a success
function, the reward. Which it is follows from the recipe, not from the attempts. These are keyed by their identity, so
two models answer the same problems with the same noise and comparisons are paired.

Attempts are on the disk before they are scored, and so is every answer of a function: the same command repeats a failed
evaluation without playing or asking again.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bcft.data.loading import Splits
from bcft.environments.single_turn import SingleTurn
from bcft.evaluation.budget import HARDER_SAMPLES
from bcft.evaluation.results import Evaluation, Measured
from bcft.generation.mode import sampling_mode
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy
from bcft.rewards.base import described, reference
from bcft.rollout.episode import GREEDY, Attempt
from bcft.rollout.sample import play_journaled
from bcft.runs.clock import Clock
from bcft.runs.distributed import broadcast, rank
from bcft.runs.progress import Progress
from bcft.runs.storage import plain, write_json, write_jsonl
from bcft.selection.scoring import Score, Scorer
from bcft.selection.store import answers_path
from bcft.types import IGNORED, Demonstration, Problem, RolloutSettings, TrainingExample
from bcft.types.text import in_file

LOSS_TOKENS = 2048
"""Tokens, with padding, in one forward pass of held-out examples."""
UNFINISHED = "evaluating"
"""The directory that holds the attempts of an evaluation, and what functions answered, until `forget`."""


def evaluate(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    settings: RolloutSettings,
    *,
    scorer: Scorer,
    samples: int,
    phase: str,
    label: str,
    directory: Path,
    step: int = 0,
) -> Evaluation:
    """Attempt every problem once greedily and `samples` times with the settings' sampling; grade the attempts.

    phase: `dev` or `test`, part of the noise's key; label: of the progress; '' for none. directory: where attempts
    and answers are kept, of this policy and these problems alone. step: the optimizer steps behind the policy.

    Raises FaultError when too many environments or a function failed; whatever the engine raises.
    """
    identities = [(d, sample) for d in demonstrations for sample in range(GREEDY, samples)]
    attempts = [Attempt(d.problem, 0, sample) for d, sample in identities]
    trajectories = play_journaled(
        policy, attempts, settings, directory=directory, clock=Clock(), label=label, phase=phase
    )
    problems = {d.problem.id: d.problem for d in demonstrations}
    scores: list[Score] = broadcast(
        scorer.score_held_out(
            trajectories, problems, store=answers_path(directory), step=step, label=label and f"{label}, score"
        )
        if rank() == 0
        else []
    )
    single_turn = settings.make_environment is SingleTurn
    by_reward = scorer.measures == "reward"
    line = partial(_attempt, renderer=policy.renderer, single_turn=single_turn, by_reward=by_reward)
    return Evaluation(tuple(line(scored, d) for (d, _), scored in zip(identities, scores, strict=True)))


def _attempt(
    scored: Score, demonstration: Demonstration, *, renderer: Renderer, single_turn: bool, by_reward: bool
) -> dict[str, Any]:
    """Return a line of `evaluation.jsonl`.

    single_turn: without the fields of an environment; by_reward: functions give the reward, or a part of the return.
    """
    trajectory, prompt = scored.trajectory, demonstration.problem.prompt
    line: dict[str, Any] = {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "prompt": renderer.text(list(trajectory.opening) or prompt, trajectory.template_kwargs(demonstration.problem)),
        "completion": trajectory.turns[-1].action if trajectory.turns else "",
        "answer": reference(demonstration.problem),
        "success": "no" if scored.success == "yes" and trajectory.truncated else scored.success,
        "stop": next((turn.stop for turn in trajectory.turns if turn.stop != "stop_token"), "stop_token"),
        "tokens": sum(len(turn.action_ids) for turn in trajectory.turns),
    }
    if single_turn:
        return line | ({"graded": scored.graded, "reward": scored.reward} if by_reward else {})
    return line | {
        "graded": scored.graded
        if by_reward
        else trajectory.environment_reward is not None and trajectory.ended != "error",
        "return": scored.reward if by_reward else trajectory.environment_reward or 0.0,
        "turns": len(trajectory.turns),
        "first": trajectory.turns[0].success if len(trajectory.turns) > 1 else "unknown",
        "messages": in_file(trajectory.messages),
    }


def measure(
    policy: Policy,
    splits: Splits,
    settings: RolloutSettings,
    *,
    split: str,
    samples: int,
    scorer: Scorer,
    examples: Sequence[TrainingExample],
    directory: Path,
    label: str,
    step: int = 0,
    keep: bool = False,
) -> Measured:
    """Evaluate a policy on `dev` or `test` and write the result into a directory.

    samples: of each problem, as `samples_of` returns it; examples: of held-out demonstrations, for their loss; may be
    empty; label: of the progress; '' for none; step: the optimizer steps behind the policy; keep: leave the attempts
    for another start, until the caller has written what else belongs to them and calls `forget`.
    """
    problems = splits.test if split == "test" else splits.dev
    if not problems:
        return Measured(Evaluation(()), {})
    answers = scorer.answers
    measured = partial(evaluate, policy, settings=settings, scorer=scorer, phase=split, step=step)

    def place(part: str, rows: Sequence[Demonstration]) -> Path:
        return attempts_place(directory, part, policy, settings, [d.problem for d in rows])

    evaluation = measured(problems, samples=samples, label=label, directory=place(split, problems))
    summary = evaluation.summary(answers)
    if splits.harder and split == "test":
        harder = measured(
            splits.harder,
            samples=min(samples, HARDER_SAMPLES),
            label=label and f"{label}, harder",
            directory=place("harder", splits.harder),
        )
        summary["harder"] = harder.summary(answers)
    if examples:
        summary["loss"] = held_out_loss(policy, examples, label=label and f"{label}, loss")
    if rank() == 0:
        write_jsonl(directory / "evaluation.jsonl", evaluation.attempts)
        write_json(directory / "evaluation.json", summary)
        if not keep:
            forget(directory)
    return Measured(evaluation, summary)


def forget(directory: Path) -> None:
    """Remove the attempts from which the result in a directory was made: the next evaluation plays its own."""
    shutil.rmtree(directory / UNFINISHED, ignore_errors=True)


def attempts_place(
    directory: Path, part: str, policy: Policy, settings: RolloutSettings, problems: Sequence[Problem]
) -> Path:
    """Return where an evaluation keeps its attempts until `forget`; part: `dev`, `test` or `harder`."""
    return directory / UNFINISHED / f"{part}-{evaluation_key(policy, settings, problems)}"


@torch.no_grad()
def evaluation_key(policy: Policy, settings: RolloutSettings, problems: Sequence[Problem]) -> str:
    """Return a hash of all that decides an evaluation's attempts: attempts of other weights are never taken for these.

    Of the weights it takes a sum for every tensor: any training changes one of them.
    """
    weights = () if policy.model is None else policy.model.parameters()
    sums = [f"{float(tensor.detach().sum(dtype=torch.float64)):.9e}" for tensor in weights] or [policy.served]
    asked = [(problem.id, plain(problem.columns)) for problem in problems]
    played = [
        described(settings.make_environment),
        repr(replace(settings, make_environment=SingleTurn, step_timeout=1.0)),
    ]
    text = json.dumps([sums, policy.renderer.fingerprint, *played, asked], default=str)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


@torch.no_grad()
def held_out_loss(policy: Policy, examples: Sequence[TrainingExample], *, label: str = "") -> float:
    """Return the mean negative log-likelihood of the supervised tokens of held-out examples, in nats.

    label: of the progress; '' for none.
    """
    total, count = 0.0, 0
    with sampling_mode(policy.model, autocast=policy.precision.autocast), Progress(label) as progress:
        progress.count(len(examples), "examples")
        for batch in _batches(sorted(examples, key=lambda example: len(example.input_ids))):
            width = len(batch[-1].input_ids)
            device = policy.model.device
            ids = torch.tensor([(*e.input_ids, *[0] * (width - len(e.input_ids))) for e in batch], device=device)
            labels = torch.tensor([(*e.labels, *[IGNORED] * (width - len(e.labels))) for e in batch], device=device)
            mask = torch.tensor([[1] * len(e.labels) + [0] * (width - len(e.labels)) for e in batch], device=device)
            logits = policy.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total, count = total + float(loss), count + int((labels[:, 1:] != IGNORED).sum())
            progress.advance(len(batch))
    return total / max(count, 1)


def _batches(examples: Sequence[TrainingExample]) -> Iterable[list[TrainingExample]]:
    """Yield batches of at most `LOSS_TOKENS` tokens, or of one longer example; examples: the shortest first."""
    batch: list[TrainingExample] = []
    for example in examples:
        if batch and (len(batch) + 1) * len(example.input_ids) > LOSS_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
