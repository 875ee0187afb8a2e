"""Strict recipes: one flat YAML file and a command line become one frozen `Recipe`, or a list of what is wrong.

Every mistake is told at once, with its place and the right name, before torch is imported. Nothing is translated,
guessed or corrected: a key that is not known here is an error, and so is a known one whose value has another type.
The tables of keys are in `config_tables.py`, the conversion of values in `config_values.py`.
"""

import copy
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bcft.config.schema import (
    COMMANDS,
    FLAGS,
    KEYS,
    OWN,
    RECORDED,
    REFUSED,
    REFUSED_VALUES,
    RENAMED,
    REQUIRED,
    TRAINING,
)
from bcft.config.values import MAX_BYTES, Plain, Raw, YamlError, convert, nearest, read_yaml, show, wanted
from bcft.errors import UsageError

SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Recipe:
    """What a command was asked to do: every key has a checked value."""

    command: str
    path: str
    """The recipe file as given, or '' if there was none."""
    values: Mapping[str, Any]
    """Every key there is, defaults filled in."""
    given: frozenset[str]
    """The keys that the file, the command line or the caller set."""
    flags: frozenset[str]
    """The switches of the command line, without their hyphens in front."""

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def resolved(self) -> dict[str, Any]:
        """Return what decides the result, as a recipe that gives this one again: the content of `config.yaml`."""
        own = {key.name for key in OWN if self.command in key.commands}
        library = {key.name for key in KEYS.values() if key.group in ("ModelConfig", "ScriptArguments", "GRPOConfig")}
        return {name: copy.deepcopy(self.values[name]) for name in sorted(self.given | own | library | RECORDED)}


@dataclass(frozen=True)
class _Entry:
    """One key as it was given, before it is known whether there is such a key."""

    key: str
    raw: Raw
    where: str


def parse(command: str, argv: Sequence[str]) -> Recipe:
    """Read `RECIPE [--key value | --key=value | key=value | --flag ...]`; `--config RECIPE` is a recipe too.

    Raises UsageError with one line for each finding.
    """
    paths: list[str] = []
    entries: list[_Entry] = []
    flags: set[str] = set()
    findings: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("-") and not ASSIGNMENT.match(token):
            paths.append(token)
        elif name in FLAGS:
            flags.add(name)
            if equals:
                findings.append(f"{COMMAND_LINE}: --{name}: takes no value")
        elif not equals and not _takes_next(name, tokens):
            if name == "config" or (name in KEYS and not _may_stand_alone(name)):
                findings.append(f"{COMMAND_LINE}: --{name}: wants a value")
            else:
                entries.append(_Entry(name, Plain("true"), COMMAND_LINE))
        else:
            text = value if equals else tokens.pop(0)
            if name == "config":
                paths.append(text)
            else:
                entries.append(_Entry(name, Plain(text) if text else "", COMMAND_LINE))
    findings += [
        f"{COMMAND_LINE}: {show(extra)}: one recipe is enough; keys are --key value or key=value, lists '[a, b]'"
        for extra in paths[1:]
    ]
    return _recipe(command, paths[0] if paths else "", entries, flags, findings)


def _takes_next(name: str, rest: Sequence[str]) -> bool:
    """Say whether the token after `--name` is its value."""
    if not rest or rest[0].startswith("--"):
        return False
    if name == "config" or (name in KEYS and not _may_stand_alone(name)):
        return True
    return not rest[0].endswith((".yaml", ".yml")) and not ASSIGNMENT.match(rest[0])


def _may_stand_alone(name: str) -> bool:
    """Say whether `--name` without a value is `true`, as in transformers' own command lines."""
    return "bool" in KEYS[name].type.split(" | ")


def load(
    command: str,
    path: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    *,
    flags: Collection[str] = frozenset(),
) -> Recipe:
    """Read a recipe file and set keys from Python, where values may be Python's or text.

    Raises UsageError with one line for each finding.
    """
    entries = [
        _Entry(key, os.fspath(value) if isinstance(value, os.PathLike) else value, "override")
        for key, value in overrides.items()
    ]
    return _recipe(command, os.fspath(path) if path is not None else "", entries, flags, [])


