"""The `openai` engine: any server with OpenAI's chat API, such as vLLM, SGLang, llama.cpp or a hosted teacher.

Messages go out and text comes back, which becomes the ids that the policy's own template gives it: what `sft` trains
for a demonstration of the same text. The server draws its own noise, so the journal is the truth. `usage` counts what
is asked, so that budgets hold across interruptions.

A problem's tools are sent; an answer that is a tool call instead of a text is not used, and counted. Left out: streams
and images. A thought that a server returns apart from its answer is not part of the text.
"""

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import openai

from bcft.config.engine import EngineSettings, key_from
from bcft.environments.base import offers_tools
from bcft.errors import BcftError, DataError, ServerError, UsageError
from bcft.generation.usage import Usage
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy
from bcft.runs.distributed import world_size
from bcft.types import Action, Engine, EngineMaker, Message, Request, RolloutSettings
from bcft.types.plain import valid_text

KEY = "OPENAI_API_KEY"
"""The variable that holds the key. It is in no file, line or error."""
MOST_TRIES = 8
"""Of one request, which takes some two minutes if none is answered; of a busy server, since it last answered any."""
FIRST_TRIES = 4
"""The same while the server has not been reached: its address may be wrong."""
_LONGEST_PAUSE, _LONGEST_ASKED = 60.0, 600.0
"""Seconds between two tries; where the server says how many."""
_TIMEOUT = openai.Timeout(600.0, connect=10.0)
"""Seconds for one answer, and to reach the server."""
_TOO_MANY = 429
_BUSY = (_TOO_MANY, 503, 529)
"""What a server answers that has too much to do: while it answers other requests, it is not gone."""
_TRANSIENT = (408, 409, 425, _TOO_MANY)
"""What a server answers, beside 500 and more, when it may answer otherwise later."""
_MALFORMED = (AttributeError, TypeError, LookupError, ValueError)
"""What reading an answer raises that has another form than a chat completion: the client checks none."""
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Parameters that OpenAI's API does not have, where they are off: many servers take them, and some refuse them."""
_NEWER_LIMIT = "max_completion_tokens"
_LONGEST_MESSAGE = 300
"""Characters of a server's own words."""
_UNFIT = {
    "content_filter": ("content_filter", "content_policy", "content management policy"),
    "context": ("context_length", "context length", "context size", "maximum context"),
}
"""Why one request is refused and others may not be -> what servers say then."""
_UNUSED = {
    "content_filter": "filtered by the server",
    "tool_calls": "calls of tools",
    "function_call": "calls of tools",
    "refusal": "refused by the model",
    "empty": "without text",
    "context": "longer than the server's context",
    "template": "not renderable by the policy's template",
}
"""Why an answer is not used -> the words for it; any other `finish_reason` is printed as it is."""


def pause(seconds: float, ended: Event) -> None:
    """Wait before a request is sent again; not longer than the engine is in use."""
    ended.wait(seconds)


@contextmanager
def open_openai(
    settings: EngineSettings, *, directory: Path, say: Callable[[str], None] = lambda _: None
) -> Iterator[EngineMaker]:
    """Yield what makes engines that share one client, whose requests count towards one budget.

    directory: of the run, where they are counted; say: prints a line.

    Raises UsageError with several processes, for a key that no header can hold, and for an environment with tools.
    """
    if world_size() > 1:
        raise UsageError(
            f"engine: openai sends {settings.concurrency} requests at a time from one process: start the command "
            f"without a launcher"
        )
    assert settings.base_url is not None
    key = key_from(KEY)
    usage, unused = Usage(directory, settings), Counter[str]()
    client = openai.OpenAI(
        # The client refuses to be made without a key, and many servers want none.
        api_key=key or "none", base_url=settings.base_url, max_retries=0, timeout=_TIMEOUT,
    )  # fmt: skip

    @contextmanager
    def make(policy: Policy, rollouts: RolloutSettings) -> Iterator[Engine]:
        if offers_tools(rollouts.make_environment):
            raise UsageError(
                "engine: openai reads no tool calls, so an environment with tools cannot be played: set engine: hf or "
                "vllm"
            )
        yield OpenAIEngine(client, settings, policy.renderer, usage, unused)

    try:
        yield make
    finally:
        if usage.requests:
            counts = (f"{n:,} {_UNUSED.get(why, why)}" for why, n in sorted(unused.items()))
            dropped = f"; answers that count as truncated and are never trained: {', '.join(counts)}" if unused else ""
            say(f"engine: {usage}{dropped}")
    usage.close()
    client.close()


