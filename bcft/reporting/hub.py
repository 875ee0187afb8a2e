"""Models and datasets that may have to come from the Hub, on a machine from which the Hub may be unreachable."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from bcft.config.effects import is_function
from bcft.data.loading import SUFFIXES
from bcft.errors import BcftError
from bcft.policy.gguf import PACKAGE

T = TypeVar("T")
PATIENCE = 3.0
"""Seconds the Hub may take to answer. The libraries retry for much longer, and once for each file."""


class Missing(str):
    """Why something is unknown; printed in its place."""


def work_offline_if_unreachable(names: Iterable[str]) -> None:
    """Set HF_HUB_OFFLINE if one of the names, or an adapter's base, may be a Hub id and the Hub does not answer.

    Call it before the libraries are imported, because they read the variable then.
    """
    names = list(names)
    local = all(map(is_local, (*names, *filter(None, map(base_of, names)))))
    if not local and "HF_HUB_OFFLINE" not in os.environ and not _answers():
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_local(name: str) -> bool:
    """Return whether a model or a dataset of this name comes from this machine; otherwise it may be a Hub id."""
    return (
        name.startswith(("bcft:", "reasoning-gym:", PACKAGE, "/", ".", "~"))
        or name.endswith(SUFFIXES)
        or is_function(name)
        or any(sign in name for sign in ",*?[{")  # several files
        or (name.endswith(".gguf") and ":" not in name)  # owner/name:FILE.gguf is on the Hub
        or Path(name).exists()
    )


def is_embedded(name: str) -> bool:
    """Return whether a path is that of the embedded model, in the package of whatever machine."""
    return Path(name).parts[-3:] == ("bcft", "assets", "tiny-math")


def available(load: Callable[[], T], name: str) -> T | Missing:
    """Return the result of `load`, or Missing where it would have to come from an unreachable Hub.

    Other errors of `load` are raised.
    """
    try:
        return load()
    except BcftError as error:
        from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415 - reads HF_HUB_OFFLINE

        cause = error.__cause__
        while cause and not isinstance(cause, (ConnectionError, LocalEntryNotFoundError)):
            cause = cause.__cause__
        if cause:
            return Missing(f"unknown: {name} is not on this machine, and the Hub is unreachable")
        raise


def base_of(name: str) -> str:
    """Return the base that an adapter directory names; '' for any other name. Damage is reported later."""
    try:
        values = json.loads((Path(name) / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(values.get("base_model_name_or_path") or "") if isinstance(values, dict) else ""


def _answers() -> bool:
    hub = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(hub, timeout=PATIENCE).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # an error page is an answer
    return True
