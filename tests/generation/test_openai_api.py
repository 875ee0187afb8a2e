"""The `openai` engine against a real server: what is sent, what its answers become, and what it does about faults."""

import json
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from threading import Barrier

import pytest
from helpers import chat_server as served
from helpers.chat_server import chat_server
from helpers.tiny import llama_tokenizer
from helpers.tools import Calculator
from helpers.trained_tokenizers import renderer_of

import bcft.generation
from bcft.config.engine import EngineSettings
from bcft.environments.base import environment_factory
from bcft.environments.single_turn import SingleTurn
from bcft.errors import BcftError, ServerError, UsageError
from bcft.generation import make_engine, open_engine, openai_api
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy
from bcft.types import Request, RolloutSettings, Sampling

TEXTS = ["it is 4 2", "say a number"]


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Return the seconds that were waited, of which none passes."""
    waited = []
    monkeypatch.setattr(openai_api, "pause", lambda seconds, _: waited.append(seconds))
    return waited


@cache
def a_renderer(*, chat=True):
    return Renderer(llama_tokenizer(TEXTS, vocabulary=400, chat=chat))


def a_request(text="2", sample=0, *, renderer=None, new=9, sampling=Sampling(), **fields):  # noqa: B008
    made = renderer or a_renderer()
    context = tuple(made.prompts([text])[0])
    said = ({"role": "user", "content": text},)
    return Request((0, "rollout", 1, text, sample, 0), context, sampling, made.stop_ids, new, messages=said, **fields)


@contextmanager
def an_engine(server, directory, *, renderer=None, say=lambda _: None, **keys):
    """Open the engine of a command, as `play_attempts` does."""
    settings = EngineSettings(engine="openai", base_url=server.url, served_model="teacher", **keys)
    policy = Policy(None, renderer or a_renderer(), None, served="teacher")
    with open_engine(settings, directory=directory, say=say) as maker:
        rollouts = RolloutSettings(SingleTurn, Sampling(), 9, 1, 1.0, 0, make_engine=maker)
        with make_engine(policy, rollouts) as engine:
            yield engine


def ask(server, directory, requests, **keys):
    """Return the action for each request's text and sample."""
    with an_engine(server, directory, **keys) as engine:
        return {(action.key[3], action.key[4]): action for action in engine.generate(requests)}


def failed(server, directory, requests, **keys):
    """Return the texts that were answered before the engine failed, and the one line of its failure."""
    answered = []
    with pytest.raises(BcftError) as caught, an_engine(server, directory, **keys) as engine:
        answered.extend(action.key[3] for action in engine.generate(requests))
    assert len(str(caught.value).splitlines()) == 1
    return answered, caught.value


def test_an_environment_with_tools_is_refused(tmp_path):
    settings = EngineSettings(engine="openai", base_url="http://127.0.0.1:9", served_model="teacher")
    made = environment_factory(Calculator, {})
    rollouts = RolloutSettings(made, Sampling(), 9, 1, 1.0, 0)
    with (
        pytest.raises(UsageError, match="engine: openai reads no tool calls"),
        open_engine(settings, directory=tmp_path, say=lambda _: None) as maker,
        make_engine(Policy(None, a_renderer(), None, served="teacher"), replace(rollouts, make_engine=maker)),
    ):
        pass


# What is sent


def test_every_parameter_is_sent_and_those_that_openai_lacks_only_when_they_are_on(tmp_path):
    warm = Sampling(0.7, 20, 0.9, 0.1, 1.2)
    with chat_server() as server:
        ask(server, tmp_path, [a_request("2"), a_request("3", sampling=warm), a_request("4", sampling=Sampling(0.0))])
        plain, warmed, greedy = sorted(server.requests, key=lambda body: body["messages"][0]["content"])
    assert plain == {
        "model": "teacher", "messages": [{"role": "user", "content": "2"}], "temperature": 1.0, "top_p": 1.0,
        "max_tokens": 9,
    }  # fmt: skip
    changed = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}
    assert warmed == plain | changed | {"messages": [{"role": "user", "content": "3"}]}
    assert greedy["temperature"] == 0.0


