"""Durable writes: a reader sees a complete file or none, and a directory counts once its manifest is there."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from bcft.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"
SEAL = "sealed.json"
ROLLOUTS, SCORES, KEPT = "rollouts.jsonl", "scores.jsonl", "kept.jsonl"
"""What a round leaves: its trajectories, their scores with the decisions, and the rows to train on."""


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an OSError while writing below `path` into a StorageError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = path if path.is_absolute() else Path(os.path.relpath(path))
        raise StorageError(
            f"cannot write {place}: {getattr(error, 'strerror', None) or error}: make room or give another output_dir"
        ) from error


@contextmanager
def temporary_storage(what: str) -> Iterator[None]:
    """Turn an OSError while writing to a temporary file into a StorageError that says what to do; what: is written."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {what} to a temporary file in {tempfile.gettempdir()}: {error.strerror or error}: make room "
            f"there, or set TMPDIR to a directory on a disk with room"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    _write(path, [content])


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file atomically, part by part: to a temporary neighbor, to the disk, then renamed."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented for readers."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, row by row. Users' values go through `plain` first."""
    _write(path, (json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows))


class Journal:
    """Rows that are durable chunk by chunk: a chunk is one line with the hash of its rows, and counts when complete.

    Opening a journal removes a chunk that a kill left incomplete; `read_journal` returns its rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        whole = max((end for _, end in _chunks(path)), default=0)
        if path.is_file() and whole < path.stat().st_size:
            with storage(path):
                os.truncate(path, whole)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a chunk; it is on the disk when this returns."""
        text = json.dumps(rows, ensure_ascii=False, allow_nan=False)
        line = f'{{"sha256": "{_sha256_of(text)}", "rows": {text}}}\n'
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            if new:
                _sync_directory(self.path.parent)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a journal's complete chunks without changing the file: another process may be writing it."""
    return list(journal_rows(path))


def journal_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of `read_journal` one after the other: one chunk is in memory."""
    for rows, _ in _chunks(path):
        yield from rows


def _chunks(path: Path) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield the rows of each complete chunk, and where it ends: nothing counts after a damaged one."""
    if not path.is_file():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            whole += len(line)
            try:
                chunk = json.loads(line)
                text = json.dumps(chunk["rows"], ensure_ascii=False)
                if not line.endswith(b"\n") or chunk["sha256"] != _sha256_of(text):
                    return
            except (ValueError, KeyError, TypeError):
                return
            yield chunk["rows"], whole


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file this package wrote, one a line."""
    return [line for line, _ in jsonl_rows(path)]


def jsonl_rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the objects of such a file one after the other, each with the place where its line begins, in bytes."""
    place = 0
    with path.open("rb") as file:
        for line in file:
            if line != b"\n":
                yield json.loads(line), place
            place += len(line)


def plain(value: Any) -> Any:
    """Return a value as files hold it: without nulls (absent text is ""), and as text where JSON has no form for it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None:
        return ""
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file this package wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file this package wrote. Raises CheckpointError for a damaged file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as YAML: restore it, or give another directory") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a mapping: restore it, or give another directory")
    return value


def write_manifest(
    directory: Path, files: Iterable[Path], *, name: str = MANIFEST, about: Mapping[str, Any] | None = None
) -> None:
    """Commit files of a directory: their hashes, written last and durably. about: further facts about them."""
    with storage(directory):
        hashes = {}
        for file in sorted(files):
            file.chmod(0o644)  # safetensors leaves 0600, which the rest of a group cannot read
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            hashes[file.relative_to(directory).as_posix()] = file_hash(file)
    write_json(directory / name, {**(about or {}), "files": hashes})


def read_manifest(directory: Path, *, name: str = MANIFEST) -> dict[str, Any]:
    """Return a manifest with its hashes and further facts; {} unless it is there and every file in it is unchanged."""
    try:
        manifest = read_json(directory / name)
        files: dict[str, str] = manifest["files"]
        return manifest if all(file_hash(directory / file) == digest for file, digest in files.items()) else {}
    except (OSError, ValueError, KeyError):
        return {}


def committed(directory: Path) -> bool:
    """Return whether the directory's manifest is there and every file in it is unchanged."""
    return bool(read_manifest(directory))


def seal(directory: Path, *names: str) -> None:
    """Record that these files of an uncommitted round are complete; the list replaces the one sealed before.

    A file that was renamed into place is complete; its hash shows whether it has changed since.
    """
    write_manifest(directory, [directory / name for name in names], name=SEAL)


def commit_round(directory: Path, *, tokenizer: str) -> None:
    """Commit all files of a round except the weights below it, and remove the seal.

    tokenizer: the fingerprint of the tokenizer whose ids the files hold.
    """
    files = [file for file in directory.iterdir() if file.is_file() and file.name != SEAL]
    write_manifest(directory, files, about={"tokenizer": tokenizer})
    (directory / SEAL).unlink(missing_ok=True)


def sealed(directory: Path, name: str) -> bool:
    """Return whether a file was sealed, or committed with its round, and is unchanged."""
    for manifest in (MANIFEST, SEAL):
        try:
            return bool(read_json(directory / manifest)["files"][name] == file_hash(directory / name))
        except (OSError, ValueError, KeyError):
            continue
    return False


def finished(directory: Path) -> bool:
    """Return whether a run was committed here.

    Raises CheckpointError when a committed file has changed since: training again would overwrite it.
    """
    if (directory / MANIFEST).is_file() and not committed(directory):
        raise CheckpointError(
            f"{directory}: a file differs from its hash in {MANIFEST}: restore it, or remove {MANIFEST} to train again"
        )
    return (directory / MANIFEST).is_file()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
