"""From text to values: YAML without its surprises, and each scalar converted by the type of its key.

YAML 1.1 reads `1e-6` as a word, `no` as false, `010` as 8 and `12:30:45` as 45045. None of that happens here, because
only the structure is YAML's: a scalar stays text until its key determines its type. The command line uses the same
conversion, so a value means the same in both places.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from bcft.config.keys import Key
from bcft.types import show

MAX_BYTES, MAX_VALUES, MAX_ALIASES, MAX_DEPTH = 1_000_000, 1_000, 100, 20
NULLS = ("", "~", "null", "Null", "NULL")
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]{1,3})?")
OPERATORS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "dict": "a mapping {name: value}",
    "list[str]": "a list [a, b]",
    "list[float]": "a list of numbers",
    "list[dict]": "a list of mappings [{name: value}]",
    "null": "null",
}

Raw = Any
"""A value before conversion: `Plain`, `str`, a list or a mapping of such, or a Python value."""


class Plain(str):
    """A scalar without quotes, in which `null` means no value (in quotes it is a word), or a command-line value."""


class YamlError(ValueError):
    """A file that cannot be read as a recipe; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def nearest(word: str, words: tuple[str, ...]) -> str:
    """Return the word that is most like this one, or an empty string."""
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), words, n=1, cutoff=0.7)
    return matches[0] if matches else ""


