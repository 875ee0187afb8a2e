"""The committed table of library keys is what the installed libraries have; run as a script, this file writes it."""

import dataclasses
import json
import re
import sys
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).parents[2] / "bcft" / "config" / "library_fields.json"
DATASET = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
SAMPLING = (
    *("num_generations", "num_generations_eval", "max_completion_length", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "generation_kwargs", "reward_weights", "use_vllm", "vllm_mode", "vllm_model_impl"),
    *("vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
)


def kinds(annotation: Any) -> list[str]:
    """Return the words of `library_fields.json` for one type, `null` last."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        words = [word for part in typing.get_args(annotation) for word in kinds(part)]
        if "dict" in words:  # `dict | str` is the libraries' way to say that a command line may give JSON
            words = [word for word in words if word != "str"]
        return sorted(dict.fromkeys(words), key=lambda word: (word == "null", word))
    if typing.get_origin(annotation) is typing.Literal:
        return [type(value).__name__ for value in typing.get_args(annotation)]
    if typing.get_origin(annotation) is list:
        return [f"list[{kinds(typing.get_args(annotation)[0])[0]}]"]
    if annotation is types.NoneType:
        return ["null"]
    if annotation in (bool, int, float, str):
        return [annotation.__name__]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ["str"]
    return ["dict" if dict in (annotation, typing.get_origin(annotation)) else "object"]


def choices(field: Any, annotation: Any) -> list[str]:
    """Return the choices of a field: those of its metadata or of its enumeration."""
    if "choices" in field.metadata:
        return list(field.metadata["choices"])
    enums = [a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, Enum)]
    return [member.value for enum in enums for member in enum]


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text on one line."""
    sentence = re.split(r"(?<=[^.][.])\s+(?=[A-Z`])", " ".join(text.split()).replace("%%", "%"), maxsplit=1)[0]
    return sentence if len(sentence) <= 160 else sentence[:157] + "..."


def describe(cls: Any, names: typing.Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return name -> type, default, choices and help of a dataclass's fields, or of those named."""
    hints, table = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if names and field.name not in names:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        row = {
            "type": " | ".join(kinds(hints[field.name])),
            "default": default.value if isinstance(default, Enum) else default,
            "help": first_sentence(field.metadata.get("help", "")),
        }
        if words := choices(field, hints[field.name]):
            row["choices"] = words
        table[field.name] = row
    return table


def installed() -> dict[str, dict[str, Any]]:
    """Return the table of the installed libraries."""
    from trl import GRPOConfig, ModelConfig, ScriptArguments, SFTConfig

    return {
        "SFTConfig": describe(SFTConfig),
        "ModelConfig": describe(ModelConfig),
        "ScriptArguments": describe(ScriptArguments, DATASET),
        "GRPOConfig": describe(GRPOConfig, SAMPLING),
    }


def render(table: dict[str, dict[str, Any]]) -> str:
    """Return the table as JSON with one field a line, so that a new release reads as a short difference."""
    blocks = []
    for group, fields in sorted(table.items()):
        rows = [f"    {json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(fields.items())]
        blocks.append(f"  {json.dumps(group)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@pytest.mark.slow
def test_the_committed_table_is_what_the_installed_trl_has() -> None:
    assert TABLE.read_text() == render(installed()), (
        "run `python tests/config/test_library_fields.py` and read the difference"
    )


def test_no_two_library_classes_of_the_table_share_a_key() -> None:
    names = [name for fields in json.loads(TABLE.read_text()).values() for name in fields]
    assert len(names) == len(set(names))


if __name__ == "__main__":
    sys.exit(TABLE.write_text(render(installed())) and None)
