"""Every kind of adapter trains, and what is saved is the same policy in plain PEFT, merged, and in a resumed run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bcft.config.schema import ModelSettings, TrainingSettings
from bcft.errors import UsageError
from bcft.policy.adapters import is_tied
from bcft.policy.loading import check_model, interpolate, load_policy, restore, save_policy, with_adapter
from bcft.training.trainer import BCTrainer, fit, training_arguments
from bcft.types import IGNORED, TrainingExample

LORA = ModelSettings(use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=("q_proj", "v_proj"))
BOTH = ("embed_tokens", "lm_head")
IDS = torch.tensor([[0, 9, 17, 30, 44, 120, 7, 4]])
KINDS = {
    "lora": (False, {}),
    "rslora": (False, {"use_rslora": True, "lora_r": 9}),
    "dora": (False, {"use_dora": True}),
    "dora with rslora": (False, {"use_dora": True, "use_rslora": True, "lora_target_modules": ("all-linear",)}),
    "adapter on the embeddings": (True, {"lora_target_modules": ("q_proj", "embed_tokens")}),
    "norms": (False, {"lora_modules_to_save": ("norm",)}),
    "embeddings and head": (False, {"lora_modules_to_save": BOTH}),
    "tied, by the head": (True, {"lora_modules_to_save": ("lm_head",)}),
    "tied, by the embeddings": (True, {"lora_modules_to_save": ("embed_tokens",)}),
    "tied, by both": (True, {"lora_modules_to_save": BOTH}),
    "tied, by both, with dora": (True, {"lora_modules_to_save": BOTH, "use_dora": True}),
}  # fmt: skip
"""Name -> whether the base's embeddings and head are tied, and the keys."""
OFTEN_SEEN = ("lora", "norms", "dora", "tied, by the embeddings", "tied, by both, with dora")
"""Kinds that other tests train as well, or that others of these are like."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base whose embeddings and head are tied, and one whose are not."""
    tokenizer, paths = llama_tokenizer(["a b"], vocabulary=300), {}
    for tied in (False, True):
        paths[tied] = path = save_llama(tmp_path_factory.mktemp("base") / "m", tokenizer)
        config = LlamaConfig.from_pretrained(path, tie_word_embeddings=tied, initializer_range=0.2)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return paths


