"""The README of a saved model is made from the files of its run: front matter, figures, and a recipe that is YAML."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from bcft.reporting.model_card import model_card
from bcft.runs.storage import write_json

FIGURES = {"n": 8, "stop_rate": 1.0, "greedy": {"success": 0.25, "ci95": [0.1, 0.5]}}
TRAIN = {"rows": 9, "tokens_supervised": 70, "steps": 3, "loss_first": 2.0, "loss_last": 1.0}
RECIPE = {
    "model_name_or_path": "some/model", "dataset_name": "some/data", "dataset_train_split": "train[:9]", "seed": 7,
    "use_peft": True, "reward_funcs": ["a.b", "c.d"], "output_dir": "/home/jo/runs/it", "overlength": "drop",
}  # fmt: skip
VERSIONS = {"packages": {"bcft": "0"}, "python": "3", "gpus": [], "cpu": "", "data": "abc", "functions": []}


@pytest.fixture
def card(tmp_path):
    """Return the text of the card of a run with these figures and keys."""

    def made(metrics, *, adapter="", recipe=RECIPE, **given):
        run = tmp_path / "it"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(recipe))
        write_json(run / "versions.json", VERSIONS)
        write_json(run / "metrics.json", {"base": {}, "final": {}, "train": TRAIN, "conclusion": ""} | metrics)
        if adapter:
            (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": adapter}))
        return model_card(run, **given)

    return made


def test_the_card_names_model_method_data_and_conclusion(card):
    text = card({"conclusion": "better: a lot"})
    assert "`some/model` after behavior cloning with bcft on `some/data` (split `train[:9]`)" in text
    assert "\nbetter: a lot\n" in text
    assert "9 demonstrations, 70 of their tokens with loss; 3 optimizer steps" in text
    about = ModelCard(text).data
    assert (about.base_model, about.datasets, about.tags) == (
        ["some/model"], ["some/data"], ["bcft", "behavior-cloning", "sft"],
    )  # fmt: skip


def test_what_nobody_finds_on_the_hub_is_not_in_the_metadata(card):
    own = {"model_name_or_path": "/models/secret/llama", "dataset_name": "bcft:arithmetic"}
    text = card({}, recipe=RECIPE | own)
    assert (ModelCard(text).data.base_model, ModelCard(text).data.datasets) == (None, None)
    assert "`llama` after" in text
    assert "/models" not in text


def test_the_figures_before_and_after_stand_in_a_table_and_in_the_metadata(card):
    text = card({"base": FIGURES, "final": FIGURES})
    assert "|  | base | final |\n| --- | ---: | ---: |\n| problems | 8 | 8 |\n" in text
    assert "| solved, greedy | 25.0 % [10.0, 50.0] | 25.0 % [10.0, 50.0] |" in text
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.25, "some/data")
    assert result.metric_name == "solved, greedy, 8 held-out problems, 95 % interval 0.1 to 0.5"


def test_a_mean_reward_is_called_that(card):
    rewarded = {"n": 8, "stop_rate": 1.0, "reward": {"mean": 0.5, "ci95": [0.25, 0.75]}}
    assert "| mean reward | 0.5 [0.25, 0.75] |" in card({"base": rewarded})


def test_a_run_without_held_out_problems_has_no_table(card):
    text = card({"conclusion": "nothing was measured"})
    assert "|" not in text
    assert "Nothing was measured on held-out problems." in text


def test_an_adapter_is_loaded_by_peft_and_a_model_by_transformers(card):
    text = card({}, name="me/it")
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in text
    assert 'AutoTokenizer.from_pretrained("me/it")' in text
    compile(re.search(r"```python\n(.+?)```", text, flags=re.S)[1], "card", "exec")
    text = card({}, adapter="other/base")
    assert "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer" in text
    assert (ModelCard(text).data.library_name, ModelCard(text).data.base_model) == ("peft", ["other/base"])


def test_the_recipe_in_the_card_is_yaml_with_every_key_that_decides_and_is_not_as_by_default(card):
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.+?)```", card({}), flags=re.S)[-1])
    assert recipe == {key: value for key, value in RECIPE.items() if key not in ("output_dir", "overlength")}
