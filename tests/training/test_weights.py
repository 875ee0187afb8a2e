"""Weights of rows: the loss is what its definition says, in whatever batches, on whatever path, in how many processes.

The networks are tiny and the steps plain gradient descent, so that the weights after a step show its gradient.
"""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from helpers.runs import torchrun
from helpers.tiny import llama_tokenizer
from helpers.weighted_step import WEIGHTS, after_a_step, examples, model, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bcft.errors import UsageError
from bcft.training.trainer import fit, newest_checkpoint, next_round, to_dataset
from bcft.types import IGNORED

REDUCTIONS = ["token", "sequence", "sum"]


@pytest.fixture(scope="module")
def tokenizer():
    return llama_tokenizer(["a b c"])


def assert_close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def by_definition(network, rows, reduction):
    """Return the loss of a step on the rows as `loss_reduction` describes it, from the model's own logits."""
    losses = []
    for row in rows:
        scores = network(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        losses.append(torch.stack([-scores[i - 1, label] for i, label in enumerate(row.labels) if label != IGNORED]))
    weighted = [row.weight * nll for row, nll in zip(rows, losses, strict=True)]
    if reduction == "sequence":
        return torch.stack([nll.mean() for nll in weighted]).mean()
    total = torch.cat(weighted).sum()
    return total if reduction == "sum" else total / sum(map(len, losses))


# The definition


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_step_follows_the_definition_of_the_weighted_loss(tmp_path, tokenizer, reduction, lora):
    rows, network = examples(WEIGHTS), model(lora=lora)
    by_definition(network, rows, reduction).backward()
    expected = {n: (p - 0.05 * p.grad).detach() for n, p in network.named_parameters() if p.requires_grad}
    assert_close(expected, after_a_step(rows, tmp_path, tokenizer, lora=lora, loss_reduction=reduction)[0], atol=1e-5)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory, tokenizer):
    """Return the gradient of a step, over all weights of the model, as a function of the rows' weights."""
    network = model()
    made = trainer(network, examples(), tmp_path_factory.mktemp("linear"), tokenizer)

    def gradient(weights):
        batch = made.data_collator([dict(row) for row in to_dataset(examples(weights))])
        network.zero_grad()
        made.compute_loss(network, batch, num_items_in_batch=torch.tensor(20)).backward()
        return np.concatenate([p.grad.numpy().ravel().copy() for p in network.parameters()]).astype(np.float64)

    return gradient


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 10, width=32), min_size=4, max_size=4))
def test_the_gradient_is_linear_in_the_weights(gradients, weights):
    alone = [gradients(unit) for unit in np.eye(4).tolist()]
    expected = sum(weight * each for weight, each in zip(weights, alone, strict=True))
    np.testing.assert_allclose(gradients(weights), expected, atol=1e-5 * max(1.0, *weights))


