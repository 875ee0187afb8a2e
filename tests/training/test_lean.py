"""Groups of like length and a head on labels only change how a micro-batch is computed, not its loss and gradient."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer import utils

from bcft.training.lean import GROUP_TOKENS, by_length, labeled_positions_only


def batch_of(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Return a batch padded on the right, whose ids name their row and column."""
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.arange(len(lengths))[:, None] * 1000 + torch.arange(width)
    return {"input_ids": ids * mask, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


@given(st.lists(st.integers(1, 700), min_size=1, max_size=20))
def test_every_row_is_in_one_group_whole_and_without_padding_that_it_does_not_need(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    groups = by_length(batch)
    rows = []
    for group in groups:
        kept = group["attention_mask"].sum(1)
        assert group["input_ids"].shape[1] == int(kept.max())
        assert group["input_ids"].numel() <= GROUP_TOKENS or len(kept) == 1
        for row, n in enumerate(kept.tolist()):
            labels = group["labels"][row]
            rows.append(int(labels[0]) // 1000)
            assert labels[:n].tolist() == batch["labels"][rows[-1], :n].tolist()
            assert (labels[n:] == -100).all()
    assert sorted(rows) == list(range(len(lengths)))


def test_equal_lengths_keep_the_order_of_the_batch() -> None:
    groups = by_length(batch_of([300, 300, 300]))
    assert [int(group["labels"][0, 0]) // 1000 for group in groups] == [0, 1, 2]


def test_the_head_of_trl_is_put_back_also_after_an_error() -> None:
    before = utils._use_triton
    try:
        with labeled_positions_only():
            assert utils._use_triton(torch.device("cpu"))
            raise KeyError
    except KeyError:
        pass
    assert utils._use_triton is before
