"""Sources: the same rows give the same splits wherever they come from, and what cannot be read is one line."""

import json
import math
from datetime import date

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.rows import many, splits
from helpers.tiny import write_jsonl

from bcft.config.loader import load
from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data import stored
from bcft.data.examples import make_examples
from bcft.data.loading import load_splits
from bcft.data.sources import shares
from bcft.errors import DataError, UsageError
from bcft.policy.chat_template import Renderer
from bcft.testing import tiny_tokenizer
from bcft.training import tokens
from bcft.training.trainer import to_dataset
from bcft.types import Demonstration, Problem, TrainingExample, problem_id

ROWS = many(60)
RENDERER = Renderer(tiny_tokenizer([" ".join(row.values()) for row in ROWS]))


def mixed(*parts, dev=9, test=9, **keys):
    sizes = EvaluationSettings(eval_dev_problems=dev, eval_test_problems=test)
    return load_splits(DataSettings(datasets=parts, **keys), sizes)


def one_jsonl(path):
    return splits(write_jsonl(path / "a.jsonl", ROWS), dev=9, test=9)


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path / "a.parquet", row_group_size=7)
    return splits(path / "a.parquet", dev=9, test=9)


def saved(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path / "saved", num_shards=2)
    return splits(path / "saved", dev=9, test=9)


def saved_dict(path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path / "saved")
    return splits(path / "saved", dev=9, test=9)


def selected_and_saved(path):
    datasets.Dataset.from_list([*reversed(ROWS)]).select(range(59, -1, -1)).save_to_disk(path / "saved")
    return splits(path / "saved", dev=9, test=9)


def glob(path):
    for number in range(3):
        write_jsonl(path / f"part-{number}.jsonl", ROWS[20 * number : 20 * number + 20])
    return splits(path / "part-*.jsonl", dev=9, test=9)


def braces_and_commas(path):
    glob(path)
    (path / "part-2.jsonl").rename(path / "last.json")
    return splits(f"{path}/part-{{0,1}}.jsonl, {path}/last.json", dev=9, test=9)


def deeper(path):
    for number in range(2):
        (path / f"{number}").mkdir()
        write_jsonl(path / f"{number}" / "a.jsonl", ROWS[30 * number : 30 * number + 30])
    return splits(path / "**" / "a.jsonl", dev=9, test=9)


def function(_):
    return splits("helpers.sources:sums", dev=9, test=9, dataset_args={"n": 60})


def mixture(path):
    return mixed({"path": write_jsonl(path / "a.jsonl", ROWS), "fraction": 1.0})


def mixture_of_parts(path):
    glob(path)
    saved(path)
    files = [str(path / "part-0.jsonl"), str(path / "part-1.jsonl")]
    return mixed({"path": "json", "data_files": files}, {"path": str(path / "saved"), "split": "train[40:60]"})


SAME = [parquet, saved, saved_dict, selected_and_saved, glob, braces_and_commas, deeper, function, mixture,
        mixture_of_parts]  # fmt: skip


@pytest.mark.parametrize("source", SAME)
def test_the_same_rows_from_any_source_give_equal_splits_and_labels(source, tmp_path):
    for name in ("file", "other"):
        (tmp_path / name).mkdir()
    file, other = one_jsonl(tmp_path / "file"), source(tmp_path / "other")
    assert other.digest == file.digest
    assert (len(other.dev), len(other.test)) == (9, 9)
    for part in ("train", "dev", "test"):
        assert [(d.problem.id, d.problem.columns, d.completion) for d in getattr(other, part)] == [
            (d.problem.id, d.problem.columns, d.completion) for d in getattr(file, part)
        ]
    labels = [
        [(example.input_ids, example.labels) for example in make_examples(parts.train, RENDERER, max_length=512)[0]]
        for parts in (file, other)
    ]
    assert labels[0] == labels[1]


@pytest.mark.parametrize("kind", ["dict", "both"])
def test_splits_of_a_saved_dataset_are_held_out(kind, tmp_path):
    parts = {"train": ROWS, "test": many(70)[60:], "validation": many(75)[70:]}
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    if kind == "both":
        tables["exam"] = tables.pop("test")
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    keys = {"dataset_test_split": "exam"} if kind == "both" else {}
    loaded = splits(tmp_path / "saved", dev=99, test=99, **keys)
    assert (len(loaded.train), len(loaded.dev), len(loaded.test)) == (60, 5, 10)
    assert loaded.train[3].problem.where == f"{tmp_path / 'saved' / 'train'} row 3"
    with pytest.raises(DataError, match=r"^dataset_test_split: .* has no split 'other'"):
        splits(tmp_path / "saved", test=9, dataset_test_split="other")