def _recipe(
    command: str, path: str, overrides: Sequence[_Entry], flags: Collection[str], findings: list[str]
) -> Recipe:
    """Check everything, and make the recipe if nothing was found."""
    in_file, problems = _read(path) if path else ([], [])
    findings += problems
    ours = {name for name, flag in FLAGS.items() if command in flag.commands}
    findings += [f"{COMMAND_LINE}: --{flag}: not a flag of bcft {command}" for flag in sorted(set(flags) - ours)]
    values: dict[str, Any] = {key.name: key.default for key in KEYS.values()}
    values["output_dir"] = f"runs/{Path(path).stem or command}"
    where: dict[str, str] = {}
    for entries, commands in ((in_file, tuple(COMMANDS)), (overrides, (command,))):
        seen: dict[str, str] = {}
        for entry in entries:
            name = entry.key if re.fullmatch(r"[\w.-]{1,64}", entry.key) else show(entry.key)
            try:
                value = _checked(entry, commands)
                if entry.key in seen:
                    raise ValueError(f"given twice, first at {seen[entry.key]}")
                values[entry.key] = value
            except ValueError as error:
                findings.append(f"{entry.where}: {name}: {error}")
            seen.setdefault(entry.key, entry.where)
        where |= {key: place for key, place in seen.items() if key in KEYS}
    if not problems:
        at = path or COMMAND_LINE
        findings += [f"{at}: {key}: required" for key in REQUIRED if key not in where]
        together = (*_together(values, where, flags), *_ruinous(command, in_file, overrides))
        findings += [f"{where[key]}: {key}: {message}" for key, message in together]
    if findings:
        raise UsageError("\n".join(findings))
    return Recipe(command, path, MappingProxyType(values), frozenset(where), frozenset(flags))


def _read(path: str) -> tuple[list[_Entry], list[str]]:
    """Return the entries of a recipe file, and why there are none."""
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
    return [_Entry(key, raw, f"{at}:{line}") for key, raw, line in pairs], []


def _checked(entry: _Entry, commands: Sequence[str]) -> Any:
    """Return an entry's value.

    Raises ValueError if there is no such key, or not for these commands, or not with this value.
    """
    name = entry.key
    if name in REFUSED:
        raise ValueError(f"refused: {REFUSED[name]}")
    if name in RENAMED:
        raise ValueError(f"not a key here; use {RENAMED[name]}")
    if name not in KEYS:
        flag = name.replace("_", "-")
        if flag in FLAGS:
            raise ValueError(f"a flag, not a key: give --{flag} on the command line")
        near = nearest(name, tuple(KEYS)) or nearest(name, tuple(REFUSED))
        if not near and (near := nearest(name, tuple(FLAGS))):
            near = f"--{near}"
        raise ValueError("unknown key" + (f"; did you mean {near}?" if near else ""))
    key = KEYS[name]
    if not set(commands) & set(key.commands):
        raise ValueError(f"not used here; it is a key of bcft {' and '.join(key.commands)}")
    if SECRET.search(str(entry.raw)):
        raise ValueError("holds a token; tokens never go into recipes, set HF_TOKEN in the environment instead")
    value = convert(entry.raw, key)
    if value == "" and name != "success_func":
        raise ValueError(f"wants {wanted(key)}, and is empty")
    if isinstance(value, str) and (name, value) in REFUSED_VALUES:
        raise ValueError(f"{value} is refused: {REFUSED_VALUES[name, value]}")
    if name == "success_func" and value and not DOTTED.fullmatch(value):
        raise ValueError(f"wants a dotted path such as package.module.function, not {show(value)}")
    return value


