"""What is played: requests to an engine, an environment's answers, and the trajectories that they make."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias, get_args

from bcft.types.calls import tools
from bcft.types.data import Problem
from bcft.types.plain import with_type
from bcft.types.text import Message, Prompt, in_file, messages

Stop = Literal["stop_token", "max_tokens", "context_full"]
Success: TypeAlias = Literal["yes", "no", "unknown"]
Ended = Literal["done", "turn_limit", "error"]
"""`done`: the environment ended it; `turn_limit`: the loop did, after the last turn allowed or with a full context (the
last turn's `stop` says which); `error`: the environment failed, so the trajectory is never data."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Every parameter is explicit: an unset `top_k` would mean 50 in `generate`.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One action to sample. Requests with equal `context_ids` share their prefill."""

    key: tuple[str | int, ...]
    """The attempt's identity: (run seed, phase, round, problem id, sample, turn). The noise depends on nothing else."""
    context_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    session: tuple[str | int, ...] | None = None
    """The conversation it continues: an engine may keep its cache from one call to the next; None keeps none."""
    messages: tuple[Message, ...] = field(default=(), compare=False)
    """The conversation that `context_ids` render, for engines that take text."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The problem's arguments of the chat template, for engines whose text has yet to become ids."""


@dataclass(frozen=True, slots=True)
class Action:
    """The sampled token ids, with the stop token if there is one."""

    key: tuple[str | int, ...]
    ids: tuple[int, ...]
    stop: Stop
    logprobs: tuple[float, ...] = ()
    """The log-probability of each of `ids` at temperature 1, before any warper; empty where an engine gives none."""
    text: str = ""
    """What was said, where ids were made of a text; '': it is read from the ids."""


class Engine(Protocol):
    """Anything that turns requests into actions."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in the order they finish."""
        ...


@dataclass(frozen=True, slots=True)
class Feedback:
    """The answer of an environment to an action. Raises ValueError for a field of a wrong type."""

    observation: Prompt | None
    """The next message for the policy, a string being a user message; None only when `done`."""
    reward: float | None
    """The reward for this turn, or None if it is not graded."""
    done: bool
    success: bool | None = None
    """Whether the problem is solved so far; None: not known. The last known value counts."""

    def __post_init__(self) -> None:
        # A scalar of NumPy or torch (`np.bool_`, `np.float32`) is kept as the Python value that it holds.
        for name in ("reward", "done", "success"):
            object.__setattr__(self, name, _python(getattr(self, name)))
        number = isinstance(self.reward, Real) and not isinstance(self.reward, bool) and math.isfinite(self.reward)
        if not (self.reward is None or number):
            raise ValueError(f"reward must be a finite number or None, not {with_type(self.reward)}")
        if not isinstance(self.done, bool):
            raise ValueError(f"done must be True or False, not {with_type(self.done)}")
        if not (self.success is None or isinstance(self.success, bool)):
            raise ValueError(f"success must be True, False or None, not {with_type(self.success)}")
        if self.observation is None:
            if not self.done:
                raise ValueError("observation is None but done is False: the policy has nothing to answer")
        elif any(message["role"] == "assistant" for message in messages(self.observation)):
            raise ValueError("an observation holds no assistant message: these are the policy's own")


def _python(value: Any) -> Any:
    """Return the Python value of a scalar of NumPy or torch or of another kind of number; anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int | float) else value


class Environment(Protocol):
    """One attempt at one problem: made for it, reset once, stepped until it is done or the turns are used up.

    It may have more. `tools`: what the policy may call (see `bcft.environments.tools`); an action with calls gets their
    results as its observation and is not stepped. `get_reward()`: a number, or None, that is added to the reward of the
    last action, whatever ended the attempt. `close()`: called after the last action.
    """

    def reset(self, problem: Problem, *, seed: int) -> Prompt:
        """Return the first observation. All random draws come from `seed`, which is in [0, 2**32)."""
        ...

    def step(self, action: str) -> Feedback:
        """Answer an action, the text without its stop token."""
        ...


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How attempts are rolled out: in which environment, with which sampling, and within which limits.

    Raises ValueError when a limit is not positive.
    """

    make_environment: Callable[[], Environment]
    sampling: Sampling
    max_new_tokens: int
    """Most tokens of an action."""
    max_turns: int
    """Most actions of an attempt."""
    step_timeout: float
    """Most seconds that a call of an environment may take."""
    seed: int
    """Part of the noise's key: tokens depend on the seed, the phase and the attempt's identity alone."""
    make_engine: "EngineMaker | None" = field(default=None, repr=False, compare=False)
    """What opens the engine for a policy; None: the program's own engine."""
    at_once: int | None = field(default=None, repr=False, compare=False)
    """Most attempts of several turns that are played together; None: all."""

    def __post_init__(self) -> None:
        if self.max_turns < 1 or self.max_new_tokens < 1 or not self.step_timeout > 0:
            raise ValueError(
                "max_turns, max_new_tokens and step_timeout must be positive, "
                f"not {self.max_turns}, {self.max_new_tokens} and {self.step_timeout}"
            )


EngineMaker: TypeAlias = Callable[[Any, RolloutSettings], AbstractContextManager[Engine]]
"""From a policy and how it is rolled out to its engine, which is open inside the context."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One action, with the text before it and the answer of the environment. Raises ValueError if malformed."""

    action: str
    """The text, without its stop token."""
    ids: tuple[int, ...]
    """The part of the context since the action before; the whole context if `rewritten`."""
    action_ids: tuple[int, ...]
    """As sampled, with the stop token; empty only with a full context."""
    stop: Stop
    rewritten: bool = False
    """Whether the template changed earlier text, so that this context does not begin with the one before."""
    observation: tuple[Message, ...] = ()
    """The answer of the environment; empty if it had nothing more to say or failed."""
    graded: bool = False
    reward: float = 0.0
    """The environment's reward for this action; 0.0 when not graded."""
    success: Success = "unknown"
    message: Message | None = None
    """The action as a message, where it says more than its text: with tool calls, or with a thought apart."""

    def __post_init__(self) -> None:
        if self.stop not in get_args(Stop) or self.success not in get_args(Success):
            raise ValueError(f"stop {self.stop!r} or success {self.success!r} is not a known word")
        if not self.action_ids and self.stop != "context_full":
            raise ValueError(f"an action without tokens stops at context_full, not at {self.stop}")
        if not math.isfinite(self.reward) or (self.reward and not self.graded):
            raise ValueError(f"a reward of {self.reward} with graded {self.graded}: not finite, or not graded")
        if self.observation:
            messages(self.observation)

    @property
    def said(self) -> Message:
        """The action as a message."""
        return self.message or {"role": "assistant", "content": self.action}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One attempt at a problem as it was played. Raises ValueError for an impossible one.

    `to_json` is a line of `rollouts.jsonl`, and `from_json(to_json(t)) == t`.
    """

    round: int
    problem_id: str
    sample: int
    """Which of the problem's attempts; -1: the one without noise."""
    turns: tuple[Turn, ...]
    ended: Ended
    error: str = ""
    """The failure, in one line; empty unless `ended` is `error`."""
    opening: tuple[Message, ...] = ()
    """The first observation; empty if it is the problem's prompt."""
    run: str = ""
    """Which of several runs it is from, where they are pooled; no part of the files of a run."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """The JSON schemas of the environment's tools."""

    def __post_init__(self) -> None:
        about = f"trajectory {self.id}"
        if self.ended not in get_args(Ended):
            raise ValueError(f"{about}: ended must be one of {', '.join(get_args(Ended))}, not {self.ended!r}")
        if bool(self.error) != (self.ended == "error") or len(self.error.splitlines()) > 1:
            raise ValueError(
                f"{about}: ended {self.ended} with the error {self.error!r}; an error has a reason of one line"
            )
        if not self.turns and self.ended != "error":
            raise ValueError(f"{about}: no turn was played, but it ended {self.ended}")
        if self.turns and self.turns[0].rewritten:
            raise ValueError(f"{about}: the first turn has no earlier context that could be rewritten")
        if any(turn.stop == "context_full" for turn in self.turns[:-1]):
            raise ValueError(f"{about}: a turn follows a full context")

    @property
    def id(self) -> str:
        """`round-problem-sample`; of pooled runs `run/round-problem-sample`."""
        return f"{self.run}{'/' if self.run else ''}{self.round}-{self.problem_id}-{self.sample}"

    @property
    def conversation(self) -> tuple[Message, ...]:
        """All messages after the problem's prompt or the opening: each action and the observation that follows it."""
        conversation: list[Message] = []
        for turn in self.turns:
            conversation += [turn.said, *turn.observation]
        return tuple(conversation)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the last action."""
        last = len(self.turns[-1].observation) if self.turns else 0
        return self.conversation[: len(self.conversation) - last]

    def template_kwargs(self, problem: Problem) -> Mapping[str, Any]:
        """Return what its problem and the environment's tools gave to the chat template."""
        return {**problem.template_kwargs, "tools": list(self.tools)} if self.tools else problem.template_kwargs

    @property
    def truncated(self) -> bool:
        """Whether an action ended without a stop token: at the token limit or with a full context."""
        return any(turn.stop != "stop_token" for turn in self.turns)

    @property
    def tokens(self) -> int:
        """How many tokens were sampled."""
        return sum(len(turn.action_ids) for turn in self.turns)

    @property
    def environment_reward(self) -> float | None:
        """The sum of the environment's rewards; None when it graded no turn."""
        given = [turn.reward for turn in self.turns if turn.graded]
        return sum(given) if given else None

    @property
    def success(self) -> Success:
        """The last known success."""
        return next((turn.success for turn in reversed(self.turns) if turn.success != "unknown"), "unknown")

    def to_json(self) -> dict[str, Any]:
        """Return a line of `rollouts.jsonl`, without nulls; `message` and `tools` are there if not empty."""
        line = {
            "id": self.id,
            "round": self.round,
            "problem_id": self.problem_id,
            "sample": self.sample,
            "turns": [
                {
                    "action": turn.action,
                    "ids": list(turn.ids),
                    "action_ids": list(turn.action_ids),
                    "rewritten": turn.rewritten,
                    "stop": turn.stop,
                    "observation": in_file(turn.observation),
                    "graded": turn.graded,
                    "reward": turn.reward,
                    "success": turn.success,
                    **({"message": in_file([turn.message])[0]} if turn.message else {}),
                }
                for turn in self.turns
            ],
            "ended": self.ended,
            "error": self.error,
            "opening": in_file(self.opening),
        }
        return line | ({"tools": [dict(tool) for tool in self.tools]} if self.tools else {})

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Trajectory":
        """Return the trajectory of a line. Raises ValueError, TypeError or KeyError for another kind of line."""
        values = dict(line)
        identity = values.pop("id")
        turns = tuple(
            Turn(
                **turn
                | {name: tuple(turn[name]) for name in ("ids", "action_ids")}
                | {"observation": tuple(messages(turn["observation"])) if turn["observation"] else ()}
                | {"message": messages([turn["message"]])[0] if turn.get("message") else None}
            )
            for turn in values.pop("turns")
        )
        opening, offered = values.pop("opening"), values.pop("tools", None)
        trajectory = cls(
            **values,
            turns=turns,
            opening=tuple(messages(opening)) if opening else (),
            tools=tuple(tools(offered)) if offered else (),
        )
        if trajectory.id != identity:
            raise ValueError(f"trajectory {trajectory.id} is filed under the id {identity!r}")
        return trajectory
