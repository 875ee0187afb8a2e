"""The `vllm` engine against a small server that answers as vLLM does: one action for each request, whatever breaks."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from helpers.vllm_double import recorded
from helpers.vllm_play import LORA, ROLLOUT, STOP, asked, play, policy_of, questions, running_at, started, train

from bcft.config.engine import EngineSettings
from bcft.errors import FaultError, ServerError, UsageError
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.generation.vllm import VLLM, engine, open_vllm, weights
from bcft.generation.vllm.client import Client
from bcft.generation.vllm.weights import Weights
from bcft.types import Request, Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"), llama_tokenizer(["a b c"]), positions=128)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(weights, "_LOOK", 0.01)


def own_logprobs(policy, request, ids):
    with torch.no_grad(), sampling_mode(policy.model):
        logits = policy.model(torch.tensor([[*request.context_ids, *ids]])).logits[0, len(request.context_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def test_every_request_gets_one_action_with_its_ids_its_stop_and_raw_log_probabilities(model, doubles, tmp_path):
    policy, requests = policy_of(model), asked(sampling=Sampling(temperature=0.7))
    maker = running_at(doubles(model), tmp_path)
    actions = play(maker, policy, requests)
    assert sorted(action.key for action in actions) == sorted(request.key for request in requests)
    by_key = {request.key: request for request in requests}
    for action in actions:
        assert action.stop == ("stop_token" if action.ids[-1] in STOP else "max_tokens")
        assert len(action.ids) == 9 or action.stop == "stop_token"
        assert not set(action.ids[:-1]) & set(STOP)
        assert action.logprobs == pytest.approx(own_logprobs(policy, by_key[action.key], action.ids), abs=1e-4)
    assert {action.stop for action in actions} == {"stop_token", "max_tokens"}
    assert maker.mismatch < 1e-5


def test_greedy_actions_are_those_of_the_hf_engine(model, doubles, tmp_path):
    policy, requests = policy_of(model), asked(samples=2, sampling=Sampling(temperature=0.0))
    actions = play(running_at(doubles(model), tmp_path), policy, requests)
    with sampling_mode(policy.model):
        own = list(HFEngine(policy.model, pad_id=0).generate(requests))
    assert {a.key: (a.ids, a.stop) for a in actions} == {a.key: (a.ids, a.stop) for a in own}


def test_samples_of_a_context_are_one_question_with_every_parameter_explicit(model, doubles, tmp_path):
    double = doubles(model)
    sampling = Sampling(temperature=0.5, top_k=0, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    play(running_at(double, tmp_path), policy_of(model), asked(problems=2, samples=20, sampling=sampling))
    bodies = questions(double)
    assert sorted((len(body["prompt"]), body["n"]) for body in bodies) == [(10, 4), (10, 16), (11, 4), (11, 16)]
    assert {key: value for key, value in bodies[0].items() if key not in ("prompt", "n")} == {
        "model": "bcft", "max_tokens": 9, "temperature": 0.5, "top_k": -1, "top_p": 0.9, "min_p": 0.01,
        "repetition_penalty": 1.1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": list(STOP),
        "ignore_eos": True, "add_special_tokens": False, "skip_special_tokens": False, "logprobs": 0,
        "return_token_ids": True, "stream": False,
    }  # fmt: skip


def test_a_context_that_is_full_or_nearly_so_is_not_asked_beyond_it(model, doubles, tmp_path):
    double = doubles(model, context=64)
    requests = [Request((0, length), tuple([10] * length), Sampling(), (), 9) for length in (63, 64, 90, 61, 50)]
    actions = {a.key[1]: a for a in play(running_at(double, tmp_path), policy_of(model), requests)}
    assert {length: (len(a.ids), a.stop) for length, a in actions.items()} == {
        63: (1, "context_full"), 64: (0, "context_full"), 90: (0, "context_full"), 61: (3, "context_full"),
        50: (9, "max_tokens"),
    }  # fmt: skip


@pytest.mark.parametrize("at", [(5, 6, 9, 14), (1, 3, 8, 9, 11)])
@pytest.mark.parametrize("how", ["cut", "refused", "500", "503", "429"])
def test_questions_whose_answers_break_are_asked_again_and_nothing_is_lost_or_doubled(
    model, doubles, tmp_path, how, at
):
    double = doubles(model)
    double.broken = dict.fromkeys(at, how)  # the first three are the checks'
    requests = asked(problems=12, samples=2)
    actions = play(running_at(double, tmp_path, concurrency=3), policy_of(model), requests)
    assert Counter(a.key for a in actions) == Counter(r.key for r in requests)
    assert not double.broken


def test_a_question_that_breaks_each_time_is_given_up_in_a_line(model, doubles, tmp_path):
    double = doubles(model)
    double.broken = dict.fromkeys(range(4, 200), "500")
    with pytest.raises(ServerError, match=r"is healthy, and has not answered a request 6 times: status 500: busy"):
        play(running_at(double, tmp_path), policy_of(model), asked(problems=1, samples=1))


def test_a_refused_question_ends_the_run_with_the_servers_words(model, doubles, tmp_path):
    double = doubles(model)
    double.broken = {4: "422"}
    with pytest.raises(FaultError, match="refused a request: busy"):
        play(running_at(double, tmp_path), policy_of(model), asked(problems=1))


def test_a_server_that_ends_twice_in_a_round_is_started_again_and_only_the_rest_is_asked_again(model, tmp_path, capsys):
    maker, server = started(tmp_path, concurrency=2)

    def kill(number):
        if number in (8, 16):
            server.double.close()

    requests = asked(problems=8)
    actions = play(maker, policy_of(model), requests, during=kill)
    assert Counter(a.key for a in actions) == Counter(r.key for r in requests)
    assert len(server.started) == 3
    sent = [len(questions(double)) for double in server.doubles]
    assert sum(sent) <= 8 + 2 * 2  # each kill loses at most what was in flight
    assert capsys.readouterr().out.count("it is started again") == 2


def test_an_engine_that_dies_inside_its_server_is_replaced(model, tmp_path):
    maker, server = started(tmp_path)
    policy = policy_of(model)
    play(maker, policy, asked(problems=1))
    server.double.broken = {server.double.number + 2: "dies"}
    requests = asked()
    actions = play(maker, policy, requests)
    assert Counter(a.key for a in actions) == Counter(r.key for r in requests)
    assert len(server.started) == 2


def test_a_server_that_ends_again_and_again_is_given_up_with_its_logs_reason(model, tmp_path):
    maker, server = started(tmp_path)
    with pytest.raises(
        ServerError, match=r"has ended 4 times in a rollout: MemoryError: killed by the system: see .*log"
    ):
        play(maker, policy_of(model), asked(problems=20), during=lambda _: server.double.close())
    assert len(server.started) == 4


def test_full_weights_that_have_changed_are_saved_and_the_server_is_started_on_them(model, tmp_path):
    maker, server = started(tmp_path)
    policy = policy_of(model)
    for seed in (0, 1, 2):
        if seed:
            train(policy, seed)
        for _ in range(2):  # weights that the server plays are not saved again
            play(maker, policy, asked(problems=1))
        assert len(server.started) == seed + 1
        assert maker.mismatch < 1e-5
    places = [dict(pairwise(a))["--model"] for a in server.started]
    assert len(set(places)) == 3
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [places[-1].rpartition("/")[2]]
    maker.weights.close()
    assert not (tmp_path / "weights").exists()
    assert server.double is None


def test_each_rounds_adapter_is_loaded_under_a_new_name_and_plays_that_round(model, tmp_path):
    """It fails with the adapter of the round before: its log-probabilities are not the policy's."""
    maker, server = started(tmp_path)
    policy = policy_of(model, LORA)
    names = []
    for seed in (2, 3, 4):
        play(maker, policy, asked(problems=2))
        double = server.double
        assert maker.mismatch < 1e-5
        names.append(questions(double)[-1]["model"])
        assert list(double.adapters) == [names[-1]]  # the one before is unloaded
        train(policy, seed)
    assert len(set(names)) == 3
    assert len(server.started) == 1
    arguments = dict(pairwise(server.started[0]))
    assert arguments["--max-lora-rank"] == "8"
    play(maker, policy, asked(problems=2))
    double.close()
    play(maker, policy, asked(problems=2))  # and after a restart
    assert len(server.started) == 2
    assert maker.mismatch < 1e-5


