"""Where a model's files come from: the package, a directory, a GGUF file, the Hub; an adapter's base; loading errors.

`bcft:tiny-math` is the embedded policy, `bcft:tiny-init` the same model before training. Any other name is that of a
GGUF file (`gguf`), a local directory or a Hub id. Weights must be safetensors or GGUF: loading a pickle runs its code.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

from bcft.config.schema import ModelSettings
from bcft.errors import DataError, UsageError
from bcft.policy import gguf
from bcft.policy.hub_errors import hub_reason

ASSETS = Path(__file__).parents[1] / "assets"
_FORESEEN = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What `from_pretrained` raises for files that a user can damage or edit."""
_NO_CONFIGURATION = ("have a file named config.json", "Should have a `model_type` key in its config.json")
"""What transformers says about a Hub repository without a model's configuration."""


def locate(name: str, settings: ModelSettings | None = None) -> str:
    """Return the name that `from_pretrained` takes: for a `bcft:` name the directory in this package.

    settings: with a `gguf_file`, which belongs to their own `model_name_or_path` and to no other name.
    """
    if settings is not None and settings.gguf_file and name == settings.model_name_or_path:
        return gguf.joined(_directory(name), settings.gguf_file)
    if name.startswith(gguf.PACKAGE):
        return gguf.in_package(name)
    if not name.startswith("bcft:"):
        return name
    if name not in ("bcft:tiny-math", "bcft:tiny-init"):
        raise UsageError(
            f"model_name_or_path: {name!r} is not embedded; the embedded models are bcft:tiny-math and bcft:tiny-init"
        )
    return str(ASSETS / "tiny-math")


def adapter_base(name: str) -> str:
    """Return the base model that an adapter directory names; '' when `name` is not an adapter directory.

    Raises UsageError when its adapter_config.json cannot be read or names no base model.
    """
    path = Path(name) / "adapter_config.json"
    if not path.is_file():
        return ""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path: cannot read {str(path)!r}: {first_line(error)}") from error
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not isinstance(base, str) or not base:
        raise UsageError(f"model_name_or_path: {str(path)!r} has no base_model_name_or_path")
    # Adapters of the embedded policy name the directory of the package that made them.
    embedded = Path(base).parts[-3:] == (*ASSETS.parts[-2:], "tiny-math") and not Path(base).is_dir()
    return str(ASSETS / "tiny-math") if embedded else locate(base)


def check_base(name: str) -> None:
    """Raise UsageError when an adapter's base is a directory or a GGUF file that is not there any more."""
    base = adapter_base(name)
    file = gguf.is_gguf(base) and not _on_the_hub(base)
    if base and (file or is_path(base)) and not (Path(base).is_file() if file else Path(base).is_dir()):
        raise UsageError(
            f"model_name_or_path: {str(Path(name) / 'adapter_config.json')!r} names the base {base!r}, and there is no "
            f"such {'file' if file else 'directory'}: move it back, or set base_model_name_or_path there to where the "
            f"base is now"
        )


def base_config(name: str, settings: ModelSettings) -> Any:
    """Load the configuration of a model; of an adapter's base."""
    name = locate(name, settings)
    return from_pretrained(AutoConfig, adapter_base(name) or name, settings)


def is_path(name: str) -> bool:
    """Return whether a name can only be a directory: a Hub id has at most one slash."""
    return name.count("/") > 1 or name.startswith((".", "/", "~", "runs/"))


def from_pretrained(auto: Any, name: str, settings: ModelSettings, **extra: Any) -> Any:
    """Call `from_pretrained`; raise UsageError of one line for the errors that a user can cause."""
    if gguf.is_gguf(name):
        return _from_gguf(auto, name, settings, **extra)
    gguf.refuse_directory_of_gguf(_directory(name))
    show_progress_of_hub_only(name)
    trust, revision = settings.trust_remote_code, settings.model_revision
    try:
        return auto.from_pretrained(name, revision=revision, trust_remote_code=trust, **extra)
    except torch.OutOfMemoryError:
        raise
    except _FORESEEN as error:
        raise cannot_load(name, error, settings) from error


