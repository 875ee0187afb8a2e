"""The embedded problems `bcft:twenty-questions`: guess an everyday object from answers of yes and no.

A problem is a secret object and two facts that are given at the start. An attempt, with a wrong guess in it:

    user       fur yes, metal no
    assistant  bear?
    user       no
    assistant  water?
    user       no
    assistant  cat?

The environment answers "correct" to the last. The demonstrations are transcripts of a sloppy player like this one: it
guesses long before it can know, and it asks questions whose answers it could infer. So there is much to improve, and
cloning alone does not improve it.

All choices come from sha256, so an item is the same in every version of Python.
"""

import re
from dataclasses import dataclass
from itertools import combinations, count
from typing import TypedDict

from bcft.environments.base import SHARES, EmbeddedDataset, Split, random_bits
from bcft.types import Feedback, Message, Problem, Prompt, bucket, problem_id

GUESSES = 0.25
"""The probability with which the sloppy player guesses, at each turn, while more than one object is possible."""
GUESSES_THE_LAST = 0.8
"""The same when only one is left."""
MOST_TURNS = 20
"""Turns of the longest demonstration; a longer one is drawn again. The limit of an attempt is `max_turns`."""
ATTRIBUTES: dict[str, str] = {
    "alive": "lives and grows; a picked fruit does not",
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
"""The attributes that a question may name, with their meaning."""
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
"""The objects that a guess may name, with their attributes. No two have the same."""
PAIRS = list(combinations(ATTRIBUTES, 2))
"""The attributes given at the start: two in their order above, so that the same two are the same problem."""


class Item(TypedDict):
    """One row of the dataset."""

    prompt: str
    """Canonical: it makes the id. The policy never reads it, because it names the secret."""
    messages: list[Message]
    """The transcript as the policy reads it, from the first observation to the right guess."""
    secret: str
    told: list[str]
    """The two attributes given at the start."""


# Problems
@dataclass(frozen=True, slots=True)
class Riddle:
    """A problem: the secret, and the two attributes given at the start.

    Raises ValueError for a secret that is not in `OBJECTS` or a `told` that is not in `PAIRS`.
    """

    secret: str
    told: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.secret not in OBJECTS:
            raise ValueError(f"the secret {self.secret!r} is not one of the objects: {', '.join(OBJECTS)}")
        if self.told not in PAIRS:
            raise ValueError(f"told: {self.told!r} is not two attributes in the order of {', '.join(ATTRIBUTES)}")

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
    members = [riddle for riddle in every if low <= bucket(problem_id(riddle.prompt)) < high]
    return sorted(members, key=lambda riddle: random_bits(f"{seed}-{riddle.prompt}"))


# Rules
def answer(secret: str, action: str) -> tuple[str, bool]:
    """Return the answer to a question or a guess, and whether it is the right guess.

    Only whole words count, in upper or lower case, however often. With exactly one object among them it is a guess
    ("correct" or "no"), whatever the other words are: "Is the cat alive?" guesses cat. With none or several, but
    exactly one attribute, it is a question ("yes" or "no"); anything else is not understood ("what?").

    >>> answer("cat", "fur?"), answer("cat", "Does it have fur?"), answer("cat", "Is it a dog or a bear?")
    (('yes', False), ('yes', False), ('no', False))
    >>> answer("cat", "cat?"), answer("cat", "It is furry, so a cat."), answer("cat", "Metal or wood?")
    (('correct', True), ('correct', True), ('what?', False))
    """
    words = set(re.findall(r"\w+", action.lower()))
    for names in (OBJECTS, ATTRIBUTES):
        if len(named := words & names.keys()) == 1:
            reply = _reply(secret, named.pop())
            return reply, reply == "correct"
    return "what?", False


def _reply(secret: str, word: str) -> str:
    """Return the answer to one word, an object or an attribute."""
    if word in OBJECTS:
        return "correct" if word == secret else "no"
    return "yes" if word in OBJECTS[secret] else "no"


# Demonstrations
def items(split: Split, n: int, *, seed: int = 0) -> list[Item]:
    """Return n rows, of which any fewer are the first: a sloppy player's transcripts, all solved.

    The problems are distinct as long as there are any, some 1,700 in train and 80 to 100 in each of dev and test. After
    that they come again in the same order, each with another transcript.
    """
    order = riddles(split, seed=seed)
    rows = []
    for index in range(n):
        again, position = divmod(index, len(order))
        riddle = order[position]
        transcript = _transcript(riddle, f"{seed}-{again}-{riddle.prompt}")
        rows.append(Item(prompt=riddle.prompt, messages=transcript, secret=riddle.secret, told=list(riddle.told)))
    return rows


def _transcript(riddle: Riddle, key: str) -> list[Message]:
    """Return the first transcript of the stream that is solved in `MOST_TURNS`."""
    attempts = (_sloppy(riddle, f"{key}-{attempt}") for attempt in count())
    return next(transcript for transcript in attempts if transcript)


def _sloppy(riddle: Riddle, key: str) -> list[Message]:
    """Return the transcript of one attempt of the sloppy player; nothing when it is not solved."""
    transcript: list[Message] = [{"role": "user", "content": riddle.opening}]
    possible = [name for name in OBJECTS if Riddle(name, riddle.told).opening == riddle.opening]
    unasked = [attribute for attribute in ATTRIBUTES if attribute not in riddle.told]
    for turn in range(MOST_TURNS):
        probability = GUESSES if len(possible) > 1 else GUESSES_THE_LAST
        # When every attribute was asked, one object is left, and only a guess remains.
        guesses = not unasked or random_bits(f"{key}-{turn}-guesses") / 2**256 < probability
        choices = possible if guesses else unasked
        word = choices[random_bits(f"{key}-{turn}-word") % len(choices)]
        transcript.append({"role": "assistant", "content": f"{word}?"})
        if word == riddle.secret:
            return transcript
        if not guesses:
            unasked.remove(word)
        reply = _reply(riddle.secret, word)
        transcript.append({"role": "user", "content": reply})
        possible = [name for name in possible if _reply(name, word) == reply]
    return []


# Environment
class TwentyQuestions:
    """Answers yes, no, what? or correct, by the columns `secret` and `told` of the problem.

    Reward is -1.0 for each action but the right guess, which has 0.0. Only the right guess ends an attempt: the number
    of turns, twenty or any other, is limited by `max_turns`.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is random
        """Return the two facts, never the problem's prompt, which names the secret.

        Raises ValueError for a problem that is not one of `bcft:twenty-questions`.
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
        """Answer one question or guess."""
        reply, solved = answer(self._secret, action)
        return Feedback(observation=reply, reward=0.0 if solved else -1.0, done=solved, success=solved)


DATASETS = {"bcft:twenty-questions": EmbeddedDataset(items)}
