"""What a vLLM server plays: another base or rank, a server that others restart, and what it refuses or is not."""

import copy
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from helpers.vllm_play import LORA, ROLLOUT, asked, play, policy_of, running_at, started, train

from bcft.config.engine import EngineSettings
from bcft.errors import FaultError, MismatchError, ServerError, UsageError
from bcft.generation.vllm import open_vllm, watchdog, weights
from bcft.policy.loading import with_adapter
from bcft.rollout import sample
from bcft.rollout.episode import Attempt
from bcft.rollout.sample import journal_path, play_journaled
from bcft.runs.clock import Clock
from bcft.types import Problem


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"), llama_tokenizer(["a b c"]), positions=128)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(weights, "_LOOK", 0.01)


def changed_base(policy):
    """Change the frozen weights of a policy."""
    for parameter in policy.model.parameters():
        if not parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return policy


SECOND = {
    "an adapter on the base": lambda model: policy_of(model, LORA),
    "the base alone": policy_of,
    "an adapter on another base": lambda model: changed_base(policy_of(model, LORA)),
    "an adapter of a higher rank": lambda model: policy_of(model, replace(LORA, lora_r=16)),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the base alone", "an adapter on the base"),
        ("an adapter on the base", "the base alone"),
        ("an adapter on the base", "an adapter on another base"),
        ("an adapter on the base", "an adapter of a higher rank"),
    ],
)
def test_a_server_is_started_anew_for_what_it_cannot_take(model, tmp_path, first, second):
    maker, server = started(tmp_path)
    for name in (first, second):
        play(maker, SECOND[name](model), asked(problems=2))
        assert maker.mismatch < 1e-5
    assert len(server.started) == 2
    adapter = second.startswith("an adapter")
    assert ("--enable-lora" in server.started[1]) == ("--lora-modules" in server.started[1]) == adapter
    if "rank" in second:
        assert dict(pairwise(server.started[1]))["--max-lora-rank"] == "16"


def test_a_policy_that_gets_an_adapter_after_its_base_was_played_is_served(model, tmp_path):
    """As in sft, which evaluates the base first."""
    maker, server = started(tmp_path)
    policy = policy_of(model)
    play(maker, policy, asked(problems=1))
    policy = with_adapter(policy, LORA, seed=0)
    for seed in (1, 2):
        train(policy, seed)
        play(maker, policy, asked(problems=1))
        assert maker.mismatch < 1e-5
    assert len(server.started) == 2


def test_a_server_that_ends_while_it_loads_an_adapter_is_started_again(model, tmp_path):
    maker, server = started(tmp_path)
    policy = policy_of(model, LORA)
    play(maker, policy, asked(problems=1))
    double = server.double

    def die(_):
        double.dead = True
        return 500, {"error": {"message": "the engine is dead"}}

    double.loaded = die
    train(policy, 2)
    play(maker, policy, asked(problems=1))
    assert len(server.started) == 2
    server.double.loaded = lambda _: (500, {"error": {"message": "no such rank"}})
    train(policy, 3)
    with pytest.raises(FaultError, match="does not load the adapter: status 500: no such rank"):
        play(maker, policy, asked(problems=1))


def test_memory_is_given_back_before_a_server_starts(model, tmp_path, monkeypatch):
    maker, server = started(tmp_path)
    events, start = [], server.start
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("freed"))
    monkeypatch.setattr(server, "start", lambda *a, **k: events.append("started") or start(*a, **k))
    play(maker, policy_of(model), asked(problems=1))
    assert events == ["freed", "started"]


def trained_and_stale(model, doubles):
    """Return a policy with full weights, a running server that takes them, and its model before it does."""
    policy, double = policy_of(model), doubles(model, developers=True)
    train(policy, 3)
    return policy, double, copy.deepcopy(double.model)


def test_a_running_server_reads_full_weights_before_a_probe_is_believed(model, doubles, tmp_path):
    double = doubles(model, developers=True)
    before = double.model
    play(running_at(double, tmp_path), policy_of(model), asked(problems=1))
    assert double.model is not before


def test_a_running_server_that_others_restart_between_rollouts_reads_full_weights_again(model, doubles, tmp_path):
    policy, double, stale = trained_and_stale(model, doubles)
    maker = running_at(double, tmp_path)
    play(maker, policy, asked(problems=1))
    double.model = stale
    play(maker, policy, asked(problems=2))
    assert maker.mismatch < 1e-5


