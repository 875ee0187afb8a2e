"""The README of a saved model can be read as it is: front matter, figures, and a recipe that is YAML."""

import re
from pathlib import Path

import pytest
import yaml

from bcft.reporting.model_card import model_card

FIGURES = {"n": 8, "stop_rate": 1.0, "greedy": {"success": 0.25, "ci95": [0.1, 0.5]}}
RECIPE = {"model_name_or_path": "some/model", "max_length": None, "use_peft": True, "reward_funcs": ["a.b", "c.d"]}


def card(metrics, *, adapter=False, command="sft"):
    return model_card(
        metrics, command=command, base="some/model", dataset="some/data", split="train[:9]", data="9 rows",
        directory=Path("runs/it"), adapter=adapter, recipe=RECIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "method"), [("sft", "behavior cloning"), ("filtered", "filtered behavior cloning")]
)
def test_the_card_names_model_method_data_and_conclusion(command, method):
    text = card({"conclusion": "better: a lot"}, command=command)
    assert f"`some/model` after {method} with bcft on `some/data` (split `train[:9]`)" in text
    assert "\nbetter: a lot\n" in text
    assert "Training data: 9 rows." in text
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["bcft", "behavior-cloning", command]


def test_the_figures_before_and_after_stand_in_a_table():
    text = card({"base": FIGURES, "final": FIGURES, "conclusion": ""})
    assert "|  | base | final |\n| --- | ---: | ---: |\n| problems | 8 | 8 |\n" in text
    assert "| solved, greedy | 25.0 % [10.0, 50.0] | 25.0 % [10.0, 50.0] |" in text


def test_a_mean_reward_is_called_that():
    rewarded = {"n": 8, "stop_rate": 1.0, "reward": {"mean": 0.5, "ci95": [0.25, 0.75]}}
    assert "| mean reward | 0.5 [0.25, 0.75] |" in card({"base": rewarded, "conclusion": ""})


def test_a_run_without_held_out_problems_has_no_table():
    assert "|" not in card({"base": {}, "final": {}, "conclusion": "nothing was measured"})


def test_an_adapter_is_loaded_by_peft_and_a_model_by_transformers():
    assert "from peft import AutoPeftModelForCausalLM" in card({"conclusion": ""}, adapter=True)
    text = card({"conclusion": ""})
    assert "from transformers import AutoModelForCausalLM" in text
    compile(re.search(r"```python\n(.+?)```", text, flags=re.S)[1], "card", "exec")


def test_the_recipe_in_the_card_is_yaml_with_the_same_values():
    text = card({"conclusion": ""})
    assert yaml.safe_load(re.search(r"```yaml\n(.+?)```", text, flags=re.S)[1]) == RECIPE
