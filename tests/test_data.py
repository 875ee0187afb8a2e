"""Datasets: every way in, every malformed row told with file and line, and splits that cannot overlap."""

import json

import pytest
from tiny import write_jsonl

from bcft.config.loader import load
from bcft.data.loading import load_splits
from bcft.errors import DataError
from bcft.types import bucket, problem_id

GOOD = {"prompt": "2 + 2?", "completion": "4", "answer": "4"}


def splits(source, **keys):
    keys = {"eval_dev_problems": 0, "eval_test_problems": 0} | keys
    return load_splits(load("sft", None, {"model_name_or_path": "bcft:tiny-init", "dataset_name": str(source), **keys}))


def everything(found):
    """Return what a source came apart into, in the order of its words."""
    return sorted((*found.train, *found.dev, *found.test), key=lambda d: str(d.problem.prompt))


def many(n=400):
    return [{"prompt": f"{i} + {i}?", "completion": str(2 * i), "answer": str(2 * i)} for i in range(n)]


BAD_LINES = {
    "torn": '{"prompt": "a", "compl',
    "not an object": '["a", "b"]',
    "null completion": '{"prompt": "a", "completion": null}',
    "number as completion": '{"prompt": "a", "completion": 4}',
    "no completion": '{"prompt": "a"}',
    "other columns": '{"input": "a", "output": "b"}',
    "empty prompt": '{"prompt": "  ", "completion": "b"}',
    "duplicate key": '{"prompt": "a", "prompt": "b", "completion": "c"}',
    "NaN": '{"prompt": "a", "completion": "b", "score": NaN}',
    "half a surrogate pair": '{"prompt": "a\\ud800", "completion": "b"}',
    "NUL tail": '{"prompt": "a", "completion": "b"}\x00\x00',
    "null reference": '{"prompt": "a", "completion": "b", "answer": null}',
    "list of strings as prompt": '{"prompt": ["a"], "completion": "b"}',
    "empty list of messages": '{"prompt": [], "completion": "b"}',
    "message without content": '{"prompt": [{"role": "user"}], "completion": "b"}',
    "unknown role": '{"prompt": [{"role": "robot", "content": "a"}], "completion": "b"}',
    "content that is a list": '{"prompt": [{"role": "user", "content": ["a"]}], "completion": "b"}',
    "prompt of the assistant's": '{"prompt": [{"role": "assistant", "content": "a"}], "completion": "b"}',
    "completion of two messages": (
        '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}'
    ),
    "question without answer": '{"question": "a"}',
    "nested too deeply": "[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_malformed_row_is_told_with_its_file_and_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as found:
        splits(path)
    assert str(found.value).startswith(f"{path}:2: ")
    assert "\n" not in str(found.value)


BAD_FILES = {
    "missing.jsonl": None,
    "empty.jsonl": b"",
    "latin1.jsonl": '{"prompt": "é", "completion": "b"}'.encode("latin-1"),
    "utf16.jsonl": '{"prompt": "a", "completion": "b"}'.encode("utf-16"),
    "ragged.csv": b"prompt,completion\na,b\nc\n",
    "quotes.csv": b'prompt,completion\n"a,b\n',
    "noise.parquet": b"PAR1 but not really",
    "array.json": b'[{"prompt": "a", "completion": "b"},\n{"prompt"',
    "columns.csv": b"input,output\na,b\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_told_by_name_in_one_line(tmp_path, name):
    if BAD_FILES[name] is not None:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(DataError) as found:
        splits(tmp_path / name)
    assert name in str(found.value)
    assert "\n" not in str(found.value)


def test_a_name_that_leads_nowhere_is_told_in_one_line(tmp_path):
    for name in (tmp_path, "nobody/no-such-dataset", "bcft:chess"):
        with pytest.raises(DataError) as found:
            splits(name)
        assert "\n" not in str(found.value)


def test_every_format_gives_the_same_demonstrations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = many(20)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("prompt,completion,answer\n" + "".join(",".join(r.values()) + "\n" for r in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    write_jsonl(tmp_path / "train.jsonl", rows)
    sources = [tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.csv", tmp_path / "d.parquet", tmp_path]
    keys = {"eval_dev_problems": 99, "eval_test_problems": 99}
    found = [[(d.problem.id, d.completion, d.problem.columns) for d in everything(splits(s, **keys))] for s in sources]
    rows.sort(key=lambda row: row["prompt"])
    assert found[0] == [(problem_id(r["prompt"]), r["completion"], {"answer": r["answer"]}) for r in rows]
    assert all(other == found[0] for other in found[1:])


def test_question_and_answer_keep_the_worked_solution_as_completion_and_reference(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}])
    (found,) = everything(splits(path, eval_dev_problems=1, eval_test_problems=1))
    assert (found.problem.prompt, found.completion) == ("2 + 2?", "2 + 2 = 4\n#### 4")
    assert found.problem.columns == {"answer": "2 + 2 = 4\n#### 4"}


def test_messages_are_kept_as_messages(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}]}]
    )
    (found,) = everything(splits(path, eval_dev_problems=1, eval_test_problems=1))
    assert (found.problem.prompt, found.completion) == (prompt, "4")


