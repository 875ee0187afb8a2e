"""What the cards of a model and of a dataset share: nothing in them names a place on the machine that made them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bcft.config.keys import KEYS
from bcft.reporting.hub import is_local
from bcft.runs.directory import MAY_DIFFER
from bcft.runs.storage import read_json, read_yaml

_PATH = re.compile(r"""(?<![^\s,='"(\[])~?(?:/[^\s/,'")\]]+)+/?(?=$|[\s,'")\]])""")
"""An absolute path, or one below the home directory, where a word begins."""
_SECRET = re.compile(r"(?i)(^|_)(api_?key|token|secret|password)$")
"""The name of an argument that may be a secret."""
RULE = (
    "keep_quantile", "min_reward", "require_success", "pass_rate", "max_per_problem", "select", "ties", "history",
    "control", "row_weight", "weight_temperature", "train_on",
)  # fmt: skip
"""The keys of the filter."""


def public(value: Any, *, inside: bool = False) -> Any:
    """Return a value of a recipe without paths of this machine, of which the last name stays, and without secrets.

    inside: the value belongs to the arguments of a function of the user's.
    """
    if isinstance(value, Mapping):
        hidden = {key: "..." for key in value if inside and _SECRET.search(str(key))}
        return {key: hidden.get(key) or public(item, inside=True) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item, inside=inside) for item in value]
    return _PATH.sub(lambda match: Path(match[0]).name, value) if isinstance(value, str) else value


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `config.yaml` that decide the result and are not as by default."""
    return {
        key: public(value, inside=isinstance(value, Mapping))
        for key, value in config.items()
        if key not in MAY_DIFFER and (key not in KEYS or value != KEYS[key].default)
    }


def source_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the dataset; of a mixture those of its parts."""
    if config.get("dataset_name"):
        return [str(config["dataset_name"])]
    return [str(part["path"]) for part in config.get("datasets") or ()]


def hub_ids(*names: str) -> list[str] | None:
    """Return those names that anybody can find on the Hub; None where there are none, as a card's metadata has it."""
    return [name for name in names if "/" in name and not is_local(name)] or None


def quoted(name: str) -> str:
    """Return a name as Markdown, a path as its last part."""
    return f"`{public(name)}`"


def rule_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the filter, with defaults."""
    return {key: config.get(key, KEYS[key].default) for key in RULE}


def functions_of(run: Path) -> list[str]:
    """Return the functions that graded, each with the hash of its source."""
    return [str(public(name)) for name in read_json(run / "versions.json").get("functions", [])]


def made_with(run: Path) -> str:
    """Return in one line what a run depended on besides its recipe."""
    versions = read_json(run / "versions.json")
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items() if version)
    hardware = ", ".join(versions["gpus"]) or f"{versions['cpu'] or 'a CPU'}, no GPU"
    return f"{packages}; Python {versions['python']}; {hardware}. SHA-256 of the data: `{versions['data']}`."


def as_yaml(values: Mapping[str, Any]) -> str:
    """Return a block of YAML in Markdown."""
    return f"```yaml\n{yaml.safe_dump(dict(values), allow_unicode=True).strip()}\n```"


def configuration(run: Path) -> dict[str, Any]:
    """Return a run's `config.yaml`."""
    return read_yaml(run / "config.yaml")


def model_of(run: Path) -> Path:
    """Return the directory of a finished run that holds its model."""
    return run / "best" if (run / "best").is_dir() else run
