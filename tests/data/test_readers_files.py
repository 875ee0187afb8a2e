"""Files: every suffix gives the same rows, and a damaged or unknown file is one line that names it."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.files import SUFFIXES, read_rows
from bcft.data.loading import load_splits
from bcft.errors import DataError

ROWS = [{"prompt": f"{i}, twice?", "completion": f"{2 * i}\n", "answer": str(2 * i)} for i in range(4)]


def loaded(path, **keys):
    return load_splits(
        DataSettings(dataset_name=str(path), **keys), EvaluationSettings(eval_dev_problems=0, eval_test_problems=0)
    )


def content(suffix, rows=ROWS):
    """Return the bytes of a text file of this suffix, uncompressed."""
    if suffix.startswith(".json"):
        return (json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))).encode()
    sign = "," if suffix == ".csv" else "\t"
    lines = [sign.join(f'"{value}"' for value in row.values()) for row in rows]
    return "\n".join([sign.join(rows[0]), *lines]).encode()


TEXT = [".jsonl", ".json", ".csv", ".tsv"]
PACKED = [f"{suffix}.gz" for suffix in TEXT]


@pytest.mark.parametrize("suffix", [*TEXT, *PACKED])
@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
def test_every_suffix_in_any_case_gives_the_same_rows(suffix, change, tmp_path):
    raw = content(suffix.removesuffix(".gz"))
    (tmp_path / "dir").mkdir()
    for path in (tmp_path / f"rows{change(suffix)}", tmp_path / "dir" / f"train{change(suffix)}"):
        path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    rows = list(read_rows(tmp_path / f"rows{change(suffix)}"))
    assert [row for row, _ in rows] == ROWS
    assert all(where.startswith(f"{tmp_path / f'rows{change(suffix)}'}:") for _, where in rows)
    assert len({where for _, where in rows}) == len(ROWS)
    assert len(loaded(tmp_path / "dir").train) + len(loaded(tmp_path / "dir").held_out) <= len(ROWS)
    assert {d.problem.id for d in loaded(tmp_path / "dir").train} == {
        d.problem.id for d in loaded(tmp_path / f"rows{change(suffix)}").train
    }


def test_every_suffix_that_is_listed_is_tested():
    assert {*SUFFIXES} == {*TEXT, *PACKED, ".parquet"}


@pytest.mark.parametrize("name", [*PACKED, ".CSV.GZ"])
def test_a_damaged_gzip_file_is_one_line(name, tmp_path):
    whole = gzip.compress(content(name.lower().removesuffix(".gz")))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    no_block = whole[:10] + b"\xff" + whole[11:]
    for damaged in (whole[:-9], whole[:15], bytes(flipped), no_block, whole[:4], b"plain text", whole + b"tail"):
        path = tmp_path / f"rows{name}"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a whole gzip file") as caught:
            loaded(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [131_071, 131_072, 131_073, 1_000_000, 3_000_000])
def test_a_field_of_any_length_is_read_and_the_limit_of_the_process_stays(size, tmp_path):
    text = "x" * size
    before = csv.field_size_limit()
    for suffix in (".csv", ".tsv"):
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(content(suffix, [{"prompt": "a", "completion": text}]))
        assert next(read_rows(path))[0]["completion"] == text
        path.write_bytes(path.read_bytes() + b'\n"torn')
        with pytest.raises(DataError, match=r"not readable after line 2"):
            list(read_rows(path))
        assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("prompt,completion,completion", "column 'completion' is given twice"),
        ("prompt,prompt,completion", "column 'prompt' is given twice"),
        ("answer,prompt,completion,answer", "column 'answer' is given twice"),
        (",prompt,completion", "column 1 has no name"),
        ("prompt, ,completion", "column 2 has no name"),
        ("prompt,completion,,", "column 3 has no name"),
        ('prompt,"",completion', "column 2 has no name"),
    ],
)
def test_a_header_that_names_two_columns_alike_or_one_not_at_all_is_refused(header, reason, tmp_path):
    for sign, suffix in ((",", ".csv"), ("\t", ".tsv")):
        path = tmp_path / f"rows{suffix}"
        path.write_text(header.replace(",", sign) + "\n" + sign.join("abcd"[: header.count(",") + 1]) + "\n")
        with pytest.raises(DataError, match=reason) as caught:
            loaded(path)
        assert str(caught.value).startswith(f"{path}:1: ")


def test_a_parquet_file_with_two_columns_of_a_name_is_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column 'completion' is given twice"):
        loaded(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["rows.txt", "rows.xlsx", "rows", "rows.jsonl.zst", "rows.arrow", "rows.jsonl.bak"])
def test_a_file_of_another_suffix_is_there_and_not_a_format(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content(".jsonl"))
    with pytest.raises(DataError, match=r"is there, but not a format that can be read: \.jsonl, \.json, ") as caught:
        loaded(path)
    assert str(caught.value).startswith(f"dataset_name: {path} ")


@pytest.mark.parametrize("second", [".json", ".csv", ".JSONL", ".jsonl.gz", ".tsv"])
def test_two_files_of_one_split_are_refused_by_name(second, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / f"train{second}").write_bytes(b"")
    with pytest.raises(DataError, match=r"has train\S+ and train\S+: one file for each split"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("name", "raw", "reason"),
    [
        ("a.csv", b"prompt,completion\n\xff,b\n", "not UTF-8 (byte 18)"),
        ("a.csv", b'prompt,completion\na,b\n"c"d,e\n', "not readable after line 2"),
        ("a.csv", b'prompt,completion\n\n"a\nb",c\n"c"d,e\n', "not readable after line 4"),
        ("a.csv", b'prompt,completion\n"a\nb" c,d\n', "write quotes within a quoted field twice, or use jsonl"),
        ("a.csv", b'"prompt"s,completion\na,b\n', "not readable in line 1"),
        ("a.csv", b"prompt;completion\na;b\n", ":1: the header is one column, 'prompt;completion'"),
        ("a.csv", b'"prompt";"completion"\n"a";"b"\n', "separate columns by commas (.csv) or tabs (.tsv)"),
        ("a.csv", b"prompt; completion; answer\na, b; c; d\n", "separate columns by commas"),
        ("a.tsv", b"prompt;completion\na;b\n", "or tabs (.tsv)"),
        ("a.csv", b"\xef\xbb\xbfprompt;completion\r\na;b\r\n", "separate columns by commas"),
        ("a.json", b'{\n  "prompt": "a"\n}\n', ":1: not JSON: Expecting property name"),
        ("a.json", b'{\n  "prompt": "a"\n}\n', "write an array of objects, or one object a line"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt":\n"a"}\n', "or one object a line"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"},\n', ":1: not JSON: Extra data"),
        ("a.jsonl", b"prompt: a\n", ":1: not JSON: Expecting value at column 1: write an array of objects"),
        ("a.csv", b"prompt,completion\na,b\nc\n", "not as many fields"),
        ("a.tsv", b"prompt\tcompletion\na\tb\tc\n", "not as many fields"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "not readable as JSON"),
        ("a.json", b"[1, 2]", "expected an object with columns"),
    ],
)
def test_a_damaged_text_file_is_one_line_with_its_place(name, raw, reason, tmp_path):
    (tmp_path / name).write_bytes(raw)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        with pytest.raises(DataError) as caught:
            loaded(path)
        assert str(caught.value).startswith(str(path))
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
