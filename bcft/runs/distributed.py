"""Several processes of one run: which one this is, as torchrun and accelerate export it, and what they exchange."""

import os
import sys
from typing import Any


def rank() -> int:
    """Return this process's number; process 0 writes and prints."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine: that of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def connect(*, cpu: bool) -> None:
    """Join the other processes. cpu: over gloo, for a model that is not on an accelerator."""
    if world_size() > 1:
        from accelerate import PartialState  # noqa: PLC0415 - loads torch, which commands check their input without

        PartialState(cpu=cpu)


def gather(items: list[Any]) -> list[Any]:
    """Return the items of all processes, in the order of their ranks; every process must call it, after `connect`."""
    if world_size() == 1:
        return items
    from accelerate.utils import gather_object  # noqa: PLC0415 - as above

    return list(gather_object(items))


def broadcast(value: Any) -> Any:
    """Return rank 0's value on every process; every process must call it, after `connect`."""
    return gather([value] if rank() == 0 else [])[0]


def barrier() -> None:
    """Wait until every process is here."""
    gather([])


def leave() -> None:
    """Destroy the process group at the end of a command.

    Threads of gloo that are still alive when Python exits abort some runs that have ended well (PyTorch issue 190489).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