def test_a_dataset_that_is_rows_alone_has_no_split_of_another_name(tmp_path):
    one_jsonl(tmp_path)
    saved(tmp_path)
    for name in (f"{tmp_path}/*.jsonl", tmp_path / "saved", "helpers.sources:sums"):
        with pytest.raises(DataError, match=r"^dataset_test_split: .* is rows without splits: give a directory"):
            splits(name, test=9, dataset_test_split="test")


# Files
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("b*.jsonl", "b*.jsonl does not exist"),
        ("a.jsonl,c.jsonl", "c.jsonl does not exist"),
        ("{a,c}.jsonl", "c.jsonl does not exist"),
        ("*", "notes.txt is there, but not a format that can be read: .jsonl, "),
        ("a.jsonl,a.*l", "a.jsonl is meant twice: name each file once"),
        ("a.jsonl,same.jsonl", "same.jsonl is meant twice: name each file once"),
        ("a.jsonl,folder", "folder is a directory: name the files in it, such as"),
        ("a.jsonl,folder/kept.jsonl", "folder/kept.jsonl has the kept rows of a run: give it alone"),
    ],
)
def test_files_that_cannot_be_meant_are_one_line(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "folder" / "kept.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "same.jsonl").symlink_to("a.jsonl")
    with pytest.raises(DataError) as caught:
        splits(name)
    assert str(caught.value).startswith("dataset_name: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_with_signs_of_a_pattern_that_exists_is_that_file(tmp_path):
    for name in ("a,b.jsonl", "[1].jsonl", "{x}.jsonl"):
        assert splits(write_jsonl(tmp_path / name, ROWS), dev=9, test=9).digest == one_jsonl(tmp_path).digest


@pytest.mark.parametrize("damage", ["state", "shard", "split", "empty"])
def test_a_damaged_saved_dataset_is_one_line(damage, tmp_path):
    path = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    if damage == "state":
        (path / "train" / "state.json").write_text("{")
    elif damage == "shard":
        next((path / "train").glob("*.arrow")).write_bytes(b"x")
    else:
        names = {"splits": [] if damage == "empty" else ["other"]}
        (path / "dataset_dict.json").write_text(json.dumps(names))
    with pytest.raises(DataError) as caught:
        splits(path)
    assert ("saved has no split 'train'" if damage in ("split", "empty") else "save it again") in str(caught.value)
    assert "\n" not in str(caught.value)


# A function
@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("helpers.sources:nobody", {}, "dataset_name: module 'helpers.sources' has no function 'nobody'"),
        ("helpers.nobody:rows", {}, "dataset_name: cannot import 'helpers.nobody'"),
        ("helpers.sources:sums", {"m": 1}, "called with {'m': 1} raised TypeError"),
        ("helpers.sources:breaks", {"n": 4}, "helpers.sources:breaks raised at row 4 RuntimeError: no more"),
        ("helpers.sources:splits_of", {}, "return the rows of one split: a list or a generator of dicts"),
        ("helpers.sources:numbers", {}, "helpers.sources:numbers row 1: expected a mapping from columns to values"),
        ("helpers.sources:nothing", {}, "helpers.sources:nothing: no rows"),
    ],
)
def test_a_function_that_gives_no_rows_is_one_line(name, arguments, reason):
    with pytest.raises((DataError, UsageError)) as caught:
        splits(name, dataset_args=arguments)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_of_a_function_are_keys_of_a_recipe_and_those_of_a_generator_are_not():
    recipe = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "my.module:rows", "dataset_args": {"n": 3}}
    assert load("sft", recipe, {}).data.dataset_args == {"n": 3}
    for key, value in {"answer_format": "tag", "dataset_config": "main", "dataset_test_split": "test"}.items():
        with pytest.raises(UsageError, match=f"{key}: has no effect with a function"):
            load("sft", recipe | {key: value}, {})
    with pytest.raises(UsageError, match="dataset_args: has no effect without a reasoning-gym dataset or a function"):
        load("sft", recipe | {"dataset_name": "a.jsonl"}, {})


# A mixture
def test_a_mixture_takes_the_first_rows_of_each_dataset_in_the_shares_that_trl_takes():
    trl = pytest.importorskip("trl")
    for sizes, fractions in (
        ([60, 60], [0.5, 0.5]),
        ([60, 9], [0.7, 0.3]),
        ([7, 11, 13], [3, 2, 1]),
        ([5, 90], [1, 1]),
    ):
        tables = [datasets.Dataset.from_list(many(size)) for size in sizes]
        assert sum(shares(sizes, fractions)) == len(_of_trl(trl, tables, fractions))
    assert shares([3, 4], [None, None]) == [3, 4]


