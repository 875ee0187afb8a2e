"""A model's own generation config: its stop ids are used, what else it holds is said, and nothing breaks a save."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from transformers import AutoModelForCausalLM, GenerationConfig

from bcft.config.schema import ModelSettings
from bcft.errors import UsageError
from bcft.policy.loading import load_policy, save_policy, with_adapter

ADAPTER = ModelSettings(use_peft=True, lora_r=2, lora_target_modules=("all-linear",))
LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
HELD = {
    "temperature without do_sample": ({"temperature": 0.6}, "temperature 0.6"),
    "sampling": (LLAMA, "do_sample True, temperature 0.6, top_p 0.9"),
    "a penalty": ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
    "greedy with top_k": ({"do_sample": False, "top_k": 5}, "top_k 5"),
    "beams": ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty 2.0, num_beams 1"),
    "several sequences": ({"num_return_sequences": 4}, "num_return_sequences 4"),
    "an unknown cache": ({"cache_implementation": "nope"}, "cache_implementation nope"),
    "a word for a number": ({"temperature": "hot"}, "temperature hot"),
    "a limit": ({"max_length": 4096, "suppress_tokens": [1, 2]}, "max_length 4096, suppress_tokens [1, 2]"),
}


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "m", llama_tokenizer(["a b"]))


def write(model, values):
    Path(model, "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.mark.parametrize("settings", [ModelSettings(), ADAPTER], ids=["full", "adapter"])
@pytest.mark.parametrize("case", HELD)
def test_what_a_generation_config_holds_is_said_and_not_saved_and_the_save_loads_and_saves_again(
    llama, tmp_path, case, settings
):
    held, words = HELD[case]
    write(llama, held | {"eos_token_id": [7, 9], "bos_token_id": 0, "transformers_version": "4.41.0"})
    policy = with_adapter(load_policy(llama, settings), settings, seed=0)
    assert f" holds {words}; this is neither used nor saved" in policy.note
    assert "\n" not in policy.note
    saved = tmp_path / "saved"
    save_policy(policy, saved)
    values = json.loads((saved / "generation_config.json").read_text())
    assert values.keys() == {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}
    assert {7, 9} <= set(values["eos_token_id"]) == set(policy.renderer.stop_ids)
    assert values["bos_token_id"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig.from_pretrained(saved).save_pretrained(tmp_path / "again")
        if settings is not ADAPTER:
            model = AutoModelForCausalLM.from_pretrained(saved)
            model.save_pretrained(tmp_path / "again")
    assert load_policy(str(saved), settings).note == (policy.note if settings is ADAPTER else "")


@pytest.mark.parametrize("values", [None, {}, {"eos_token_id": 7, "pad_token_id": 0}, {"_from_model_config": True},
                                    {"do_sample": False, "use_cache": True}])  # fmt: skip
def test_a_generation_config_without_sampling_has_no_note(llama, values):
    Path(llama, "generation_config.json").unlink()
    if values is not None:
        write(llama, values)
    assert load_policy(llama, ModelSettings()).note == ""


@pytest.mark.parametrize("values", [{"temperature": 0.7}, LLAMA, {"repetition_penalty": 1.2}, {"num_beams": 4},
                                    {"max_length": 30}])  # fmt: skip
def test_sampling_in_an_old_models_configuration_neither_reaches_generate_nor_breaks_a_save(llama, tmp_path, values):
    file = Path(llama, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    policy = load_policy(llama, ModelSettings())
    assert not policy.model.generation_config.to_diff_dict().keys() & values.keys()
    save_policy(policy, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not loaded.generation_config.to_diff_dict().keys() & values.keys()
    loaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "it holds \\[\\], not a mapping"),
        ('"greedy"', "it holds greedy, not a mapping"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', not a token id"),
        ('{"eos_token_id": [7, -1]}', "eos_token_id is \\[7, -1\\], not a token id"),
        ('{"eos_token_id": true}', "eos_token_id is True, not a token id"),
        ('{"bos_token_id": 1.5}', "bos_token_id is 1.5, not a token id"),
    ],
)
def test_a_generation_config_that_says_nothing_usable_is_refused_in_one_line(llama, text, reason):
    write(llama, text)
    with pytest.raises(UsageError, match=f"^model_name_or_path: cannot load generation_config.json of .*{reason}") as e:
        load_policy(llama, ModelSettings())
    assert "\n" not in str(e.value)


def test_generate_of_the_saved_model_stops_where_the_policy_stops(llama, tmp_path):
    policy = load_policy(llama, ModelSettings())
    save_policy(policy, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert loaded.generate(ids, max_new_tokens=8).tolist() == policy.model.generate(ids, max_new_tokens=8).tolist()
    assert loaded.generation_config.eos_token_id == list(policy.renderer.stop_ids)
