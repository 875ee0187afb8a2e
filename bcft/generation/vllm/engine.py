"""The `vllm` engine: a vLLM server samples, one that this starts or one that runs already.

Prompts go as token ids, and the sampled ids come back, which are what is trained. Unlike the `hf` engine's, the noise
is the server's: a rollout that is played again has other tokens, and only what is journaled is kept. Questions that got
no answer are asked again; each request gets one action, whatever breaks meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from bcft.config.engine import EngineSettings, key_from
from bcft.errors import FaultError, ServerError
from bcft.generation.vllm.checks import Compared
from bcft.generation.vllm.client import SECRET, Broken, Client, Refused
from bcft.generation.vllm.requests import ask, grouped
from bcft.generation.vllm.server import Server, check_command
from bcft.generation.vllm.weights import Weights
from bcft.policy.loading import Policy
from bcft.runs.distributed import rank, world_size
from bcft.types import Action, Engine, Request, RolloutSettings

MOST_TRIES = 6
"""Times that one question is asked of a server that is healthy."""
FIRST_PAUSE = 0.5
"""Seconds before a question is asked again; each time twice as long."""
_LOOK = 1.0


@contextmanager
def open_vllm(
    settings: EngineSettings,
    *,
    directory: Path,
    say: Callable[[str], None] = lambda _: None,
    label: Callable[[str], str] = str,
) -> Iterator["VLLM"]:
    """Yield what makes engines of policies, with the server behind them; one that this starts ends with it.

    directory: of the run, where the server's log is and weights are saved for it; say: prints a line; label: from a
    phase to the label of its progress. Raises UsageError when there is no vLLM to start.
    """
    place, server = directory / "vllm", None
    if not settings.vllm_server_base_url:
        command = check_command(settings.command)
        starting = label("starting the vLLM server")
        server = Server(command, log=place / "server.log", timeout=settings.vllm_server_timeout, label=starting)
    key = "" if server else key_from(SECRET)
    weights = Weights(settings, place / "weights", server, key=key, say=say, label=label)
    try:
        yield VLLM(weights, concurrency=settings.concurrency)
    finally:
        weights.close()


class VLLM:
    """Makes the engine of a policy: an `EngineMaker`."""

    mismatch: float | None = None
    """How far the server's log-probabilities of tokens sampled in the last rollout were from the policy's, on average;
    None before the first."""

    def __init__(self, weights: Weights, *, concurrency: int) -> None:
        self.weights = weights
        self.concurrency = concurrency

    @contextmanager
    def __call__(self, policy: Policy, settings: RolloutSettings) -> Iterator[Engine]:  # noqa: ARG002 - an EngineMaker
        """Yield the policy's engine; afterwards compare some of its actions' log-probabilities with the policy's.

        Raises UsageError, FaultError and ServerError when the server cannot play the policy, MismatchError when it did
        not: then none of its actions count.
        """
        engine = VLLMEngine(self.weights, policy, concurrency=self.concurrency)
        if world_size() > 1:  # all processes together, whether or not each has something to sample
            engine.sync()
        yield engine
        self.mismatch = engine.compared.mismatch(policy)
        if self.mismatch is not None and rank() == 0:
            self.weights.say(f"vLLM: its log-probabilities differ by {self.mismatch:.1e} from the policy's, on average")


@dataclass(eq=False)
class _Question:
    """Requests that are asked together, how often they were, and when they may be again."""

    requests: list[Request]
    tries: int = 0
    not_before: float = 0.0


class VLLMEngine:
    """Sample a policy with a server, which gets its weights before the first request. concurrency: most in flight."""

    def __init__(self, weights: Weights, policy: Policy, *, concurrency: int) -> None:
        self.weights = weights
        self.policy = policy
        self.concurrency = concurrency
        self.compared = Compared()
        self.synced = False

    def sync(self) -> None:
        """Let the server play the policy, once: a rollout that has nothing left to sample starts no server."""
        if not self.synced:
            self.weights.sync(self.policy)
            self.synced = True

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in the order they finish.

        Raises FaultError when the server refuses a question, ServerError when it is gone too often, ValueError when two
        requests share a key.
        """
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests have the same key")
        if not requests:
            return
        self.sync()
        full = [r for r in requests if len(r.context_ids) >= self.weights.context or r.max_new_tokens < 1]
        yield from (Action(r.key, (), "context_full") for r in full)
        skip = {r.key for r in full}
        waiting = deque(_Question(group) for group in grouped([r for r in requests if r.key not in skip]))
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="bcft-vllm")
        client = self.weights.client.fresh()
        running: dict[Future[list[Action]], tuple[_Question, int]] = {}
        try:
            while waiting or running:
                if client.url != self.weights.client.url:
                    client = self.weights.client.fresh()
                self._send(pool, client, waiting, running)
                if not running:
                    sleep(max(0.0, min(question.not_before for question in waiting) - monotonic()))
                for future in wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED).done:
                    question, starts = running.pop(future)
                    answered = self._answered(future, question, starts)
                    if answered is None:
                        waiting.append(question)
                        continue
                    for request, action in zip(question.requests, answered, strict=True):
                        self.compared.offer(request, action)
                        yield action
        finally:
            client.close()  # the server drops what nobody waits for
            pool.shutdown(wait=False, cancel_futures=True)

    def _send(
        self,
        pool: ThreadPoolExecutor,
        client: Client,
        waiting: deque[_Question],
        running: dict[Future[list[Action]], tuple[_Question, int]],
    ) -> None:
        """Ask the questions that may be asked now, as many as there is room for."""
        now, weights = monotonic(), self.weights
        for _ in range(len(waiting)):
            if len(running) >= self.concurrency:
                return
            question = waiting.popleft()
            if question.not_before > now:
                waiting.append(question)
                continue
            future = pool.submit(ask, client, weights.model, question.requests, context=weights.context)
            running[future] = question, weights.starts

    def _answered(self, future: Future[list[Action]], question: _Question, starts: int) -> list[Action] | None:
        """Return the actions of a question; None if it is to be asked again, of a server that answers.

        starts: those of the server when the question was asked. A question that broke with a server which has been
        replaced since says nothing about the one that is there.
        """
        try:
            return future.result()
        except Refused as refused:
            if refused.status != 404:
                raise FaultError(f"the vLLM server refused a request: {refused}") from refused
            if starts == self.weights.starts:
                self.weights.restore_adapter(self.policy)
        except Broken as broken:
            if starts == self.weights.starts and not self.weights.mend(broken, self.policy):
                question.tries += 1
                if question.tries >= MOST_TRIES:
                    raise ServerError(
                        f"the vLLM server is healthy, and has not answered a request {question.tries} times: {broken}"
                    ) from broken
                question.not_before = monotonic() + FIRST_PAUSE * 2 ** (question.tries - 1)
        return None