def read_yaml(data: bytes) -> list[tuple[str, Raw, int]]:
    """Return `(key, raw value, line)` for each line of a flat YAML mapping, duplicates included.

    Raises YamlError when the data is not UTF-8, not YAML, not a mapping, or larger than any recipe.
    """
    if len(data) > MAX_BYTES:
        raise YamlError(1, f"larger than {MAX_BYTES // 1_000_000} MB: this is not a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlError(line, f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None
    return _Reader(text).document()


def _flow(text: str) -> Raw:
    """Read one value from text such as `[a, b]`, `{"a": 1}` or `"a"`."""
    try:
        ((_, raw, _),) = _Reader("value: " + text.replace("\n", " ")).document()
    except YamlError as error:
        raise ValueError(f"{show(text)} is not readable: {error}") from None
    return raw


class _Reader:
    """Builds raw values from YAML's events, within limits that no real recipe reaches."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.anchors: dict[str, str] = {}
        self.values = self.aliases = 0

    def document(self) -> list[tuple[str, Raw, int]]:
        """Return the key, raw value and line of each pair; raise YamlError when this is not a flat recipe."""
        try:
            events = yaml.parse(self.text, Loader=yaml.SafeLoader)
            next(events), next(events)  # the stream starts; so does the document, or the stream ends
            if not (first := next(events, None)):
                return []
            if isinstance(first, yaml.ScalarEvent) and not first.value:
                return []
            if not isinstance(first, yaml.MappingStartEvent):
                raise YamlError(_line(first), "a recipe is lines of `key: value`")
            pairs = list(self._pairs(first, events, 0))
            next(events)
            if not isinstance(extra := next(events), yaml.StreamEndEvent):
                raise YamlError(_line(extra), "a second document; a recipe is one")
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            last = max(1, len(self.text.rstrip().splitlines()))
            raise YamlError(min(line, last), f"not valid YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            raise YamlError(line, f"not valid YAML: character {show(self.text[error.position])}") from None
        return pairs

    def _pairs(self, start: Any, events: Iterator[Any], depth: int) -> Iterator[tuple[str, Raw, int]]:
        self._check(start)
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._value(event, events, depth + 1)
            if not isinstance(key, str):
                raise YamlError(_line(event), "a key is a word, not a list or a mapping")
            yield str(key), self._value(next(events), events, depth + 1), _line(event)

    def _value(self, event: Any, events: Iterator[Any], depth: int) -> Raw:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > MAX_DEPTH:
            raise YamlError(_line(event), f"nested deeper than {MAX_DEPTH}")
        if isinstance(event, yaml.ScalarEvent):
            self._check(event)
            scalar = str(event.value) if event.style else Plain(event.value)
            if event.anchor:
                self.anchors[event.anchor] = scalar
            return scalar
        if isinstance(event, yaml.SequenceStartEvent):
            self._check(event)
            items = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                items.append(self._value(item, events, depth + 1))
            return items
        mapping: dict[str, Raw] = {}
        for key, value, line in self._pairs(event, events, depth):
            if key in mapping:
                raise YamlError(line, f"{show(key)} is given twice")
            mapping[key] = value
        return mapping

    def _check(self, event: Any) -> None:
        self.values += 1
        if self.values > MAX_VALUES:
            raise YamlError(_line(event), f"more than {MAX_VALUES} values: this is not a recipe")
        if event.tag is not None:
            raise YamlError(_line(event), f"tags are not used in recipes: {show(event.tag)}")

    def _alias(self, event: Any) -> str:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise YamlError(_line(event), f"more than {MAX_ALIASES} aliases: this is not a recipe")
        if event.anchor not in self.anchors:
            raise YamlError(_line(event), f"*{event.anchor} does not stand for a single value")
        return self.anchors[event.anchor]


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def convert(raw: Raw, key: Key) -> Any:
    """Return the value of a key.

    Raises ValueError with the wanted and the given value.
    """
    if isinstance(raw, Plain):
        raw = Plain(raw.strip())  # from the command line; YAML does so in a file
        if raw.startswith(("'", '"')):  # in a file it would not be plain
            raw = _flow(raw)
    kinds = key.type.split(" | ")
    if raw is None or (isinstance(raw, Plain) and raw in NULLS):
        if "null" in kinds:
            return None
        raise ValueError(f"wants {wanted(key)}, and has no value")
    if isinstance(raw, Plain) and raw == "None" and "null" in kinds:
        raise ValueError("None is a word in YAML; write null for no value")
    if isinstance(raw, str) and raw in key.choices:
        return str(raw)
    value = None
    for kind in _ORDER:
        if value is None and kind in kinds:
            value = _as(kind, raw, kinds)
    if value is None or (isinstance(value, str) and key.choices):
        hint = nearest(raw, key.choices) if isinstance(raw, str) else ""
        raise ValueError(f"wants {wanted(key)}, not {show(raw)}" + (f"; did you mean {hint}?" if hint else ""))
    if isinstance(value, list) and key.choices and (other := [word for word in value if word not in key.choices]):
        hint = nearest(str(other[0]), key.choices)
        raise ValueError(f"wants {wanted(key)}, not {show(other[0])}" + (f"; did you mean {hint}?" if hint else ""))
    if isinstance(value, int | float) and not isinstance(value, bool) and not _within(value, key.limits):
        raise ValueError(f"wants {wanted(key)}, not {show(value)}")
    return value


def wanted(key: Key) -> str:
    """Return in words the values of a key: `an integer >= 1 or null`."""
    words = []
    for kind in key.type.split(" | "):
        if kind == "str" and key.choices:
            few = ", ".join(key.choices[:12]) + (", ..." if len(key.choices) > 12 else "")
            words.append(few if len(key.choices) == 1 else f"one of {few}")
        else:
            words.append(f"{WORDS[kind]} {key.limits}" if kind in ("int", "float") and key.limits else WORDS[kind])
    return " or ".join(words)


_ORDER = ("bool", "int", "float", "dict", "list[str]", "list[float]", "list[dict]", "str")


def _as(kind: str, raw: Raw, kinds: list[str]) -> Any:
    """Return the raw value as one kind, or None if it is not of that kind."""
    raw = _builtin(raw)
    if kind == "bool":
        return BOOLS.get(raw.lower()) if isinstance(raw, str) else raw if isinstance(raw, bool) else None
    if kind == "int":
        if isinstance(raw, str):
            return int(raw) if INTEGER.fullmatch(raw) else None
        return raw if isinstance(raw, int) and not isinstance(raw, bool) else None
    if kind == "float":
        return _number(raw)
    if kind == "str":
        return str(raw) if isinstance(raw, str) else None
    if isinstance(raw, str) and raw.startswith("{" if kind == "dict" else "["):
        raw = _flow(raw)
    if kind == "dict":
        return {str(name): _untyped(value) for name, value in raw.items()} if isinstance(raw, Mapping) else None
    if isinstance(raw, str):
        if "str" in kinds:
            return None
        if "," in raw:
            raise ValueError(f"wants a list, not {show(raw)}; lists are written [a, b]")
        raw = [raw]
    if not isinstance(raw, list | tuple):
        return None
    inner = kind.removeprefix("list[").removesuffix("]")
    items = [None if isinstance(item, Plain) and item in NULLS else _as(inner, item, []) for item in raw]
    return None if None in items else items


def _builtin(raw: Raw) -> Raw:
    """Return a single NumPy value as Python's own, any other value as it is; NumPy is not imported for it."""
    return raw.item() if type(raw).__module__ == "numpy" and getattr(raw, "shape", None) == () else raw


def _number(raw: Raw) -> float | None:
    if isinstance(raw, str):
        if not NUMBER.fullmatch(raw) or not any(c.isdigit() for c in re.split("[eE]", raw)[0]):
            return None
        raw = float(raw)
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        return None
    return float(raw)


def _untyped(raw: Raw) -> Any:
    """Return a value inside a mapping of keyword arguments, whose types no key declares."""
    raw = _builtin(raw)
    if isinstance(raw, Mapping):
        return {str(name): _untyped(value) for name, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_untyped(value) for value in raw]
    if not isinstance(raw, Plain):
        if raw is None or isinstance(raw, bool | int | float | str):
            return raw
        raise ValueError(f"cannot hold {show(raw)}")
    if raw in NULLS:
        return None
    if raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    if INTEGER.fullmatch(raw):
        return int(raw)
    if raw.lower() in BOOLS or re.fullmatch(r"[-+]?[0-9][0-9_:]*", raw):
        raise ValueError(f"{show(raw)} can be read in two ways here; write true, false or a decimal, or quote the word")
    number = _number(raw)
    return str(raw) if number is None else number


def _within(value: float, limits: str) -> bool:
    if not limits:
        return True
    pairs = (limit.split() for limit in limits.split(" and "))
    return all(OPERATORS[sign](value, float(bound)) for sign, bound in pairs)