def _from_gguf(auto: Any, name: str, settings: ModelSettings, **extra: Any) -> Any:
    """Call `from_pretrained` for a GGUF file, which must be whole; weights are dequantized."""
    check_gguf(name, settings)
    (place, file), trust = gguf.split(name), settings.trust_remote_code
    if auto is AutoModelForCausalLM:  # without it linear layers may stay packed, and the model could not be saved
        extra["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with gguf.read_once():
            revision = settings.model_revision
            return auto.from_pretrained(place, gguf_file=file, revision=revision, trust_remote_code=trust, **extra)
    except torch.OutOfMemoryError:
        raise
    except MemoryError as error:
        raise UsageError(
            f"model_name_or_path: {name!r} does not fit into memory when it is dequantized: give a smaller model, or "
            f"use a machine with more memory"
        ) from error
    except OSError as error:  # the file was whole a moment ago: the disk, or the Hub
        raise cannot_load(place, error, settings, what=file) from error
    except gguf.DAMAGE as error:
        raise gguf.unreadable(name, error) from error
    except _FORESEEN as error:
        raise cannot_load(name, error, settings) from error


def check_gguf(name: str, settings: ModelSettings) -> str:
    """Raise UsageError for a GGUF file that is not there, or not whole; return its quantization, such as `Q4_1`."""
    place, file = gguf.split(name)
    path = Path(place) / file
    if _on_the_hub(name):
        show_progress_of_hub_only(place)
        try:
            path = Path(hf_hub_download(place, file, revision=settings.model_revision))
        except (EntryNotFoundError, OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise UsageError(f"gguf_file: the Hub's {place!r} has no file {file!r}: see its Files page") from error
            raise cannot_load(place, error, settings, what=file) from error
    show_progress_of_hub_only(str(path.parent))
    return gguf.check(name, path, four_bits=settings.load_in_4bit)


def _on_the_hub(name: str) -> bool:
    return ":" in name and gguf.split(name)[0] != str(Path(name).parent)


def _directory(name: str) -> str:
    """Return a name that is no GGUF file's. Raises UsageError if it can only be a directory, and there is none."""
    if not Path(name).is_dir() and is_path(name):
        raise UsageError(f"model_name_or_path: there is no directory {name!r}: run the recipe that makes it first")
    return name


def cannot_load(name: str, error: Exception, settings: ModelSettings, *, what: str = "") -> UsageError:
    """Return the UsageError for a model or a file of it that cannot be loaded; `what`: the file, if it is one."""
    local = Path(name).is_dir()
    reason = "" if local else hub_reason(error, name, revision=settings.model_revision)
    key = "model_revision" if "no revision" in reason else "model_name_or_path"
    if not reason and not local and any(words in str(error) for words in _NO_CONFIGURATION):
        reason = (
            "its repository has no config.json with a model_type, so it is not a transformers model; if it is an "
            f"adapter, run `hf download {name} --local-dir DIRECTORY` and give the directory; if "
            "it has GGUF files, name one with gguf_file"
        )
    if not reason and str(error).startswith("Couldn't instantiate the backend tokenizer"):
        reason = "it has no tokenizer that transformers can load: save one beside the model"
    return UsageError(f"{key}: cannot load {f'{what} of ' if what else ''}{name!r}: {reason or first_line(error)}")


@contextmanager
def adapter_errors(name: str) -> Iterator[None]:
    """Raise UsageError of one line for what peft raises when an adapter is damaged or does not fit its base."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 300 else f"{reason[:297]}..."  # torch lists every weight that does not fit
        raise UsageError(f"model_name_or_path: cannot load the adapter {name!r}: {reason}") from error


def refuse_pickles(name: str, *, stem: str = "") -> None:
    """Raise DataError for a local directory with pickled weights only: loading a pickle runs its code."""
    path = Path(name)
    if not path.is_dir() or any(path.glob(f"{stem}*.safetensors")):
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise DataError(f"{path / pickles[0]}: pickled weights can run code: convert them to safetensors")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, two if the first announces another; without a text its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))


def show_progress_of_hub_only(name: str) -> None:
    """Show progress bars for downloads only: a local file loads at once."""
    if Path(name).is_dir():
        logging.disable_progress_bar()
    else:
        logging.enable_progress_bar()