@pytest.mark.parametrize("quickly", [True, False])
def test_a_running_server_that_others_restart_in_a_rollout_reads_full_weights_again(model, doubles, tmp_path, quickly):
    policy, double, stale = trained_and_stale(model, doubles)

    def restart(number):
        if number == 8:
            double.model = stale
            double.broken = {double.number + 1: "refused"}
            if not quickly:
                double.dead = True
                threading.Timer(0.3, setattr, (double, "dead", False)).start()

    maker = running_at(double, tmp_path, concurrency=1, vllm_server_timeout=30.0)
    assert len(play(maker, policy, asked(), during=restart)) == 24
    assert maker.mismatch < 1e-5


def test_a_running_server_without_the_endpoints_that_plays_something_else_since_is_refused(model, doubles, tmp_path):
    double, policy = doubles(model), policy_of(model)
    maker = running_at(double, tmp_path)
    play(maker, policy, asked(problems=1))
    train(double, 3)
    with pytest.raises(FaultError, match="does not play the policy"):
        play(maker, policy, asked(problems=1))


def test_attempts_that_a_server_sampled_from_another_policy_are_played_again(model, doubles, tmp_path):
    double, policy = doubles(model), policy_of(model)
    right = copy.deepcopy(double.model)
    attempts = [Attempt(Problem(f"p{n}", f"a {n}"), 1, k) for n in range(3) for k in range(4)]
    maker = running_at(double, tmp_path)
    sync = maker.weights.sync

    def sync_and_change(policy):
        sync(policy)
        train(double, 9)  # after the probe

    def round_of_attempts():
        settings = replace(ROLLOUT, make_engine=maker)
        return play_journaled(policy, attempts, settings, directory=tmp_path, clock=Clock(), label="")

    maker.weights.sync = sync_and_change
    with pytest.raises(MismatchError):
        round_of_attempts()
    assert not journal_path(tmp_path).exists()
    maker.weights.sync, double.model = sync, right
    assert len(round_of_attempts()) == len(attempts)
    assert maker.mismatch < 1e-5
    assert journal_path(tmp_path).exists()


def test_what_one_process_raises_is_raised_on_all(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "gather", lambda items: [*items, ServerError("it is gone")])
    with pytest.raises(ServerError, match="it is gone"):
        play_journaled(policy_of(model), [], ROLLOUT, directory=tmp_path, clock=Clock(), label="")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(weights, "broadcast", lambda value: (UsageError("no adapters"), value[1]))
    with pytest.raises(UsageError, match="no adapters"):
        started(tmp_path)[0].weights.sync(policy_of(model))


@pytest.mark.parametrize(("key", "words"), [("", "wants a key"), ("a-wrong-one", "refuses the key")])
def test_a_server_with_another_key_is_refused_with_the_variables_name(
    model, doubles, tmp_path, monkeypatch, key, words
):
    monkeypatch.setenv("VLLM_API_KEY", f" {key}\n")
    double = doubles(model, key="right")
    settings = EngineSettings(engine="vllm", vllm_server_base_url=double.url)
    with (
        open_vllm(settings, directory=tmp_path) as maker,
        pytest.raises(UsageError, match=f"VLLM_API_KEY: the vLLM server at {double.url} {words} .status 401") as raised,
    ):
        play(maker, policy_of(model), asked(problems=1))
    assert "a-wrong-one" not in str(raised.value)
    monkeypatch.setenv("VLLM_API_KEY", "right\n")
    with open_vllm(settings, directory=tmp_path) as maker:
        assert play(maker, policy_of(model), asked(problems=1))


@pytest.mark.parametrize("answer", ["<html>Welcome</html>", {"data": []}, {"data": ["a"]}, {"models": []}, [1]])
@pytest.mark.parametrize("paths", [("/v1/models", "/v1/completions"), ("/v1/completions",)])
def test_a_server_that_is_no_vllm_server_is_refused_in_a_line(model, doubles, tmp_path, answer, paths):
    double = doubles(model)
    usual = double.answer
    double.answer = lambda path, body: (200, answer) if path in paths else usual(path, body)
    with pytest.raises(UsageError, match=r"is no OpenAI-compatible vLLM server, .* `trl vllm-serve` is none"):
        play(running_at(double, tmp_path), policy_of(model), asked(problems=1))


def test_a_server_without_a_list_of_models_is_no_vllm_server(model, doubles, tmp_path):
    double = doubles(model)
    double.answer = lambda path, _: (200, "") if path == "/health" else (404, {"detail": "Not Found"})
    with pytest.raises(UsageError, match="is no OpenAI-compatible vLLM server"):
        play(running_at(double, tmp_path), policy_of(model, LORA), asked(problems=1))


def test_nothing_of_a_server_is_left_five_seconds_after_bcft_has_ended():
    assert watchdog.GRACE + 2 * watchdog._LOOK < 5
