"""Caches of conversations save reading; they change no token, and they are dropped in time."""

import pytest
import torch
from helpers.sampling import random_llama, requests, tokens
from transformers import DynamicCache, LlamaConfig

from bcft.generation.hf import HFEngine
from bcft.generation.kv_cache import cached_numbers_per_token
from bcft.generation.mode import sampling_mode
from bcft.types import Request, Sampling


@pytest.fixture(scope="module")
def model():
    return random_llama()


def conversation(model, *, turns=4, n=6, rows=16, sessions=True, engine=None):
    """Play a conversation of several turns with each of n attempts; return every action."""
    engine = engine or HFEngine(model, pad_id=0, rows=rows)
    contexts = {k: tuple(range(2 + k, 5 + 2 * k)) for k in range(n)}
    actions = {}
    with sampling_mode(model):
        for turn in range(turns):
            given = [
                Request((0, "t", 0, f"p{k}", 0, turn), context, Sampling(), (1, 4), 5, (f"p{k}",) if sessions else None)
                for k, context in contexts.items()
            ]
            for action in engine.generate(given):
                k = int(action.key[3][1:])
                actions[action.key] = (action.ids, action.stop)
                contexts[k] += action.ids + (7,) * (k + turn)  # of another length for each attempt and turn
    return actions


def lengths_read(model, **settings):
    """Return how many tokens of each row the model reads, call by call, in a conversation with these settings."""
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        conversation(model, **settings)
    finally:
        hook.remove()
    return [n for n in lengths if n > 1]


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_continuing_from_a_cached_conversation_changes_no_token(model, rows):
    assert conversation(model, rows=rows) == conversation(model, sessions=False)


def test_a_conversation_reads_only_what_is_new(model):
    # The first context has three tokens; then the token sampled last and the answer, of 0, 1 and 2 tokens.
    assert lengths_read(model, n=1, turns=4, engine=HFEngine(model, pad_id=0)) == [3, 2, 3]


def test_an_engine_that_keeps_no_sessions_reads_every_context_whole_and_changes_no_token(model):
    engine = HFEngine(model, pad_id=0, keep_sessions=False)
    actions = conversation(model, engine=engine)
    assert actions == conversation(model) == conversation(model, sessions=False)
    assert not len(engine.sessions)
    lengths = lengths_read(model, n=1, turns=4, engine=engine)
    assert lengths == lengths_read(model, n=1, turns=4, sessions=False)
    assert sum(lengths) > sum(lengths_read(model, n=1, turns=4))


def test_without_memory_for_caches_only_the_time_changes(model, monkeypatch):
    monkeypatch.setattr("bcft.generation.kv_cache.SESSION_BYTES", 0)
    engine = HFEngine(model, pad_id=0)
    assert conversation(model, engine=engine) == conversation(model, sessions=False)
    assert not len(engine.sessions)


def test_a_rewritten_context_is_read_again(model):
    engine = HFEngine(model, pad_id=0)
    first = Request((0, "t", 0, "p", 0, 0), (2, 3, 5), Sampling(), (1,), 4, ("p",))
    other = Request((0, "t", 0, "p", 0, 1), (2, 9, 5, 8, 8, 8, 8, 8, 8), Sampling(), (1,), 4, ("p",))
    with sampling_mode(model):
        list(engine.generate([first]))
        (action,) = engine.generate([other])
    assert tokens(model, [other])[other.key] == (action.ids, action.stop)


def test_caches_of_conversations_that_have_ended_are_dropped(model):
    engine = HFEngine(model, pad_id=0)
    conversation(model, turns=1, n=5, engine=engine)
    assert len(engine.sessions) == 5
    with sampling_mode(model):
        list(engine.generate(requests(n=1)))
    assert not len(engine.sessions)


def test_when_memory_runs_out_caches_are_dropped_first_and_no_token_changes(model):
    engine, failing = HFEngine(model, pad_id=0, rows=4), [True]

    def fail(_, __, given):
        if failing[0] and len(engine.sessions) and given["input_ids"].shape[0] > 2:
            failing[0] = False
            raise torch.OutOfMemoryError

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        actions = conversation(model, engine=engine)
    finally:
        hook.remove()
    assert not failing[0]
    assert actions == conversation(model, sessions=False)


def test_the_numbers_that_a_token_takes_are_those_of_a_cache_that_holds_it(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[2, 3, 4]]), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cached_numbers_per_token(model.config) == held // 3
    wide = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6, hidden_size=32)
    assert cached_numbers_per_token(wide) == 2 * 3 * 2 * 6
