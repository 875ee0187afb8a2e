"""The one place where an engine is chosen: what it yields, and in which state the model is inside."""

from dataclasses import replace

import pytest
import torch
from helpers.sampling import random_llama, requests
from helpers.tiny import llama_tokenizer, save_llama

from bcft.config.schema import ModelSettings
from bcft.environments.single_turn import SingleTurn
from bcft.generation import make_engine
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision, load_policy, with_adapter
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


@pytest.mark.parametrize("quantized", ["nf4", "fp4", "nested", "none"])
@pytest.mark.parametrize("autocast", [None, True])
def test_an_adapters_dropout_changes_no_sampled_token(tmp_path, quantized, autocast):
    """PEFT's wrapper of a 4-bit layer has bitsandbytes' class name, and holds the dropout."""
    name = save_llama(tmp_path, llama_tokenizer(["a b"]))
    plain = ModelSettings(
        use_peft=True, lora_target_modules=("all-linear",), use_cpu=True, bf16=autocast, lora_dropout=0.0,
        load_in_4bit=quantized != "none", use_bnb_nested_quant=quantized == "nested",
        bnb_4bit_quant_type="fp4" if quantized == "fp4" else "nf4",
    )  # fmt: skip
    drawn = []
    for settings in (plain, replace(plain, lora_dropout=0.5)):
        made = with_adapter(load_policy(name, settings), settings, seed=0)
        torch.manual_seed(1)
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        made.model.train()
        with sampling_mode(made.model, autocast=made.precision.autocast):
            dropouts = [m for m in made.model.modules() if isinstance(m, torch.nn.Dropout)]
            assert not any(module.training for module in dropouts)
            engine = HFEngine(made.model, pad_id=made.renderer.tokenizer.pad_token_id)
            drawn.append({action.key: action.ids for action in engine.generate(requests(4))})
        assert all(module.training for module in dropouts)
        assert bool(dropouts) == (settings.lora_dropout > 0)
    assert drawn[0] == drawn[1]