def test_tools_and_calls_are_sent_in_openais_form_and_the_mark_of_a_message_is_not(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": "é"}}}
    talk = (
        {"role": "assistant", "content": "", "tool_calls": [call], "train": True},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    )
    asked = replace(a_request(), messages=talk, template_kwargs={"tools": tools})
    with chat_server() as server:
        ask(server, tmp_path, [asked])
        (body,) = server.requests
    sent = call | {"function": {"name": "add", "arguments": '{"a": "é"}'}}
    assert body["tools"] == tools
    assert body["messages"] == [{"role": "assistant", "content": "", "tool_calls": [sent]}, talk[1]]


@pytest.mark.parametrize(("key", "sent"), [("a-secret-of-mine", "Bearer a-secret-of-mine"), (None, "Bearer none")])
def test_the_key_comes_from_the_environment_alone(tmp_path, monkeypatch, key, sent):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with chat_server() as server:
        ask(server, tmp_path, [a_request()])
        assert set(server.keys) == {sent}


@pytest.mark.parametrize("key", ["a-secret\nof-mine", "a-s\u00e9cret-of-mine", "a-secret\x7fof-mine"])
def test_a_key_that_no_header_can_hold_is_refused_unsent_and_unshown(tmp_path, monkeypatch, capfd, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with chat_server() as server:
        answered, error = failed(server, tmp_path, [a_request()])
        assert (answered, server.requests) == ([], [])
    assert isinstance(error, UsageError)
    assert str(error).startswith("OPENAI_API_KEY: ")
    shown = str(error) + "".join(capfd.readouterr())
    assert not any(part in shown for part in (key, "cret", "of-mine"))


def test_a_server_that_wants_the_newer_name_of_the_limit_gets_it(tmp_path):
    with chat_server(fault=lambda number, _: "newer" if "max_tokens" in server.requests[number - 1] else "") as server:
        assert len(ask(server, tmp_path, [a_request(str(i)) for i in range(6)], concurrency=2)) == 6
        assert server.requests[-1]["max_completion_tokens"] == 9
        assert sum("max_tokens" in body for body in server.requests) <= 2


def test_as_many_requests_are_in_flight_as_the_recipe_says_and_no_more(tmp_path):
    barrier = Barrier(4, timeout=60)
    in_flight, most = set(), []

    def reply(prompt):
        in_flight.add(prompt)
        most.append(len(in_flight))
        barrier.wait()  # four must be here before any is answered
        in_flight.discard(prompt)
        barrier.wait()
        return prompt

    with chat_server(reply) as server:
        assert len(ask(server, tmp_path, [a_request(str(i)) for i in range(12)], concurrency=4)) == 12
    assert max(most) == 4


# What answers become


@pytest.mark.parametrize(
    ("name", "kind"),
    [("plain", ""), ("smollm2", "bytes"), ("llama2", "legacy"), ("qwen3", "bytes"), ("mistral_v03", "first")],
)
def test_a_text_becomes_the_ids_that_its_row_has_as_a_demonstration(tmp_path, name, kind):
    renderer = renderer_of(name, kind) if kind else a_renderer(chat=False)
    requests = [a_request(renderer=renderer)]
    with chat_server(lambda _: "it is 4 2") as server:
        (action,) = ask(server, tmp_path, requests, renderer=renderer).values()
    ((prompt, ids),) = renderer.rows([renderer.texts("2", "it is 4 2")])
    assert (tuple(prompt), tuple(ids)) == (requests[0].context_ids, action.ids)
    assert action.stop == "stop_token"
    assert action.ids[-1] in renderer.stop_ids
    assert action.text == "it is 4 2"


@pytest.mark.parametrize(
    ("answer", "text", "stop", "printed"),
    [
        ("it is 4", "it is 4", "stop_token", ""),
        (("it is", "length"), "it is", "max_tokens", ""),
        (("it is <|eot_id|>", "stop"), "it is <|eot_id|>", "stop_token", ""),
        (("it", "content_filter"), "", "context_full", "1 filtered by the server"),
        (("", "tool_calls"), "", "context_full", "1 calls of tools"),
        (("I cannot", "refusal"), "", "context_full", "1 refused by the model"),
        (("", "stop"), "", "context_full", "1 without text"),
        (("\n", "length"), "", "context_full", "1 without text"),
        ((None, "stop"), "", "context_full", "1 without text"),
        (("it is", "eos"), "", "context_full", "1 eos"),
        (("it is \ud800", "stop"), "", "context_full", "1 not renderable by the policy's template"),
    ],
)
def test_what_is_no_whole_answer_is_truncated_and_counted(tmp_path, answer, text, stop, printed):
    lines = []
    with chat_server(lambda _: answer) as server:
        (action,) = ask(server, tmp_path, [a_request()], say=lines.append).values()
    renderer = a_renderer()
    assert (action.text, renderer.decode(action.ids), action.stop) == (text, text, stop)
    assert bool(action.ids and action.ids[-1] in renderer.stop_ids) == (stop == "stop_token")
    assert lines[-1].endswith(f"never trained: {printed}" if printed else "of completions")


@pytest.mark.parametrize(("fault", "printed"), [("long", "longer than the server's context"), ("filter", "filtered")])
def test_a_prompt_that_the_server_cannot_take_costs_only_its_own_attempt(tmp_path, fault, printed):
    lines = []
    with chat_server(fault=lambda _, prompt: fault if prompt == "3" else "") as server:
        actions = ask(server, tmp_path, [a_request("2"), a_request("3"), a_request("4")], say=lines.append)
    assert {text: action.stop for (text, _), action in actions.items()} == {
        "2": "stop_token", "3": "context_full", "4": "stop_token",
    }  # fmt: skip
    assert f"1 {printed}" in lines[-1]


# Faults


@pytest.mark.parametrize("fault", ["429", "429 date", "500", "503", "cut", "cut in the middle", "html", "empty"])
def test_a_request_is_repeated_until_it_is_answered_and_answered_once(tmp_path, fault):
    tried = {}

    def first_two(_, prompt):
        tried[prompt] = tried.get(prompt, 0) + 1
        return fault if tried[prompt] < 3 else ""

    requests = [a_request(str(i)) for i in range(9)]
    with chat_server(fault=first_two) as server:
        actions = ask(server, tmp_path, requests, concurrency=3)
        assert {text for text, _ in actions} == {str(i) for i in range(9)}
        assert set(server.answered.values()) == {1}
    assert json.loads((tmp_path / "usage.json").read_text())["requests"] == 27


def test_pauses_double_and_are_at_least_as_long_as_the_server_asks(tmp_path, pauses):
    script = iter(["500", "500", "429 later", "500", "429", "cut"])
    with chat_server(fault=lambda *_: next(script, "")) as server:
        ask(server, tmp_path, [a_request()])
    bounds = [(0.5, 1), (1, 2), (7, 9), (4, 8), (8, 16), (16, 32)]
    assert all(least <= waited <= most for waited, (least, most) in zip(pauses, bounds, strict=True))


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_busy_server_that_answers_others_is_waited_for(tmp_path, fault):
    """One request is refused more often than a server that is gone is asked, and another is answered each time."""
    refusals = count(1)

    def unlucky(_, prompt):
        if prompt != "0" or (number := next(refusals)) > 3 * openai_api.MOST_TRIES:
            return ""
        while server.answered.total() < number:
            time.sleep(0.001)
        return fault

    with chat_server(fault=unlucky) as server:
        assert len(ask(server, tmp_path, [a_request(str(i)) for i in range(40)], concurrency=2)) == 40
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("fault", ["429", "503"])
def test_a_busy_server_that_answers_nothing_is_given_up(tmp_path, fault):
    with chat_server(fault=lambda *_: fault) as server:
        _, error = failed(server, tmp_path, [a_request()])
        assert len(server.requests) == openai_api.MOST_TRIES
    assert isinstance(error, ServerError)
    assert "resume with the same command; answered requests are not repeated" in str(error)


MESSAGE = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    "answer",
    [
        [1], "4", 4, {}, {"choices": 5}, {"choices": {"0": MESSAGE}}, {"choices": "4"}, {"choices": [4]},
        {"choices": [{"message": "4"}]}, {"choices": [{"message": [MESSAGE]}]},
        {"choices": [{"message": {"content": [{"type": "text", "text": "4"}]}, "finish_reason": "stop"}]},
    ],
)  # fmt: skip
def test_what_has_another_form_than_a_chat_completion_is_told_in_one_line(tmp_path, monkeypatch, capfd, answer):
    monkeypatch.setattr(served._Handler, "_answer", lambda *_: answer)
    with chat_server() as server:
        answered, error = failed(server, tmp_path, [a_request()])
    assert (answered, type(error)) == ([], ServerError)
    assert "not a chat completion" in str(error)
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("usage", [None, 5, {"prompt_tokens": "10", "completion_tokens": -1}, {"prompt_tokens": 1e999}])
def test_tokens_that_a_server_does_not_count_are_those_that_the_request_allows(tmp_path, monkeypatch, usage):
    answer = {"choices": [{"message": MESSAGE, "finish_reason": "stop"}], "usage": usage}
    monkeypatch.setattr(served._Handler, "_answer", lambda *_: answer)
    request = a_request()
    with chat_server() as server:
        ask(server, tmp_path, [request])
    counted = json.loads((tmp_path / "usage.json").read_text())
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (len(request.context_ids), 9)


def test_a_server_that_does_not_come_back_ends_the_engine_after_what_is_in_flight(tmp_path):
    with chat_server(fault=lambda _, prompt: "500" if prompt == "3" else "") as server:
        answered, error = failed(server, tmp_path, [a_request(str(i)) for i in range(2, 6)], concurrency=4)
        assert sum(body["messages"][0]["content"] == "3" for body in server.requests) == openai_api.MOST_TRIES
    assert sorted(answered) == ["2", "4", "5"]
    assert isinstance(error, ServerError)
    assert error.exit_code == 8
    assert "The server had an error (status 500)" in str(error)


def test_a_server_that_was_never_there_is_told_after_fewer_tries(tmp_path, pauses):
    with chat_server() as server:
        pass
    _, error = failed(server, tmp_path, [a_request()])
    assert f"asked {openai_api.FIRST_TRIES} times: Connection error." in str(error)
    assert server.url in str(error)
    assert len(pauses) == openai_api.FIRST_TRIES - 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("401", "Incorrect API key provided: ***; the key is that of OPENAI_API_KEY (status 401)"),
        ("404", "The model `other` does not exist. (status 404)"),
        ("400", "temperature must be at most 1 (status 400)"),
        ("quota", "You exceeded your current quota (status 429)"),
    ],
)
def test_a_refusal_that_would_be_repeated_is_not_and_shows_no_key(tmp_path, monkeypatch, fault, words):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-of-mine")
    with chat_server(fault=lambda *_: fault) as server:
        answered, error = failed(server, tmp_path, [a_request(str(i)) for i in range(9)], concurrency=1)
        assert (answered, len(server.requests)) == ([], 1)
    assert isinstance(error, UsageError)
    assert str(error) == f"engine: teacher at {server.url} refuses the request: {words}"
    assert error.__suppress_context__ or error.__context__ is None


