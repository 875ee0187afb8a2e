"""What needs no weights is refused before any is loaded, each with its key and what to do."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from bcft.config.schema import ModelSettings, TrainingSettings
from bcft.errors import DataError, StorageError, UsageError
from bcft.policy import loading
from bcft.policy.loading import (
    ASSETS,
    check_disk,
    check_model,
    cpu_threads,
    load_model,
    load_policy,
    load_tokenizer,
    save_policy,
    with_adapter,
)
from bcft.training.trainer import BCTrainer, training_arguments
from bcft.types import IGNORED, TrainingExample

LORA = ModelSettings(use_peft=True, lora_r=4, lora_target_modules=("q_proj", "v_proj"))


@pytest.fixture
def llama(tmp_path):
    return save_llama(tmp_path / "m", llama_tokenizer(["a b"]))


@pytest.fixture
def adapter(llama, tmp_path):
    """A saved adapter's directory."""
    save_policy(with_adapter(load_policy(llama, LORA), LORA, seed=0), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def loads(monkeypatch):
    """The names whose weights are loaded."""
    names = []
    monkeypatch.setattr(loading, "load_model", lambda name, *_, **__: names.append(name))
    return names


def edit(file, **values):
    file = Path(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(name, settings, loads, *, error=UsageError, trainable=True):
    """Return the line with which a policy is refused before its weights are loaded."""
    loads.clear()
    with pytest.raises(error) as caught:
        load_policy(str(name), settings, trainable=trainable)
    assert not loads
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The tokenizer against the embeddings


@pytest.mark.parametrize("more", [1, 2, 7])
def test_more_tokens_than_embeddings_are_refused_with_both_numbers_and_the_remedy(llama, loads, more):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = len(tokenizer)
    tokenizer.add_tokens([f"new{i}" for i in range(more)])
    tokenizer.save_pretrained(llama)
    line = refused(llama, ModelSettings(), loads)
    assert line.startswith(f"model_name_or_path: the tokenizer of '{llama}' has {rows + more} tokens and its model ")
    assert f" {rows} embeddings, none for 'new0' (id {rows}): " in line
    assert line.endswith(f"resize_token_embeddings({rows + more})")


@pytest.mark.parametrize("role", ["pad", "eos", "bos", "template"])
def test_a_special_token_beyond_the_embeddings_is_refused_where_it_is_used(llama, loads, role):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|late|>"]})
    tokenizer.save_pretrained(llama)
    check_model(llama, ModelSettings())  # Gemma 3's text models have such an image token
    if role == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|eot_id|><|late|>")
    else:
        setattr(tokenizer, f"{role}_token", "<|late|>")
    tokenizer.save_pretrained(llama)
    assert "none for '<|late|>'" in refused(llama, ModelSettings(), loads)


def test_fewer_tokens_than_embeddings_are_fine(llama, tmp_path):
    tokenizer = load_tokenizer(llama, ModelSettings())
    padded = save_llama(tmp_path / "padded", tokenizer)
    model = loading.load_policy(padded, ModelSettings()).model
    model.resize_token_embeddings(len(tokenizer) + 64)
    model.save_pretrained(padded)
    check_model(padded, ModelSettings())


# Files and templates


def test_a_template_path_that_is_a_directory_is_refused_with_the_file_to_give(llama, tmp_path, loads):
    line = refused(llama, ModelSettings(chat_template_path=llama), loads)
    assert line == f"chat_template_path: '{llama}' is a directory: give '{llama}/chat_template.jinja'"
    (tmp_path / "empty").mkdir()
    line = refused(llama, ModelSettings(chat_template_path=str(tmp_path / "empty")), loads)
    assert line.endswith("is a directory: give the template's own file")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"\xff\xfe{", "is not UTF-8 text"), (b"{% for", "template")]
)
def test_a_template_that_cannot_be_read_is_refused(llama, tmp_path, loads, content, reason):
    file = tmp_path / "t.jinja"
    if content is not None:
        file.write_bytes(content)
    line = refused(llama, ModelSettings(chat_template_path=str(file)), loads, error=(UsageError, DataError))
    assert reason in line


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "no_such"}, "cannot load"),
        ({"model_type": "t5"}, "is not a causal language model"),
        ({"model_type": "mamba"}, "takes no `past_key_values`"),
        ({"num_attention_heads": 5}, "The hidden size (32) is not a multiple of the number of attention heads (5)"),
        ({"hidden_act": "no_such"}, "does not define a model"),
    ],
)
def test_a_configuration_without_a_model_that_can_be_played_is_refused(llama, loads, values, reason):
    file = Path(llama, "config.json")
    if values == {"model_type": "mamba"}:
        file.write_text(json.dumps(values))
    edit(file, **values)
    line = refused(llama, ModelSettings(), loads)
    assert line.startswith("model_name_or_path: ")
    assert reason in line


