"""Datasets to splits: every source, and splits that cannot overlap."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers.rows import everything, many, shared_prompts, splits
from helpers.tiny import write_jsonl

from bcft.data import sources
from bcft.data.loading import HELD_OUT
from bcft.errors import BcftError, DataError
from bcft.types import TrainingExample, bucket, problem_id

DIGESTS = {
    "bcft:arithmetic": "525fca7a35bc2c5d6fd0d82755dd094d7a38da5fc406daec9a5152617923640b",
    "bcft:grid-walk": "c0dc64ad64ca4dcf937c7ea6c830edfdff895b814b4cd5142bee140edc56d431",
}


def test_a_dataset_that_does_not_exist_is_an_error_of_one_line(tmp_path):
    for name in (tmp_path, "nobody/no-such-dataset", "bcft:chess"):
        with pytest.raises(DataError) as caught:
            splits(name)
        assert "\n" not in str(caught.value)


class HubError(OSError):
    """An error of the Hub as its library names it; the class's name is what is recognized."""

    def __init__(self, status):
        super().__init__(f"{status} Client Error. (Request ID: x)\n\nmore lines")
        self.response = SimpleNamespace(status_code=status)


@pytest.mark.parametrize(
    ("kind", "status", "says"),
    [
        (
            "GatedRepoError",
            403,
            "it is gated, and this account has no access yet: ask at https://hugging",
        ),
        (
            "GatedRepoError",
            401,
            "it is gated: ask for access at https://huggingface.co/datasets/owner/name, then",
        ),
        ("RepositoryNotFoundError", 404, "the Hub has no such dataset repository: check the spelling"),
        ("RepositoryNotFoundError", 401, "the Hub shows no such repository to this machine: check the spelling"),
        ("HfHubHTTPError", 429, "the Hub answers 429, too many requests: wait some minutes"),
        ("HfHubHTTPError", 503, "the Hub answers 503: try again later"),
        ("OSError", 0, "0 Client Error. (Request ID: x)"),
    ],
)
def test_an_error_of_the_hub_is_one_line_that_says_what_to_do(kind, status, says, monkeypatch):
    def load_dataset(*_):
        cause = type(kind, (HubError,), {})(status)
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is not\nthere") from cause

    if kind == "OSError":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: (_ for _ in ()).throw(HubError(status)))
    else:
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        splits("owner/name")
    start = "dataset_name: cannot load 'owner/name' as a file, a directory or a Hub dataset: "
    assert str(caught.value).startswith(start + says)
    assert "\n" not in str(caught.value)


