"""The recipes of the 3B model, two rounds of each on a random two-layer Llama: 4-bit bases, adapters, precision."""

import hashlib

import pytest
import torch
from helpers.functions import odd
from helpers.runs import LLAMA, LOOP, ROOT, interrupted
from helpers.tiny import gsm8k, llama_tokenizer, save_llama, write_jsonl
from safetensors.torch import load_file

from bcft import filtered, sft
from bcft.algorithms import filtered_bc, opening
from bcft.config.loader import load
from bcft.errors import UsageError
from bcft.policy.loading import load_policy, with_adapter
from bcft.runs.storage import read_json, read_jsonl

RECIPES = ROOT / "recipes" / "llama-3.2-3b"
ROWS = gsm8k(ROOT / "tests" / "data" / "gsm8k_50.jsonl")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return keys that put a random Llama and GSM8K's rows, ten times with other numbers of the page, into a recipe."""
    path = tmp_path_factory.mktemp("small")
    tokenizer = llama_tokenizer([row["question"] for row in ROWS], vocabulary=300)
    rows = [{**row, "question": f"Page {page}. {row['question'][:60]}"} for page in range(6) for row in ROWS]
    name = save_llama(path / "llama", tokenizer, positions=1024)
    return LLAMA | {"model_name_or_path": name, "dataset_name": write_jsonl(path / "rows.jsonl", rows)}


def play(recipe, path, small, **keys):
    return filtered.run(RECIPES / recipe, output_dir=str(path), reward_funcs=[odd], **small | LOOP | keys)


def state(module):
    """Return a hash of every parameter and buffer of the base, quantisation state included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "lora_" not in name:
            digest.update(name.replace("base_model.model.", "").replace(".base_layer", "").encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["filtered_bc.yaml", "filtered_bc_qlora.yaml"])
def test_two_rounds_train_one_fp32_adapter_and_leave_the_base_as_it_was(tmp_path, small, monkeypatch, recipe):
    held = []
    monkeypatch.setattr(opening, "load_policy", lambda *given: held.append(load_policy(*given)) or held[-1])
    play(recipe, tmp_path, small)
    (policy,) = held
    config = load("filtered", RECIPES / recipe, small)
    fresh = load_policy(config.model.model_name_or_path, config.model).model
    quantised = [type(m).__name__ for m in fresh.modules()].count("Linear4bit")
    assert quantised == (14 if "qlora" in recipe else 0)
    # PEFT puts its layers into the module it is given.
    assert state(policy.model) == state(fresh)
    first, last = (load_file(tmp_path / f"round_{n:03d}" / "model" / "adapter_model.safetensors") for n in (0, 2))
    assert all(tensor.dtype == torch.float32 for tensor in (*first.values(), *last.values()))
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)
    assert all(tensor.any() for name, tensor in last.items() if "lora_B" in name)
    for number in (1, 2):
        train = read_json(tmp_path / f"round_{number:03d}" / "metrics.json")["train"]
        assert train["steps"] == -(-train["rows"] // 4) > 0


@pytest.mark.slow
def test_the_shipped_adapter_loads_with_peft_and_computes_what_the_run_did(tmp_path, small, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    held = []
    monkeypatch.setattr(opening, "load_policy", lambda *given: held.append(load_policy(*given)) or held[-1])
    play("filtered_bc.yaml", tmp_path, small)
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.float32).eval()(ids).logits
        ours = held[0].model.eval()(ids).logits
    assert torch.equal(ours, theirs)


def test_a_new_adapter_depends_on_the_seed_alone(small):
    def adapter(seed):
        settings = load("filtered", RECIPES / "filtered_bc.yaml", small).model
        torch.rand(seed + 1)  # whatever was drawn before
        adapted = with_adapter(load_policy(settings.model_name_or_path, settings), settings, seed=seed).model
        return torch.cat([p.flatten() for name, p in adapted.named_parameters() if "lora_A" in name])

    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))


@pytest.mark.slow
def test_bc_math_and_what_it_hands_to_filtered_with_an_adapter(tmp_path, small):
    """The README's hand-off: an adapter that sft trained is continued, not stacked and not merged."""
    sft.run(RECIPES / "bc_math.yaml", output_dir=str(tmp_path / "sft"), max_steps=3, **small)
    keys = small | {"model_name_or_path": str(tmp_path / "sft")}
    play("filtered_bc.yaml", tmp_path / "run", keys, num_rounds=1)
    trained = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    went_on = load_file(tmp_path / "run" / "round_001" / "model" / "adapter_model.safetensors")
    assert trained.keys() == went_on.keys()
    moved = max(float((trained[name] - went_on[name]).abs().max()) for name in trained)
    assert 0 < moved < 0.2
    assert not (tmp_path / "run" / "round_000" / "model").exists()  # round 0 is the adapter it was given
    # and answers as it did where it was trained
    assert greedy(tmp_path / "sft" / "final") == greedy(tmp_path / "run" / "round_000" / "test")


