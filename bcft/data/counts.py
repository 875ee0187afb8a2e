"""What is counted of the examples before the first step, and its words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExampleCounts:
    """Counts over all examples before the first step."""

    given: int
    kept: int
    overlong: int
    duplicate: int
    unsupervised: int
    tokens: int
    tokens_supervised: int
    longest: int
    """Tokens of the longest example given, dropped ones included; rows of weight 0 are not counted."""
    bos: int
    """BOS tokens at the head of each example: 0 or 1, as the tokenizer's template has it."""
    stop: str
    """The stop token that is the last label of every example, as text."""
    sampled: int = 0
    """Examples with the ids that a policy sampled, rather than those of a text."""
    weightless: int = 0
    """Rows of weight 0, and conversations in which every action is marked to carry no loss."""

    def __str__(self) -> str:
        dropped = {
            "over-long": self.overlong,
            "duplicate": self.duplicate,
            "empty": self.unsupervised,
            "of weight 0": self.weightless,
        }
        drops = ", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "none"
        sampled = f"; {self.sampled:,} with the ids that were sampled" if self.sampled else ""
        return (
            f"{self.kept:,} of {self.given:,} rows (dropped: {drops}); {self.tokens_supervised:,} of "
            f"{self.tokens:,} tokens carry loss; longest row {self.longest} tokens; "
            f"every row ends in {self.stop}, BOS {self.bos}{sampled}"
        )
