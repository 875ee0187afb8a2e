"""How many environments may fail before a command stops."""

from collections.abc import Sequence

from bcft.errors import FaultError
from bcft.types import Trajectory

MAX_ERROR_SHARE = 0.05
"""A command stops when more than this share of environments fails."""


def refuse_failures(trajectories: Sequence[Trajectory]) -> None:
    """Raise FaultError when more than `MAX_ERROR_SHARE` of the trajectories ended in an error of their environment."""
    errors = [trajectory for trajectory in trajectories if trajectory.ended == "error"]
    if errors:
        refuse_share(len(errors), of=len(trajectories), first=f"{errors[0].id}: {errors[0].error}")


def refuse_share(errors: int, *, of: int, first: str) -> None:
    """Raise FaultError when more than `MAX_ERROR_SHARE` of so many trajectories failed; first: one, in words."""
    if errors > MAX_ERROR_SHARE * of:
        raise FaultError(f"{errors} of {of} trajectories failed; {first}")
