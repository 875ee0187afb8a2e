"""What a policy forgets: its divergence from the base, on attempts that the base has played.

The attempts are the base's own, sampled at dev problems before any training. What the base says there is written once,
so that a resumed run needs none of its weights and every kind of policy is measured alike. Left out: a divergence on
the policy's own attempts, which says what it has become.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from bcft.data.examples import trajectory_examples
from bcft.evaluation.held_out import attempts_place
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import Policy
from bcft.rollout.episode import Attempt
from bcft.rollout.sample import play_journaled
from bcft.runs.clock import Clock
from bcft.runs.distributed import broadcast, rank
from bcft.runs.progress import Progress
from bcft.runs.storage import write_bytes
from bcft.types import IGNORED, Problem, RolloutSettings, Trajectory

REFERENCE = "base_logprobs.safetensors"
"""The file of the base: `input_ids` and `own` (T,), which tokens are the base's own, of rows with `lengths` (N,); for
the P own tokens, `tokens` (P, K) and `logprobs` (P, K + 1), as `_read` returns them."""
ATTEMPTS = 128
"""The most attempts that are read."""
ROW_TOKENS = 1024
"""The most tokens of a row that are read, from its first action on."""
POSITIONS = 32_768
"""No further attempt is read after so many own tokens."""
TOP = 128
"""The likeliest tokens, whose probabilities are kept at each position; all others count as one."""
CHUNK = 256
"""Positions whose logits are in fp32 at once."""
_Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are the base's own."""


def record_base(
    policy: Policy,
    problems: Sequence[Problem],
    settings: RolloutSettings,
    *,
    samples: int,
    directory: Path,
    label: str,
) -> None:
    """Write what the base says on its sampled attempts at dev problems; every process must call it.

    samples: of each problem, in its evaluation in this directory, whose attempts are taken as they are while its
    journal is there. The first sample of every problem comes before the second of any.
    """
    attempts = [Attempt(problem, 0, sample) for sample in range(samples) for problem in problems]
    attempts = sorted(attempts, key=lambda attempt: (attempt.sample, attempt.problem.id))[:ATTEMPTS]
    place = attempts_place(directory, "dev", policy, settings, problems)
    trajectories = play_journaled(policy, attempts, settings, directory=place, clock=Clock(), label=label, phase="dev")
    if rank() == 0:
        rows = _rows(trajectories, {problem.id: problem for problem in problems})
        tokens, logprobs = _read(policy, rows, tokens=None, label=label)
        tensors = {
            "input_ids": torch.tensor([token for ids, _ in rows for token in ids], dtype=torch.int32),
            "own": torch.tensor([mine for _, own in rows for mine in own], dtype=torch.bool),
            "lengths": torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int32),
            "tokens": tokens.int(),
            "logprobs": logprobs,
        }
        write_bytes(directory / REFERENCE, save(tensors))
    broadcast(None)  # the others wait for the file


def divergence(policy: Policy, directory: Path, *, label: str) -> float | None:
    """Return KL(base || policy) in nats a token, on the base's attempts of `record_base`; None without any.

    It is the mean over the base's own tokens of the divergence of the next-token distributions there, at temperature 1
    and before any warper. Given the text before a token, that divergence is exact, so this is the Rao-Blackwellized
    estimator of Amini, Vieira and Cotterell 2025 (https://arxiv.org/abs/2504.10637, section 3): of lower variance than
    the mean of log p(token) - log q(token), never negative, and 0 for equal policies. It is unbiased where attempts are
    sampled at temperature 1 without warpers; elsewhere the texts are those that the base was made to say. Where the
    vocabulary has more than `TOP` tokens, those beyond the base's likeliest count as one, which makes it a lower bound
    (the log sum inequality), by at most the divergence within them times their probability.

    Every process must call it; the first one works, and all return its figure. Memory is bounded by the logits of one
    row of `ROW_TOKENS`.
    """
    figure = None
    if rank() == 0 and (directory / REFERENCE).is_file():
        base = load_file(directory / REFERENCE)
        rows = _split(base["input_ids"], base["own"], base["lengths"])
        if rows:
            figure = kl(base["logprobs"], _read(policy, rows, tokens=base["tokens"], label=label)[1])
    known: float | None = broadcast(figure)
    return known


def kl(base: torch.Tensor, policy: torch.Tensor) -> float:
    """Return the mean over positions of KL(base || policy) in nats, given log-probabilities (P, V) of both."""
    base, policy = base.double(), policy.double()
    terms = torch.where(base.isneginf(), 0.0, base.exp() * (base - policy))
    return max(0.0, float(terms.sum(1).mean()))  # rounding may leave -1e-17


def _rows(trajectories: Sequence[Trajectory], problems: dict[str, Problem]) -> list[_Row]:
    """Return the rows to read, several of a trajectory whose template rewrites earlier text."""
    rows: list[_Row] = []
    for trajectory in trajectories:
        if trajectory.ended == "error":
            continue
        for example in trajectory_examples(trajectory, problems[trajectory.problem_id], reward=0.0, source="self"):
            own = [label != IGNORED for label in example.labels]
            end = own.index(True) + ROW_TOKENS
            rows.append((list(example.input_ids[:end]), own[:end]))
        if sum(sum(own) for _, own in rows) >= POSITIONS:
            break
    return rows


def _split(ids: torch.Tensor, own: torch.Tensor, lengths: torch.Tensor) -> list[_Row]:
    """Return the rows of the file."""
    ends = lengths.cumsum(0).tolist()
    return [(ids[a:b].tolist(), own[a:b].tolist()) for a, b in pairwise([0, *ends])]


@torch.no_grad()
def _read(
    policy: Policy, rows: Sequence[_Row], *, tokens: torch.Tensor | None, label: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a policy says at each of P own tokens: K tokens (P, K), and log-probabilities (P, K + 1).

    The last of these is that of all other tokens together. tokens: which ones (P, K); None: the likeliest. Rows are
    read one by one, so that none is padded and a figure does not depend on the others.
    """
    model, position = policy.model, 0
    chosen: list[torch.Tensor] = []
    parts: list[torch.Tensor] = []
    with sampling_mode(model, autocast=policy.precision.autocast), Progress(label) as progress:
        progress.count(len(rows), "attempts")
        for ids, own in rows:
            first = own.index(True)
            read = torch.tensor([ids], device=model.device)
            logits = model(input_ids=read, use_cache=False, logits_to_keep=len(ids) - first + 1).logits[0, :-1]
            for part in logits[torch.tensor(own[first:], device=logits.device)].split(CHUNK):
                logprobs = part.float().log_softmax(-1)
                if tokens is None:
                    mine = logprobs.topk(min(TOP, logprobs.shape[1])).indices
                else:
                    mine = tokens[position : position + len(part)].to(logprobs.device).long()
                others = logprobs.scatter(1, mine, -torch.inf).logsumexp(1, keepdim=True)
                chosen.append(mine.cpu())
                parts.append(torch.cat([logprobs.gather(1, mine), others], dim=1).cpu())
                position += len(part)
            progress.advance()
    if not parts:
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 1)
    return torch.cat(chosen), torch.cat(parts)