@pytest.mark.parametrize("name", ["no_such", "flash_attention_2"])
def test_attention_that_is_not_installed_is_refused_with_its_key(llama, loads, name):
    assert refused(llama, ModelSettings(attn_implementation=name), loads).startswith("attn_implementation: ")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_pickled_weights_are_refused_unread(llama, loads, file):
    Path(llama, "model.safetensors").rename(Path(llama, file))
    assert "pickled weights can run code" in refused(llama, ModelSettings(), loads, error=DataError)


@pytest.mark.parametrize("damage", ["a tensor missing", "another shape", "torn", "empty", "no file"])
def test_weights_that_are_not_the_models_are_refused_in_one_line(llama, damage):
    """Without its own check a missing tensor is random, with a warning that nobody reads."""
    file = Path(llama, "model.safetensors")
    weights = load_file(file)
    if damage == "a tensor missing":
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
    elif damage == "another shape":
        edit(Path(llama, "config.json"), intermediate_size=48)
    elif damage == "no file":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8] if damage == "torn" else b"")
    with pytest.raises(UsageError, match=r"^model_name_or_path: ") as caught:
        load_policy(llama, ModelSettings())
    assert "\n" not in str(caught.value)
    if damage == "a tensor missing":
        assert "has no weights for 1 tensors of its model, such as model.layers.0.mlp.up_proj.weight" in str(
            caught.value
        )


# Adapters


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("lora_target_modules", ("no_such",)),
        ("lora_target_modules", ("q_proj", "no_such")),
        ("lora_target_modules", (r".*\.no_such_\d+",)),
        ("lora_target_modules", ("all_linear",)),
        ("lora_target_modules", ("input_layernorm",)),
        ("lora_modules_to_save", ("no_such",)),
        ("lora_modules_to_save", ("lm_head", "no_such")),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_the_names_that_do(llama, loads, key, names):
    line = refused(llama, replace(LORA, **{key: names}), loads)
    assert line.startswith(f"{key}: ")
    assert "use all-linear, or names among down_proj, gate_proj, k_proj" in line
    assert check_model(llama, replace(LORA, **{key: names}), trainable=False)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("lora_target_modules", ("all-linear",)),
        ("lora_target_modules", ("q_proj", "mlp.up_proj")),
        ("lora_target_modules", (r".*layers\.1.*_proj",)),
        ("lora_target_modules", None),
        ("lora_modules_to_save", ("lm_head", "embed_tokens")),
    ],
)
def test_targets_that_match_are_what_peft_trains(llama, key, names):
    settings = replace(LORA, **{key: names})
    check_model(llama, settings)
    assert with_adapter(load_policy(llama, settings), settings, seed=0).adapter


@pytest.mark.parametrize("base", ["/nowhere/base", "runs/sft/base", "./base", "../moved", "a/b/c"])
def test_an_adapter_whose_base_moved_is_refused_with_the_file_that_names_it(adapter, loads, base):
    edit(adapter / "adapter_config.json", base_model_name_or_path=base)
    (adapter / "tokenizer_config.json").unlink()
    line = refused(adapter, ModelSettings(), loads)
    assert line.startswith(f"model_name_or_path: '{adapter / 'adapter_config.json'}' names the base {base!r}")
    assert line.endswith("set base_model_name_or_path there to where the base is now")


