"""The `hf` engine: tokens are a function of the attempt's identity, and nothing else."""

import dataclasses

import pytest
import torch
from helpers.sampling import VOCABULARY, random_llama, requests, tokens

from bcft.generation import hf
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.types import Request, Sampling


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8, 32, 64])
def test_batch_size_changes_no_token(model, rows):
    given = requests()
    assert tokens(model, given, rows=rows) == tokens(model, given, rows=16)


@pytest.mark.parametrize("every", [1, 3, 10_000])
def test_dropping_finished_rows_or_keeping_them_to_the_end_changes_no_token(model, monkeypatch, every):
    given = requests(stop=(1, 4, 9))
    expected = tokens(model, given, rows=16)
    assert len({len(ids) for ids, _ in expected.values()}) > 5  # rows end at different times
    monkeypatch.setattr(hf, "_COMPACT_EVERY", every)
    assert tokens(model, given, rows=16) == expected


def test_a_prefill_shared_by_all_samples_gives_the_tokens_of_one_for_each(model):
    given = requests(n=8, samples=4)
    alone = {key: action for request in given for key, action in tokens(model, [request]).items()}
    assert tokens(model, given) == alone


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("part", [60, 10_000])
def test_a_beginning_that_all_prompts_share_is_read_once_and_no_token_changes(model, monkeypatch, rows, part):
    monkeypatch.setattr(hf.cpu, "is_large", lambda _: True)
    monkeypatch.setattr(hf, "_CPU_PREFILL_TOKENS", part)
    system = tuple(range(2, 22))
    given = [dataclasses.replace(r, context_ids=(*system, *r.context_ids)) for r in requests(n=10)]
    with monkeypatch.context() as patch:
        patch.setattr(hf, "_LEAST_SHARED", 10_000)
        expected = tokens(model, given, rows=rows)
    read = []
    handle = model.register_forward_pre_hook(lambda _, __, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    try:
        assert tokens(model, given, rows=rows) == expected
    finally:
        handle.remove()
    if rows == 64:  # with five rows, most prompts are read alone
        assert sum(ids.tolist() == [list(system)] for ids in read) >= 1
    assert all(ids.shape[1] <= 14 for ids in read if ids.shape[0] > 1)


def test_the_order_of_requests_changes_no_token(model):
    given = requests()
    assert tokens(model, given[::-1], rows=8) == tokens(model, given, rows=8)


def test_greedy_decoding_equals_transformers_generate(model):
    given = requests(samples=1, sampling=Sampling(temperature=0.0))
    ours = tokens(model, given, rows=8)
    for request in given:
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
    given = [Request((3, "test", 0, "p", k, 0), context, sampling, (1,), 1) for k in range(n)]
    ours = torch.tensor([ids[0] for ids, _ in tokens(model, given).values()])
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
    given = requests(n=6, samples=1, sampling=Sampling(temperature=0.0, repetition_penalty=1.8))
    ours = tokens(model, given, rows=4)
    for request in given:
        theirs = model.generate(
            torch.tensor([request.context_ids]), do_sample=False, max_new_tokens=20, eos_token_id=[1], pad_token_id=0,
            repetition_penalty=1.8,
        )[0, len(request.context_ids) :].tolist()  # fmt: skip
        assert list(ours[request.key][0]) == theirs


def test_when_memory_runs_out_the_rows_are_halved_and_no_token_changes(model):
    given = requests()
    expected = tokens(model, given, rows=16)
    engine = HFEngine(model, pad_id=0, rows=16)
    step = engine._step
    calls = iter(range(10_000))

    def failing(rows, sampling, warpers):
        if len(rows.requests) > 5 and next(calls) >= 3:
            raise torch.OutOfMemoryError("injected")
        step(rows, sampling, warpers)

    engine._step = failing
    with sampling_mode(model):
        actions = {action.key: (action.ids, action.stop) for action in engine.generate(given)}
    assert engine.rows == 4
    assert actions == expected


def test_a_full_context_stops_the_attempt_and_says_so(model):
    long = Request((0, "test", 0, "long", 0, 0), tuple([5] * 60), Sampling(), (1,), 20)
    longer = Request((0, "test", 0, "longer", 0, 0), tuple([5] * 64), Sampling(), (1,), 20)
    actions = tokens(model, [long, longer])
    assert len(actions[long.key][0]) <= 4
    assert actions[long.key][1] == "context_full" or actions[long.key][0][-1] == 1
    assert actions[longer.key] == ((), "context_full")


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
