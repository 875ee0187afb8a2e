"""Strict recipes: one flat YAML file and a command line become one frozen `Config`, or a list of findings.

All mistakes are reported at once, each with its place and the right name, before torch is imported. Nothing is
translated, guessed or corrected: an unknown key is an error, and so is a value of another type.
"""

import copy
import json
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bcft.config.declare import LIBRARY_FIELDS, TRAINING, SettingError
from bcft.config.effects import adapter_keys, without_effect
from bcft.config.entries import DICT, Entry, Recipe, path_as_text, recipe_entries
from bcft.config.keys import COMMANDS, FLAGS, KEYS, PASSED_THROUGH, REFUSED, REFUSED_VALUES, RENAMED
from bcft.config.schema import (
    REQUIRED,
    SECTIONS,
    DataSettings,
    EngineSettings,
    EnvironmentSettings,
    EvaluationSettings,
    ModelSettings,
    RoundSettings,
    SamplingSettings,
    SelectionSettings,
    SharingSettings,
    TrainingSettings,
)
from bcft.config.values import Plain, convert, nearest, wanted
from bcft.errors import UsageError
from bcft.types import show

SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,})")
ASSIGNMENT = re.compile(r"[A-Za-z_][\w.-]*=")
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
DOTTED_PATHS = {
    "environment": (DOTTED, "a dotted path such as package.module.Class"),
    "success_func": (
        re.compile(rf"{DOTTED.pattern}|[A-Za-z_]\w*"),
        "a dotted path such as package.module.function, or the name of one of reward_funcs",
    ),
}
"""Keys that name Python objects -> what their values look like, as a pattern and in words."""
QUOTES = ("'", '"', "`", "\u2018", "\u2019", "\u201c", "\u201d")
"""What an output_dir cannot begin with: quotation marks that were meant for the shell, typographic ones included."""
COMMAND_LINE = "command line"
_NAMING = ("datasets", "dataset_config", "dataset_test_split", "dataset_args", "answer_format", "prompt_suffix")
OF_DATASET = ("dataset_train_split", *_NAMING)
"""Keys of a recipe that say nothing about rows that Python gives in place of its dataset."""


@dataclass(frozen=True)
class Config:
    """The recipe's keys, in typed sections."""

    command: str
    path: str
    """The recipe file as given, or '' if there was none."""
    values: Mapping[str, Any]
    """Every key, flat, defaults filled in: for files and messages."""
    given: frozenset[str]
    """The keys that the file, the command line or the caller set."""
    flags: frozenset[str]
    """The flags of the command line, without their leading hyphens."""
    model: ModelSettings
    data: DataSettings
    sampling: SamplingSettings
    engine: EngineSettings
    environment: EnvironmentSettings
    selection: SelectionSettings
    rounds: RoundSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    sharing: SharingSettings
    python_objects: frozenset[str] = frozenset()
    """The keys whose value only names a Python object, such as `m.reward@0a1b2c3d`."""

    @property
    def sections(self) -> dict[str, Any]:
        """The sections by name."""
        return {name: getattr(self, name) for name in SECTIONS}

    @property
    def quiet(self) -> bool:
        """Whether only the conclusion is printed."""
        return not self.flags.isdisjoint({"quiet", "json"})

    def label(self, phase: str) -> str:
        """Return the label of a phase's progress: '' when quiet."""
        return "" if self.quiet else phase

    @property
    def resolved(self) -> dict[str, Any]:
        """The keys that decide the result, with their values: the content of `config.yaml`.

        As a recipe it loads to the same configuration. With `python_objects` it does not: their keys hold names, so
        that a run is not resumed with other objects.
        """
        declared = (
            key.name for key in KEYS.values() if self.command in key.commands and key.name not in PASSED_THROUGH
        )
        names = {*declared, *self.given} - ({"dataset_name"} if self.data.datasets else set())
        decide = (name for name in sorted(names) if KEYS[name].section != "sharing")
        return {name: copy.deepcopy(self.values[name]) for name in decide}

    @property
    def command_line(self) -> str:
        """The command that starts this run: the recipe, and every key that differs from its file.

        It leaves out `python_objects`, which no command line can give: with them it is not the whole run.
        """
        flags = (f"--{flag}" for flag in sorted(self.flags - {"dry-run"}))
        return shlex.join([*self._words(self.command), *flags])

    def evaluating(self, model: str) -> str:
        """Return the command that measures a model as this run does; '' if it needs `python_objects`."""
        if self.python_objects:
            return ""
        own = {"model_name_or_path", "gguf_file", "output_dir", "against"}
        return shlex.join([*self._words("evaluate", without=own), "--model_name_or_path", model])

    def _words(self, command: str, *, without: Collection[str] = ()) -> list[str]:
        """Return a command with the recipe, and every key that it reads and that differs from the recipe's file."""
        try:
            in_file = load(self.command, self.path, {}, flags=self.flags).values if self.path else {}
        except UsageError:  # the file is incomplete without the command line
            in_file = {}
        words = ["bcft", command, *([self.path] if self.path else [])]
        for key in sorted(self.given - self.python_objects - {*without}):
            value = self.values[key]
            if command in KEYS[key].commands and (key not in in_file or in_file[key] != value):
                words.append(f"{key}={_argument(key, value)}")
        return words


