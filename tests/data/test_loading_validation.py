"""A validation split is dev, wherever it comes from, and shares no prompt with training and test."""

import gzip
import json
from collections import Counter

import pytest
from helpers.rows import many, shared_prompts, splits
from helpers.tiny import write_jsonl

from bcft.data import sources
from bcft.errors import DataError


@pytest.fixture
def three(tmp_path):
    """Return a directory with a file for each of train, validation and test."""
    write_jsonl(tmp_path / "train.jsonl", many(100))
    write_jsonl(tmp_path / "validation.jsonl", [{"prompt": f"dev {i}", "completion": str(i)} for i in range(30)])
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"test {i}", "answer": str(i)} for i in range(30)])
    return tmp_path


def words(part):
    """Return how often each first word of a prompt occurs."""
    return Counter(str(d.problem.prompt).split()[0] for d in part)


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json", ".jsonl.gz", "hub"])
def test_a_validation_split_is_dev_and_training_keeps_all_its_rows(suffix, three, monkeypatch):
    name = three
    rows = [json.loads(line) for line in (three / "validation.jsonl").read_text().splitlines()]
    (three / "validation.jsonl").unlink()
    if suffix == "hub":
        name, calls = "owner/name", []
        hub = {"train": many(100), "validation": rows, "test": [{"prompt": f"test {i}"} for i in range(30)]}
        monkeypatch.setattr(sources, "load_hub", lambda source: calls.append(source) or hub)
    elif suffix == ".json":
        (three / "validation.json").write_text(json.dumps(rows))
    else:
        raw = "\n".join(map(json.dumps, rows)).encode()
        (three / f"validation{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    parts = splits(name, dev=20, test=10)
    assert (words(parts.dev), words(parts.test)) == ({"dev": 20}, {"test": 10})
    assert [d.problem.prompt for d in parts.train] == [row["prompt"] for row in many(100)]
    assert all(d.problem.where.startswith((f"{name}/validation", f"{name} validation row ")) for d in parts.dev)
    if suffix == "hub":
        assert len(calls) == 1, "the dataset is loaded once"


def test_without_a_test_split_dev_is_validation_and_test_a_share(three):
    (three / "test.jsonl").unlink()
    parts = splits(three, dev=99, test=99)
    assert words(parts.dev) == {"dev": 30}
    assert (len(parts.test), len(parts.train)) == (20, 80)


@pytest.mark.parametrize("keys", [{"dataset_train_split": "validation"}, {"dataset_test_split": "validation"}])
def test_a_validation_split_that_the_recipe_names_otherwise_is_not_dev(keys, three):
    parts = splits(three, dev=99, test=99, **keys)
    trained = "dev" if "dataset_train_split" in keys else "0"
    assert words((*parts.train, *parts.dev))[trained] == (30 if trained == "dev" else 1)
    assert words(parts.dev) != {"dev": 30}
    assert shared_prompts(parts) == set()


@pytest.mark.parametrize(
    ("split", "prompt", "message"),
    [
        (
            "train",
            "dev 3",
            r"train\.jsonl:101: 1 of 101 training .* in dev or test \(this .*validation\.",
        ),
        (
            "train",
            "dev  3",
            r"train\.jsonl:101: 1 of 101 training .* in dev or test \(this .*validation\.",
        ),
        ("train", "test 3", r"train\.jsonl:101: 1 of 101 training prompts are also in dev or test \(this .*test\."),
        ("validation", "test 3", r"validation\.jsonl:31: 1 of 31 dev prompts are also in test \(this one is .*test\."),
        ("test", "dev 3", r"validation\.jsonl:4: 1 of 30 dev prompts are also in test \(this one is .*test\.jsonl:31"),
        ("validation", "7 + 7?", r"train\.jsonl:8: 1 of 100 training prompts are also in dev or test"),
    ],
)
def test_a_prompt_in_two_of_three_splits_is_refused_unless_allowed(split, prompt, message, three):
    with (three / f"{split}.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": prompt, "completion": "x"}) + "\n")
    with pytest.raises(DataError, match=message):
        splits(three, dev=9, test=9)
    assert splits(three, dev=9, test=9, allow_overlap=True).dev


@pytest.mark.parametrize("name", ["dev", "val", "valid", "eval"])
def test_a_file_that_others_call_validation_is_not_ignored(name, three):
    (three / "validation.jsonl").rename(three / f"{name}.jsonl")
    with pytest.raises(DataError, match=f"its split '{name}' is not read: rename it to validation"):
        splits(three)
    assert splits(three, test=5, dataset_test_split=name).test
