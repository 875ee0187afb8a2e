"""Durable writes: a reader sees a whole file or none, and a directory counts once its manifest is there."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bcft.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"


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


def write_text(path: Path, text: str) -> None:
    """Write a file whole: to a temporary neighbour, to the disk, then renamed."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a journal and make them durable; a line that a kill tore off before is cut away first."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.truncate(_whole_lines(path.read_bytes()))
            file.write("".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(content: bytes) -> int:
    """Return where the last whole line ends."""
    return content.rfind(b"\n") + 1


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file this package wrote, one a line; a torn last line is none."""
    content = path.read_bytes()
    return [json.loads(line) for line in content[: _whole_lines(content)].split(b"\n") if line]


def _plain(value: Any) -> Any:
    """Return a value as files hold it: no nulls (absent text is ""), and as text what JSON has no form for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None:
        return ""
    if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file this package wrote."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_manifest(directory: Path, files: Iterable[Path], **facts: Any) -> None:
    """Commit files of a directory: their hashes, written last and durably."""
    with storage(directory):
        hashes = {}
        for file in sorted(files):
            file.chmod(0o644)  # safetensors leaves 0600, which the rest of a group cannot read
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            hashes[file.relative_to(directory).as_posix()] = _sha256(file)
    write_json(directory / MANIFEST, {**facts, "files": hashes})


def committed(directory: Path) -> bool:
    """Tell whether the directory's manifest is there and every file in it is as it was."""
    try:
        files: dict[str, str] = read_json(directory / MANIFEST)["files"]
        return all(_sha256(directory / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def finished(directory: Path) -> bool:
    """Tell whether a run was committed here.

    Raises CheckpointError where it was and a file has changed since: training again would overwrite it.
    """
    if (directory / MANIFEST).is_file() and not committed(directory):
        raise CheckpointError(
            f"{directory}: a file is not as {MANIFEST} has it: restore it, or remove {MANIFEST} to train again"
        )
    return (directory / MANIFEST).is_file()


def _sha256(path: Path) -> str:
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