def parse(command: str, argv: Sequence[str]) -> Config:
    """Read `RECIPE [--key value | --key=value | key=value | --flag ...]`; `--config RECIPE` gives a recipe too.

    Raises UsageError with one line for each finding.
    """
    paths: list[str] = []
    entries: list[Entry] = []
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
                entries.append(Entry(name, Plain("true"), COMMAND_LINE))
        else:
            text = value if equals else tokens.pop(0)
            if name == "config":
                paths.append(text)
            else:
                entries.append(Entry(name, Plain(text) if text else "", COMMAND_LINE))
    findings += [
        f"{COMMAND_LINE}: {show(extra)}: one recipe is enough; keys are --key value or key=value, lists '[a, b]'"
        for extra in paths[1:]
    ]
    return _config(command, paths[0] if paths else None, entries, flags, findings)


def _takes_next(name: str, rest: Sequence[str]) -> bool:
    """Return whether the token after `--name` is its value."""
    if not rest or rest[0].startswith("--"):
        return False
    if name == "config" or (name in KEYS and not _may_stand_alone(name)):
        return True
    return not rest[0].endswith((".yaml", ".yml")) and not ASSIGNMENT.match(rest[0])


def _may_stand_alone(name: str) -> bool:
    """Return whether `--name` without a value means `true`, as in transformers' own command lines."""
    return "bool" in KEYS[name].type.split(" | ")


def _argument(key: str, value: Any) -> str:
    """Return a value as the command line reads it: text in quotes if it would mean something else without them."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        plain = convert(Plain(value) if value else "", KEYS[key])
    except ValueError:
        plain = None
    return value if plain == value else json.dumps(value, ensure_ascii=False)


def load(
    command: str,
    recipe: Recipe | None,
    overrides: Mapping[str, Any],
    *,
    flags: Collection[str] = frozenset(),
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Read a recipe, a file or a dict, and set keys from Python, to Python values or text.

    objects: the keys that Python objects take the place of -> what names the object. `resolved` records the names, so
    that a run is not resumed with other objects; `command_line` leaves them out.

    Raises UsageError with one line for each finding.
    """
    given = [Entry(key, path_as_text(value), "override") for key, value in overrides.items()]
    return _config(command, recipe, given, flags, [], objects)


