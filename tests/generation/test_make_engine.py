"""The one place where an engine is chosen: what it yields, and in which state the model is inside."""

import pytest
import torch
from helpers.sampling import random_llama, requests
from helpers.tiny import llama_tokenizer

from bcft.environments.single_turn import SingleTurn
from bcft.generation import make_engine
from bcft.generation.hf import HFEngine, sampling_mode
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision
from bcft.types import RolloutSettings, Sampling


def policy(autocast="no"):
    renderer = Renderer(llama_tokenizer(["a b c"]))
    return Policy(random_llama(), renderer, Precision("cpu", autocast, torch.float32, ""))


def settings(max_turns):
    return RolloutSettings(SingleTurn, Sampling(), max_new_tokens=9, max_turns=max_turns, step_timeout=1.0, seed=0)


@pytest.mark.parametrize(("turns", "keeps"), [(1, False), (2, True)])
def test_caches_are_kept_only_where_an_episode_has_a_second_turn(turns, keeps):
    with make_engine(policy(), settings(turns)) as engine:
        assert isinstance(engine, HFEngine)
        assert engine.keep_sessions is keeps


def test_the_engine_samples_the_policys_model_with_its_pad_token():
    made = policy()
    with make_engine(made, settings(1)) as engine:
        actions = {action.key: action.ids for action in engine.generate(requests(4))}
    with sampling_mode(made.model):
        bare = HFEngine(made.model, pad_id=made.renderer.tokenizer.pad_token_id)
        assert actions == {action.key: action.ids for action in bare.generate(requests(4))}


@pytest.mark.parametrize("autocast", ["no", "bf16"])
def test_inside_the_model_is_in_eval_mode_under_the_trainings_autocast_and_restored_afterwards(autocast):
    made = policy(autocast)
    made.model.train()
    with make_engine(made, settings(1)):
        assert not made.model.training
        assert torch.is_autocast_enabled("cpu") == (autocast == "bf16")
    assert made.model.training
    assert not torch.is_autocast_enabled("cpu")
