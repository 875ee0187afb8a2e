"""How many copies of the weights a run has at once, against what runs leave."""

import pytest

from bcft.config.loader import load
from bcft.runs.disk import copies_of_rounds, copies_of_sft

NAMES = {"model_name_or_path": "m", "dataset_name": "d"}


@pytest.mark.parametrize(("rounds", "copies"), [(1, 2), (2, 3), (3, 4), (10, 4)])
def test_rounds_keep_the_last_and_the_best_beside_the_next_and_the_result(rounds, copies):
    assert copies_of_rounds(load("filtered", None, NAMES | {"num_rounds": rounds}).rounds) == copies


@pytest.mark.parametrize(
    ("keys", "copies"),
    [
        ({"save_strategy": "no"}, 1),
        ({}, 3),
        ({"save_total_limit": 1}, 3),
        ({"save_total_limit": 3}, 5),
        ({"save_strategy": "epoch", "save_total_limit": 2}, 4),
    ],
)
def test_sft_writes_its_checkpoints_beside_the_result(keys, copies):
    assert copies_of_sft(load("sft", None, NAMES | keys).training) == copies
