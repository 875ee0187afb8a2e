"""Splits by the hash of the problems: shares that never change, and more of a small dataset."""

import pytest
from helpers.rows import many, shared_prompts, splits
from helpers.tiny import write_jsonl

from bcft.errors import DataError, UsageError
from bcft.types import bucket, problem_id


def test_splits_by_hash_do_not_overlap_lose_nothing_and_ignore_the_order(tmp_path):
    rows = many()
    for asked in (10, 10_000):
        forward = splits(write_jsonl(tmp_path / "a.jsonl", rows), dev=asked, test=asked)
        backward = splits(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), dev=asked, test=asked)
        parts = [{d.problem.id for d in part} for part in (forward.train, forward.dev, forward.test)]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
        assert [len(part) for part in parts[1:]] == ([10, 10] if asked == 10 else [80, 80])
        assert [d.problem.id for d in forward.test] == [d.problem.id for d in backward.test]
        assert [d.problem.id for d in forward.dev] == [d.problem.id for d in backward.dev]
    assert sum(map(len, parts)) == len(rows)


def test_a_share_that_holds_as_many_as_asked_for_is_what_the_hash_alone_says(tmp_path):
    for n, asked in ((400, 0), (400, 10), (1000, 30), (3000, 100), (3000, 128)):
        parts = splits(write_jsonl(tmp_path / "a.jsonl", many(n)), dev=asked, test=asked)
        ids = sorted(problem_id(row["prompt"]) for row in many(n))
        shares = [[key for key in ids if low <= bucket(key) < low + 0.05] for low in (0.0, 0.05)]
        assert min(map(len, shares)) >= asked
        assert [d.problem.id for d in parts.test] == shares[0][:asked]
        assert [d.problem.id for d in parts.dev] == shares[1][:asked]
        assert {d.problem.id for d in parts.train} == {key for key in ids if bucket(key) >= 0.1}


def test_a_small_dataset_holds_out_as_many_as_asked_for_up_to_a_fifth(tmp_path):
    held = {}
    for n in (5, 9, 16, 32, 64, 500):
        for asked in (2, 500):
            parts = splits(write_jsonl(tmp_path / "a.jsonl", many(n)), dev=asked, test=asked)
            held[n, asked] = [len(part) for part in (parts.train, parts.dev, parts.test)]
            ids = {d.problem.id for part in (parts.train, parts.dev, parts.test) for d in part}
            # The share of the hash stays out of training even if it is larger than asked for.
            assert len(ids) == n or (n, asked) == (500, 2) or n == 64
    assert {key[0]: sizes for key, sizes in held.items() if key[1] == 500} == {
        5: [3, 1, 1],
        9: [7, 1, 1],
        16: [10, 3, 3],
        32: [20, 6, 6],
        64: [40, 12, 12],
        500: [300, 100, 100],
    }
    assert {key[0]: sizes[1:] for key, sizes in held.items() if key[1] == 2} == {
        5: [1, 1],
        9: [1, 1],
        16: [2, 2],
        32: [2, 2],
        64: [2, 2],
        500: [2, 2],
    }


def test_a_small_dataset_adds_training_problems_to_the_shares_in_the_order_of_their_hash(tmp_path):
    parts = splits(write_jsonl(tmp_path / "a.jsonl", many(200)), dev=500, test=500)
    ids = sorted(problem_id(row["prompt"]) for row in many(200))
    test, dev = ([key for key in ids if low <= bucket(key) < low + 0.05] for low in (0.0, 0.05))
    rest = [key for key in ids if bucket(key) >= 0.1]
    more = 40 - len(test)
    assert {d.problem.id for d in parts.test} == {*test, *rest[:more]}
    assert {d.problem.id for d in parts.dev} == {*dev, *rest[more : more + 40 - len(dev)]}


@pytest.mark.parametrize(("inside", "outside"), [(1, 0), (2, 2), (3, 3), (3, 7), (5, 10)])
def test_a_share_that_is_larger_than_a_fifth_by_chance_is_partly_trained_on(inside, outside, tmp_path):
    rows = many(2000)
    chosen = [row for row in rows if bucket(problem_id(row["prompt"])) < 0.05][:inside]
    chosen += [row for row in rows if bucket(problem_id(row["prompt"])) >= 0.1][:outside]
    most = (inside + outside) // 5
    parts = splits(write_jsonl(tmp_path / "a.jsonl", chosen), dev=500, test=500)
    assert [len(parts.train), len(parts.dev), len(parts.test)] == [len(chosen) - 2 * most, most, most]
    assert [d.problem.id for d in parts.test] == sorted(problem_id(row["prompt"]) for row in chosen)[:most]


def test_repeated_rows_count_once_and_stay_together_in_a_small_dataset(tmp_path):
    rows = [row | {"level": n} for n in range(6) for row in many(20)]
    parts = splits(write_jsonl(tmp_path / "a.jsonl", rows), dev=500, test=500)
    assert [len(parts.dev), len(parts.test), len(parts.train)] == [4, 4, 12 * 6]
    assert shared_prompts(parts) == set()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_dataset_of_one_to_four_problems_is_trained_whole_and_says_what_dev_needs(tmp_path, n):
    parts = splits(write_jsonl(tmp_path / "a.jsonl", many(n)), dev=128, test=500)
    assert [len(parts.train), len(parts.dev), len(parts.test)] == [n, 0, 0]
    with pytest.raises(DataError, match=rf"a\.jsonl:1: {n} problems are too few .* give 5 or more, or a split `valid"):
        parts.require_dev(128)
    with pytest.raises(UsageError, match=r"^eval_dev_problems: 0: dev problems choose"):
        parts.require_dev(0)
    splits(write_jsonl(tmp_path / "a.jsonl", many(5)), dev=1).require_dev(1)


def test_fewer_evaluated_problems_are_among_those_held_out_for_more(tmp_path):
    for n, most in ((3000, 100), (100, 500)):
        path = write_jsonl(tmp_path / "a.jsonl", many(n))
        more, fewer = splits(path, dev=most, test=most), splits(path, dev=5, test=5)
        assert {d.problem.id for d in fewer.held_out} <= {d.problem.id for d in more.held_out}
        assert (fewer.train == more.train) == (n == 3000)