def test_a_key_that_is_cut_off_in_a_long_answer_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-of-mine")
    for before in range(270, 300, 5):
        monkeypatch.setitem(served.STATUS, "401", (401, {}, "x" * before + "{key}" + "y" * 99, "invalid_api_key"))
        with chat_server(fault=lambda *_: "401") as server:
            _, error = failed(server, tmp_path, [a_request()])
        assert "a-s" not in str(error)


# Budgets


def test_a_budget_of_requests_is_held_across_starts_and_repeated_ones_count(tmp_path):
    requests = [a_request(str(i)) for i in range(9)]
    with chat_server(fault=lambda number, _: "500" if number <= 2 else "") as server:
        answered, error = failed(server, tmp_path, requests, concurrency=2, max_requests=5)
        assert (len(answered), len(server.requests)) == (3, 5)
        assert str(error).startswith("max_requests: 5 of 5 requests are used: raise it")
        left = [request for request in requests if request.key[3] not in answered]
        assert failed(server, tmp_path, left, max_requests=5)[0] == []
        assert len(ask(server, tmp_path, left, max_requests=11)) == 6
        assert len(server.requests) == 11


def test_requests_that_a_busy_server_refuses_cost_no_budget(tmp_path):
    lines = []
    with chat_server(fault=lambda number, _: "429" if number <= 5 else "") as server:
        requests = [a_request(str(i)) for i in range(3)]
        assert len(ask(server, tmp_path, requests, concurrency=1, max_requests=3, say=lines.append)) == 3
        assert len(server.requests) == 8
    assert lines[-1].startswith("engine: 8 requests (5 refused as too many), ")


