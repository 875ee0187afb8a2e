"""Held-out evaluation: one function for every model, split and command, so that figures are comparable.

Greedy decoding gives one attempt a problem, sampling several. An attempt is solved when it stopped by itself and its
environment or the success function reports success; an ungraded attempt is counted and never solved. Where an
environment gives rewards, the return of an attempt is measured too, and policies are compared by it. Attempts are keyed
by their identity, so two models answer the same problems with the same noise and comparisons are paired.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bcft.config.schema import EvaluationSettings
from bcft.data.loading import Splits
from bcft.environments.single_turn import SingleTurn
from bcft.evaluation.results import Evaluation, Measured
from bcft.generation.hf import sampling_mode
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy
from bcft.rewards.base import Reward, answers_of, reference
from bcft.rollout.episode import GREEDY, Attempt
from bcft.rollout.sample import play_attempts, share
from bcft.runs.distributed import gather, rank
from bcft.runs.storage import write_json, write_jsonl
from bcft.selection.scoring import Score, refuse_failures, score
from bcft.types import IGNORED, Demonstration, RolloutSettings, TrainingExample

HARDER_SAMPLES = 4
"""The most sampled attempts at each harder problem."""
LOSS_TOKENS = 2048
"""Tokens, with padding, in one forward pass of held-out examples."""


def samples_of(evaluation: EvaluationSettings, split: str, *, graded: bool) -> int:
    """Return how many sampled attempts each problem of `dev` or `test` gets.

    graded: whether a success function or an environment reports success or rewards; without, samples show nothing: 0.
    """
    if not graded:
        return 0
    return evaluation.eval_test_samples if split == "test" else evaluation.eval_dev_samples


def evaluate(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    settings: RolloutSettings,
    *,
    success: Reward | None,
    samples: int,
    phase: str,
    label: str,
) -> Evaluation:
    """Attempt every problem once greedily and `samples` times with the settings' sampling; grade the attempts.

    phase: `dev` or `test`, part of the noise's key; label: of the progress bar; '' for none.

    Raises FaultError when too many environments failed; whatever the engine or `success` raise.
    """
    identities = [(d, sample) for d in demonstrations for sample in range(GREEDY, samples)]
    attempts = [Attempt(d.problem, 0, sample) for d, sample in identities]
    start = time.perf_counter()
    mine = list(play_attempts(policy, share(attempts), settings, phase=phase, label=label))
    if label and rank() == 0:
        seconds, tokens = time.perf_counter() - start, sum(len(turn.action_ids) for t in mine for turn in t.turns)
        print(f"{label}: {len(mine):,} attempts in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s", flush=True)
    everyone = {trajectory.id: trajectory for trajectory in gather(mine)}
    trajectories = [everyone[attempt.id] for attempt in attempts]
    refuse_failures(trajectories)
    problems = {d.problem.id: d.problem for d in demonstrations}
    scores = score(trajectories, problems, [], weights=[], success=success)
    single_turn = settings.make_environment is SingleTurn
    return Evaluation(
        tuple(
            _attempt(s, d, policy.renderer, single_turn=single_turn)
            for (d, _), s in zip(identities, scores, strict=True)
        )
    )


def _attempt(scored: Score, demonstration: Demonstration, renderer: Renderer, *, single_turn: bool) -> dict[str, Any]:
    """Return a line of `evaluation.jsonl`; single_turn: without the fields of an environment."""
    trajectory, prompt = scored.trajectory, demonstration.problem.prompt
    line: dict[str, Any] = {
        "problem_id": trajectory.problem_id,
        "sample": trajectory.sample,
        "prompt": renderer.text(list(trajectory.opening) or prompt),
        "completion": trajectory.turns[-1].action if trajectory.turns else "",
        "answer": reference(demonstration.problem),
        "success": "no" if scored.success == "yes" and trajectory.truncated else scored.success,
        "stop": next((turn.stop for turn in trajectory.turns if turn.stop != "stop_token"), "stop_token"),
        "tokens": sum(len(turn.action_ids) for turn in trajectory.turns),
    }
    if single_turn:
        return line
    return line | {
        "graded": trajectory.environment_reward is not None and trajectory.ended != "error",
        "return": trajectory.environment_reward or 0.0,
        "turns": len(trajectory.turns),
        "first": trajectory.turns[0].success if len(trajectory.turns) > 1 else "unknown",
        "messages": [dict(message) for message in trajectory.messages],
    }


def measure(
    policy: Policy,
    splits: Splits,
    settings: RolloutSettings,
    *,
    split: str,
    samples: int,
    success: Reward | None,
    examples: Sequence[TrainingExample],
    directory: Path,
    quiet: bool,
) -> Measured:
    """Evaluate a policy on `dev` or `test` and write the result into a directory.

    samples: of each problem, as `samples_of` returns it; success: as `success_function` returns it; examples: of
    held-out demonstrations, for their loss; may be empty. The directory's name is the label of the progress bar.
    """
    problems = splits.test if split == "test" else splits.dev
    if not problems:
        return Measured(Evaluation(()), {})
    label, answers = "" if quiet else directory.name, answers_of(success)
    evaluation = evaluate(policy, problems, settings, success=success, samples=samples, phase=split, label=label)
    summary = evaluation.summary(answers)
    if splits.harder and split == "test":
        harder = evaluate(
            policy,
            splits.harder,
            settings,
            success=success,
            samples=min(samples, HARDER_SAMPLES),
            phase=split,
            label=label and f"{label}, harder",
        )
        summary["harder"] = harder.summary(answers)
    if examples:
        summary["loss"] = held_out_loss(policy, examples)
    if rank() == 0:
        write_jsonl(directory / "evaluation.jsonl", evaluation.attempts)
        write_json(directory / "evaluation.json", summary)
    return Measured(evaluation, summary)


@torch.no_grad()
def held_out_loss(policy: Policy, examples: Sequence[TrainingExample]) -> float:
    """Return the mean negative log-likelihood of the supervised tokens of held-out examples, in nats."""
    total, count = 0.0, 0
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
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