def _together(values: Mapping[str, Any], given: Collection[str], flags: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong about keys that are right one by one."""
    pinned = re.fullmatch("[0-9a-f]{40}", values["model_revision"])
    if values["trust_remote_code"] and not (pinned and "allow-remote-code" in flags):
        yield (
            "trust_remote_code",
            "runs the model author's code: it needs --allow-remote-code on the command line "
            "and a model_revision of 40 hex digits",
        )
    if values["bf16"] and values["fp16"]:
        yield "fp16", "bf16 is on too; a run has one precision"
    if values["warmup_rounds"] >= values["num_rounds"]:
        yield "warmup_rounds" if "warmup_rounds" in given else "num_rounds", "warm-up rounds leave none that trains"
    if values["ties"] == "sample" and values["keep_quantile"] == 1:
        yield "ties" if "ties" in given else "keep_quantile", "ties: sample with keep_quantile: 1 would keep nothing"
    band = values["pass_rate"]
    if band is not None and not (len(band) == 2 and 0 <= band[0] <= band[1] <= 1):
        yield "pass_rate", f"wants two numbers in [0, 1], the lower first, such as [0.1, 0.9], not {show(str(band))}"
    if values["environment"] is not None and not DOTTED.fullmatch(values["environment"]):
        yield "environment", f"wants a dotted path such as package.module.Class, not {show(values['environment'])}"
    if "use_peft" not in given:
        for key in sorted(given):
            if key.startswith("lora_") or key in ("use_dora", "use_rslora"):
                yield key, "has no effect without use_peft: true"


def _ruinous(command: str, in_file: Sequence[_Entry], overrides: Sequence[_Entry]) -> Iterator[tuple[str, str]]:
    """Yield a finding if a recipe for an embedded model is turned on another one and its learning rate kept."""
    small, model = ({entry.key: str(entry.raw) for entry in entries} for entries in (in_file, overrides))
    was, now = small.get("model_name_or_path", ""), model.get("model_name_or_path", "bcft:")
    if command not in TRAINING or not was.startswith("bcft:") or now.startswith("bcft:") or "learning_rate" in model:
        return
    yield (
        "model_name_or_path",
        f"this recipe's learning rate is for {was} and would ruin a larger model; "
        "start from recipes/llama-3.2-3b/bc_math.yaml, or give learning_rate as well",
    )


def help_text(command: str) -> str:
    """Return what `--help` prints."""
    about = COMMANDS[command]
    lines = [
        f"usage: bcft {command} RECIPE [--key value | --key=value | key=value | --flag ...]",
        f"       (or python -m bcft.{command}, accelerate launch -m bcft.{command}, torchrun -m bcft.{command})",
        "",
        about.summary,
        "",
        f"example: {about.example}",
    ]
    sections = {"required": [KEYS[name] for name in REQUIRED]}
    sampling = (key for key in KEYS.values() if key.group == "GRPOConfig")
    for key in (*OWN, *sampling):
        if command in key.commands:
            sections.setdefault("sampling" if key.group == "GRPOConfig" else key.group, []).append(key)
    for heading, keys in sections.items():
        lines += ["", f"{heading}:"]
        for key in keys:
            default = "" if key.name in REQUIRED else f", default {_yaml(key.default)}"
            lines += [f"  {key.name}: {wanted(key)}{default}", f"      {key.meaning}"]
    lines += ["", "flags:"]
    lines += [f"  --{name:<20}{flag.meaning}" for name, flag in FLAGS.items() if command in flag.commands]
    return "\n".join(
        [
            *lines,
            "",
            "Every other field of TRL's SFTConfig and ModelConfig is a key as well, and so are dataset_config,",
            "dataset_train_split and dataset_test_split of ScriptArguments. A key that makes no sense is refused by",
            "name, with the reason. The command line wins over the file.",
        ]
    )


def reference() -> str:
    """Return the page of all keys, flags and refused names, in Markdown."""
    lines = ["# Keys of a recipe", "", "The same names are `--key value` on the command line."]
    for group in dict.fromkeys(key.group for key in KEYS.values()):
        lines += ["", f"## {group}", "", "| key | takes | default | commands | meaning |", "|---|---|---|---|---|"]
        for key in KEYS.values():
            if key.group == group:
                lines.append(
                    _row(f"`{key.name}`", wanted(key), _yaml(key.default), ", ".join(key.commands), key.meaning)
                )
    lines += ["", "## Flags", "", "| flag | commands | meaning |", "|---|---|---|"]
    lines += [_row(f"`--{name}`", ", ".join(flag.commands), flag.meaning) for name, flag in FLAGS.items()]
    lines += ["", "## Refused", "", "| name | reason |", "|---|---|"]
    lines += [_row(f"`{name}`", reason) for name, reason in sorted(REFUSED.items())]
    lines += [_row(f"`{name}: {value}`", reason) for (name, value), reason in sorted(REFUSED_VALUES.items())]
    lines += ["", "## Names from elsewhere", "", "| there | here |", "|---|---|"]
    lines += [_row(f"`{name}`", right) for name, right in sorted(RENAMED.items())]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _yaml(value: Any) -> str:
    """Return a default as it would stand in a recipe."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value) or "''"
