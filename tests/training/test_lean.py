"""Packed rows and a head on labels only change how a micro-batch is computed, not its loss and gradient."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils

from bcft.training import lean
from bcft.types import IGNORED


def batch_of(rows: list[list[int]], prompts: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch padded on the right; the first `prompts[i]` tokens of row i carry no loss."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor(
            [
                [IGNORED] * prompt + row[prompt:] + [IGNORED] * (width - len(row))
                for row, prompt in zip(rows, prompts, strict=True)
            ]
        ),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def drawn(n: int, *, shared: int, seed: int) -> dict[str, torch.Tensor]:
    """Return a batch of n rows that begin with the same `shared` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 50, (count,), generator=generator).tolist()

    beginning = ids(shared)
    sizes = torch.randint(2, 20, (n, 2), generator=generator).tolist()
    rows = [beginning + ids(prompt) + ids(answer) for prompt, answer in sizes]
    return batch_of(rows, [shared + prompt for prompt, _ in sizes])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        )
    )  # fmt: skip


def loss_and_gradient(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
        total = total + loss.detach()
    return [total, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("shared", [0, 1, 7, 40])
@pytest.mark.parametrize("tokens", [30, 100, 1000])
def test_packed_rows_have_the_loss_and_the_gradient_of_the_padded_batch(model, monkeypatch, tokens, shared):
    monkeypatch.setattr(lean, "GROUP_TOKENS", tokens)
    batch = drawn(9, shared=shared, seed=shared)
    sequences = lean.pack(batch)
    for expected, got in zip(loss_and_gradient(model, [batch]), loss_and_gradient(model, sequences), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    labels = sum(int((sequence["labels"] != IGNORED).sum()) for sequence in sequences)
    assert labels == int((batch["labels"] != IGNORED).sum())
    assert all(s["input_ids"].shape[1] <= tokens or s["attention_mask"].ndim == 2 for s in sequences)


@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("tokens", [30, 1000])
def test_a_weight_stays_with_its_token(monkeypatch, tokens, shared):
    monkeypatch.setattr(lean, "GROUP_TOKENS", tokens)
    batch = drawn(9, shared=shared, seed=shared)
    weights = torch.arange(1.0, 10.0)[:, None].expand(batch["labels"].shape)

    def carried(labels, weights):
        return [pair for pair in zip(labels.flatten().tolist(), weights.flatten().tolist(), strict=True) if pair[0] > 0]

    sequences = lean.pack(batch | {"weight": weights})
    assert all(s["weight"].shape == s["labels"].shape for s in sequences)
    packed = [pair for s in sequences for pair in carried(s["labels"], s["weight"])]
    assert packed == carried(batch["labels"], weights)


def test_what_all_prompts_begin_with_is_read_once_and_nothing_is_padded():
    batch = batch_of([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8], [1, 2, 3, 9, 5]], [4, 4, 4])
    (sequence,) = lean.pack(batch)
    assert sequence["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 5]]
    assert sequence["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 3, 4]]
    ignored = IGNORED
    assert sequence["labels"].tolist() == [[*[ignored] * 4, 5, ignored, 7, 8, ignored, 5]]


def test_equal_rows_keep_a_token_of_their_own_before_their_labels():
    (sequence,) = lean.pack(batch_of([[1, 2, 3, 4], [1, 2, 3, 4]], [3, 3]))
    assert sequence["input_ids"].tolist() == [[1, 2, 3, 4, 3, 4]]


def test_a_row_whose_first_token_is_a_label_does_not_predict_it_from_another_row():
    sequences = lean.pack(batch_of([[1, 2], [3, 4]], [0, 0]))
    assert [s["labels"].tolist() for s in sequences] == [[[IGNORED, 2, IGNORED, 4]]]


def test_models_with_windows_or_without_rotary_positions_are_not_packed(model):
    assert lean.isolates(model)
    eager = LlamaForCausalLM._from_config(model.config, attn_implementation="eager")
    assert not lean.isolates(eager)


def test_the_head_of_trl_is_put_back_also_after_an_error():
    before = utils._use_triton

    def fail() -> None:
        with lean.labeled_positions_only():
            assert utils._use_triton(torch.device("cpu"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert utils._use_triton is before