def test_splits_by_hash_do_not_overlap_lose_nothing_and_ignore_the_order(tmp_path):
    rows = many()
    one = splits(write_jsonl(tmp_path / "a.jsonl", rows), eval_dev_problems=10_000, eval_test_problems=10_000)
    two = splits(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), eval_dev_problems=10_000, eval_test_problems=10_000)
    parts = [{d.problem.id for d in part} for part in (one.train, one.dev, one.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(rows)
    assert all(5 <= len(part) <= 40 for part in parts[1:])
    assert all(bucket(key) < 0.05 for key in parts[2])
    assert all(0.05 <= bucket(key) < 0.10 for key in parts[1])
    assert [d.problem.id for d in one.test] == [d.problem.id for d in two.test]
    assert [d.problem.id for d in one.dev] == [d.problem.id for d in two.dev]


def test_the_same_problem_under_other_white_space_is_the_same_problem():
    assert problem_id("2  + 2?\n") == problem_id("2 + 2?")


def test_a_test_split_of_its_own_is_used_and_slices_are_understood(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", many(100))
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"held out {i}", "answer": str(i)} for i in range(30)])
    found = splits(tmp_path, eval_test_problems=20, eval_dev_problems=99, dataset_train_split="train[10:60]")
    assert {d.problem.prompt for d in (*found.train, *found.dev)} == {f"{i} + {i}?" for i in range(10, 60)}
    assert [d.problem.prompt for d in found.train] == sorted(
        (d.problem.prompt for d in found.train), key=lambda prompt: int(prompt.split()[0])
    )
    assert len(found.test) == 20
    assert all(str(d.problem.prompt).startswith("held out") for d in found.test)
    with pytest.raises(DataError, match="no split 'exam'"):
        splits(tmp_path, eval_test_problems=20, dataset_test_split="exam")
    with pytest.raises(DataError, match="is not understood"):
        splits(tmp_path, dataset_train_split="train[:10%]")


def test_training_prompts_that_are_also_held_out_are_refused_unless_allowed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", many(50))
    write_jsonl(tmp_path / "test.jsonl", many(50)[7:9])
    with pytest.raises(DataError, match=r"train\.jsonl:8: 2 of \d+ training prompts are also in dev or test"):
        splits(tmp_path, eval_test_problems=5)
    assert splits(tmp_path, eval_test_problems=5, allow_overlap=True).shared_prompts == 2


def test_a_string_and_the_same_words_as_one_user_message_are_one_problem():
    for words in ("2 + 2?", " 2 +\n2? "):
        assert problem_id([{"role": "user", "content": words}]) == problem_id("2 + 2?")
    assert problem_id([{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 2?"}]) != problem_id(
        "2 + 2?"
    )


def test_what_is_held_out_does_not_depend_on_how_much_is_evaluated(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", many())
    assert splits(path).train == splits(path, eval_dev_problems=500, eval_test_problems=500).train


def test_the_embedded_splits_share_no_problem():
    found = splits("bcft:arithmetic", eval_dev_problems=128, eval_test_problems=500, dataset_train_split="train[:500]")
    parts = [{d.problem.id for d in part} for part in (found.train, found.dev, found.test, found.harder)]
    assert [len(part) for part in parts] == [500, 128, 500, 200]
    assert len(set.union(*parts)) == sum(map(len, parts))
