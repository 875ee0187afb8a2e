"""What `export` writes is what was trained, loaded by plain transformers; what would not be is not written."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from helpers.tiny import llama_tokenizer, save_llama, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bcft import cli, export
from bcft.algorithms import export as exporting
from bcft.config.schema import ModelSettings
from bcft.errors import CheckpointError, StorageError, UsageError
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import interpolate, load_policy, save_policy, with_adapter
from bcft.runs.storage import read_json, write_manifest

LORA = ModelSettings(use_peft=True, lora_r=4, lora_dropout=0.1, lora_target_modules=("q_proj", "v_proj"), use_cpu=True)
IDS = torch.tensor([[0, 9, 17, 30, 44, 120, 7, 4]])
BOTH = ("embed_tokens", "lm_head")
KINDS = {
    "lora": (False, {}),
    "rslora": (False, {"use_rslora": True, "lora_r": 9}),
    "dora": (False, {"use_dora": True, "lora_target_modules": ("all-linear",)}),
    "on the embeddings": (True, {"lora_target_modules": ("q_proj", "embed_tokens")}),
    "embeddings and head": (False, {"lora_modules_to_save": BOTH}),
    "tied": (True, {"lora_modules_to_save": ("lm_head",), "use_dora": True}),
    "4-bit": (False, {"load_in_4bit": True, "lora_target_modules": ("all-linear",)}),
    "4-bit, tied, nested, dora": (
        True,
        {"load_in_4bit": True, "use_bnb_nested_quant": True, "use_dora": True, "lora_modules_to_save": ("lm_head",)},
    ),
}
"""Name -> whether the base's embeddings and head are tied, and the keys."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base whose embeddings and head are tied, and one whose are not."""
    tokenizer, paths = llama_tokenizer(["a b"], vocabulary=300), {}
    for tied in (False, True):
        paths[tied] = path = save_llama(tmp_path_factory.mktemp("base") / "m", tokenizer, hidden=64)
        config = LlamaConfig.from_pretrained(path, tie_word_embeddings=tied, initializer_range=0.1)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return paths


