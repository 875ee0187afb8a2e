"""Keys, refused names and foreign names agree with the libraries' fields and with each other."""

import re
from dataclasses import fields
from functools import partial

import pytest
from helpers.recipes import BASE_KEYS, findings

from bcft.config.declare import LIBRARY, LIBRARY_FIELDS
from bcft.config.keys import KEYS, PASSED_THROUGH, REFUSED, REFUSED_VALUES, RENAMED
from bcft.config.loader import load
from bcft.config.schema import REQUIRED, SECTIONS

OTHER_TYPES = {
    "model_name_or_path": "str",  # required, as are the next two
    "dataset_name": "str",
    "output_dir": "str",
    "dtype": "str",  # null would be TRL's float32
    "fp16": "bool | null",  # null: chosen from the hardware, as for bf16
    "min_p": "float",  # 0 is off, so null is not needed
    "max_completion_length": "int",  # without a limit a rollout might not end
    "num_generations": "int",
    "dataset_test_split": "str | null",  # null: a share of the problems where there is no split
    "logging_steps": "float | null",  # null: the command decides
    "hub_private_repo": "bool",  # private unless the recipe says otherwise, whatever an organization's default is
}
"""Library fields whose type here is another one, each with the reason."""
OTHER_DEFAULTS = {
    "dataset_test_split",
    "dtype",
    "fp16",
    "gradient_checkpointing",
    "hub_private_repo",
    "logging_steps",
    "min_p",
}
"""Library fields whose default here is another one, beside those whose default depends on the recipe."""


def test_types_of_library_fields_are_those_of_the_library_or_documented() -> None:
    library = {name: set(row["type"].split(" | ")) for name, (_, row) in LIBRARY_FIELDS.items()}
    here = {key.name: set(key.type.split(" | ")) for key in KEYS.values() if key.group != "bcft"}
    assert {name for name, kinds in here.items() if kinds != library[name]} == OTHER_TYPES.keys()
    assert {name: here[name] for name in OTHER_TYPES} == {
        name: set(kinds.split(" | ")) for name, kinds in OTHER_TYPES.items()
    }


def test_defaults_of_library_fields_are_those_of_the_library_or_documented() -> None:
    here = {key.name: key.default for key in KEYS.values() if key.group != "bcft"}
    differing = {name for name, default in here.items() if default != LIBRARY_FIELDS[name][1]["default"]}
    assert differing == OTHER_DEFAULTS | {*REQUIRED, "output_dir"}


def test_a_library_field_with_choices_takes_no_other_word() -> None:
    names = [name for name, (_, row) in LIBRARY_FIELDS.items() if name in KEYS and "choices" in row]
    assert {"eval_strategy", "lr_scheduler_type", "optim", "bnb_4bit_quant_type", "save_strategy"} <= {*names}
    for name in names:
        (line,) = findings(partial(load, "sft", None, BASE_KEYS | {name: "no_such_word"}))
        first = LIBRARY_FIELDS[name][1]["choices"][0]
        assert re.match(rf"override: {name}: wants .*\bone of {first}, .*, not 'no_such_word'", line)


def test_a_key_is_declared_once() -> None:
    declared = [field.name for section in SECTIONS.values() for field in fields(section)]
    declared = [name for name in declared if name != "passed_through"]
    assert sorted([*declared, *PASSED_THROUGH]) == sorted(KEYS)


def test_only_fields_of_the_trainers_configuration_are_passed_through() -> None:
    assert PASSED_THROUGH.keys() <= LIBRARY["SFTConfig"].keys()


def test_a_refused_or_foreign_name_is_answered_with_the_reason_or_the_right_name() -> None:
    lines = findings(lambda: load("sft", None, BASE_KEYS | dict.fromkeys([*REFUSED, *RENAMED], 1)))
    assert lines == [
        *(f"override: {name}: refused: {reason}" for name, reason in REFUSED.items()),
        *(f"override: {name}: not a key here; use {right}" for name, right in RENAMED.items()),
    ]


@pytest.mark.parametrize("name", sorted(LIBRARY_FIELDS.keys() - KEYS.keys() - REFUSED.keys()))
def test_a_library_field_that_is_not_a_key_is_refused(name: str) -> None:
    group = LIBRARY_FIELDS[name][0]
    for value in (LIBRARY_FIELDS[name][1]["default"], "x"):
        assert findings(lambda value=value: load("sft", None, {**BASE_KEYS, name: value})) == [
            f"override: {name}: refused: bcft does not use this field of TRL's {group}; recipes/KEYS.md has the keys"
        ]


def test_the_right_name_of_a_foreign_one_is_a_key() -> None:
    assert {right.split()[0].strip(":") for right in RENAMED.values()} <= KEYS.keys()


def test_keys_and_refused_and_foreign_names_are_apart() -> None:
    assert not RENAMED.keys() & (KEYS.keys() | REFUSED.keys() | LIBRARY_FIELDS.keys())
    assert not KEYS.keys() & REFUSED.keys()
    assert {name for name, _ in REFUSED_VALUES} <= KEYS.keys()
    assert all(word in KEYS[name].choices for name, word in REFUSED_VALUES)