def test_an_adapter_of_the_embedded_policy_finds_it_in_whichever_place_the_package_is(tmp_path):
    directory = tmp_path / "adapter"
    settings = replace(LORA, lora_target_modules=("all-linear",))
    save_policy(with_adapter(load_policy("bcft:tiny-math", settings), settings, seed=0), directory)
    edit(directory / "adapter_config.json", base_model_name_or_path="/elsewhere/bcft/assets/tiny-math")
    assert loading.adapter_base(str(directory)) == str(ASSETS / "tiny-math")
    assert load_policy(str(directory), ModelSettings()).adapter


@pytest.mark.parametrize("damage", ["wider base", "fewer layers", "torn", "missing", "pickle", "unknown type"])
def test_an_adapter_that_does_not_fit_its_base_is_refused_before_the_base_is_loaded(adapter, tmp_path, loads, damage):
    weights = adapter / "adapter_model.safetensors"
    if damage in ("wider base", "fewer layers"):
        change = {"hidden": 64} if damage == "wider base" else {"layers": 1}
        other = save_llama(tmp_path / "other", llama_tokenizer(["a b"]), **change)
        edit(adapter / "adapter_config.json", base_model_name_or_path=other)
    elif damage == "torn":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "unknown type":
        edit(adapter / "adapter_config.json", peft_type="SOMETHING")
    else:
        weights.rename(adapter / "adapter_model.bin") if damage == "pickle" else weights.unlink()
    line = refused(adapter, ModelSettings(), loads, error=DataError if damage == "pickle" else UsageError)
    expected = {
        "wider base": "its lora_A of model.layers.0.self_attn.q_proj is 4 x 32, and the layer of its base",
        "fewer layers": "has no module model.layers.1.self_attn.q_proj",
        "pickle": "pickled weights can run code",
    }
    assert expected.get(damage, "cannot load the adapter") in line


# Precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_full_model_is_not_trained_in_16_bits_and_the_line_says_what_to_set(llama, loads, dtype):
    line = refused(llama, ModelSettings(dtype=dtype), loads)
    assert line.startswith(f"dtype: {dtype} weights lose most small updates")
    assert ("bf16: true" if dtype == "bfloat16" else "fp16: true") in line