def test_a_budget_of_tokens_sends_nothing_beyond_it_and_loses_nothing_in_flight(tmp_path):
    requests = [a_request(str(i)) for i in range(9)]  # of 10 and 3 tokens each
    with chat_server() as server:
        answered, error = failed(server, tmp_path, requests, concurrency=1, max_total_tokens=30)
        assert (len(answered), len(server.requests)) == (3, 3)
        assert str(error).startswith("max_total_tokens: 39 of 30 tokens are used: raise it")


def test_a_command_that_is_complete_leaves_its_total_and_the_next_counts_from_nothing(tmp_path):
    with chat_server() as server:
        for _ in range(2):
            ask(server, tmp_path, [a_request("2"), a_request("3")], max_requests=2)
    assert json.loads((tmp_path / "usage.json").read_text()) == {
        "requests": 2, "refused": 0, "prompt_tokens": 20, "completion_tokens": 6,
    }  # fmt: skip
    assert not (tmp_path / "usage.jsonl").exists()


def test_a_count_that_a_kill_left_incomplete_is_dropped(tmp_path):
    line = '{"requests": 1, "prompt_tokens": 0, "completion_tokens": 0}\n'
    (tmp_path / "usage.jsonl").write_text(line * 2 + line[:9])
    with chat_server() as server:
        answered, _ = failed(server, tmp_path, [a_request("2"), a_request("3")], concurrency=1, max_requests=3)
    assert len(answered) == 1


# What cannot be


def test_without_its_client_the_engine_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(bcft.generation.importlib.util, "find_spec", lambda _: None)
    with chat_server() as server, pytest.raises(UsageError, match=r"pip install 'bcft\[openai\]'"):
        ask(server, tmp_path, [a_request()])


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(openai_api, "world_size", lambda: 2)
    with chat_server() as server, pytest.raises(UsageError, match="one process"):
        ask(server, tmp_path, [a_request()])
