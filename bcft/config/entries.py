"""The keys of a recipe as they are given, each with its place: the lines of a YAML file, or the items of a dict."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bcft.config.keys import KEYS
from bcft.config.values import MAX_BYTES, Raw, YamlError, read_yaml
from bcft.types import show

DICT = "recipe"
"""The place of a recipe that is a dict, in messages."""
Recipe = str | os.PathLike[str] | Mapping[str, Any]
"""A recipe as Python gives it: the path of a file, or its keys and values."""


@dataclass(frozen=True)
class Entry:
    """One key as given, not yet checked."""

    key: str
    raw: Raw
    where: str


def recipe_entries(recipe: Recipe | None) -> tuple[list[Entry], list[str], str]:
    """Return the entries of a recipe, the findings if it cannot be read, and its path; '' for a dict."""
    if recipe is None or recipe == "":
        return [], [], ""
    if isinstance(recipe, Mapping):
        entries = [Entry(key, path_as_text(value), DICT) for key, value in recipe.items() if isinstance(key, str)]
        others = [key for key in recipe if not isinstance(key, str)]
        return entries, [f"{DICT}: {show(key)}: a key is a word" for key in others], ""
    if not isinstance(recipe, str | os.PathLike):
        return [], [f"{DICT}: wants the path of a file or a dict of keys, not {show(recipe)}"], ""
    path = os.fspath(recipe)
    return *_read(path), path


def path_as_text(value: Any) -> Any:
    """Return a path as text, and any other value as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _read(path: str) -> tuple[list[Entry], list[str]]:
    """Return the entries of a recipe file, and the findings if it cannot be read."""
    at = path if path.isprintable() else show(path)
    try:
        with open(path, "rb") as file:
            pairs = read_yaml(file.read(MAX_BYTES + 1))
    except YamlError as error:
        return [], [f"{at}:{error.line}: {error}"]
    except IsADirectoryError:
        return [], [f"{at}: a directory; give the recipe file in it"]
    except FileNotFoundError:
        hint = f"; a key is given as --{path} value or {path}=value" if path in KEYS else ""
        return [], [f"{at}: no such recipe file{hint}"]
    except (OSError, ValueError) as error:
        return [], [f"{at}: cannot be read: {error.strerror if isinstance(error, OSError) else error}"]
    return [Entry(key, raw, f"{at}:{line}") for key, raw, line in pairs], []
