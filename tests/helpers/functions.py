"""Reward functions and environments that recipes of the tests name by dotted path."""

from bcft.types import Feedback


def brevity(completions, **_):
    """Reward short completions, whatever they say."""
    return [-float(len(text)) for text in completions]


def odd(completions, **_):
    """Reward the length of a completion modulo 7: a random policy cannot help varying it."""
    return [float(len(text if isinstance(text, str) else text[-1]["content"]) % 7) for text in completions]


def even(completions, **_):
    """Reward an even number of characters; unlike a sum, the embedded policy gets that right in a second attempt."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(len(text) % 2 == 0) for text in texts]


class Coin:
    """Pays a point for an even number of characters."""

    def reset(self, problem, *, seed):  # noqa: ARG002
        """Return the prompt as messages."""
        return [{"role": "user", "content": str(problem.prompt)}]

    def step(self, action):
        """Pay, and never end."""
        return Feedback("again", float(len(action) % 2 == 0), done=False)


class Broken:
    """Fails at every step."""

    def reset(self, problem, *, seed):  # noqa: ARG002
        """Return the prompt."""
        return str(problem.prompt)

    def step(self, action):  # noqa: ARG002
        """Fail."""
        raise OSError("the game server is down")
