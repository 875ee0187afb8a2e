"""Attempts played by a policy: every process its share, with a bar for who watches.

The one way in which anything is sampled, in rollouts and in evaluations alike.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from bcft.generation.hf import HFEngine, sampling_mode
from bcft.model import Policy
from bcft.play import Attempt, play
from bcft.processes import rank, world_size
from bcft.types import Environment, Sampling, Trajectory


def played(
    policy: Policy,
    attempts: Sequence[Attempt],
    make: Callable[[], Environment],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    max_turns: int,
    step_timeout: float,
    seed: int,
    phase: str,
    label: str,
) -> Iterator[Trajectory]:
    """Play attempts as `bcft.play.play` does; yield trajectories as they finish.

    label: what the bar says, which shows attempts done, tokens a second and time left on a terminal; none without.
    """
    tokens, start = 0, time.perf_counter()
    watched = bool(label) and rank() == 0 and sys.stderr.isatty()
    engine = HFEngine(policy.model, pad_id=policy.renderer.tokenizer.pad_token_id)
    with (
        sampling_mode(policy.model, autocast=policy.precision.autocast),
        tqdm(total=len(attempts), desc=label, unit="attempt", disable=not watched, leave=False) as bar,
    ):
        for trajectory in play(
            attempts,
            make,
            policy.renderer,
            engine,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            max_turns=max_turns,
            step_timeout=step_timeout,
            seed=seed,
            phase=phase,
        ):
            tokens += sum(len(turn.action_ids) for turn in trajectory.turns)
            bar.update()
            if bar.n % 16 == 0:
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            yield trajectory


def share(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Return what this process plays: whole problems, whose attempts share a prefill."""
    problems = list(dict.fromkeys(attempt.problem.id for attempt in attempts))
    mine = set(problems[rank() :: world_size()])
    return [attempt for attempt in attempts if attempt.problem.id in mine]


def gather(policy: Policy, items: list[Any]) -> list[Any]:
    """Return the items of all processes, by process; every process must call it."""
    if world_size() == 1:
        return items
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=policy.precision.device == "cpu")
    return list(gather_object(items))