@pytest.mark.parametrize(
    ("fields", "trainable", "loaded", "trained"),
    [
        ({}, True, torch.float32, torch.float32),
        ({"dtype": "float32"}, True, torch.float32, torch.float32),
        ({"bf16": True}, True, torch.float32, torch.float32),
        ({"dtype": "bfloat16"}, False, torch.bfloat16, None),
        ({"dtype": "bfloat16", "use_peft": True}, True, torch.bfloat16, torch.float32),
        ({"dtype": "float16", "use_peft": True}, True, torch.float16, torch.float32),
        ({"bf16": True, "use_peft": True}, True, torch.bfloat16, torch.float32),
    ],
)
def test_the_precision_line_names_the_weights_that_are_loaded_and_trained_weights_are_saved_in_fp32(
    llama, tmp_path, fields, trainable, loaded, trained
):
    settings = ModelSettings(**fields, lora_target_modules=("q_proj",), use_cpu=True)
    policy = load_policy(llama, settings, trainable=trainable)
    assert {p.dtype for p in policy.model.parameters()} == {loaded}
    small = policy.precision.why == "cpu, float32, one thread (more would slow a model this small)"
    assert small or str(loaded).removeprefix("torch.") in policy.precision.why
    if trained is None:
        return
    policy = with_adapter(policy, settings, seed=0)
    example = TrainingExample("d", "p", (5, 6, 7), (IGNORED, 6, 7))
    arguments = training_arguments(
        TrainingSettings(max_steps=1, passed_through={"report_to": "none", "save_strategy": "no"}),
        output_dir=tmp_path / "run", autocast=policy.precision.autocast, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = BCTrainer(policy.model, arguments, examples=[example], tokenizer=policy.renderer.tokenizer)
    trainer.train()
    save_policy(replace(policy, model=trainer.model), tmp_path / "saved")
    file = "adapter_model.safetensors" if settings.use_peft else "model.safetensors"
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved" / file).values()} == {trained}
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen == ({loaded} if settings.use_peft else set())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_thread_count_of_a_small_model_does_not_outlive_the_run(llama, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with cpu_threads():
            load_policy(llama, ModelSettings(use_cpu=True))
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == threads
        with pytest.raises(UsageError), cpu_threads():
            load_policy("bcft:huge", ModelSettings())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# The disk


def disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(2 * free, free, free))


@pytest.mark.parametrize(
    ("fields", "training", "copies", "optimizer", "each"),
    [
        ({}, {}, 1, True, 12),
        ({}, {}, 3, True, 20),
        ({}, {}, 3, False, 12),
        ({}, {"optim": "sgd"}, 2, True, 8),
        ({}, {"optim": "adamw_bnb_8bit"}, 2, True, 10),
        ({}, {"passed_through": {"save_strategy": "no"}}, 2, None, 8),
        ({}, {}, 2, None, 16),
    ],
)
def test_a_disk_that_cannot_hold_the_weights_is_refused_with_both_figures(
    monkeypatch, llama, tmp_path, fields, training, copies, optimizer, each
):
    parameters = load_policy(llama, ModelSettings()).model.num_parameters()
    given = tmp_path / "not" / "yet", llama, ModelSettings(**fields), TrainingSettings(**training)
    disk(monkeypatch, each * parameters)
    check_disk(*given, copies=copies, optimizer=optimizer)
    disk(monkeypatch, each * parameters - 1)
    with pytest.raises(StorageError, match=f"^output_dir: .* needs about {each * parameters / 1e6:.2f} MB") as caught:
        check_disk(*given, copies=copies, optimizer=optimizer)
    assert f"has {(each * parameters - 1) / 1e6:.2f} MB free" in str(caught.value)
    assert caught.value.exit_code == 7


def test_an_adapter_needs_room_for_itself_alone_and_what_is_written_already_counts(monkeypatch, llama, adapter):
    parameters = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    for name, settings in ((llama, LORA), (str(adapter), ModelSettings())):
        disk(monkeypatch, 4 * parameters)
        check_disk(Path("nowhere"), name, settings, TrainingSettings(), copies=1, optimizer=False)
        disk(monkeypatch, 4 * parameters - 1)
        with pytest.raises(StorageError):
            check_disk(Path("nowhere"), name, settings, TrainingSettings(), copies=1, optimizer=False)
        check_disk(adapter, name, settings, TrainingSettings(), copies=1, optimizer=False)


def test_a_3b_model_does_not_fit_a_disk_of_10_gigabytes(monkeypatch, tmp_path):
    shape = str(Path(__file__).parents[1] / "data" / "llama-3.2-3b")
    disk(monkeypatch, 10**10)
    with pytest.raises(StorageError, match=r"needs about 51.40 GB \(2 x 12.85 GB of weights and the optimizer\)"):
        check_disk(tmp_path, shape, ModelSettings(), TrainingSettings(), copies=2)
    check_disk(tmp_path, shape, LORA, TrainingSettings(), copies=3)


# What is checked is what is loaded


def test_a_model_that_passes_is_loaded_once(llama, monkeypatch):
    names = []
    monkeypatch.setattr(loading, "load_model", lambda name, *a, **k: names.append(name) or load_model(name, *a, **k))
    load_policy(llama, ModelSettings())
    assert names == [llama]
    assert AutoConfig.from_pretrained(llama).vocab_size
