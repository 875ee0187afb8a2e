"""Durable files: a journal keeps every complete chunk and nothing else."""

from bcft.runs.storage import Journal, read_journal


def test_a_torn_or_damaged_chunk_of_a_journal_is_cut_away_with_what_follows_it(tmp_path):
    file = tmp_path / "journal.jsonl"
    Journal(file).append([{"id": 1}, {"id": 2}])
    whole = file.read_bytes()
    with file.open("a") as torn:
        torn.write('{"sha256": "ab", "ro')
    assert read_journal(file) == [{"id": 1}, {"id": 2}]
    assert Journal(file).rows == [{"id": 1}, {"id": 2}]
    assert file.read_bytes() == whole
    Journal(file).append([{"id": 3}])
    assert [row["id"] for row in Journal(file).rows] == [1, 2, 3]
    file.write_bytes(file.read_bytes().replace(b'"id": 2', b'"id": 7'))
    assert Journal(file).rows == []