def test_an_adapter_on_a_base_in_four_bits_is_served_on_the_numbers_that_it_multiplies_with(model, tmp_path):
    maker, server = started(tmp_path)
    play(maker, policy_of(model, replace(LORA, load_in_4bit=True)), asked(problems=2))
    assert maker.mismatch < 1e-4
    assert server.started


def test_an_adapter_of_the_round_before_is_found_out(model, tmp_path):
    maker, server = started(tmp_path)
    policy = policy_of(model, LORA)
    play(maker, policy, asked(problems=1))
    stale = server.double.adapters.copy()
    load = server.double.load

    def load_the_old_one(name, _):
        load(name, next(iter(stale.values())))

    server.double.load = load_the_old_one
    train(policy, 5)
    with pytest.raises(FaultError, match="does not play the policy"):
        play(maker, policy, asked(problems=1))


def test_a_mismatch_of_a_rollout_in_fp32_is_refused(model, doubles, tmp_path):
    double, policy = doubles(model), policy_of(model)
    maker = running_at(double, tmp_path)
    engine = maker(policy, ROLLOUT)
    actions = engine.__enter__().generate(asked(problems=9))
    next(actions)
    train(double, 9)  # after the probe
    assert list(actions)
    with pytest.raises(FaultError, match=r"log-probabilities differ by .* in fp32 may by 0.01"):
        engine.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_dora": True}, "use_dora"), ({"lora_modules_to_save": ("lm_head",)}, "lora_modules_to_save")],
)
def test_adapters_that_vllm_does_not_load_are_refused_by_name_before_a_server_starts(model, tmp_path, change, named):
    maker, server = started(tmp_path)
    with pytest.raises(UsageError, match=f"{named}: vLLM"):
        play(maker, policy_of(model, replace(LORA, **change)), asked(problems=1))
    assert not server.started