def _of_trl(trl, tables, fractions):
    """Return the rows that TRL takes; its parts are loaded by name, so each is a file."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        parts = []
        for number, (table, fraction) in enumerate(zip(tables, fractions, strict=True)):
            file = Path(directory) / f"{number}.parquet"
            table.to_parquet(file)
            parts.append({"path": "parquet", "data_files": str(file), "fraction": fraction})
        return trl.get_dataset(trl.DatasetMixtureConfig(datasets=parts))["train"].to_list()


def test_a_mixture_says_how_many_rows_each_dataset_contributes(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", many(90)[60:])
    parts = mixed({"path": a, "fraction": 0.8}, {"path": b, "fraction": 0.2}, dev=0, test=0)
    taken = {d.problem.prompt for d in parts.train}
    assert taken <= {row["prompt"] for row in (*ROWS, *many(90)[60:75])}
    assert parts.shares == f"rows: 60 of 60 from {a}, 15 of 30 from {b}"
    assert str(parts).endswith(parts.shares)
    whole = mixed({"path": a}, {"path": b}, dev=0, test=0)
    assert whole.shares == f"rows: 60 of 60 from {a}, 30 of 30 from {b}"


def test_a_mixture_selects_splits_rows_and_columns(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "extra.jsonl", many(70)[60:])
    part = {"path": str(tmp_path), "split": "extra[2:9]", "columns": ["prompt", "completion"]}
    rows = mixed(part, dev=0, test=0, allow_overlap=True)
    everything = [*rows.train, *rows.held_out]
    assert {d.problem.prompt for d in everything} <= {row["prompt"] for row in many(69)[62:]}
    assert all(d.problem.columns == {} for d in everything)
    with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'level', .* it has prompt"):
        mixed({"path": str(tmp_path), "columns": ["level"]})


@pytest.mark.parametrize(
    ("datasets_key", "reason"),
    [
        ([], "is empty"),
        ([{}], "number 1: no path"),
        ([{"path": "a", "weight": 1}], "number 1: unknown field weight; there are path, name, "),
        ([{"path": "a", "fraction": 0}], "number 1: fraction wants a number > 0, not 0"),
        ([{"path": "a", "fraction": -1.5}], "number 1: fraction wants a number > 0, not -1.5"),
        ([{"path": "a", "fraction": True}], "number 1: fraction wants a number > 0, not True"),
        ([{"path": "a", "columns": "prompt"}], "number 1: columns wants a list of columns, not 'prompt'"),
        ([{"path": "a", "fraction": 1}, {"path": "b"}], "number 2 has no fraction, and another has"),
        ([{"path": "json"}], "number 1: path json says only a format: give data_files too"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused_before_anything_is_read(datasets_key, reason):
    with pytest.raises(UsageError) as caught:
        load("sft", {"model_name_or_path": "bcft:tiny-math", "datasets": datasets_key}, {})
    assert f"datasets: {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mixture_takes_the_place_of_a_dataset_and_one_of_them_is_required():
    parts = [{"path": "a.jsonl", "fraction": 0.5}, {"path": "b.jsonl", "split": "train[:9]", "fraction": 0.5}]
    recipe = {"model_name_or_path": "bcft:tiny-math", "datasets": parts}
    made = load("sft", recipe, {})
    assert list(made.data.datasets) == parts
    assert made.data.source_name == "a.jsonl + b.jsonl"
    # config.yaml is a recipe, and a command line may name the other of the two.
    again = load("sft", made.resolved, {})
    assert again.data == made.data
    assert load("sft", recipe, {"dataset_name": "c.jsonl"}).data.datasets is None
    assert load("sft", {**recipe, "datasets": None, "dataset_name": "c.jsonl"}, {"datasets": parts}).data == made.data
    for more, reason in (
        ({"dataset_name": "c.jsonl"}, "dataset_name is given too"),
        ({"dataset_config": "main"}, "dataset_config: has no effect with datasets"),
        ({"dataset_test_split": "test"}, "dataset_test_split: has no effect with datasets"),
        ({"dataset_train_split": "train[:9]"}, "dataset_train_split: has no effect with datasets"),
        ({"streaming": True}, "streaming: refused: "),
        ({"test_split_size": 0.1}, "test_split_size: refused: held-out problems are chosen by hash"),
    ):
        with pytest.raises(UsageError, match=reason):
            load("sft", recipe | more, {})
    with pytest.raises(UsageError, match="dataset_name: required"):
        load("sft", {"model_name_or_path": "bcft:tiny-math"}, {})


@pytest.mark.parametrize("path", ["bcft:arithmetic", "reasoning-gym:chain_sum", "run"])
def test_a_dataset_with_held_out_problems_of_its_own_is_no_part_of_a_mixture(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    write_jsonl(tmp_path / "run" / "kept.jsonl", ROWS)
    with pytest.raises(DataError, match=r"^datasets: number 2: .* has held-out problems of its own: give it alone"):
        mixed({"path": write_jsonl(tmp_path / "a.jsonl", ROWS)}, {"path": path})


def test_replay_may_be_any_source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    glob(tmp_path)
    (path_of_replay, expected) = (f"{tmp_path}/part-*.jsonl", splits(path, test=9, replay_dataset=path).replay)
    assert (
        splits(path, test=9, replay_dataset=path_of_replay).digest == splits(path, test=9, replay_dataset=path).digest
    )
    assert len(expected) == len(splits(path, test=9).train)


# Rows beyond memory
@pytest.mark.parametrize("room", [0, 500])
def test_rows_and_tokens_on_the_disk_are_those_in_memory(room, tmp_path, monkeypatch):
    rows = [*ROWS, *ROWS[:7], {"prompt": "1 + 1?", "completion": "two", "answer": "2"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    keys = {"dev": 9, "test": 9, "replay_dataset": path}

    def everything():
        parts = splits(path, **keys)
        examples, counts = make_examples(parts.train, RENDERER, max_length=512)
        columns = [dict(row) for row in to_dataset(examples)]
        return parts.digest, parts, list(examples), counts, columns, parts.note_conflicts(None)

    before = everything()
    monkeypatch.setattr(stored, "IN_MEMORY", room)
    monkeypatch.setattr(tokens, "IN_MEMORY", room)
    monkeypatch.setattr(tokens, "BATCH", 100)
    assert everything() == before
    assert before[3].duplicate > 0


def test_temporary_files_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    monkeypatch.setattr(tokens, "IN_MEMORY", 0)
    monkeypatch.setattr(tokens, "BATCH", 100)
    parts = splits(write_jsonl(tmp_path / "a.jsonl", ROWS))
    examples, _ = make_examples(parts.train, RENDERER, max_length=512)
    assert len(to_dataset(examples)) == len(examples) > 40
    assert list((tmp_path / "temporary").iterdir()) == []


def test_values_that_are_none_of_jsons_come_back_as_they_were(monkeypatch):
    class Text(str):
        """A text of another class."""

    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    values = [date(2026, 11, 27), (1, [2]), {3: "x"}, Text("a"), b"\x00", 2**200, [math.inf, -0.0, 1e-300], {"a": None},
              "caf\u00e9", np.float32(0.1), True, 1.0, 1]  # fmt: skip
    columns = [{"value": value, "nested": [value], "last": "z"} for value in values]
    rows = [{**row, **more} for row, more in zip(many(len(values)), columns, strict=True)]
    rows[0] |= {"completion": Text("two")}
    sizes = EvaluationSettings(eval_dev_problems=0, eval_test_problems=0)
    parts = load_splits(DataSettings(dataset_name="train_dataset@0"), sizes, train=rows)
    for d in parts.train:
        expected = rows[int(d.problem.where.split()[-1])]
        for column in ("value", "nested", "last"):
            got = d.problem.columns[column]
            assert (repr(got), type(got)) == (repr(expected[column]), type(expected[column]))
        assert [*d.problem.columns] == ["answer", "value", "nested", "last"]


def test_sampled_ids_marks_and_conversations_come_back_as_they_were():
    asked, reply = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "4", "train": True}
    example = TrainingExample("1-a-0", "a", (1, 2, 3), (-100, 2, 3), prompt=(asked,), completion=(reply,), weight=0.5,
                              template_kwargs={"x": 1}, where="file:2")  # fmt: skip
    given = [
        Demonstration(Problem(problem_id("Hi"), "Hi", {"chat_template_kwargs": {"x": 1}}, "file:2"), [asked], (reply,)),
        Demonstration(Problem("a", (asked,), {}, "file:2"), (asked,), (reply, asked, reply), example, "abc", 0.5),
        Demonstration(Problem("b", [asked]), "Hi"),
    ]
    store = stored.Store()
    store._room = 0
    assert list(store.extend(given).view()) == given
    assert [type(store.row(number).prompt) for number in range(3)] == [list, tuple, str]