def test_a_weight_does_not_cancel_at_one_row_a_step(tmp_path, tokenizer):
    """Divided by the sum of weights, it would: every step of one row would be that of weight 1."""
    before = {n: p.detach().clone() for n, p in model().named_parameters()}
    steps = []
    for weight in (1.0, 3.0):
        rows = examples((weight,) * 4)
        after, _ = after_a_step(rows, tmp_path, tokenizer, per_device_train_batch_size=1)
        steps.append({name: after[name] - before[name] for name in after})
    assert_close({name: 3 * step for name, step in steps[0].items()}, steps[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_of_1_are_bit_for_bit_none(tmp_path, tokenizer, reduction):
    """Under `token` and `sum` there is no column, so the very same path is taken."""
    explicit = [dataclasses.replace(row, weight=1.0) for row in examples()]
    columns = ["input_ids", "labels", *(["weight"] if reduction == "sequence" else [])]
    assert to_dataset(explicit, reduction).column_names == columns
    one, two = (after_a_step(rows, tmp_path, tokenizer, loss_reduction=reduction) for rows in (examples(), explicit))
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def test_a_row_twice_is_the_row_with_weight_2_under_sum(tmp_path, tokenizer):
    twice, heavy = examples(), examples((1.0, 2.0, 1.0, 1.0))
    fields = {"loss_reduction": "sum", "per_device_train_batch_size": 5}
    (one, _), (two, _) = (after_a_step(rows, tmp_path, tokenizer, **fields) for rows in ([*twice, twice[1]], heavy))
    assert_close(one, two)


def test_every_row_is_equal_under_sequence_however_long_it_is():
    rows = examples()
    assert len({row.supervised for row in rows}) > 1
    dataset = to_dataset(rows, "sequence")
    shares = [weight * row.supervised for weight, row in zip(dataset["weight"], rows, strict=True)]
    assert shares == pytest.approx([1.0] * 4)


# One step, however it is computed


@pytest.mark.parametrize(("reduction", "lora"), [*((name, False) for name in REDUCTIONS), ("token", True)])
def test_micro_batches_and_packed_rows_make_the_same_step_and_log_the_same_loss(
    tmp_path, tokenizer, monkeypatch, reduction, lora
):
    monkeypatch.setattr("bcft.training.lean.GROUP_TOKENS", 24)
    results = []
    for packs, size, accumulation in ((False, 4, 1), (False, 1, 4), (True, 4, 1), (True, 2, 2)):
        monkeypatch.setattr("bcft.policy.cpu.is_large", lambda _, packs=packs: packs)
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        fields |= {"loss_reduction": reduction}
        results.append(after_a_step(examples(WEIGHTS), tmp_path, tokenizer, lora=lora, **fields))
    assert trainer(model(lora=lora), examples(WEIGHTS), tmp_path, tokenizer).packs
    (first, figures), *others = results
    for weights, logged in others:
        assert_close(first, weights, rtol=1e-4, atol=1e-5)
        assert logged["loss"] == pytest.approx(figures["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path, tokenizer):
    torchrun("-m", "helpers.weighted_step", str(tmp_path), json.dumps(REDUCTIONS), directory=tmp_path)
    for reduction in REDUCTIONS:
        one, _ = after_a_step(examples(WEIGHTS), tmp_path / "one", tokenizer, loss_reduction=reduction)
        for rank in (0, 1):
            assert_close(one, load_file(tmp_path / f"{reduction}_{rank}.safetensors"), rtol=1e-4, atol=1e-5)


def test_the_fused_head_runs_once_for_a_micro_batch_and_makes_no_logits(tmp_path, tokenizer, monkeypatch):
    made = trainer(model(), examples(WEIGHTS), tmp_path, tokenizer)
    calls, forward = [], made.model.forward

    def watched(*arguments, **inputs):
        outputs = forward(*arguments, **inputs)
        calls.append((inputs.get("fused_lm_head"), sorted(outputs)))
        return outputs

    monkeypatch.setattr(made.model, "forward", watched)
    made.train()
    assert calls == [(True, ["entropy", "is_top1", "label_mask", "log_probs", "loss"])]


# What is logged


def test_the_logged_loss_is_per_token_and_entropy_and_accuracy_are_of_the_policy(tmp_path, tokenizer):
    rows = examples(WEIGHTS)
    _, plain = after_a_step(examples(), tmp_path, tokenizer)
    for reduction in REDUCTIONS:
        _, logged = after_a_step(rows, tmp_path, tokenizer, loss_reduction=reduction)
        per_token = "token" if reduction == "sum" else reduction
        assert logged["loss"] == pytest.approx(by_definition(model(), rows, per_token).item(), abs=1e-3)
        assert logged["entropy"] == pytest.approx(plain["entropy"], rel=1e-5)
        assert logged["mean_token_accuracy"] == plain["mean_token_accuracy"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_held_out_loss_is_the_mean_over_tokens_without_weights(tmp_path, tokenizer, reduction):
    rows = examples(WEIGHTS)
    made = trainer(model(), rows, tmp_path, tokenizer, loss_reduction=reduction)
    batch = to_dataset([dataclasses.replace(row, weight=1.0) for row in rows])
    loss = made.evaluate(batch)["eval_loss"]
    assert loss == pytest.approx(by_definition(model(), examples(), "token").item(), rel=1e-4)


def test_a_round_takes_the_weights_of_its_own_examples(tmp_path, tokenizer):
    made = trainer(model(), examples(), tmp_path, tokenizer)
    for weights, columns in ((WEIGHTS, 3), ((1.0,) * 4, 2), (WEIGHTS, 3)):
        next_round(made, examples(weights), seed=1, learning_rate=0.05)
        (batch,) = made.get_train_dataloader()
        assert len(made.train_dataset.column_names) == columns
        assert ("weight" in batch) == (columns == 3)
    pickle.dumps(made.data_collator)  # for processes that load data


def test_a_resumed_run_with_weights_ends_in_the_same_weights_bit_for_bit(tmp_path, tokenizer):
    fields = {
        "max_steps": 6, "per_device_train_batch_size": 1, "loss_reduction": "sequence",
        "passed_through": {"report_to": "none", "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2},
    }  # fmt: skip
    rows, whole, resumed = examples(WEIGHTS), model(), model()
    fit(trainer(whole, rows, tmp_path, tokenizer, **fields), rows)
    assert newest_checkpoint(tmp_path).endswith("checkpoint-6")
    fit(trainer(resumed, rows, tmp_path, tokenizer, **fields), rows, resume=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_model_whose_micro_batches_are_averaged_alone_takes_no_other_reduction(tmp_path, tokenizer):
    network = model()
    network.accepts_loss_kwargs = False
    trainer(network, examples(), tmp_path, tokenizer)
    with pytest.raises(UsageError, match=r"^loss_reduction: sum: .*give token"):
        trainer(network, examples(), tmp_path, tokenizer, loss_reduction="sum")
