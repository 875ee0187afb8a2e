"""The `vllm` engine against vLLM itself, in an environment of its own: `BCFT_VLLM_PYTHON` names its interpreter.

A Llama with heads of 32, which vLLM's CPU attention has; it refuses those of 16 of `bcft:tiny-math`.
"""

import os
import signal
import subprocess
import time

import pytest
from helpers.tiny import llama_tokenizer, save_llama
from helpers.vllm_play import FULL, LORA, STOP, asked, play, policy_of, train

from bcft.config.engine import EngineSettings
from bcft.errors import ServerError
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.generation.vllm import open_vllm
from bcft.types import Sampling

PYTHON = os.environ.get("BCFT_VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="BCFT_VLLM_PYTHON names no interpreter with vLLM")
SETTINGS = EngineSettings(
    engine="vllm",
    vllm_command=(PYTHON, "-m", "vllm.entrypoints.openai.api_server"),
    vllm_server_timeout=600.0,
    concurrency=8,
)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"), llama_tokenizer(["a b c"]), hidden=128, positions=256)


def group_of(server):
    """Return the processes of a server's group by their ids."""
    listed = subprocess.run(
        ["ps", "-e", "-ww", "-o", "pid=", "-o", "pgid=", "-o", "args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return {int(pid): args for pid, group, args in rows if int(group) == server._process.pid}


def test_adapters_are_played_round_by_round_and_a_server_that_is_killed_twice_loses_and_doubles_nothing(
    model, tmp_path, capsys
):
    policy = policy_of(model, LORA)
    with open_vllm(SETTINGS, directory=tmp_path, say=print) as maker:
        for seed in (2, 3):
            actions = play(maker, policy, asked(sampling=Sampling(temperature=0.7)))
            assert {a.stop for a in actions} <= {"stop_token", "max_tokens"}
            assert all((a.stop == "stop_token") == (a.ids[-1] in STOP) for a in actions)
            print(f"mismatch with an adapter: {maker.mismatch:.2e}")
            assert maker.mismatch <= 1e-3
            train(policy, seed, by=0.05)
        greedy = asked(samples=1, sampling=Sampling(temperature=0.0))
        served = {a.key: a.ids for a in play(maker, policy, greedy)}
        with sampling_mode(policy.model):
            assert served == {a.key: a.ids for a in HFEngine(policy.model, pad_id=0).generate(greedy)}

        def kill(number):
            """Kill the API's process first, then the engine's alone."""
            if number in (16, 48):
                group = group_of(maker.weights.server)
                word = "api_server --model" if number == 16 else "EngineCore"
                os.kill(max(pid for pid, args in group.items() if word in args), signal.SIGKILL)

        play(maker, policy, asked(problems=40), during=kill)
        assert maker.mismatch <= 1e-3
        group = group_of(maker.weights.server)
    assert len(group) >= 3
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in group):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert capsys.readouterr().out.count("it is started again") == 2
    assert [path.name for path in (tmp_path / "vllm").iterdir()] == ["server.log"]


def test_full_weights_are_played_round_by_round(model, tmp_path):
    policy = policy_of(model, FULL)
    with open_vllm(SETTINGS, directory=tmp_path) as maker:
        for seed in (2, 3):
            play(maker, policy, asked(problems=4))
            print(f"mismatch with full weights: {maker.mismatch:.2e}")
            assert maker.mismatch <= 1e-3
            train(policy, seed, by=0.05)


def test_a_model_that_vllm_cannot_run_is_told_in_a_line_with_its_logs_reason(tmp_path):
    small = save_llama(tmp_path / "small", llama_tokenizer(["a b c"]), hidden=64, positions=256)
    with open_vllm(SETTINGS, directory=tmp_path) as maker, pytest.raises(ServerError, match=r"head.?_?(size|dim)|16"):
        play(maker, policy_of(small, FULL), asked(problems=1))
