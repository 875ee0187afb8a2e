"""The values that flow through the package, frozen and checked when made, and the protocols between its layers.

Plain behavior cloning goes from a Problem to a Demonstration to a TrainingExample. Filtered behavior cloning makes its
own demonstrations: Problem, Request, Action, Feedback, Turn, Trajectory, TrainingExample.
"""

from bcft.types.data import IGNORED, Demonstration, Problem, Source, TrainingExample
from bcft.types.lazy import Lazy
from bcft.types.plain import show
from bcft.types.play import (
    Action,
    Ended,
    Engine,
    EngineMaker,
    Environment,
    Feedback,
    Request,
    RolloutSettings,
    Sampling,
    Stop,
    Success,
    Trajectory,
    Turn,
)
from bcft.types.text import ROLES, Message, Prompt, bucket, messages, problem_id

__all__ = [
    "IGNORED",
    "ROLES",
    "Action",
    "Demonstration",
    "Ended",
    "Engine",
    "EngineMaker",
    "Environment",
    "Feedback",
    "Lazy",
    "Message",
    "Problem",
    "Prompt",
    "Request",
    "RolloutSettings",
    "Sampling",
    "Source",
    "Stop",
    "Success",
    "TrainingExample",
    "Trajectory",
    "Turn",
    "bucket",
    "messages",
    "problem_id",
    "show",
]
