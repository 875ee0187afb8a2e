"""Settings are explained, and refuse values that are wrong together."""

import re
from collections.abc import Callable

import pytest

from bcft.config.declare import SettingError, Settings
from bcft.config.keys import KEYS, PASSED_THROUGH
from bcft.config.schema import (
    ModelSettings,
    RoundSettings,
    RuleSettings,
    SelectionSettings,
    TrainingSettings,
)

NO_DIRECTION = {"seed", "preview_rows", "reward_weights"}
"""Numbers of which a larger one is not more of anything, or whose meaning says it all."""
NUMBERS = {"int", "float", "list[float]"}


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in KEYS.values() if not re.search(r"\w+ \w+|[A-Za-z]\.", key.meaning)] == []


def test_the_meaning_of_a_number_says_which_way_it_turns() -> None:
    numbers = [
        key
        for key in KEYS.values()
        if NUMBERS & set(key.type.split(" | ")) and key.name not in {*PASSED_THROUGH, *NO_DIRECTION}
    ]
    assert len(numbers) > 30
    direction = re.compile(r"\b(higher|lower|more|narrower)\b.* \w+")
    assert [key.name for key in numbers if not direction.search(key.meaning)] == []


def test_the_meaning_of_a_choice_names_its_words() -> None:
    for key in KEYS.values():
        if key.group == "bcft" and key.choices and key.name not in ("eval_split", "train_on"):
            missing = [
                word for word in key.choices if not re.search(rf"\b{word}\b", key.meaning) and word != key.default
            ]
            assert not missing, (key.name, missing)


CONFLICTS: list[tuple[Callable[[], Settings], str, str]] = [
    (lambda: ModelSettings(bf16=True, fp16=True), "fp16", "a run has one precision"),
    (lambda: RuleSettings(pass_rate=(0.9, 0.1)), "pass_rate", "the lower first"),
    (lambda: RuleSettings(pass_rate=(0.1, 0.5, 0.9)), "pass_rate", "wants two numbers"),
    (lambda: SelectionSettings(pass_rate=(0.0, 1.1)), "pass_rate", "in [0, 1]"),
    (lambda: SelectionSettings(ties="sample", keep_quantile=1.0), "ties", "would keep nothing"),
    (lambda: RoundSettings(num_rounds=2, warmup_rounds=2), "warmup_rounds", "leave none that trains"),
    (lambda: TrainingSettings(loss_reduction="sequence", loss_type="dft"), "loss_reduction", "loss_type: dft"),
    (
        lambda: TrainingSettings(loss_reduction="sequence", passed_through={"label_smoothing_factor": 0.1}),
        "loss_reduction",
        "has no label smoothing",
    ),
    (
        lambda: TrainingSettings(loss_reduction="sum", passed_through={"average_tokens_across_devices": False}),
        "loss_reduction",
        "sum is over all processes",
    ),
]


@pytest.mark.parametrize(("make", "key", "message"), CONFLICTS)
def test_settings_that_are_wrong_together_cannot_be_made(make: Callable[[], Settings], key: str, message: str) -> None:
    with pytest.raises(SettingError, match=f"^{key}: ") as caught:
        make()
    assert message in str(caught.value)
    assert caught.value.conflicts[0][0][0] == key


def test_all_conflicts_of_a_section_come_at_once() -> None:
    with pytest.raises(SettingError) as caught:
        RuleSettings(pass_rate=(1.0,), ties="sample", keep_quantile=1.0)
    assert [keys[0] for keys, _ in caught.value.conflicts] == ["pass_rate", "ties"]