def _config(
    command: str,
    recipe: Recipe | None,
    overrides: Sequence[Entry],
    flags: Collection[str],
    findings: list[str],
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> Config:
    """Return the configuration. Raises UsageError with all findings."""
    in_file, problems, path = recipe_entries(recipe)
    findings += problems
    allowed = {name for name, flag in FLAGS.items() if command in flag.commands}
    findings += [f"{COMMAND_LINE}: --{flag}: not a flag of bcft {command}" for flag in sorted(set(flags) - allowed)]
    values: dict[str, Any] = {key.name: copy.copy(key.default) for key in KEYS.values()}
    values["output_dir"] = f"runs/{os.path.splitext(os.path.basename(path))[0] or command}"
    file_values, file_places = _valid(in_file, tuple(COMMANDS), findings)
    override_values, override_places = _valid(overrides, (command,), findings)
    if "model_name_or_path" in override_places:  # another model, of which the file's `gguf_file` is no part
        file_values.pop("gguf_file", None)
        file_places.pop("gguf_file", None)
    for key, other in (("datasets", "dataset_name"), ("dataset_name", "datasets")):  # one takes the other's place
        if key in override_places and other in file_places and other not in override_places:
            del file_values[other], file_places[other]
    if "dataset_name" in objects:  # rows in place of the recipe's dataset
        others = [key for key in _NAMING if key in override_places]
        findings += [f"{override_places[key]}: {key}: has no effect with train_dataset" for key in others]
        findings += _named_split(override_values, override_places)
        file_values = {key: value for key, value in file_values.items() if key not in OF_DATASET}
    where = file_places | override_places | dict.fromkeys(objects, "Python object")
    values |= {**file_values, **override_values, **objects}
    if command in TRAINING:  # what is recorded is what is trained
        own = adapter_keys(values["model_name_or_path"])
        values |= {key: value for key, value in own.items() if key not in where}
    sections, conflicts = _sections(values, where)
    if not problems:
        at = path or (COMMAND_LINE if recipe is None else DICT)
        findings += [f"{at}: {key}: required" for key in REQUIRED if key not in where and key not in _instead(where)]
        conflicts += [
            *_permissions(values, flags),
            *without_effect(command, values, in_file=file_places, overrides={*override_places, *objects}),
            *_learning_rate_conflict(command, file_values, override_values),
        ]
        findings += [f"{where.get(key, at)}: {key}: {message}" for key, message in conflicts]
    if findings:
        raise UsageError("\n".join(findings))
    return Config(
        command,
        path,
        MappingProxyType(values),
        frozenset(where),
        frozenset(flags),
        **sections,
        python_objects=frozenset(objects),
    )


def _instead(given: Collection[str]) -> tuple[str, ...]:
    """Return the required keys that another one stands for."""
    return ("dataset_name",) if "datasets" in given else ()


def _named_split(values: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[str]:
    """Yield a finding for a train split whose name would be ignored: rows that Python gives are `train` alone."""
    key = "dataset_train_split"
    name, *_ = str(values.get(key, "train")).partition("[")
    if name != "train":
        yield f"{places[key]}: {key}: {show(name)} has no effect with train_dataset: give train, or rows as train[:5]"


def _valid(
    entries: Sequence[Entry], commands: Sequence[str], findings: list[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the valid values and the places of all keys that exist; add a finding for each mistake."""
    values: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for entry in entries:
        try:
            value = _checked(entry, commands)
            if entry.key in seen:
                raise ValueError(f"given twice, first at {seen[entry.key]}")
            values[entry.key] = value
        except ValueError as error:
            name = entry.key if re.fullmatch(r"[\w.-]{1,64}", entry.key) else show(entry.key)
            findings.append(f"{entry.where}: {name}: {error}")
        seen.setdefault(entry.key, entry.where)
    return values, {key: place for key, place in seen.items() if key in KEYS}


def _sections(values: Mapping[str, Any], given: Collection[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the sections, and the conflicts within them: the key to change and the reason.

    given: the keys that were set; a conflict is reported for one of these.
    """
    sections: dict[str, Any] = {}
    conflicts: list[tuple[str, str]] = []
    for section, cls in SECTIONS.items():
        names = [key.name for key in KEYS.values() if key.section == section and key.name not in PASSED_THROUGH]
        settings = {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names}
        if section == "training":
            settings["passed_through"] = {name: values[name] for name in PASSED_THROUGH if name in given}
        try:
            sections[section] = cls(**settings)
        except SettingError as error:
            for keys, message in error.conflicts:
                conflicts.append((next((key for key in keys if key in given), keys[0]), message))
    return sections, conflicts


def _checked(entry: Entry, commands: Sequence[str]) -> Any:
    """Return an entry's value.

    Raises ValueError when the key is unknown, not a key of these commands, or cannot have this value.
    """
    name = entry.key
    if name in REFUSED:
        raise ValueError(f"refused: {REFUSED[name]}")
    if name in RENAMED:
        raise ValueError(f"not a key here; use {RENAMED[name]}")
    if name not in KEYS:
        raise ValueError(_unknown(name))
    key = KEYS[name]
    if not set(commands) & set(key.commands):
        *first, last = key.commands
        raise ValueError(f"not used here; it is a key of bcft {', '.join(first) + ' and ' if first else ''}{last}")
    if SECRET.search(str(entry.raw)):
        raise ValueError("holds a token; tokens never go into recipes, set HF_TOKEN in the environment instead")
    value = convert(entry.raw, key)
    if value == "" and name not in ("success_func", "prompt_suffix"):
        raise ValueError(f"wants {wanted(key)}, and is empty")
    if isinstance(value, str) and (name, value) in REFUSED_VALUES:
        raise ValueError(f"{value} is refused: {REFUSED_VALUES[name, value]}")
    if name in DOTTED_PATHS and value and not DOTTED_PATHS[name][0].fullmatch(value):
        raise ValueError(f"wants {DOTTED_PATHS[name][1]}, not {show(value)}")
    if name == "output_dir" and value.startswith(QUOTES):
        raise ValueError(f"begins with a quotation mark, {show(value)}: quote the whole argument for the shell instead")
    return value


def _unknown(name: str) -> str:
    """Return why a name is not a key: a library's field that bcft does not use, a flag, or a misspelled key."""
    if name in LIBRARY_FIELDS:
        return f"refused: bcft does not use this field of TRL's {LIBRARY_FIELDS[name][0]}; recipes/KEYS.md has the keys"
    flag = name.replace("_", "-")
    if flag in FLAGS:
        return f"a flag, not a key: give --{flag} on the command line"
    near = nearest(name, tuple(KEYS)) or nearest(name, tuple(REFUSED))
    if not near and (near := nearest(name, tuple(FLAGS))):
        near = f"--{near}"
    return "unknown key" + (f"; did you mean {near}?" if near else "")


def _permissions(values: Mapping[str, Any], flags: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the conflict that depends on a flag."""
    pinned = re.fullmatch("[0-9a-f]{40}", values["model_revision"])
    if values["trust_remote_code"] and not (pinned and "allow-remote-code" in flags):
        yield (
            "trust_remote_code",
            "runs the model author's code: it needs --allow-remote-code on the command line "
            "and a model_revision of 40 hex digits",
        )


def _learning_rate_conflict(
    command: str, in_file: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield a finding when the model of an embedded-model recipe is overridden and its learning rate is not."""
    small, model = in_file.get("model_name_or_path", ""), overrides.get("model_name_or_path", "bcft:")
    if command not in ("sft", "filtered") or not small.startswith("bcft:") or model.startswith("bcft:"):
        return
    if "learning_rate" not in overrides:
        yield (
            "model_name_or_path",
            f"this recipe's learning rate is for {small} and would ruin a larger model; "
            "start from recipes/llama-3.2-3b/bc_math.yaml, or give learning_rate as well",
        )