def trained(base, settings, directory, *, steps=2):
    """Return a policy with an adapter after so many steps."""
    policy = with_adapter(load_policy(base, settings), settings, seed=0)
    rows = [TrainingExample(f"d{i}", "p", (5, 6 + i, 7, 4), (IGNORED, 6 + i, 7, 4)) for i in range(4)]
    keys = {"report_to": "none", "save_strategy": "no"}
    arguments = training_arguments(
        TrainingSettings(max_steps=steps, learning_rate=1e-2, passed_through=keys),
        output_dir=directory / "run", autocast=policy.precision.autocast, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = BCTrainer(policy.model, arguments, examples=rows, tokenizer=policy.renderer.tokenizer, checkpoints=False)
    fit(trainer, rows)
    return replace(policy, model=trainer.model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def tensors(model):
    """Return the parameters of an adapter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in OFTEN_SEEN else ()) for k in KINDS])
def test_a_saved_adapter_is_the_policy_in_plain_peft_merged_and_resumed(bases, tmp_path, kind):
    tied, keys = KINDS[kind]
    settings = replace(LORA, **keys)
    check_model(bases[tied], settings)
    policy = trained(bases[tied], settings, tmp_path)
    before = logits(load_policy(bases[tied], ModelSettings()).model)
    expected = logits(policy.model)
    assert (expected - before).abs().max() > 1e-3
    assert is_tied(policy.model) == tied
    save_policy(policy, tmp_path / "adapter")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    resumed = load_policy(str(tmp_path / "adapter"), settings)
    assert tensors(resumed.model).keys() == tensors(policy.model).keys()
    assert all(torch.equal(tensor, tensors(policy.model)[name]) for name, tensor in tensors(resumed.model).items())
    if settings.lora_modules_to_save and tied:  # trained and saved as one
        whole = [name for name in tensors(policy.model) if ".modules_to_save." in name]
        assert whole == ["base_model.model.model.embed_tokens.modules_to_save.default.weight"]
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        head, embeddings = (saved[f"base_model.model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
        assert torch.equal(head, embeddings)
    if "adapter on the embeddings" in kind:  # merged, they are no longer those of the head
        return
    plain.merge_and_unload().save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(whole), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["rslora", "dora", "tied, by both"])
def test_a_policy_restored_to_saved_weights_is_what_was_saved(bases, tmp_path, kind):
    tied, keys = KINDS[kind]
    settings = replace(LORA, **keys)
    policy = with_adapter(load_policy(bases[tied], settings), settings, seed=0)
    save_policy(policy, tmp_path / "adapter")
    began = logits(policy.model)
    with torch.no_grad():
        for parameter in tensors(policy.model):
            policy.model.get_parameter(parameter).add_(0.5)
    assert not torch.equal(logits(policy.model), began)
    restore(policy, str(tmp_path / "adapter"), settings)
    assert torch.equal(logits(policy.model), began)


def test_tied_weights_by_other_names_are_refused_unless_the_head_is_named(tmp_path):
    tokenizer = llama_tokenizer(["a b"], vocabulary=300)
    path = str(tmp_path / "gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=4,
        initializer_range=0.2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    plain = replace(LORA, lora_target_modules=("c_attn",))
    with pytest.raises(UsageError, match=r"^lora_modules_to_save: .* copy of one of them: give lora_modules_to_save: "):
        check_model(path, replace(plain, lora_modules_to_save=("wte",)))
    settings = replace(plain, lora_modules_to_save=("lm_head",))
    check_model(path, settings)
    policy = trained(path, settings, tmp_path)
    assert is_tied(policy.model)
    save_policy(policy, tmp_path / "adapter")
    plain_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(logits(plain_peft), logits(policy.model), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_an_adapter_on_the_head_is_refused_since_it_would_not_train(bases, tied):
    with pytest.raises(UsageError, match=r"^lora_target_modules: .*give lora_modules_to_save: \[lm_head\]") as caught:
        check_model(bases[tied], replace(LORA, lora_target_modules=("q_proj", "lm_head")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dtype": "bfloat16"}, "the frozen base in bfloat16 cannot be multiplied with them"),
        ({"load_in_4bit": True, "lora_modules_to_save": ("lm_head", "o_proj")}, "o_proj is in 4 bits"),
    ],
    ids=str,
)
def test_whole_modules_that_do_not_fit_the_base_are_refused(bases, keys, words):
    with pytest.raises(UsageError, match=f"^lora_modules_to_save: .*{words}"):
        check_model(bases[True], replace(LORA, **{"lora_modules_to_save": ("lm_head",), "use_cpu": True} | keys))


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_modules_to_save": BOTH, "dtype": "bfloat16", "bf16": True},
        {"use_dora": True, "dtype": "bfloat16", "bf16": True},
        {"lora_modules_to_save": ("lm_head",), "load_in_4bit": True},
        pytest.param({"use_dora": True, "load_in_4bit": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_adapter_keeps_its_fp32_numbers_on_a_base_that_has_fewer_bits(bases, tmp_path, keys):
    settings = replace(LORA, use_cpu=True, **keys)
    policy = trained(bases[True], settings, tmp_path)
    save_policy(policy, tmp_path / "adapter")
    resumed = load_policy(str(tmp_path / "adapter"), settings)
    saved, own = tensors(policy.model), tensors(resumed.model)
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in own.items())


# The way from the base to a policy


@pytest.mark.parametrize(
    "kind",
    [
        *("full, tied", "lora", "tied, by both"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "rslora", "embeddings and head")),
    ],
)
def test_a_scale_is_a_point_on_the_straight_line_between_the_weights(bases, tmp_path, kind):
    scale = 0.7
    tied, keys = KINDS.get(kind, (kind.endswith("tied"), {"use_peft": False}))
    settings = replace(LORA, **keys)
    policy = trained(bases[tied], settings, tmp_path)
    save_policy(policy, tmp_path / "trained")
    ends = [AutoModelForCausalLM.from_pretrained(bases[tied])]
    ends.append(merged(tmp_path / "trained", policy))
    with torch.no_grad():
        one, two = (dict(model.named_parameters()) for model in ends)
        for name, parameter in one.items():
            parameter.copy_((1 - scale) * parameter.double() + scale * two[name].double())
    interpolate(policy, bases[tied], scale, settings)
    assert torch.allclose(logits(policy.model), logits(ends[0]), atol=1e-5)
    save_policy(policy, tmp_path / "scaled")
    assert torch.allclose(logits(merged(tmp_path / "scaled", policy)), logits(ends[0]), atol=1e-5)
    assert is_tied(policy.model) == tied


def merged(directory, policy):
    """Return a saved policy as a full model, loaded by transformers and PEFT alone."""
    if not policy.adapter:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload()


# Stop tokens that were never trained


def spoiled(base, directory, rows, *, value=None):
    """Save a base in which these rows of the head are equal, and of the embeddings if they are tied."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[rows] = weight[rows[0]].clone() if value is None else torch.full((weight.shape[1],), value)
    model.save_pretrained(directory)
    for file in Path(base).glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "chat_template.jinja").write_bytes(Path(base, "chat_template.jinja").read_bytes())
    return str(directory)


@pytest.mark.parametrize(
    ("tied", "rows", "value", "words"),
    [
        (False, [4], 0.0, "is all zeros"),
        (True, [4], 0.0, "is all zeros"),
        (False, [4, 5, 3], None, "is equal to 2 others"),
        (True, [2, 4], None, "is equal to 1 others"),
    ],
)
def test_a_stop_token_that_was_never_trained_is_reported_with_the_remedy(bases, tmp_path, tied, rows, value, words):
    base = spoiled(bases[tied], tmp_path / "base", rows, value=value)
    (line,) = load_policy(base, LORA).note.splitlines()
    assert line.startswith("warning: the stop token '<|eot_id|>' (id 4) was never trained in this model")
    assert words in line
    names = line.rpartition("lora_modules_to_save: [")[2].rstrip("]").split(", ")
    assert names == (["lm_head"] if tied else [*BOTH])
    assert "Instruct" in line
    assert load_policy(base, replace(LORA, lora_modules_to_save=tuple(names))).note == ""
    assert load_policy(base, ModelSettings()).note == ""  # all weights train
    assert load_policy(base, LORA, trainable=False).note == ""


def test_trained_stop_tokens_are_not_reported_nor_other_rows_that_are_equal(bases, tmp_path):
    assert load_policy(bases[True], LORA).note == ""
    assert load_policy("bcft:tiny-math", LORA).note == ""
    assert load_policy(spoiled(bases[False], tmp_path / "base", [1, 2, 5]), LORA).note == ""