def test_every_format_gives_the_same_demonstrations(tmp_path):
    rows = many(20)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("prompt,completion,answer\n" + "".join(",".join(r.values()) + "\n" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_jsonl(tmp_path / "train.jsonl", rows)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.csv", tmp_path / "d.parquet", tmp_path]
    first, *others = (
        [(d.problem.id, d.completion, d.problem.columns) for d in everything(splits(source, dev=99, test=99))]
        for source in sources
    )
    rows.sort(key=lambda row: row["prompt"])
    assert first == [
        (problem_id(r["prompt"]), ({"role": "assistant", "content": r["completion"]},), {"answer": r["answer"]})
        for r in rows
    ]
    assert all(other == first for other in others)


def test_the_same_problem_with_other_white_space_is_the_same_problem():
    assert problem_id("2  + 2?\n") == problem_id("2 + 2?")


def test_a_string_and_the_same_words_as_one_user_message_are_one_problem():
    for words in ("2 + 2?", " 2 +\n2? "):
        assert problem_id([{"role": "user", "content": words}]) == problem_id("2 + 2?")
    assert problem_id([{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 2?"}]) != problem_id(
        "2 + 2?"
    )


def test_a_test_split_of_its_own_is_used_and_slices_are_understood(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", many(100))
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"held out {i}", "answer": str(i)} for i in range(30)])
    parts = splits(tmp_path, test=20, dev=99, dataset_train_split="train[10:60]")
    assert {d.problem.prompt for d in (*parts.train, *parts.dev)} == {f"{i} + {i}?" for i in range(10, 60)}
    assert [d.problem.prompt for d in parts.train] == sorted(
        (d.problem.prompt for d in parts.train), key=lambda prompt: int(prompt.split()[0])
    )
    assert len(parts.test) == 20
    assert all(str(d.problem.prompt).startswith("held out") for d in parts.test)
    named = splits(tmp_path, test=20, dev=99, dataset_train_split="train[10:60]", dataset_test_split="test")
    assert named == parts
    with pytest.raises(DataError, match="no split 'exam'"):
        splits(tmp_path, test=20, dataset_test_split="exam")
    with pytest.raises(DataError, match=r"^dataset_train_split: 'train\[:10%\]' is not understood"):
        splits(tmp_path, dataset_train_split="train[:10%]")
    with pytest.raises(DataError, match=r"^dataset_test_split: 'test\[1\]' is not understood"):
        splits(tmp_path, dataset_test_split="test[1]")


def test_a_test_split_that_is_given_must_exist_and_the_default_one_need_not(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", many(100))
    assert splits(tmp_path, test=20).test
    with pytest.raises(DataError, match=r"^dataset_test_split: .* has no split 'test'"):
        splits(tmp_path, test=20, dataset_test_split="test")
    with pytest.raises(DataError, match=r"^dataset_test_split: .* is one file without splits"):
        splits(tmp_path / "train.jsonl", test=20, dataset_test_split="test")


def test_training_prompts_that_are_also_held_out_are_refused_unless_allowed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", many(50))
    write_jsonl(tmp_path / "test.jsonl", many(50)[7:9])
    with pytest.raises(DataError, match=r"train\.jsonl:8: 2 of \d+ training prompts are also in dev or test"):
        splits(tmp_path, test=5)
    assert len(shared_prompts(splits(tmp_path, test=5, allow_overlap=True))) == 2


def test_the_embedded_splits_share_no_problem():
    parts = splits("bcft:arithmetic", dev=128, test=500, dataset_train_split="train[:500]")
    ids = [{d.problem.id for d in part} for part in (parts.train, parts.dev, parts.test, parts.harder)]
    assert [len(part) for part in ids] == [500, 128, 500, 200]
    assert len(set.union(*ids)) == sum(map(len, ids))


# Kept rows and replay


@pytest.fixture
def run(tmp_path):
    """Return the directory of a run on the files of `tmp_path`, with a kept row of each of ten problems."""
    write_jsonl(tmp_path / "train.jsonl", many(100))
    write_jsonl(tmp_path / "test.jsonl", many(120)[100:])
    directory = tmp_path / "run"
    directory.mkdir()
    # An earlier version wrote no more keys than these.
    values = dict(zip(HELD_OUT, (str(tmp_path), None, "train[:80]", None, 99, 99, {}, "text", None), strict=False))
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    (directory / "manifest.json").write_text('{"tokenizer": "abc"}')
    examples = [
        TrainingExample(
            f"1-{problem_id(row['prompt'])}-0", problem_id(row["prompt"]), (1, n + 2, 3), (-100, n + 2, 3),
            source="self", prompt=({"role": "user", "content": row["prompt"]},),
            completion=({"role": "assistant", "content": row["completion"]},),
        )
        for n, row in enumerate(many(10))
    ]  # fmt: skip
    write_jsonl(directory / "kept.jsonl", [example.to_json() for example in examples])
    return directory


def test_kept_rows_are_trained_and_the_problems_of_their_run_held_out(run, tmp_path):
    source = splits(tmp_path, dev=99, test=99, dataset_train_split="train[:80]")
    for name in (run, run / "kept.jsonl"):
        # The slice is one of the kept rows; the splits are those that the run's config.yaml names.
        parts = splits(name, dev=99, test=99, dataset_train_split="train[2:8]", allow_overlap=True)
        assert (parts.dev, parts.test) == (source.dev, source.test)
        assert [d.sampled.input_ids for d in parts.train] == [(1, n + 2, 3) for n in range(2, 8)]
        assert {d.tokenizer for d in parts.train} == {"abc"}
        assert shared_prompts(parts) == set()


def test_a_kept_row_of_a_held_out_problem_is_refused_unless_allowed(run, tmp_path):
    held_out = splits(tmp_path, test=99).test[0].problem.id
    first, *others = (run / "kept.jsonl").read_text().splitlines()
    first = json.dumps(json.loads(first) | {"problem_id": held_out})
    (run / "kept.jsonl").write_text("\n".join([first, *others]))
    with pytest.raises(DataError, match=r"kept\.jsonl:1: 1 of 10 training prompts are also in dev or test"):
        splits(run, test=99)
    assert shared_prompts(splits(run, test=99, allow_overlap=True)) == {held_out}


def test_kept_rows_without_their_run_and_malformed_ones_are_refused(run):
    lines = (run / "kept.jsonl").read_text().splitlines()
    (run / "kept.jsonl").write_text("\n".join([*lines[:4], lines[4].replace('"labels": [-100,', '"labels": [')]))
    with pytest.raises(DataError, match=r"kept\.jsonl:5: not a row of kept\.jsonl: 3 input_ids but 2 labels"):
        splits(run, allow_overlap=True)
    (run / "kept.jsonl").write_text("")
    with pytest.raises(DataError, match=r"kept\.jsonl: no rows"):
        splits(run)
    (run / "config.yaml").write_text(yaml.safe_dump({"dataset_name": str(run)}))
    with pytest.raises(DataError, match=r"config\.yaml: its dataset, .* is itself the kept rows of a run"):
        splits(run)
    for damaged in (b"dataset_name: [", b"\xff", b"just words"):
        (run / "config.yaml").write_bytes(damaged)
        with pytest.raises(BcftError, match=r"config\.yaml: not ") as caught:
            splits(run)
        assert "\n" not in str(caught.value)
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"kept\.jsonl: no config\.yaml"):
        splits(run)


def test_kept_rows_of_a_run_whose_rows_were_given_in_python_are_refused_with_the_remedy(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"dataset_name": "train_dataset@1a2b3c4d"}))
    with pytest.raises(DataError, match=r"config\.yaml: the run was given its rows in Python.* write the rows to"):
        splits(run)


