"""The built-in environments with the modules of their problems, and problems out of items."""

from bcft.environments import grid_walk, guess_number, twenty_questions
from bcft.environments.grid_walk import GridWalk
from bcft.environments.guess_number import GuessNumber
from bcft.environments.twenty_questions import TwentyQuestions
from bcft.types import Problem, problem_id

ALL = [(grid_walk, GridWalk), (guess_number, GuessNumber), (twenty_questions, TwentyQuestions)]


class Sized(GridWalk):
    """A grid walk with an argument."""

    def __init__(self, size=1):
        self.size = size


def problem_of(item):
    """Return the problem of an embedded dataset's item."""
    columns = {key: value for key, value in item.items() if key not in ("prompt", "messages")}
    return Problem(problem_id(item["prompt"]), item["prompt"], columns)


def ungraded(completions, **_):
    """Return None for every completion: a reward function that cannot grade."""
    return [None] * len(completions)
