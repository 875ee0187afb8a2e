"""Durable files: a journal keeps every complete chunk and nothing else, and damaged files are one-line errors."""

import pytest

from bcft.errors import CheckpointError
from bcft.runs.storage import Journal, read_journal, read_yaml


def test_a_torn_or_damaged_chunk_of_a_journal_is_removed_with_what_follows_it(tmp_path):
    file = tmp_path / "journal.jsonl"
    Journal(file).append([{"id": 1}, {"id": 2}])
    complete = file.read_bytes()
    with file.open("a") as torn:
        torn.write('{"sha256": "ab", "ro')
    assert read_journal(file) == [{"id": 1}, {"id": 2}]
    Journal(file)
    assert file.read_bytes() == complete
    Journal(file).append([{"id": 3}])
    assert [row["id"] for row in read_journal(file)] == [1, 2, 3]
    file.write_bytes(file.read_bytes().replace(b'"id": 2', b'"id": 7'))
    assert read_journal(file) == []


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n", b"\xff\xfe", b""])
def test_a_damaged_recipe_of_a_run_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml: not (readable|a mapping)") as caught:
        read_yaml(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
