"""Which of the processes that the launcher started this one is: what torchrun and accelerate export, without torch."""

import os
import sys


def rank() -> int:
    """Return this process's number; 0 writes and prints."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine: that of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """Take leave of the other processes, at the end of a command that is done.

    Gloo's threads, where they are still there when Python ends, abort some of the runs that are done: PyTorch's issue
    190489.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
