"""The `hf` engine: tokens are a function of the attempt's identity, and nothing else."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.generation import hf
from bcft.generation.hf import HFEngine, sampling_mode
from bcft.generation.noise import gumbel, identity_seed
from bcft.types import Request, Sampling

VOCABULARY = 37


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def requests(n=24, *, samples=3, new=20, sampling=Sampling(), stop=(1,)):  # noqa: B008
    generator = torch.Generator().manual_seed(1)
    found = []
    for problem in range(n):
        length = int(torch.randint(2, 15, (1,), generator=generator))
        context = tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())
        found += [Request((0, "test", 0, f"p{problem}", k, 0), context, sampling, stop, new) for k in range(samples)]
    return found


def tokens(model, asked, **settings):
    engine = HFEngine(model, pad_id=0, **settings)
    with sampling_mode(model):
        return {action.key: (action.ids, action.stop) for action in engine.generate(asked)}


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 32, 64])
def test_batch_size_changes_no_token(model, rows):
    asked = requests()
    assert tokens(model, asked, rows=rows) == tokens(model, asked, rows=16)


@pytest.mark.parametrize("every", [1, 3, 10_000])
def test_dropping_finished_rows_or_keeping_them_to_the_end_changes_no_token(model, monkeypatch, every):
    asked = requests(stop=(1, 4, 9))
    expected = tokens(model, asked, rows=16)
    assert len({len(ids) for ids, _ in expected.values()}) > 5  # rows end at different times
    monkeypatch.setattr(hf, "_COMPACT_EVERY", every)
    assert tokens(model, asked, rows=16) == expected


def test_a_prefill_shared_by_all_samples_gives_the_tokens_of_one_for_each(model):
    asked = requests(n=8, samples=4)
    alone = {key: found for request in asked for key, found in tokens(model, [request]).items()}
    assert tokens(model, asked) == alone


def test_the_order_of_requests_changes_no_token(model):
    asked = requests()
    assert tokens(model, asked[::-1], rows=8) == tokens(model, asked, rows=8)


def test_greedy_decoding_equals_transformers_generate(model):
    asked = requests(samples=1, sampling=Sampling(temperature=0.0))
    ours = tokens(model, asked, rows=8)
    for request in asked:
        context = torch.tensor([request.context_ids])
        theirs = model.generate(
            context, do_sample=False, max_new_tokens=request.max_new_tokens, eos_token_id=[1], pad_token_id=0
        )[0, len(request.context_ids) :].tolist()
        assert list(ours[request.key][0]) == theirs


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.3),
        Sampling(temperature=1.7, top_p=0.8, repetition_penalty=1.5),
    ],
    ids=str,
)  # fmt: skip
def test_first_tokens_follow_the_distribution_of_transformers_own_sampling(model, sampling):
    context = (5, 9, 30, 7)
    n = 4000
    asked = [Request((3, "test", 0, "p", k, 0), context, sampling, (1,), 1) for k in range(n)]
    ours = torch.tensor([ids[0] for ids, _ in tokens(model, asked).values()])
    torch.manual_seed(2)
    theirs = model.generate(
        torch.tensor([context]).expand(n, -1), do_sample=True, max_new_tokens=1, eos_token_id=1, pad_token_id=0,
        temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )[:, -1]  # fmt: skip
    a, b = (torch.bincount(x, minlength=VOCABULARY).double() for x in (ours, theirs))
    both = (a + b) > 0
    # Two-sample chi-square on the tokens either of them drew; 5 standard deviations of its null distribution.
    statistic = float((((a - b) ** 2)[both] / (a + b)[both]).sum())
    degrees = int(both.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5 + 1e-9


def test_repetition_penalty_acts_on_the_same_tokens_as_in_transformers(model):
    asked = requests(n=6, samples=1, sampling=Sampling(temperature=0.0, repetition_penalty=1.8))
    ours = tokens(model, asked, rows=4)
    for request in asked:
        theirs = model.generate(
            torch.tensor([request.context_ids]), do_sample=False, max_new_tokens=20, eos_token_id=[1], pad_token_id=0,
            repetition_penalty=1.8,
        )[0, len(request.context_ids) :].tolist()  # fmt: skip
        assert list(ours[request.key][0]) == theirs


def test_out_of_memory_halves_the_rows_and_changes_no_token(model):
    asked = requests()
    expected = tokens(model, asked, rows=16)
    engine = HFEngine(model, pad_id=0, rows=16)
    step = engine._step
    calls = iter(range(10_000))

    def failing(rows, sampling, warpers):
        if len(rows.requests) > 5 and next(calls) >= 3:
            raise torch.OutOfMemoryError("injected")
        step(rows, sampling, warpers)

    engine._step = failing
    with sampling_mode(model):
        found = {action.key: (action.ids, action.stop) for action in engine.generate(asked)}
    assert engine.rows == 4
    assert found == expected


def test_a_full_context_stops_the_attempt_and_says_so(model):
    long = Request((0, "test", 0, "long", 0, 0), tuple([5] * 60), Sampling(), (1,), 20)
    longer = Request((0, "test", 0, "longer", 0, 0), tuple([5] * 64), Sampling(), (1,), 20)
    found = tokens(model, [long, longer])
    assert len(found[long.key][0]) <= 4
    assert found[long.key][1] == "context_full" or found[long.key][0][-1] == 1
    assert found[longer.key] == ((), "context_full")


def test_every_action_ends_at_its_first_stop_token_or_at_its_limit(model):
    for ids, stop in tokens(model, requests(new=9, stop=(1, 4))).values():
        assert not {1, 4} & set(ids[:-1])
        assert (stop == "stop_token") == (ids[-1] in (1, 4))
        assert stop == "stop_token" or len(ids) == 9


def test_sampling_mode_restores_training_and_checkpointing(model):
    model.train()
    model.activation_checkpointing_enable()
    with sampling_mode(model):
        assert not model.training
        assert not model.is_activation_checkpointing
    assert model.training
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    model.eval()


def test_two_requests_with_one_identity_are_refused(model):
    request = requests(1, samples=1)[0]
    with pytest.raises(ValueError, match="same key"):
        list(HFEngine(model, pad_id=0).generate([request, request]))


def test_noise_is_standard_gumbel_along_tokens_positions_and_attempts():
    seeds = torch.tensor([identity_seed(0, "test", 0, f"p{i}", 0, 0) for i in range(400)], dtype=torch.int32)
    noise = torch.stack([gumbel(seeds, torch.full((400,), t, dtype=torch.int32), 50) for t in range(20)])
    assert torch.isfinite(noise).all()
    # Mean and variance of the standard Gumbel distribution: 0.57722 and pi^2 / 6.
    assert abs(noise.mean() - 0.57722) < 5 * (1.6449 / noise.numel()) ** 0.5
    assert abs(noise.var() - 1.6449) < 0.02
    for dim in range(3):
        means = noise.mean(dim=[d for d in range(3) if d != dim])
        expected = (1.6449 / (noise.numel() / len(means))) ** 0.5
        assert 0.6 < means.std() / expected < 1.5
    flat = noise - noise.mean()
    for lagged in (flat[1:] * flat[:-1], flat[:, 1:] * flat[:, :-1], flat[..., 1:] * flat[..., :-1]):
        assert abs(lagged.mean()) < 5 * 1.6449 / lagged.numel() ** 0.5


def test_one_value_of_the_noise_is_pinned():
    """Runs made with another noise could not be resumed or compared: change it with a reason only."""
    seeds = torch.tensor([identity_seed(42, "test", 0, "0123456789abcdef", 3, 0)], dtype=torch.int32)
    found = gumbel(seeds, torch.tensor([7], dtype=torch.int32), 5)[0].tolist()
    assert found == pytest.approx([-0.311211, -0.194526, -0.227373, 0.003328, 0.865346], abs=1e-5)


# Conversations


def conversation(model, *, turns=4, n=6, rows=16, sessions=True, engine=None):
    """Play a conversation of several turns with each of n attempts; return every action."""
    engine = engine or HFEngine(model, pad_id=0, rows=rows)
    contexts = {k: tuple(range(2 + k, 5 + 2 * k)) for k in range(n)}
    found = {}
    with sampling_mode(model):
        for turn in range(turns):
            asked = [
                Request((0, "t", 0, f"p{k}", 0, turn), context, Sampling(), (1, 4), 5, (f"p{k}",) if sessions else None)
                for k, context in contexts.items()
            ]
            for action in engine.generate(asked):
                k = int(action.key[3][1:])
                found[action.key] = (action.ids, action.stop)
                contexts[k] += action.ids + (7,) * (k + turn)  # of another length for each attempt and turn
    return found


@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_going_on_from_a_cached_conversation_changes_no_token(model, rows):
    assert conversation(model, rows=rows) == conversation(model, sessions=False)


def test_a_conversation_reads_only_what_is_new(model):
    engine, read = HFEngine(model, pad_id=0), []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        conversation(model, n=1, turns=4, engine=engine)
    finally:
        hook.remove()
    # The first context has three tokens; then the token sampled last and the answer, of 0, 1 and 2 tokens.
    assert [n for n in read if n > 1] == [3, 2, 3]


def test_without_room_for_caches_nothing_changes_but_the_time(model, monkeypatch):
    monkeypatch.setattr("bcft.generation.kv_cache.SESSION_BYTES", 0)
    engine = HFEngine(model, pad_id=0)
    assert conversation(model, engine=engine) == conversation(model, sessions=False)
    assert not len(engine.sessions)


def test_what_is_rewritten_is_read_anew(model):
    engine = HFEngine(model, pad_id=0)
    first = Request((0, "t", 0, "p", 0, 0), (2, 3, 5), Sampling(), (1,), 4, ("p",))
    other = Request((0, "t", 0, "p", 0, 1), (2, 9, 5, 8, 8, 8, 8, 8, 8), Sampling(), (1,), 4, ("p",))
    with sampling_mode(model):
        list(engine.generate([first]))
        (found,) = engine.generate([other])
    assert tokens(model, [other])[other.key] == (found.ids, found.stop)


def test_caches_of_conversations_that_have_ended_are_let_go(model):
    engine = HFEngine(model, pad_id=0)
    conversation(model, turns=1, n=5, engine=engine)
    assert len(engine.sessions) == 5
    with sampling_mode(model):
        list(engine.generate(requests(n=1)))
    assert not len(engine.sessions)


def test_out_of_memory_lets_go_of_caches_first_and_changes_no_token(model):
    engine, failing = HFEngine(model, pad_id=0, rows=4), [True]

    def fail(_, __, given):
        if failing[0] and len(engine.sessions) and given["input_ids"].shape[0] > 2:
            failing[0] = False
            raise torch.OutOfMemoryError

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        found = conversation(model, engine=engine)
    finally:
        hook.remove()
    assert not failing[0]
    assert found == conversation(model, sessions=False)
