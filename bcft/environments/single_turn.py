"""One prompt and one completion: the multi-turn loop that stops at once. Reward functions grade the completion."""

from bcft.types import Feedback, Problem, Prompt


class SingleTurn:
    """Shows the problem's prompt and is done after one action, without a reward of its own."""

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is random
        """Return the prompt as given."""
        return problem.prompt

    def step(self, action: str) -> Feedback:  # noqa: ARG002 - reward functions grade it
        """End the attempt."""
        return Feedback(observation=None, reward=None, done=True)