def adapted(base, settings, directory, *, scale=1.0):
    """Save an adapter that changes its base, as after training; return the policy."""
    policy = with_adapter(load_policy(base, settings), settings, seed=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn_like(parameter)
    if scale != 1:
        interpolate(policy, base, scale, settings)
    directory.mkdir()
    save_policy(policy, directory)
    return policy


@torch.no_grad()
def logits(model):
    with sampling_mode(model):
        return model(input_ids=IDS).logits


def loaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_is_one_plain_model_with_the_same_logits(bases, tmp_path, kind):
    tied, keys = KINDS[kind]
    settings = replace(LORA, **keys)
    policy = adapted(bases[tied], settings, tmp_path / "adapter")
    names = ("load_in_4bit", "use_bnb_nested_quant")
    export.run(tmp_path / "adapter", tmp_path / "out", **{name: keys[name] for name in names if name in keys})
    model = loaded(tmp_path / "out")
    bound = 1e-3 if settings.load_in_4bit else 1e-5
    assert (logits(model) - logits(policy.model)).abs().max() <= bound
    assert (logits(loaded(bases[tied])) - logits(model)).abs().max() > 0.01  # the adapter is in there
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    config = read_json(tmp_path / "out" / "config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] == (tied and kind != "on the embeddings")  # the head has no adapter
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.chat_template == policy.renderer.tokenizer.chat_template
    assert model.generation_config.eos_token_id == list(policy.renderer.stop_ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_the_base_is_not_merged_in_four_bits(bases, tmp_path):
    """Merging into 4-bit layers rounds the sum to 4 bits: it differs a hundred times as much."""
    settings = replace(LORA, load_in_4bit=True, lora_target_modules=("all-linear",))
    policy = adapted(bases[False], settings, tmp_path / "adapter")
    before = logits(policy.model)
    export.run(tmp_path / "adapter", tmp_path / "out", load_in_4bit=True)
    into_four_bits = policy.model.merge_and_unload()
    assert (logits(into_four_bits) - before).abs().max() > 100 * (logits(loaded(tmp_path / "out")) - before).abs().max()


def test_of_a_scaled_round_the_scaled_weights_are_exported(bases, tmp_path):
    """`ship_scale` writes weights between base and round into best/."""
    policy = adapted(bases[False], LORA, tmp_path / "adapter", scale=0.5)
    export.run(tmp_path / "adapter", tmp_path / "out")
    assert (logits(loaded(tmp_path / "out")) - logits(policy.model)).abs().max() <= 1e-5


def test_copies_of_tied_weights_that_differ_are_written_as_two(bases, tmp_path):
    """An adapter of another tool trained the head apart from the embeddings."""
    model = get_peft_model(loaded(bases[True]), LoraConfig(target_modules=["q_proj"], modules_to_save=list(BOTH)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head.modules_to_save" in name:
                parameter += 1
    model.save_pretrained(tmp_path / "adapter")
    export.run(tmp_path / "adapter", tmp_path / "out")
    assert (logits(loaded(tmp_path / "out")) - logits(model)).abs().max() <= 1e-5
    assert not read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_full_weights_keep_their_numbers_unless_others_are_asked_for(bases, tmp_path, dtype, capsys):
    export.run(bases[False], tmp_path / "out", dtype=dtype)
    model, before = loaded(tmp_path / "out"), loaded(bases[False])
    said = capsys.readouterr().out
    for (name, one), (_, two) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(one, two if dtype == "auto" else two.bfloat16().float()), name
    assert ("rounding to bfloat16 changes one by" in said) == (dtype == "bfloat16")
    assert f"--outtype {'f32' if dtype == 'auto' else 'bf16'}" in said
    again = tmp_path / "again"
    export.run(tmp_path / "out", again, quiet=True)  # nothing is rounded twice
    assert read_json(again / "config.json")["dtype"] == ("float32" if dtype == "auto" else "bfloat16")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_model_that_computes_something_else_is_not_written(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "BOUND", -1e-9)
    with pytest.raises(CheckpointError, match=r"merged model's logits differ .* nothing was written"):
        export.run(bases[False], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_left_as_it_is(bases, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="is there and not empty"):
        export.run(bases[False], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_is_too_small_is_refused_before_weights_are_loaded(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(exporting, "load_policy", None)
    with pytest.raises(StorageError, match=r"needs about 0\.\d+ MB of weights, and its disk has 0\.00 MB free"):
        export.run(bases[False], tmp_path / "out")


@pytest.fixture
def a_run(bases, tmp_path):
    """The directory of a `filtered` run as far as `export` reads it: two rounds, the second finished."""
    top = tmp_path / "run"
    for place in (top / "round_001" / "model", top / "round_002" / "model", top / "best"):
        shutil.copytree(bases[False], place)
        if place.name == "model":
            write_manifest(place, [*place.iterdir()])
    recipe = {"model_name_or_path": bases[False], "chat_template_kwargs": {"date_string": "01 Jan 2026"}}
    (top / "config.yaml").write_text(json.dumps(recipe))
    (top / "versions.json").write_text("{}")
    write_jsonl(top / "problems.jsonl", [{"problem_id": "p", "prompt": "a b", "answer": "4"}])
    write_manifest(top, [*(top / "best").iterdir()])
    return top


@pytest.mark.parametrize(
    ("given", "model"),
    [(".", "best"), ("best", "best"), ("round_001", "round_001/model"), ("round_001/model", "round_001/model")],
)
def test_what_a_directory_means(a_run, given, model):
    assert export.model_of(str(a_run / given)) == str(a_run / model)
    assert export.run_of(a_run / model) == a_run


def test_an_unfinished_run_and_changed_weights_are_refused(a_run):
    (a_run / "round_001" / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="differs from its hash"):
        export.model_of(str(a_run / "round_001"))
    (a_run / "round_002" / "model" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="its round is not finished"):
        export.model_of(str(a_run / "round_002"))
    (a_run / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is not finished: re-run its command"):
        export.model_of(str(a_run))
    shutil.rmtree(a_run / "best")
    with pytest.raises(UsageError, match=r"is not finished; give a round, such as .*round_002"):
        export.model_of(str(a_run))
    with pytest.raises(UsageError, match="has no model: give the directory of a run"):
        export.model_of(str(a_run.parent))


def test_a_run_is_compared_on_its_own_problems(a_run, tmp_path, capsys):
    export.run(a_run, tmp_path / "out")
    assert f"logits on 1 prompts of the run, in float32: the largest difference between {a_run / 'best'}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/x"], "command line: the following arguments are required: --output_dir"),
        (["runs/x", "output_dir=y", "--dtpye", "float32"], "command line: unrecognized arguments: --dtpye float32"),
        (["runs/x", "output_dir=y", "dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["runs/x", "output_dir=y", "load_in_4bit=yes"], 'argument --load_in_4bit: wants true or false, not "yes"'),
        (["runs/x", "output_dir=y", "to=dataset", "dtype=float32"], "dtype: has no effect with to: dataset"),
        (["runs/x", "output_dir=y", "lora_alpha=32"], "lora_alpha: has no effect but for a .pt file"),
        (["m.pt", "output_dir=y"], "model_name_or_path: required: m.pt has weights only"),
        (["m.pt", "output_dir=y", "model_name_or_path=m", "--load_in_4bit"], "load_in_4bit: has no effect for a .pt"),
        (["nowhere/at/all", "output_dir=y"], "nowhere/at/all: there is no such directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bcft: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_keys_are_given_in_both_ways():
    asked = export.options_of(["d", "--output_dir", "o", "to=pairs", "--quiet"])
    assert asked == export.Options("d", "o", to="pairs", quiet=True)
    asked = export.options_of(["d", "--output_dir=o", "use_bnb_nested_quant=true", "--load_in_4bit", "--use_cpu=false"])
    assert asked == export.Options("d", "o", use_bnb_nested_quant=True, load_in_4bit=True, use_cpu=False)


def test_help_says_what_each_option_is(capsys):
    assert cli.main(["export", "--help"]) == 0
    said = capsys.readouterr().out
    names = {field.name for field in fields(export.Options)} - {"source", "allow_remote_code"}
    assert all(f"--{name}" in said for name in {*names, "allow-remote-code", "debug"})
    assert cli.main(["--help"]) == 0
    assert "  export    Write a run" in capsys.readouterr().out
