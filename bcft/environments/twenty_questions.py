"""The embedded problems of `twenty_questions`: an everyday object is to be guessed from yes and no.

A problem is a secret object and two facts that are told at the start. What is said, a wrong guess among it:

    user       fur yes, metal no
    assistant  bear?
    user       no
    assistant  water?
    user       no
    assistant  cat?

The environment answers "correct" to the last. These are transcripts of a sloppy player: it guesses long before it can
know, and it asks what it could have inferred. So there is much to be won over it, which cloning alone does not do.

All choices come from sha256, so an item is the same in every version of Python. The rules stand here, in `answer`; the
environment, `bcft.environments.twenty_questions`, keeps the secret and counts the reward.
"""

import re
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, count
from typing import TypedDict

from bcft.environments.base import SHARES, Split
from bcft.types import Feedback, Message, Problem, Prompt, bucket, problem_id

GUESSES = 0.25
"""The probability with which the sloppy player guesses, at each turn, while more than one object is possible."""
GUESSES_THE_LAST = 0.8
"""The same when only one is left."""
MOST_TURNS = 20
"""Longer transcripts are drawn again. For who plays, the limit of turns is the loop's (`max_turns`)."""
ATTRIBUTES: dict[str, str] = {
    "alive": "lives and grows; what was picked does not",
    "fur": "has fur",
    "wings": "has wings",
    "legs": "stands on legs, those of furniture included",
    "water": "lives in water or moves on it",
    "food": "is eaten by people",
    "big": "is bigger than a person",
    "small": "fits into a pocket",
    "metal": "is made of metal, or much of it is",
    "wood": "is made of wood, or much of it is",
    "wheels": "runs on wheels",
    "round": "is round like a ball or a coin",
    "soft": "is soft to the touch, as bread, cloth, fur and feathers are",
}
"""What can be asked, and what is meant by it."""
OBJECTS: dict[str, frozenset[str]] = {
    name: frozenset(attributes.split())
    for name, attributes in {
        "cat": "alive fur legs soft",
        "bear": "alive fur legs big soft",
        "owl": "alive wings legs soft",
        "bee": "alive wings legs small",
        "swan": "alive wings legs water soft",
        "pig": "alive legs food",
        "elephant": "alive legs big",
        "frog": "alive legs water small",
        "fish": "alive water food",
        "whale": "alive water big",
        "tree": "alive big wood",
        "apple": "food small round",
        "carrot": "food small",
        "bread": "food soft",
        "bike": "metal wheels",
        "truck": "big metal wheels",
        "plane": "wings big metal wheels",
        "ship": "water big metal",
        "raft": "water big wood",
        "chair": "legs wood",
        "sofa": "legs big soft",
        "coin": "small metal round",
        "ball": "round",
        "sock": "small soft",
    }.items()
}
"""What can be guessed, each with what is true of it. No two have the same attributes."""
PAIRS = list(combinations(ATTRIBUTES, 2))
"""What can be told at the start: two attributes in their order above, so that the same two are the same problem."""


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    """Canonical: it makes the id and is never shown, for it names the secret."""
    messages: list[Message]
    """All that is said, as the policy reads it, from the first observation to the right guess."""
    secret: str
    told: list[str]


@dataclass(frozen=True, slots=True)
class Riddle:
    """What is to be guessed, and what is told at the start.

    Raises ValueError for a secret that is none of `OBJECTS` or a `told` that is none of `PAIRS`.
    """

    secret: str
    told: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.secret not in OBJECTS:
            raise ValueError(f"the secret {self.secret!r} is none of the objects: {', '.join(OBJECTS)}")
        if self.told not in PAIRS:
            raise ValueError(f"told {self.told!r} are not two attributes in the order of {', '.join(ATTRIBUTES)}")

    @property
    def prompt(self) -> str:
        """The canonical text."""
        return f"Twenty questions: {self.secret}, told {' and '.join(self.told)}."

    @property
    def opening(self) -> str:
        """The first observation: the two facts."""
        return ", ".join(f"{attribute} {_reply(self.secret, attribute)}" for attribute in self.told)


def riddles(split: Split, *, seed: int = 0) -> list[Riddle]:
    """Return all riddles of a split, in an order that depends on the seed."""
    low, high = SHARES[split]
    every = (Riddle(secret, told) for secret in OBJECTS for told in PAIRS)
    found = [riddle for riddle in every if low <= bucket(problem_id(riddle.prompt)) < high]
    return sorted(found, key=lambda riddle: _hash(f"{seed}-{riddle.prompt}"))


