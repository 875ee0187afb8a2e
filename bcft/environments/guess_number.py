"""The embedded problems `bcft:guess-number`: find a number between two others by guessing it.

The player reads the bounds (`20-63`) and guesses a number; the answer is `higher`, `lower` or `correct`. The secret is
hidden: luck alone may make an attempt short, and a filter by return cannot tell luck from skill.

The demonstrations come from a sloppy player: it guesses any number that is still possible, and with probability
`SLOPPY` any number between the bounds.
"""

from hashlib import sha256
from itertools import count
from typing import TypedDict

from bcft.environments.base import SHARES, EmbeddedDataset, Split, uniforms
from bcft.types import Feedback, Message, Problem, Prompt, bucket, problem_id

LEAST, MOST = 10, 59
"""All numbers have two digits."""
WIDTHS = range(8, 33)
"""How many numbers there are from the lower bound to the upper one, both included."""
SLOPPY = 0.4
LONGEST = 20
"""Guesses of the longest demonstration; a longer one is drawn again."""


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    messages: list[Message]
    low: int
    high: int
    secret: int


# Rules
def bounds(low: int, high: int) -> str:
    """Return the first observation."""
    return f"{low}-{high}"


def answer(secret: int, action: str) -> str:
    """Return the answer to a guess, `higher`, `lower` or `correct`; `what?` where its last word is not a number.

    >>> answer(42, "40")
    'higher'
    """
    words = action.strip().rstrip(".!?").split()
    guess = words[-1] if words else ""
    if not (guess.isascii() and guess.isdigit() and len(guess) <= 9):
        return "what?"
    return "correct" if int(guess) == secret else "higher" if int(guess) < secret else "lower"


# Problems
def prompt(low: int, high: int, secret: int) -> str:
    """Return the problem's text, which makes its id; the player never reads it."""
    return f"Guess a number from {low} to {high}: {secret}."


def _triples(split: Split, seed: int) -> list[tuple[int, int, int]]:
    """Return the split's bounds and secrets in an order drawn from the seed."""
    first, last = SHARES[split]
    triples = [
        (low, low + width - 1, secret)
        for width in WIDTHS
        for low in range(LEAST, MOST + 2 - width)
        for secret in range(low, low + width)
        if first <= bucket(problem_id(prompt(low, low + width - 1, secret))) < last
    ]
    return sorted(triples, key=lambda triple: sha256(f"{seed}-{triple}".encode()).digest())


# Demonstrations
def items(split: Split, n: int, *, seed: int = 0) -> list[Item]:
    """Return n items, of which any fewer are the first: all problems of the split once, then other guesses at the same.

    Of some 15,000 triples of bounds and secret 5 % each are held out as test and dev; every number is the secret of
    some training problem.
    """
    triples = _triples(split, seed)
    return [_item(*triples[index % len(triples)], f"{seed}-{index}") for index in range(n)]


def _item(low: int, high: int, secret: int, key: str) -> Item:
    attempts = (_guesses(low, high, secret, f"{key}-{attempt}-game") for attempt in count())
    guesses = next(guesses for guesses in attempts if guesses)
    conversation: list[Message] = [{"role": "user", "content": bounds(low, high)}]
    for guess in guesses:
        conversation.append({"role": "assistant", "content": str(guess)})
        conversation.append({"role": "user", "content": answer(secret, str(guess))})
    return Item(prompt=prompt(low, high, secret), messages=conversation[:-1], low=low, high=high, secret=secret)


def _guesses(low: int, high: int, secret: int, key: str) -> list[int]:
    """Return the sloppy player's guesses; none when there are too many."""
    numbers = uniforms(key)
    least, most = low, high  # the bounds of the numbers that are still possible
    guesses: list[int] = []
    while secret not in guesses:
        if len(guesses) == LONGEST:
            return []
        first, last = (low, high) if next(numbers) < SLOPPY else (least, most)
        guess = first + int(next(numbers) * (last - first + 1))
        guesses.append(guess)
        if guess < secret:
            least = max(least, guess + 1)
        elif guess > secret:
            most = min(most, guess - 1)
    return guesses


# Environment
class GuessNumber:
    """Shows two bounds, answers each guess with `higher` or `lower`, and is done when it is `correct`.

    Reward is -1.0 for each guess, so the return is minus the number of guesses; text without a number counts as one.
    Problems are those of `bcft:guess-number`, with the columns `low`, `high` and `secret`.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is random
        """Return the bounds."""
        self.secret = int(problem.columns["secret"])
        return bounds(problem.columns["low"], problem.columns["high"])

    def step(self, action: str) -> Feedback:
        """Answer a guess."""
        reply = answer(self.secret, action)
        correct = reply == "correct"
        return Feedback(observation=reply, reward=-1.0, done=correct, success=correct)


DATASETS = {"bcft:guess-number": EmbeddedDataset(items)}
