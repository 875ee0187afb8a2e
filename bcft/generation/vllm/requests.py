"""Requests as vLLM's completions API takes them, and its answers as actions: ids in, ids out, no text between.

Requests with equal contexts and equal limits are one question with `n` samples, which share their prefill. The noise is
the server's own. A seed for each request would kill vLLM's engine on a CPU as soon as a prompt is read in chunks ("CPU
Generator does not use offset"), and would not promise the same tokens in another batch on a GPU either.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bcft.errors import FaultError, UsageError
from bcft.generation.vllm.client import Broken, Client, Refused
from bcft.types import Action, Request, Stop

MOST_SAMPLES = 16
"""Samples of one question: all of them are sampled again when its connection breaks."""


def grouped(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Yield the requests that are one question together: the same but for their key, and not greedy."""
    alike: dict[Any, list[Request]] = {}
    for request in requests:
        greedy = request.sampling.temperature == 0  # of which vLLM samples one at a time
        what = (request.context_ids, request.sampling, request.stop_ids, request.max_new_tokens)
        alike.setdefault((*what, request.key if greedy else ()), []).append(request)
    for group in alike.values():
        for start in range(0, len(group), MOST_SAMPLES):
            yield group[start : start + MOST_SAMPLES]


def ask(client: Client, model: str, group: Sequence[Request], *, context: int) -> list[Action]:
    """Return the server's actions for requests that are one question. context: tokens that the server reads at most.

    Raises Broken and Refused, FaultError for an answer that lacks what vLLM gives, UsageError for one of another API.
    """
    request = group[0]
    limit = min(request.max_new_tokens, context - len(request.context_ids))
    choices = completed(client, body_of(request, model, n=len(group), limit=limit))
    if len(choices) != len(group):
        raise Broken(f"{len(choices)} answers to {len(group)} requests")
    ordered = sorted(choices, key=lambda choice: int(choice["index"]))
    return [_action(asked, choice) for asked, choice in zip(group, ordered, strict=True)]


def completed(client: Client, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the choices that a server answers a question with. Raises as `ask`."""
    answer = client.post("/v1/completions", body)
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(c, Mapping) and "index" in c for c in choices):
        raise UsageError(_no_vllm(client))
    return choices


def served_model(client: Client) -> tuple[str, int | None]:
    """Return the name by which a server knows its model, and how many tokens that reads, where it says so.

    Raises Broken, and UsageError for what is no vLLM server.
    """
    try:
        cards = client.get("/v1/models")["data"]
        card: dict[str, Any] = next(card for card in cards if not card.get("parent"))
        length = card.get("max_model_len")
        return str(card["id"]), int(length) if length else None
    except (Refused, KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UsageError(_no_vllm(client)) from error


def body_of(request: Request, model: str, *, n: int, limit: int) -> dict[str, Any]:
    """Return a question with every parameter explicit: a server has defaults of its own, some from the model's files.

    Only the request's stop tokens end an action, as in the `hf` engine.
    """
    sampling = request.sampling
    return {
        "model": model,
        "prompt": list(request.context_ids),
        "n": n,
        "max_tokens": limit,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "stream": False,
    }


def _no_vllm(client: Client) -> str:
    return (
        f"vllm_server_base_url: what answers at {client.url} is no OpenAI-compatible vLLM server, such as `vllm serve` "
        f"starts; that of `trl vllm-serve` is none"
    )


def _action(request: Request, choice: Any) -> Action:
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):  # `abort` and `error`: the engine dropped it
        raise Broken(f"the server ended an answer with {finish!r}")
    ids, read = choice.get("token_ids"), choice.get("prompt_token_ids")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or ()
    if not ids or len(logprobs) != len(ids):
        raise FaultError(
            "the vLLM server's answers lack token ids or their log-probabilities: use a newer "
            "vLLM, which knows return_token_ids"
        )
    if read is not None and tuple(read) != request.context_ids:
        raise FaultError("the vLLM server has read other token ids than it was sent: it must not change prompts")
    limit: Stop = "max_tokens" if len(ids) == request.max_new_tokens else "context_full"
    stop: Stop = "stop_token" if ids[-1] in request.stop_ids else limit
    if finish == "stop" and stop != "stop_token":
        raise FaultError(f"the vLLM server stopped at token {ids[-1]}, which is none of {list(request.stop_ids)}")
    return Action(request.key, tuple(ids), stop, tuple(map(float, logprobs)))
