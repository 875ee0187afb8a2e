"""What is exported is the policy: an ordinary directory with the same logits, or nothing."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from helpers.tiny import llama_tokenizer, save_llama, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bcft import export
from bcft.algorithms import export as exporting
from bcft.config.schema import ModelSettings
from bcft.errors import CheckpointError, DataError, StorageError, UsageError
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import load_policy, save_policy, with_adapter

LORA = ModelSettings(use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=("q_proj", "v_proj"))
KINDS = {
    "lora": (False, {}),
    "rslora": (False, {"use_rslora": True, "lora_r": 9}),
    "dora": (False, {"use_dora": True}),
    "embeddings and head": (False, {"lora_modules_to_save": ("embed_tokens", "lm_head")}),
    "tied, by the head": (True, {"lora_modules_to_save": ("lm_head",)}),
    "adapter on tied embeddings": (True, {"lora_target_modules": ("q_proj", "embed_tokens")}),
}
FOUR_BITS = {"lora in 4 bits": False, "lora in 4 bits, scales in 8": True}
IDS = torch.tensor([[0, 9, 17, 30, 44, 120, 7, 4]])


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


def adapted(base, settings, directory, *, run=None):
    """Save an adapter that changes the base; return its directory and its logits. run: also the files of a run."""
    settings = replace(settings, model_name_or_path=base)
    policy = with_adapter(load_policy(base, settings), settings, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    place = directory / "best" if run else directory
    place.mkdir(parents=True)
    save_policy(policy, place)
    if run:
        (directory / "versions.json").write_text("{}")
        (directory / "config.yaml").write_text(yaml.safe_dump({**asdict(settings), "lora_target_modules": []}))
        write_jsonl(directory / "problems.jsonl", [{"prompt": "b a"}, {"prompt": [{"role": "user", "content": "a"}]}])
    return place, logits(policy.model)


@torch.no_grad()
def logits(model):
    """The logits of some ids; 4-bit layers are not repacked."""
    with sampling_mode(model):
        return model(input_ids=IDS).logits


def plain(directory):
    """The logits of a directory in transformers alone, in eval mode."""
    return logits(AutoModelForCausalLM.from_pretrained(directory).eval())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_has_the_logits_of_the_policy_in_transformers_alone(bases, tmp_path, kind, capsys):
    tied, keys = KINDS[kind]
    place, before = adapted(bases[tied], replace(LORA, **keys), tmp_path / "adapter")
    output = export.run(place, output_dir=tmp_path / "whole")
    assert (plain(output) - before).abs().max() <= 1e-5
    assert (before - plain(bases[tied])).abs().max() > 0.01
    assert not (output / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(place).chat_template
    assert (output / "generation_config.json").is_file()
    out = capsys.readouterr().out
    assert "adapter merged, float32" in out
    assert f"--outfile {output}.gguf" in out


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_4_bit_base_is_dequantized_before_the_adapter_is_merged(bases, tmp_path, kind):
    settings = replace(LORA, load_in_4bit=True, use_bnb_nested_quant=FOUR_BITS[kind])
    _, before = adapted(bases[False], settings, tmp_path / "run", run=True)
    output = export.run(tmp_path / "run", output_dir=tmp_path / "whole")
    assert (plain(output) - before).abs().max() <= 1e-3
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    # Merged with the full weights, the adapter would be another policy.
    full = export.run(tmp_path / "run" / "best", output_dir=tmp_path / "full")
    assert (plain(full) - before).abs().max() <= 1e-3, "the run's recipe is read for its best/ too"
    (tmp_path / "run" / "versions.json").unlink()
    unquantized = export.run(tmp_path / "run" / "best", output_dir=tmp_path / "unquantized")
    assert (plain(unquantized) - before).abs().max() > 1e-2


def test_full_weights_are_exported_in_the_numbers_asked_for(bases, tmp_path, capsys):
    whole = export.run(bases[True], output_dir=tmp_path / "a")
    assert torch.equal(plain(whole), plain(bases[True]))
    half = export.run(bases[True], output_dir=tmp_path / "b", dtype="bfloat16")
    assert {w.dtype for w in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert "after rounding to bfloat16" in capsys.readouterr().out


def test_an_export_that_is_not_the_policy_is_refused_and_leaves_nothing(bases, tmp_path, monkeypatch):
    place, _ = adapted(bases[False], LORA, tmp_path / "adapter")

    def damaged(policy, directory):
        files = save_policy(policy, directory)
        weights = load_file(directory / "model.safetensors")
        weights["lm_head.weight"][5] += 0.01
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return files

    monkeypatch.setattr(exporting, "save_policy", damaged)
    with pytest.raises(CheckpointError, match="nothing was exported"):
        export.run(place, output_dir=tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(bases, tmp_path, monkeypatch):
    usage = exporting.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="output_dir: the model takes"):
        export.run(bases[False], output_dir=tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused_in_a_line(bases, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(UsageError, match="exists: give another"):
        export.run(bases[False], output_dir=full)
    with pytest.raises(UsageError, match="there is no such directory"):
        export.run(tmp_path / "nothing", output_dir=tmp_path / "out")
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="holds no model"):
        export.run(tmp_path / "run", output_dir=tmp_path / "out")
    (tmp_path / "run" / "manifest.json").touch()
    with pytest.raises(UsageError, match="save_total_limit"):
        export.run(tmp_path / "run", output_dir=tmp_path / "out")
    (tmp_path / "run" / "status.json").touch()
    with pytest.raises(UsageError, match="is not finished"):
        export.run(tmp_path / "run", output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "the following arguments are required: --output_dir"),
        (["x", "--output_dir", "y", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
        (["x", "--output_dir", "y", "--bits", "4"], "unrecognized arguments: --bits 4"),
        (["x.pt", "--output_dir", "y"], "model_name_or_path: required with x.pt"),
        (["x", "--output_dir", "y", "--model_name_or_path", "z"], "model_name_or_path: has no effect with x"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# Weights that torch.save wrote


@pytest.mark.parametrize("wrapper", ["", "module.", "model.", "module.model.", "base_model.model."])
@pytest.mark.parametrize("tied", [False, True])
def test_archers_checkpoint_becomes_a_directory_with_its_logits(bases, tmp_path, wrapper, tied):
    """As its scripts save it: the state dict of the whole model, with the names of what wrapped it."""
    model = AutoModelForCausalLM.from_pretrained(bases[tied]).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    file = tmp_path / "bc_model.pt"
    state = {wrapper + name: weight for name, weight in model.state_dict().items()}
    torch.save({"model_state_dict": state}, file)
    output = export.run(file, model_name_or_path=bases[tied], output_dir=tmp_path / "imported")
    assert (plain(output) - logits(model)).abs().max() <= 1e-6
    assert (plain(bases[tied]) - logits(model)).abs().max() > 0.01


class Code:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return print, ("it ran",)


def test_a_file_that_is_not_the_models_is_refused_and_runs_no_code(bases, tmp_path, capsys):
    state = dict(AutoModelForCausalLM.from_pretrained(bases[False]).state_dict())
    file, name = tmp_path / "bc_model.pt", "model.layers.0.self_attn.q_proj.weight"

    def refused(content, message):
        if content is not None:
            torch.save(content, file)
        with pytest.raises(DataError, match=message):
            export.run(file, model_name_or_path=bases[False], output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(None, "there is no such file")
    refused({"model_state_dict": state, "by": Code()}, "more than tensors")
    refused({"epoch": 3}, "no tensors by name")
    refused({"model_state_dict": {k: w for k, w in state.items() if k != name}}, f"lacks 1 .* such as {name}")
    refused({"model_state_dict": state | {"critic.weight": torch.ones(2)}}, "1 that the model has not, such as critic")
    refused({"model_state_dict": state | {name: torch.ones(2, 2)}}, r"q_proj.weight has shape \(2, 2\)")
    refused({"model_state_dict": state | {"a.lora_A.default.weight": torch.ones(2)}}, "merge_and_unload")
    file.write_bytes(file.read_bytes()[:1000])
    refused(None, "cannot be read|more than tensors")
    assert "it ran" not in capsys.readouterr().out
