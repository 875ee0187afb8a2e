"""Rows given in Python are split as a file of them, and named by their number."""

from types import MappingProxyType

import datasets
import pytest
from helpers.rows import many, splits
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.loading import load_splits
from bcft.errors import DataError


def given(rows, *, dev=99, test=99, demonstrations=True, **keys):
    sizes = EvaluationSettings(eval_dev_problems=dev, eval_test_problems=test)
    return load_splits(DataSettings(dataset_name="train_dataset@0", **keys), sizes, train=rows,
                       demonstrations=demonstrations)  # fmt: skip


@pytest.mark.parametrize("kind", ["list", "dataset", "generator", "tuple", "iterable", "mappings"])
def test_rows_given_in_python_are_split_as_a_file_of_them(kind, tmp_path):
    rows = many(60)
    kinds = {
        "list": rows,
        "dataset": datasets.Dataset.from_list(rows),
        "generator": (row for row in rows),
        "tuple": tuple(rows),
        "iterable": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "mappings": [MappingProxyType(row) for row in rows],
    }
    file = splits(write_jsonl(tmp_path / "a.jsonl", rows), dev=99, test=99)
    parts = given(kinds[kind])
    assert parts.digest == file.digest
    for part, other in zip((parts.train, parts.dev, parts.test), (file.train, file.dev, file.test), strict=True):
        assert [(d.problem.id, d.completion, d.problem.columns) for d in part] == [
            (d.problem.id, d.completion, d.problem.columns) for d in other
        ]
    assert {d.problem.where for d in (*parts.train, *parts.dev, *parts.test)} == {
        f"train_dataset row {i}" for i in range(60)
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "^train_dataset: no rows$"),
        (["a"], "^train_dataset row 0: expected a mapping from columns to values, not 'a'"),
        ([{"prompt": "a", "completion": "b"}, None], "^train_dataset row 1: expected a mapping"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "^train_dataset row 1: no completion"),
        ([{"prompt": "a", "completion": "b", "tools": ["x"]}], "^train_dataset row 0: tools: expected a list"),
        ([{"prompt": "a", "completion": "b", "label": False}], "^train_dataset row 0: column 'label'"),
    ],
)
def test_rows_in_python_that_cannot_be_trained_are_refused_by_their_number(rows, message):
    with pytest.raises(DataError, match=message):
        given(rows)


def test_rows_in_python_take_the_slice_and_may_be_prompts_alone():
    assert [d.problem.prompt for d in given(many(9), dev=0, dataset_train_split="train[2:4]").train] == [
        "2 + 2?", "3 + 3?"
    ]  # fmt: skip
    alone = [{"prompt": row["prompt"], "answer": row["answer"]} for row in many(9)]
    parts = given(alone, demonstrations=False)
    assert len(parts.problems_to_attempt()) == 7
    with pytest.raises(DataError, match=r"^train_dataset row 0: no completion"):
        given(alone)