def test_kept_rows_hold_out_the_share_of_their_run_whatever_is_asked_for_now(run, tmp_path):
    """The run's own numbers decide which problems of a small dataset are held out."""
    (tmp_path / "test.jsonl").unlink()
    source = splits(tmp_path, dev=99, test=99, dataset_train_split="train[:80]")
    for asked in (0, 1, 5, 16, 500):
        parts = splits(run, dev=asked, test=asked, allow_overlap=True)
        assert parts.dev == source.dev[:asked]
        assert parts.test == source.test[:asked]
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"eval_dev_problems": 1, "eval_test_problems": 2}))
    parts = splits(run, dev=500, test=500, allow_overlap=True)
    assert {d.problem.id for d in parts.held_out} <= {d.problem.id for d in source.held_out}


def test_the_source_of_kept_rows_may_be_prompts_alone(run, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": row["prompt"], "answer": row["answer"]} for row in many(100)])
    assert len(splits(run, dev=9, test=9, allow_overlap=True).train) == 10


def test_replay_takes_the_training_split_without_held_out_problems(tmp_path):
    for name in ("main", "other"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "main" / "train.jsonl", many(50))
    write_jsonl(tmp_path / "main" / "exam.jsonl", many(60)[50:])
    write_jsonl(tmp_path / "other" / "train.jsonl", [*many(100)[40:], {"prompt": "empty", "completion": ""}])
    parts = splits(tmp_path / "main", test=99, dataset_test_split="exam", replay_dataset=str(tmp_path / "other"))
    replayed = {d.problem.id for d in parts.replay}
    shares = {problem_id(row["prompt"]) for row in many(100)[40:] if bucket(problem_id(row["prompt"])) >= 0.1}
    assert replayed == shares - {d.problem.id for d in parts.test}
    # Beside a test split, the share of test by hash belongs to training.
    own = splits(tmp_path / "main", test=99, dataset_test_split="exam", replay_dataset=str(tmp_path / "main"))
    assert {d.problem.id for d in own.replay} == {d.problem.id for d in own.train}
    keys = {"dataset_train_split": "train[:50]", "replay_dataset": "bcft:arithmetic-apprentice"}
    assert splits("bcft:arithmetic", **keys).replay[0].problem.where == ("bcft:arithmetic-apprentice train row 0")


def test_the_configuration_of_a_dataset_is_not_that_of_another_one_to_replay(monkeypatch):
    asked = []

    def hub(source):
        asked.append((source.dataset_name, source.dataset_config, source.dataset_train_split))
        return {"train": many(60)}

    monkeypatch.setattr(sources, "load_hub", hub)
    keys = {"dataset_config": "main", "dataset_train_split": "train[:40]"}
    other = splits("owner/main", replay_dataset="owner/other", **keys)
    assert {*asked} == {("owner/main", "main", "train[:40]"), ("owner/other", None, "train[:40]")}
    asked.clear()
    assert splits("owner/main", replay_dataset="owner/main", **keys).replay == other.train
    assert {*asked} == {("owner/main", "main", "train[:40]")}


def test_an_error_of_the_replayed_dataset_names_its_key(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many(100))
    with pytest.raises(DataError, match=r"^replay_dataset: .*none\.jsonl does not exist"):
        splits(path, replay_dataset=str(tmp_path / "none.jsonl"))
    (held_out, *_) = splits(path, test=9).test
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": held_out.problem.prompt, "completion": "9"}])
    with pytest.raises(DataError, match=r"^replay_dataset: .*b\.jsonl: no demonstration"):
        splits(path, test=9, replay_dataset=str(tmp_path / "b.jsonl"))


def test_the_digest_changes_with_any_data_that_is_trained_or_evaluated(tmp_path):
    def digest(rows, **keys):
        return splits(write_jsonl(tmp_path / "a.jsonl", rows), dev=99, test=99, **keys).digest

    rows, replay = many(100), write_jsonl(tmp_path / "b.jsonl", many(3))
    reply = {"role": "assistant", "content": "4"}
    other_prompt = [{"role": "user", "content": "Hi"}, reply]
    row = rows[0] | {"completion": None}
    digests = {
        digest(rows),
        digest(rows[:-1]),
        digest([rows[0] | {"completion": "x"}, *rows[1:]]),
        digest([rows[0] | {"answer": "x"}, *rows[1:]]),
        digest([row | {"messages": other_prompt}, *rows[1:]]),
        digest([row | {"messages": [*other_prompt, other_prompt[0], reply]}, *rows[1:]]),
        digest(rows, replay_dataset=replay),
    }
    assert len(digests) == 7
    assert digest(rows) in digests


def test_the_digest_of_the_same_data_never_changes():
    """Another format would refuse to resume every run that was started before the change."""
    for name, expected in DIGESTS.items():
        keys = {"replay_dataset": "bcft:arithmetic"} if name == "bcft:grid-walk" else {}
        assert splits(name, dev=20, test=20, dataset_train_split="train[:50]", **keys).digest == expected


@pytest.mark.skipif("BCFT_TEST_DATA" not in os.environ, reason="BCFT_TEST_DATA does not name the large data")
def test_gsm8k_has_the_splits_and_the_digest_that_it_always_had():
    directory = Path(os.environ["BCFT_TEST_DATA"]) / "gsm8k"
    parts = splits(directory, dev=128, test=500)
    assert (len(parts.train), len(parts.dev), len(parts.test)) == (7122, 128, 500)
    assert parts.digest == "092523838bcf0c81e5300aa516b3b6c96081e4e7dc43030456304ce47f6f91d9"
    assert parts.note_conflicts(None) == ""
    file = splits(directory / "train.jsonl", dev=128, test=300)
    assert (len(file.train), len(file.dev), len(file.test)) == (6757, 128, 300)
    assert file.digest == "e5bc59c58ca775510398161a1fc62c59b32a6a2672fed41d4aec6b16031d838c"