def greedy(place):
    rows = read_jsonl(place / "evaluation.jsonl")
    return {row["problem_id"]: row["completion"] for row in rows if row["sample"] == -1}


@pytest.mark.slow
def test_what_sft_hands_to_filtered_as_a_full_model(tmp_path, small):
    sft.run(None, output_dir=str(tmp_path / "sft"), max_steps=3, **full(small))
    keys = full(small) | {"model_name_or_path": str(tmp_path / "sft")} | LOOP | {"num_rounds": 1}
    filtered.run(None, output_dir=str(tmp_path / "run"), reward_funcs=[odd], **keys)
    trained = load_file(tmp_path / "sft" / "model.safetensors")
    went_on = load_file(tmp_path / "run" / "round_001" / "model" / "model.safetensors")
    assert trained.keys() == went_on.keys()
    assert any(not torch.equal(trained[name], went_on[name]) for name in trained)
    assert greedy(tmp_path / "sft" / "final") == greedy(tmp_path / "run" / "round_000" / "test")


def full(small):
    """Return the keys without those that only a recipe's file may hold for a Hub dataset."""
    return {key: value for key, value in small.items() if key != "dataset_config"}


def test_four_bits_without_an_adapter_are_refused_by_every_command_that_trains(tmp_path, small):
    with pytest.raises(UsageError, match="load_in_4bit: 4-bit weights cannot train by themselves"):
        filtered.run(None, output_dir=str(tmp_path), load_in_4bit=True, **full(small))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [pytest.param(False, id="full"), pytest.param(True, id="lora")])
def test_with_bf16_every_phase_of_every_round_computes_in_bf16(tmp_path, small, monkeypatch, adapter):
    """A trainer's model is under autocast from its first `train()` on only; rounds before and after must not differ."""
    seen, number = set(), [0]
    start, load_weights = filtered_bc.start, filtered_bc.load_weights

    def watching(run, history):
        learner, replay = start(run, history)

        def note(_module, _inputs, output):
            seen.add((number[0], run.clock._phase, output.dtype))

        layers = [m for name, m in learner.policy.model.named_modules() if name.endswith("layers.0.mlp.down_proj")]
        layers[0].register_forward_hook(note)
        return learner, replay

    def numbering(run, learner, history, next_number):
        number[0] = next_number
        load_weights(run, learner, history, next_number)

    monkeypatch.setattr(filtered_bc, "start", watching)
    monkeypatch.setattr(filtered_bc, "load_weights", numbering)
    keys = full(small) | LOOP | {
        "num_rounds": 3, "eval_every": 1, "bf16": True, "prompts_per_round": 18,  # more than the sanity check plays
    }  # fmt: skip
    keys |= {"use_peft": True, "lora_target_modules": ["all-linear"]} if adapter else {}

    keys |= {"reward_funcs": [odd]}
    interrupted(monkeypatch, tmp_path, filtered_bc, "commit", **keys)
    number[0] = 0
    first = set(seen)
    filtered.run(None, output_dir=str(tmp_path), **keys)
    for number in (1, 2, 3):
        assert {phase for n, phase, _ in seen if n == number} >= {"rollout", "train", "evaluate"}
    assert {n for n, _, _ in first} == {0, 1}
    assert {dtype for _, _, dtype in seen} == {torch.bfloat16}
