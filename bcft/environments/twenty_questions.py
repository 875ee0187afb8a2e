"""Twenty questions: the policy asks for attributes of a secret object, or guesses it, until the guess is right.

Rewards are those of the 20-questions task of ArCHer (Zhou et al. 2024, https://arxiv.org/abs/2402.19446): -1 for each
turn that does not end the game, so that the return is minus the turns wasted. Unlike there, rules answer and not a
language model, and two facts are told at the start: there are as many problems as pairs of a secret and what is told.
"""

from bcft.problems.twenty_questions import Riddle, answer
from bcft.types import Feedback, Problem, Prompt


class TwentyQuestions:
    """Answers yes, no, what? or correct, by the columns `secret` and `told` of the problem.

    It ends with the right guess and never before: how many turns there are, twenty or any other number, is the loop's
    to say.
    """

    instant = True

    def reset(self, problem: Problem, *, seed: int) -> Prompt:  # noqa: ARG002 - nothing is drawn
        """Return the two facts that are told, never the problem's prompt: that names the secret.

        Raises ValueError for a problem that is none of `bcft.problems.twenty_questions`.
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
