"""Which of the processes that the launcher started this one is: what torchrun and accelerate export, without torch."""

import os


def rank() -> int:
    """Return this process's number; 0 writes and prints."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine: that of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))