@dataclass(frozen=True)
class _Answer:
    """What the server made of a request; `reason` is `stop`, `length`, or why the text is not used."""

    text: str
    reason: str


@dataclass(frozen=True)
class _Failure:
    """Why there is no answer, in the server's words, and what to do about it."""

    message: str
    transient: bool
    seconds: float = 0.0
    """The pause that the server asks for."""
    reached: bool = True
    busy: bool = False


class OpenAIEngine:
    """Sample with a chat server; requests run in threads of their own, at most `concurrency` together.

    When one fails for good no other is sent, and those in flight are answered first: they are paid for.
    """

    def __init__(
        self, client: openai.OpenAI, settings: EngineSettings, renderer: Renderer, usage: Usage, unused: Counter[str]
    ) -> None:
        self.client = client
        self.settings = settings
        self.renderer = renderer
        self.usage = usage
        self.unused = unused
        self.limit_name = "max_tokens"
        self.reached = False

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in the order they are answered.

        Raises ServerError when the server does not answer, UsageError when it refuses the key, the model or a parameter
        and when a budget is spent.
        """
        answers: SimpleQueue[tuple[Request, _Answer | BcftError | None]] = SimpleQueue()
        waiting, in_flight, ended = deque(requests), 0, Event()
        failure: BcftError | None = None
        try:
            while in_flight or (waiting and failure is None):
                while waiting and failure is None and in_flight < self.settings.concurrency:
                    given = (waiting.popleft(), answers, ended)
                    Thread(target=self._run, args=given, name="requests", daemon=True).start()
                    in_flight += 1
                request, answer = answers.get()
                in_flight -= 1
                if isinstance(answer, BcftError):
                    failure = failure or answer
                    ended.set()
                else:
                    assert answer is not None, "a thread ended without an answer, with the error above"
                    yield self._action(request, answer)
        finally:
            ended.set()
        if failure is not None:
            raise failure

    # In threads
    def _run(self, request: Request, answers: "SimpleQueue[Any]", ended: Event) -> None:
        answer: _Answer | BcftError | None = None
        try:
            answer = self._ask(request, ended)
        except BcftError as error:
            answer = error
        finally:
            answers.put((request, answer))

    def _ask(self, request: Request, ended: Event) -> _Answer:
        """Send a request until it is answered."""
        at = f"engine: {self.settings.served_model} at {self.settings.base_url} "
        answers, before = self.usage.answers, 0  # tries before a busy server last answered another request
        for tries in count(1):
            self.usage.send()
            outcome = self._once(request)
            if isinstance(outcome, _Answer):
                return outcome
            if not outcome.transient:
                raise UsageError(f"{at}refuses the request: {outcome.message}")
            self.reached = self.reached or outcome.reached
            gone = ServerError(
                f"{at}does not answer, asked {tries} times: {outcome.message}: resume with the same command; answered "
                f"requests are not repeated"
            )
            if outcome.busy and self.usage.answers > answers:
                answers, before = self.usage.answers, tries
            if tries - before >= (MOST_TRIES if self.reached else FIRST_TRIES):
                raise gone
            half = min(2.0 ** min(tries - 1, 10), _LONGEST_PAUSE) / 2
            pause(max(half, min(outcome.seconds, _LONGEST_ASKED)) + random.uniform(0.0, half), ended)
            if ended.is_set():
                raise gone
        raise AssertionError("counting does not end")

    def _once(self, request: Request) -> _Answer | _Failure:
        parameters = self._parameters(request)
        try:
            return self._read(request, self.client.chat.completions.create(**parameters))
        except openai.APIStatusError as error:
            status, message = error.status_code, _words(error)
            for reason, words in _UNFIT.items() if status in (400, 413) else ():
                if any(word in message.lower() for word in words):
                    return _Answer("", reason)
            if status == 400 and _NEWER_LIMIT in message and _NEWER_LIMIT not in parameters:
                self.limit_name = _NEWER_LIMIT
                return _Failure(message, transient=True)
            if status in (401, 403):
                message += f"; the key is that of {KEY}" if key_from(KEY) else f"; {KEY} is not set"
            spent = status == _TOO_MANY and "insufficient_quota" in f"{error.code} {message}"
            transient = not spent and (status in _TRANSIENT or status >= 500)
            if status == _TOO_MANY:
                self.usage.refused()
            asked = _asked_pause(error.response.headers)
            return _Failure(f"{message} (status {status})", transient, asked, busy=status in _BUSY)
        except openai.APIConnectionError as error:
            cause = f"{error} {error.__cause__ or ''}".strip()
            return _Failure(_one_line(cause), transient=True, reached=False)
        except (openai.APIError, *_MALFORMED) as error:
            return _Failure(_one_line(f"not a chat completion: {error}"), transient=True)

    def _parameters(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        extra = {name: value for name, off in _NEUTRAL.items() if (value := getattr(sampling, name)) != off}
        return {
            "model": self.settings.served_model,
            "messages": [_as_sent(message) for message in request.messages],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self.limit_name: request.max_new_tokens,
            **({"tools": tools} if (tools := request.template_kwargs.get("tools")) else {}),
            **({"extra_body": extra} if extra else {}),
        }

    def _read(self, request: Request, completion: Any) -> _Answer | _Failure:
        """Return what an answer holds, and count its tokens. Raises one of `_MALFORMED` for another form."""
        choices = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if not choices or message is None:
            return _Failure("not a chat completion", transient=True)
        text, reason = message.content or "", str(choices[0].finish_reason or "none")
        if not isinstance(text, str):
            raise TypeError(f"its content is no text but a {type(text).__name__}")
        self.reached = True
        # A server that does not count gets the length that the request allowed: a budget must hold.
        prompt, made = (getattr(completion.usage, f"{part}_tokens", None) for part in ("prompt", "completion"))
        self.usage.answered(
            prompt=prompt if isinstance(prompt, int) and prompt > 0 else len(request.context_ids),
            completion=made if isinstance(made, int) and made >= 0 else request.max_new_tokens,
        )
        if getattr(message, "refusal", None):
            reason = "refusal"
        elif reason in ("stop", "length") and not text.strip():
            reason = "empty"
        return _Answer(text, reason)

    # In the thread that reads the actions
    def _action(self, request: Request, answer: _Answer) -> Action:
        """Return the ids that the policy's template gives an answer; a cut one has no stop token, an unused no ids."""
        reason = answer.reason
        if reason in ("stop", "length"):
            renderer = self.renderer
            # Without a template, a text continues the one before it, and nothing stands for the messages.
            context = request.messages if renderer.chat else request.messages[-1:]
            try:
                texts = renderer.texts(context, valid_text(answer.text), request.template_kwargs)
                ids = tuple(renderer.rows([texts])[0][1])
            except (DataError, ValueError):
                ids, reason = (), "template"
            if reason == "stop":
                return Action(request.key, ids, "stop_token", text=answer.text)
            if reason == "length" and len(ids) > len(renderer.tail_ids):
                return Action(request.key, ids[: -len(renderer.tail_ids)], "max_tokens", text=answer.text)
        self.unused[reason] += 1
        return Action(request.key, (), "context_full")


def _as_sent(message: Message) -> dict[str, Any]:
    """Return a message in OpenAI's form: the arguments of calls are JSON text."""
    sent = {key: value for key, value in message.items() if key != "train"}
    if "tool_calls" in message:
        called = [(call, call["function"]) for call in message["tool_calls"]]
        sent["tool_calls"] = [
            {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
            for call, function in called
        ]
    return sent


def _words(error: openai.APIStatusError) -> str:
    """Return what a server says, on one line."""
    body = error.body
    message = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    return _one_line(str(message or error))


def _one_line(text: str) -> str:
    """Return words of a server or of its client without the key, which some repeat, and not too long."""
    key = key_from(KEY)
    line = " ".join((text.replace(key, "***") if key else text).split())
    return line if len(line) <= _LONGEST_MESSAGE else line[: _LONGEST_MESSAGE - 3] + "..."


def _asked_pause(headers: Any) -> float:
    """Return the seconds that a server asks to wait, as a number or as a date; 0 if it does not."""
    given = headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(given) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # neither a date, nor one with a zone
        return 0.0