def items(split: Split, n: int, *, seed: int = 0) -> list[Item]:
    """Return n rows, of which any fewer are the first: a sloppy player's transcripts, all solved.

    The problems are distinct as long as there are any, some 1,700 in train and 80 to 100 in each of dev and test. After
    that they come again in the same order, each with another transcript.
    """
    order = riddles(split, seed=seed)
    rows = []
    for index in range(n):
        again, place = divmod(index, len(order))
        riddle = order[place]
        said = _transcript(riddle, f"{seed}-{again}-{riddle.prompt}")
        rows.append(Item(prompt=riddle.prompt, messages=said, secret=riddle.secret, told=list(riddle.told)))
    return rows


def answer(secret: str, said: str) -> tuple[str, bool]:
    """Answer what was said by the rules alone, and whether that was the right guess.

    Only whole words count, in upper or lower case, however often. With exactly one object among them it is a guess
    ("correct" or "no"), whatever else is said: "Is the cat alive?" guesses cat. With none or several, but exactly one
    attribute, it is a question ("yes" or "no"); anything else is not understood ("what?").

    >>> answer("cat", "fur?"), answer("cat", "Does it have fur?"), answer("cat", "Is it a dog or a bear?")
    (('yes', False), ('yes', False), ('no', False))
    >>> answer("cat", "cat?"), answer("cat", "It is furry, so a cat."), answer("cat", "Metal or wood?")
    (('correct', True), ('correct', True), ('what?', False))
    """
    words = set(re.findall(r"\w+", said.lower()))
    for names in (OBJECTS, ATTRIBUTES):
        if len(named := words & names.keys()) == 1:
            reply = _reply(secret, named.pop())
            return reply, reply == "correct"
    return "what?", False


def _reply(secret: str, word: str) -> str:
    """Answer one word, an object or an attribute."""
    if word in OBJECTS:
        return "correct" if word == secret else "no"
    return "yes" if word in OBJECTS[secret] else "no"


def _transcript(riddle: Riddle, key: str) -> list[Message]:
    """Return the first transcript of the stream that is solved in `MOST_TURNS`."""
    return next(said for attempt in count() if (said := _sloppy(riddle, f"{key}-{attempt}")))


def _sloppy(riddle: Riddle, key: str) -> list[Message]:
    """Return what a sloppy player and its partner say; nothing when it is not solved."""
    said: list[Message] = [{"role": "user", "content": riddle.opening}]
    possible = [name for name in OBJECTS if Riddle(name, riddle.told).opening == riddle.opening]
    unasked = [attribute for attribute in ATTRIBUTES if attribute not in riddle.told]
    for turn in range(MOST_TURNS):
        probability = GUESSES if len(possible) > 1 else GUESSES_THE_LAST
        # When all is asked, one object is left: there is nothing but to guess it.
        guesses = not unasked or _hash(f"{key}-{turn}-guesses") / 2**256 < probability
        choices = possible if guesses else unasked
        word = choices[_hash(f"{key}-{turn}-word") % len(choices)]
        said.append({"role": "assistant", "content": f"{word}?"})
        if word == riddle.secret:
            return said
        if not guesses:
            unasked.remove(word)
        reply = _reply(riddle.secret, word)
        said.append({"role": "user", "content": reply})
        possible = [name for name in possible if _reply(name, word) == reply]
    return []


def _hash(key: str) -> int:
    """Return 256 bits that depend on the key alone."""
    return int.from_bytes(sha256(key.encode()).digest(), "big")


class TwentyQuestions:
    """Answers yes, no, what? or correct, by the columns `secret` and `told` of the problem.

    It ends with the right guess and never before: how many turns there are, twenty or any other number, is the loop's
    to say.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is drawn
        """Return the two facts that are told, never the problem's prompt: that names the secret.

        Raises ValueError for a problem that is none of `bcft.environments.twenty_questions`.
        """
        if missing := [name for name in ("secret", "told") if name not in problem.columns]:
            where = problem.where or f"problem {problem.id}"
            raise ValueError(
                f"{where}: twenty questions need the columns secret and told: there is no {' and no '.join(missing)}"
            )
        riddle = Riddle(problem.columns["secret"], tuple(problem.columns["told"]))
        self._secret = riddle.secret
        return riddle.opening

    def step(self, action: str) -> Feedback:
        """Answer one question or guess, at -1.0 unless it is the right guess."""
        reply, solved = answer(self._secret, action)
        return Feedback(observation=reply, reward=0.0 if solved else -1.0, done=solved, success=solved)
