"""A model's tokenizer and its generation config: all that decides which ids a text becomes, and where actions stop."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoTokenizer

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.chat_template import Renderer
from bcft.policy.gguf import is_gguf, split
from bcft.policy.sources import adapter_base, cannot_load, from_pretrained, locate

_FILE = "generation_config.json"
_NOT_SAMPLING = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class GenerationFile:
    """What a model's own generation_config.json says."""

    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Everything but token ids, such as a temperature or a repetition penalty."""

    @property
    def note(self) -> str:
        """One line about what is neither used nor saved; '' if there is nothing."""
        if not self.sampling:
            return ""
        values = ", ".join(f"{key} {value!s:.40}" for key, value in sorted(self.sampling.items()))
        return (
            f"generation config: the model's own {_FILE} holds {values}; this is neither used nor saved: actions are "
            f"sampled as the recipe says"
        )


def load_renderer(name: str, settings: ModelSettings) -> Renderer:
    """Load a model's tokenizer, and the ids at which its generation config stops.

    A model without a generation_config.json stops at its tokenizer's EOS. Raises UsageError when one of the files
    cannot be loaded: with other stop ids the policy would act otherwise.
    """
    tokenizer = load_tokenizer(name, settings)
    return Renderer(tokenizer, load_generation_file(name, settings).stop_ids, settings.chat_template_kwargs)


def load_tokenizer(name: str, settings: ModelSettings) -> Any:
    """Load the tokenizer with a pad token, its template replaced by `chat_template_path` where given.

    The pad token is taken from the vocabulary: embeddings are never resized.
    """
    name = locate(name, settings)
    if not (Path(name) / "tokenizer_config.json").is_file():
        name = adapter_base(name) or name
    tokenizer = from_pretrained(AutoTokenizer, name, settings)
    if settings.chat_template_path:
        tokenizer.chat_template = _template(Path(settings.chat_template_path))
    if settings.eos_token:
        if settings.eos_token not in tokenizer.get_vocab():
            raise UsageError(f"eos_token: {settings.eos_token!r} is not in the tokenizer's vocabulary")
        tokenizer.eos_token = settings.eos_token
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        spare = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<unk>")
        # Padding has no label and no attention, so sharing the stop token's id does no harm.
        tokenizer.pad_token = next((token for token in spare if token in vocabulary), tokenizer.eos_token)
    return tokenizer


def load_generation_file(name: str, settings: ModelSettings) -> GenerationFile:
    """Read a model's generation_config.json, of an adapter its base's; empty where the model has none.

    Raises UsageError for a file that cannot be read, is not JSON, or whose stop ids are no token ids. What else it
    holds is never an error: transformers refuses to load or to save some of it.
    """
    source = locate(name, settings)
    source = adapter_base(source) or source
    if is_gguf(source):
        source, _ = split(source)
    path = _find(source, settings)
    if path is None:
        return GenerationFile()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise cannot_load(source, error, settings, what=_FILE) from error
    if not isinstance(values, dict):
        raise UsageError(
            f"model_name_or_path: cannot load {_FILE} of {source!r}: it holds {values!s:.40}, not a mapping"
        )
    ids = {key: _ids(source, key, values.get(key)) for key in ("eos_token_id", "bos_token_id")}
    sampling = {
        key: value
        for key, value in values.items()
        if key not in _NOT_SAMPLING and not key.startswith("_") and value not in (None, False, [], {})
    }
    return GenerationFile(tuple(ids["eos_token_id"]), next(iter(ids["bos_token_id"]), None), sampling)


def _ids(source: str, key: str, value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise UsageError(
            f"model_name_or_path: cannot load {_FILE} of {source!r}: {key} is {value!r:.60}, not a token id or a list "
            f"of token ids: correct it there"
        )
    return ids


def _find(name: str, settings: ModelSettings) -> Path | None:
    """Return the file of a directory or of a Hub id; None where the model has none."""
    revision, path = settings.model_revision, Path(name)
    if path.is_dir():
        return path / _FILE if (path / _FILE).is_file() else None
    try:
        return Path(hf_hub_download(name, _FILE, revision=revision))
    except (EntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, LocalEntryNotFoundError):  # the Hub was not reached, and the cache has no copy
            missing = is_offline_mode() or try_to_load_from_cache(name, _FILE, revision=revision) is _CACHED_NO_EXIST
        else:
            missing = isinstance(error, EntryNotFoundError)
        if missing:
            return None
        raise cannot_load(name, error, settings, what=_FILE) from error


def _template(path: Path) -> str:
    """Return the text of `chat_template_path`."""
    if path.is_dir():
        file = next((f for f in ("chat_template.jinja", "tokenizer_config.json") if (path / f).is_file()), "")
        hint = f"give {str(path / file)!r}" if file.endswith(".jinja") else "give the template's own file"
        raise UsageError(f"chat_template_path: {str(path)!r} is a directory: {hint}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"chat_template_path: {str(path)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise UsageError(f"chat_template_path: cannot read {str(path)!r}: {error.strerror or error}") from error
