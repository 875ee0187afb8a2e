"""The embedded problems `bcft:guess-number`: find a number between two others by guessing it.

The player reads the bounds (`20-63`) and says a number; the oracle answers `higher`, `lower` or `correct`. The secret
is hidden: a game may be short by luck alone, and a filter by return cannot tell luck from skill.

The demonstrations are those of a sloppy player, who guesses any number that is still possible, and with probability
`SLOPPY` any between the bounds.
"""

from hashlib import sha256
from itertools import count
from typing import TypedDict

from bcft.environments.base import SHARES, Split
from bcft.environments.base import lots as draw
from bcft.types import Feedback, Message, Problem, Prompt, bucket, problem_id

LEAST, MOST = 10, 59
"""All numbers have two digits."""
WIDTHS = range(8, 33)
"""How many numbers are between the bounds, these included."""
SLOPPY = 0.4
LONGEST = 20
"""Guesses of the longest demonstration; a longer game is drawn again."""


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    messages: list[Message]
    low: int
    high: int
    secret: int


def answer(secret: int, said: str) -> str:
    """Return what the oracle answers to a guess: `higher`, `lower`, `correct`; to what is no number `what?`.

    >>> answer(42, "40")
    'higher'
    """
    words = said.strip().rstrip(".!?").split()
    guess = words[-1] if words else ""
    if not (guess.isascii() and guess.isdigit() and len(guess) <= 9):
        return "what?"
    return "correct" if int(guess) == secret else "higher" if int(guess) < secret else "lower"


def bounds(low: int, high: int) -> str:
    """Return what the player reads first."""
    return f"{low}-{high}"


def prompt(low: int, high: int, secret: int) -> str:
    """Return the problem's text, which makes its id; the player never reads it."""
    return f"Guess a number from {low} to {high}: {secret}."


def items(split: Split, n: int, *, seed: int = 0) -> list[Item]:
    """Return n games, of which any fewer are the first: all problems of the split once, then other games of the same.

    Of some 15,000 triples of bounds and secret 5 % each are held out as test and dev; every number is the secret of
    some training problem.
    """
    triples = _triples(split, seed)
    return [_item(*triples[index % len(triples)], f"{seed}-{index}") for index in range(n)]


def _triples(split: Split, seed: int) -> list[tuple[int, int, int]]:
    """Return the split's bounds and secrets in an order drawn from the seed."""
    first, last = SHARES[split]
    found = [
        (low, low + width - 1, secret)
        for width in WIDTHS
        for low in range(LEAST, MOST + 2 - width)
        for secret in range(low, low + width)
        if first <= bucket(problem_id(prompt(low, low + width - 1, secret))) < last
    ]
    return sorted(found, key=lambda triple: sha256(f"{seed}-{triple}".encode()).digest())


def _item(low: int, high: int, secret: int, key: str) -> Item:
    games = (_game(low, high, secret, f"{key}-{attempt}") for attempt in count())
    guesses = next(game for game in games if game)
    said: list[Message] = [{"role": "user", "content": bounds(low, high)}]
    for guess in guesses:
        said.append({"role": "assistant", "content": str(guess)})
        said.append({"role": "user", "content": answer(secret, str(guess))})
    return Item(prompt=prompt(low, high, secret), messages=said[:-1], low=low, high=high, secret=secret)


def _game(low: int, high: int, secret: int, key: str) -> list[int]:
    """Return the sloppy player's guesses; none when they are too many."""
    lots = draw(f"{key}-game")
    least, most = low, high  # what is still possible
    guesses: list[int] = []
    while secret not in guesses:
        if len(guesses) == LONGEST:
            return []
        first, last = (low, high) if next(lots) < SLOPPY else (least, most)
        guess = first + int(next(lots) * (last - first + 1))
        guesses.append(guess)
        if guess < secret:
            least = max(least, guess + 1)
        elif guess > secret:
            most = min(most, guess - 1)
    return guesses


class GuessNumber:
    """Shows two bounds, answers each guess with `higher` or `lower`, and is done when it is `correct`.

    Reward is -1.0 a guess, so that the return is minus the guesses. What is no number counts as one. Problems are those
    of `bcft:guess-number`, with the columns `low`, `high` and `secret`.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is drawn
        """Return the bounds."""
        self.secret = int(problem.columns["secret"])
        return bounds(problem.columns["low"], problem.columns["high"])

    def step(self, action: str) -> Feedback:
        """Answer a guess."""
        said = answer(self.secret, action)
        found = said == "correct"
        return Feedback(observation=said, reward=-1.0, done=found, success=found)
