"""Two attempts at the same problem, with a review between them, each graded by itself.

Filtered behavior cloning is not known to teach self-correction: it keeps conversations that end well, and most of these
are right at the first attempt. Kumar et al. 2024 (SCoRe, https://arxiv.org/abs/2409.12917) measure it.
"""

from bcft.rewards.base import Reward, ask, import_function, solved
from bcft.types import Feedback, Message, Problem, Prompt

REVIEW = "Check your solution and correct any mistake in it. Then give the whole solution again."
VERDICTS = {True: "That is right. ", False: "That is not right. ", None: ""}
"""The beginning of the review, by the first attempt's success."""


class TwoAttempts:
    """Shows the problem, asks for a second attempt at it, and is done.

    review: the observation after the first attempt; verdict: begin it with the grade of that attempt; reward_func:
    dotted path of the grader, in TRL's signature, which returns 1.0 or more for a solution.

    The first attempt has no reward of its own, the second has the grader's; each has its own success.
    """

    def __init__(
        self, *, review: str = REVIEW, verdict: bool = False, reward_func: str = "bcft.rewards.math_reward"
    ) -> None:
        if not isinstance(review, str) or not review.strip():
            raise ValueError(f"review must be text, not {review!r}")
        if not isinstance(verdict, bool):
            raise ValueError(f"verdict must be true or false, not {verdict!r}")
        self.review, self.verdict = review, verdict
        self.grader: Reward = import_function(reward_func, key="environment_args: reward_func")
        self.attempts = 0

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is random
        """Return the problem's prompt as given."""
        self.problem, self.attempts = problem, 0
        return problem.prompt

    def step(self, action: str) -> Feedback:
        """Grade an attempt by itself; ask for another after the first."""
        message: Message = {"role": "assistant", "content": action}
        (reward,) = ask(self.grader, [self.problem], [action if isinstance(self.problem.prompt, str) else [message]])
        success = None if reward is None else solved(reward)
        self.attempts += 1
        if self.attempts == 1:
            review = (VERDICTS[success] if self.verdict else "") + self.review
            return Feedback(observation=review, reward=None, done=False, success=success)
        return Feedback(observation=None, reward=reward, done=True, success=success)
