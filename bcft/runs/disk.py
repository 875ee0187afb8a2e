"""How many copies of the trained weights a run has on the disk at once, for the check before it starts."""

from bcft.config.schema import RoundSettings, TrainingSettings


def copies_of_sft(training: TrainingSettings) -> int:
    """Return the most copies in a run of `sft`: the model, its checkpoints, and one that replaces an older one."""
    given = training.passed_through
    if given.get("save_strategy", "steps") in ("no", "best"):
        return 1
    return 2 + (given.get("save_total_limit") or 1)


def copies_of_rounds(rounds: RoundSettings) -> int:
    """Return the most copies in a run of `filtered`: the last and the best round, the next one, and `best/`."""
    return min(rounds.num_rounds, 3) + 1
