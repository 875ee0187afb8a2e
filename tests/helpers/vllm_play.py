"""Policies, requests and engines of tests with a vLLM double: `running_at` one, or `started` by the engine."""

from collections import Counter
from dataclasses import replace

import torch
from helpers.vllm_double import DoubleServer

from bcft.config.engine import EngineSettings
from bcft.config.schema import ModelSettings
from bcft.environments.single_turn import SingleTurn
from bcft.generation.vllm import VLLM
from bcft.generation.vllm.weights import Weights
from bcft.policy.loading import load_policy, with_adapter
from bcft.types import Request, RolloutSettings, Sampling

FULL = ModelSettings(use_cpu=True)
LORA = replace(FULL, use_peft=True, lora_r=4, lora_target_modules=("all-linear",))
ROLLOUT = RolloutSettings(SingleTurn, Sampling(), max_new_tokens=9, max_turns=1, step_timeout=1.0, seed=0)
STOP = (7, 8, 9, 40, 41, 42)


def policy_of(model, settings=FULL):
    policy = with_adapter(load_policy(model, settings), settings, seed=0)
    if policy.adapter:
        train(policy, 1)
    return policy


def train(policy, seed, by=0.3):
    """Change the weights that train. by: the standard deviation of the changes."""
    torch.manual_seed(seed)
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=by)


def asked(problems=6, samples=4, **more):
    given = {"sampling": Sampling(), "stop_ids": STOP, "max_new_tokens": 9} | more
    return [
        Request((0, "rollout", 1, f"p{p}", k, 0), tuple(range(10, 20 + p)), **given)
        for p in range(problems)
        for k in range(samples)
    ]


def running_at(double, tmp_path, **more):
    """Return a maker of engines for a server that runs already."""
    settings = EngineSettings(engine="vllm", vllm_server_base_url=double.url, **more)
    return VLLM(Weights(settings, tmp_path / "weights", None), concurrency=settings.concurrency)


def started(tmp_path, concurrency=4, **settings):
    """Return a maker of engines for a server that it starts, and the server."""
    server = DoubleServer(**settings)
    given = EngineSettings(engine="vllm", vllm_command=("vllm",), vllm_server_timeout=5.0)
    return VLLM(Weights(given, tmp_path / "weights", server, say=print), concurrency=concurrency), server


def play(maker, policy, requests, during=lambda _: None):
    with maker(policy, ROLLOUT) as engine:
        actions = []
        for action in engine.generate(requests):
            actions.append(action)
            during(len(actions))
    assert Counter(action.key for action in actions) == Counter(request.key for request in requests)
    return actions


def questions(double):
    """Return the questions of rollouts, not of probes."""
    return [body for body in double.asked if body.get("stop_token_ids")]