def test_a_server_of_another_vocabulary_is_refused(model, doubles, tmp_path):
    other = save_llama(tmp_path / "other", llama_tokenizer(["d e f g h i j k l m n o p " * 9], vocabulary=300))
    with pytest.raises(FaultError, match="has another vocabulary than the policy"):
        play(running_at(doubles(other), tmp_path), policy_of(model), asked(problems=1))


def test_a_running_server_with_other_full_weights_is_refused_unless_it_takes_new_ones(model, doubles, tmp_path):
    policy = policy_of(model)
    train(policy, 3)
    with pytest.raises(
        UsageError,
        match=r"vllm_server_base_url: that server plays other weights and takes no new ones: .*VLLM_SERVER_DEV_MODE",
    ):
        play(running_at(doubles(model), tmp_path), policy, asked(problems=1))
    maker = running_at(doubles(model, developers=True), tmp_path)
    for seed in (4, 5):
        play(maker, policy, asked(problems=1))
        assert maker.mismatch < 1e-5
        train(policy, seed)


def test_a_running_server_gets_adapters_loses_them_gets_them_again_and_is_left_running(model, doubles, tmp_path):
    double, policy = doubles(model, name="served"), policy_of(model, LORA)
    settings = EngineSettings(engine="vllm", vllm_server_base_url=f"{double.url}/v1")
    with open_vllm(settings, directory=tmp_path) as maker:
        requests = asked(problems=9)

        def forget(number):
            if number == 8:
                with double.lock:
                    double.adapters.clear()

        actions = play(maker, policy, requests, during=forget)
        assert Counter(a.key for a in actions) == Counter(r.key for r in requests)
        assert list(double.adapters)
    assert not double.adapters
    assert not double.dead


def test_a_running_server_that_takes_no_adapters_is_refused(model, doubles, tmp_path):
    with pytest.raises(
        UsageError, match="vllm_server_base_url: that server takes no adapters: start it with --enable-lora"
    ):
        play(running_at(doubles(model, loads=False), tmp_path), policy_of(model, LORA), asked(problems=1))


def test_a_running_server_that_does_not_see_the_runs_directory_is_refused(model, doubles, tmp_path):
    double = doubles(model)
    double.loaded = lambda _: recorded("load_missing")
    with pytest.raises(UsageError, match=r"vllm_server_base_url: that server finds no adapter at .* the same path"):
        play(running_at(double, tmp_path), policy_of(model, LORA), asked(problems=1))


def test_a_server_that_is_busy_is_not_taken_for_one_that_is_gone(model, tmp_path, monkeypatch):
    maker, server = started(tmp_path)
    policy = policy_of(model)
    play(maker, policy, asked(problems=1))
    healthy, asks = Client.healthy, []
    monkeypatch.setattr(Client, "healthy", lambda client: asks.append(client) or (len(asks) > 2 and healthy(client)))
    server.double.broken = {server.double.number + 1: "cut"}
    play(maker, policy, asked(problems=1))
    assert len(asks) == 3
    assert len(server.started) == 1


def test_a_server_that_is_not_there_is_named(model, tmp_path):
    settings = EngineSettings(engine="vllm", vllm_server_base_url="http://127.0.0.1:1", vllm_server_timeout=0.1)
    maker = VLLM(Weights(settings, tmp_path / "weights", None), concurrency=2)
    with pytest.raises(ServerError, match=r"does not answer: ConnectionRefusedError.* at http://127.0.0.1:1"):
        play(maker, policy_of(model), asked(problems=1))


def test_a_rollout_that_has_nothing_left_to_sample_starts_no_server(model, tmp_path):
    maker, server = started(tmp_path)
    assert play(maker, policy_of(model), []) == []
    assert not server.started
    assert maker.mismatch is None


def test_requests_that_share_a_key_are_refused(model, doubles, tmp_path):
    with pytest.raises(ValueError, match="same key"):
        play(running_at(doubles(model), tmp_path), policy_of(model), asked(problems=1) * 2)


def test_a_caller_that_stops_reading_leaves_no_thread_waiting(model, doubles, tmp_path):
    import threading

    before = {thread.name for thread in threading.enumerate()}
    with running_at(doubles(model), tmp_path, concurrency=2)(policy_of(model), ROLLOUT) as engine:
        actions = engine.generate(asked(problems=30))
        next(actions)
        actions.close()
    for thread in threading.enumerate():
        if thread.name.startswith("bcft-vllm") and thread.name not in before:
            thread.join(20)
            assert not thread.is_alive()
