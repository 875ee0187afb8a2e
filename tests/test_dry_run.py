"""A dry run tells what the run turns out to be: parameters, steps, attempts, memory; and leaves nothing behind."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import gsm8k, llama_tokenizer, save_llama, write_jsonl

from bcft import sft
from bcft.config.loader import load, parse
from bcft.errors import DataError, UsageError
from bcft.policy import loading as model
from bcft.policy.loading import Precision, load_policy, with_adapter
from bcft.reporting import dry_run as dry
from bcft.reporting.dry_run import command, dry_run, evaluated_rounds, steps
from bcft.reporting.memory import memory, outline
from bcft.runs.history import Ledger
from bcft.types import Request, Sampling

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SHAPE = str(ROOT / "tests" / "data" / "llama-3.2-3b")
TINY = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]"}
GPU = Precision("cuda", "bf16", torch.bfloat16, "a GPU")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return keys for a random two-layer Llama and 50 rows of GSM8K."""
    path = tmp_path_factory.mktemp("llama")
    rows = gsm8k(ROOT / "tests" / "data" / "gsm8k_50.jsonl")
    tokenizer = llama_tokenizer([row["question"] for row in rows], vocabulary=300)
    name = save_llama(path / "model", tokenizer, hidden=64, positions=1024)
    return {"model_name_or_path": name, "dataset_name": write_jsonl(path / "rows.jsonl", rows)}


def told(capsys, recipe):
    """Return what a dry run prints: by name, a name's lines joined."""
    dry_run(recipe)
    found, name = {}, ""
    for line in capsys.readouterr().out.splitlines():
        name = line[:12].strip() or name
        found[name] = f"{found.get(name, '')}\n{line[12:]}".strip()
    return found


def total(items):
    return sum(size for _, size, _ in items)


def by_name(found, part):
    return {name: size for name, size, _ in found[part]}


# Counts against what is really built


def test_parameters_are_those_of_the_loaded_model(llama):
    for keys in (TINY, llama):
        recipe = load("sft", None, keys)
        loaded = load_policy(recipe).model
        assert outline(recipe).parameters == loaded.num_parameters()
        assert outline(recipe).trainable == sum(p.numel() for p in loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "v_proj"]])
def test_an_adapter_is_counted_as_peft_makes_it_and_by_hand(llama, targets):
    recipe = load("sft", None, llama | {"use_peft": True, "lora_r": 4, "lora_target_modules": targets})
    made = with_adapter(load_policy(recipe), recipe).model
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    ends = tuple(targets) if targets != ["all-linear"] else ("_proj",)
    layers = [m for name, m in load_policy(recipe).model.named_modules() if name.endswith(ends)]
    assert outline(recipe).trainable == trained == sum(4 * (m.in_features + m.out_features) for m in layers)


def test_an_adapter_directory_is_counted_with_its_base(llama, tmp_path):
    recipe = load("sft", None, llama | {"use_peft": True, "lora_r": 2, "lora_target_modules": ["all-linear"]})
    with_adapter(load_policy(recipe), recipe).model.save_pretrained(tmp_path)
    found = outline(load("filtered", None, llama | {"model_name_or_path": str(tmp_path)}))
    assert found == outline(recipe)
    assert found.adapter


@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_base_takes_the_bytes_it_is_told_to(llama, nested):
    keys = {"load_in_4bit": True, "use_bnb_nested_quant": nested, "use_peft": True}
    recipe = load("sft", None, llama | keys)
    loaded = load_policy(recipe).model
    four = [m.weight for m in loaded.modules() if type(m).__name__ == "Linear4bit"]
    states = [weight.quant_state for weight in four]
    held = sum(weight.numel() for weight in four) + sum(s.absmax.numel() * s.absmax.itemsize for s in states)
    held += sum(s.state2.absmax.numel() * 4 for s in states) if nested else 0
    shape = outline(recipe)
    assert shape.linear == 2 * sum(weight.numel() for weight in four)
    items = by_name(memory(recipe, shape, GPU, (8, 8)), "always")
    assert items["4-bit weights"] == pytest.approx(held, rel=0.01)
    assert items["weights"] == 2 * (shape.parameters - shape.linear)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", ["no", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_what_autograd_saves_within_a_fifth(tmp_path, adapter, autocast, checkpointed):
    """Weights that autocast copied are among what is saved, and an item of their own."""
    from peft import get_peft_model

    name = save_llama(tmp_path, llama_tokenizer(["a b"], vocabulary=270), hidden=96, layers=8)
    keys = {"use_peft": adapter, "lora_target_modules": ["all-linear"]} if adapter else {}
    recipe = load("sft", None, TINY | keys | {
        "model_name_or_path": name, "gradient_checkpointing": checkpointed, "per_device_train_batch_size": 4,
    })  # fmt: skip
    low = torch.bfloat16 if adapter and autocast == "bf16" else torch.float32
    precision = Precision("cpu", autocast, low, "")
    base = model.load_model(recipe, precision)
    whole = get_peft_model(base, model.lora_config(recipe)) if adapter else base
    if checkpointed:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
        whole.enable_input_require_grads()
    parameters = {p.untyped_storage().data_ptr() for p in whole.parameters()}
    kept = []
    ids = torch.randint(0, 200, (4, 256))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        whole.train()
        base.model(input_ids=ids, use_cache=False)
    saved = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    measured = sum(size for place, size in saved.items() if place not in parameters)
    found = memory(recipe, outline(recipe), precision, (256, 256))
    expected = by_name(found, "training")["activations"] + by_name(found, "always").get("16-bit copies", 0)
    if checkpointed:  # nothing is saved inside a block, and the one that is computed anew is not there yet
        plain = replace(recipe, values={**recipe.values, "gradient_checkpointing": False})
        block = by_name(memory(plain, outline(recipe), precision, (256, 256)), "training")["activations"] / 8
        expected -= block + by_name(found, "always").get("16-bit copies", 0)
    assert expected == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("tokens", [40, 512])
def test_as_many_rows_are_sampled_together_as_the_engine_would_take(llama, tokens):
    from bcft.generation.hf import HFEngine, rows_that_fit

    recipe = load("sft", None, llama)
    engine = HFEngine(load_policy(recipe).model, pad_id=0)
    request = Request(("a",), tuple(range(30)), Sampling(), (0,), tokens - 30)
    shape = outline(recipe)
    found = rows_that_fit(cached=shape.cached, vocabulary=shape.vocabulary, tokens=tokens, free=2**30)
    assert found == engine._rows_that_fit([request])


STEPS = [
    {}, {"num_train_epochs": 1}, {"num_train_epochs": 0.3}, {"per_device_train_batch_size": 7},
    {"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 100}, {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
    {"max_steps": 5}, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("keys", STEPS, ids=str)
def test_steps_are_those_of_transformers_trainer(tmp_path, keys):
    from transformers import Trainer, TrainingArguments

    recipe = load("sft", None, TINY | keys)
    taken = "num_train_epochs per_device_train_batch_size gradient_accumulation_steps dataloader_drop_last max_steps"
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **{key: recipe[key] for key in taken.split()})
    for rows in (9, 50, 64):
        trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{"x": 0.0}] * rows)
        counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
        assert steps(recipe, rows) == counted, rows


def test_each_process_takes_its_share_of_the_batches(monkeypatch):
    recipe = load("sft", None, TINY | {"num_train_epochs": 1, "gradient_accumulation_steps": 2})
    assert steps(recipe, 64) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [steps(recipe, rows) for rows in (1, 32, 64, 65)] == [1, 1, 2, 3]


@pytest.mark.slow
def test_steps_and_attempts_are_those_of_a_real_run(tmp_path, capsys):
    keys = TINY | {
        "output_dir": str(tmp_path), "num_train_epochs": 1.5, "per_device_train_batch_size": 6, "eval_test_problems": 5,
        "gradient_accumulation_steps": 3, "eval_test_samples": 2, "max_completion_length": 8,
    }  # fmt: skip
    found = told(capsys, load("sft", None, keys))
    metrics = sft.run(None, **keys)
    assert found["steps"].startswith(f"{metrics['train']['steps']}; num_train_epochs 1.5, 18 rows a step")
    assert f"{metrics['train']['rows']} of 64 rows" in found["rows"]
    attempts = len((tmp_path / "base" / "evaluation.jsonl").read_text().splitlines())
    harder = metrics["base"]["harder"]["n"] * (1 + 2)
    assert f"= {attempts + harder} attempts" in found["evaluation"]


@pytest.mark.parametrize("every", ["auto", 1, 3, 5])
@pytest.mark.parametrize("warmup", [0, 2])
def test_rounds_are_evaluated_as_the_ledger_says(tmp_path, every, warmup):
    recipe = load("filtered", None, TINY | {"eval_every": every, "num_rounds": 10, "warmup_rounds": warmup})
    ledger = Ledger(recipe, tmp_path)
    ledger.records = [{"round": 0, "eval": {}}]
    for number in range(1, 11):
        ledger.records.append({"train": {"steps": int(number > warmup)}})
        if ledger.due(number, evaluated=640, played=512):
            ledger.records[number]["eval"] = {}
    evaluated = sum("eval" in record for record in ledger.records[1:])
    assert evaluated_rounds(recipe, evaluated=640, played=512) == evaluated


# Worked examples


def test_llama_3b_has_3_212_749_824_parameters_and_its_adapter_24_313_856():
    """28 x 16 x (q 6144 + k 4096 + v 4096 + o 6144 + gate 11264 + up 11264 + down 11264) = 24,313,856."""
    plain = load("sft", None, TINY | {"model_name_or_path": SHAPE})
    assert outline(plain).parameters == outline(plain).trainable == 3_212_749_824
    lora = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc.yaml", {"model_name_or_path": SHAPE})
    found = outline(lora)
    assert (found.parameters, found.trainable) == (3_212_749_824, 24_313_856)
    assert found.linear == 28 * 3072 * (2 * 3072 + 2 * 1024 + 3 * 8192)
    assert found.parameters - found.linear == 128_256 * 3072 + 57 * 3072  # embeddings, which are the head, and norms
    assert found.cached * 2 == 114_688  # bytes of a token's keys and values


def test_the_3b_model_in_bf16_in_4_bits_and_trained_in_full():
    full = load("sft", None, TINY | {"model_name_or_path": SHAPE})
    parts = memory(full, outline(full), GPU, (1024, 1024))
    assert by_name(parts, "always")["weights"] == 4 * 3_212_749_824
    assert by_name(parts, "training")["gradients"] + by_name(parts, "training")["optimizer"] == 12 * 3_212_749_824
    lora = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc.yaml", {"model_name_or_path": SHAPE})
    held = by_name(memory(lora, outline(lora), GPU, (1024, 1024)), "always")
    assert (held["weights"], held["adapter"]) == (2 * 3_212_749_824, 4 * 24_313_856)
    four = load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc_qlora.yaml", {"model_name_or_path": SHAPE})
    held = by_name(memory(four, outline(four), GPU, (1024, 1024)), "always")
    assert held["4-bit weights"] == pytest.approx(2_818_572_288 * 0.5159, rel=1e-4)
    assert held["weights"] == 2 * 394_177_536


def test_checkpointing_an_8_bit_optimizer_and_shorter_rows_take_less():
    def training(lengths=(1024, 1024), **keys):
        recipe = load("sft", None, TINY | {"model_name_or_path": SHAPE} | keys)
        return total(memory(recipe, outline(recipe), Precision("cpu", "bf16", torch.float32, ""), lengths)["training"])

    most = training()
    assert training(gradient_checkpointing=True) < most
    assert training(optim="adamw_bnb_8bit") == most - 6 * 3_212_749_824
    assert training((512, 512)) < most


@pytest.mark.parametrize(("name", "run"), [("bc_math", "sft"), ("filtered_bc", "filtered")])
def test_the_first_recipes_are_told_whole(capsys, name, run):
    found = told(capsys, load(run, RECIPES / f"{name}.yaml", {}, flags={"dry-run"}))
    assert "unknown" not in str(found)
    assert found["model"] == "bcft:tiny-math: 101,120 parameters, all trained"
    assert found["to run it"] == f"bcft {run} {RECIPES / name}.yaml"
    assert "500 problems x (1 greedy + 16 sampled) + 200 harder x (1 + 4) = 9,500 attempts" in found["evaluation"]
    if run == "sft":
        assert found["data"] == "2,000 demonstrations to train on, 128 dev and 500 test problems held out"
        assert found["steps"].startswith("126; num_train_epochs 2, 32 rows a step")
        assert "before and after training: 19,000 attempts" in found["evaluation"]
    else:
        assert "256 prompts x 4 generations = 1,024 attempts each" in found["rounds"]
        assert "at most 73,728 tokens" in found["rounds"]
        assert "at most 32 if 1,024 of 1,024 are kept, 4 if 102 of 1,024 are kept" in found["steps"]
        assert "27,320 attempts beside 12,288 of rounds: 69 %" in found["evaluation"]


def test_history_and_a_cap_bound_what_a_round_can_keep(capsys):
    keys = TINY | {"num_rounds": 4, "prompts_per_round": 32, "num_generations": 4, "num_train_epochs": 1}
    found = told(capsys, load("filtered", None, keys | {"history": 2, "max_per_problem": 1, "keep_quantile": 0.5}))
    assert "at most 8 if 64 of 256 are kept; num_train_epochs 1, 8 rows a step" in found["steps"]


def test_replayed_demonstrations_are_rows_as_well(capsys):
    keys = TINY | {"num_rounds": 1, "prompts_per_round": 32, "num_generations": 4, "num_train_epochs": 1}
    keys |= {"replay_dataset": "bcft:arithmetic", "keep_quantile": 0.5, "dataset_train_split": "train[:100]"}
    found = told(capsys, load("filtered", None, keys))
    most, share = "29 if 128 of 128 are kept beside 100", "16 if 64 of 128 are kept beside 64"
    assert found["steps"].startswith(f"a round at most {most} demonstrations, {share} demonstrations; ")


# What is not at hand


def test_a_directory_with_a_configuration_alone_tells_all_but_tokens(capsys):
    keys = {"model_name_or_path": SHAPE, "dataset_name": TINY["dataset_name"], "dataset_config": None, "bf16": True}
    found = told(capsys, load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc_qlora.yaml", keys))
    assert "no tokenizer" in found["prompts"]
    assert "3,212,749,824 parameters" in found["model"]
    assert "rows of 1,024 tokens assumed" in found["memory"]
    assert found["peak"].startswith("about ")
    found = told(capsys, load("sft", RECIPES / "llama-3.2-3b" / "bc_math.yaml", keys))
    assert "no tokenizer" in found["rows"]
    assert found["steps"].startswith("at most ")


def test_without_network_the_3b_recipe_is_told_as_far_as_it_goes_and_exits_0(capsys):
    recipe = str(RECIPES / "llama-3.2-3b" / "bc_math.yaml")
    assert sft.main([recipe, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "unknown: openai/gsm8k is not on this machine" in printed
    assert "unknown: meta-llama/Llama-3.2-3B-Instruct is not on this machine" in printed
    assert "at most 256 problems x (1 greedy + 8 sampled) = 2,304 attempts" in printed
    assert printed.splitlines()[-1].endswith(f"bcft sft {recipe}")


def test_the_hub_is_asked_once_and_not_at_all_where_nothing_comes_from_it(monkeypatch, llama):
    asked = []
    monkeypatch.setattr(dry, "_hub_answers", lambda: asked.append(1))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for keys in (TINY, llama):
        dry._do_without_an_absent_hub(load("sft", None, keys))
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not asked
    remote = load("sft", None, TINY | {"model_name_or_path": "meta-llama/Llama-3.2-3B-Instruct"})
    for _ in range(2):
        dry._do_without_an_absent_hub(remote)
    assert (len(asked), os.environ["HF_HUB_OFFLINE"]) == (1, "1")


def test_an_address_where_nobody_listens_is_no_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not dry._hub_answers()


def test_what_is_malformed_is_an_error_as_in_the_run(tmp_path, capsys, llama):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?"}\n')
    keys = ["--model_name_or_path", "bcft:tiny-math", "--dry-run", "--dataset_name"]
    assert sft.main([*keys, str(bad)]) == DataError.exit_code
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert sft.main([*keys, str(tmp_path / "none.jsonl")]) == DataError.exit_code
    assert sft.main([*keys, "bcft:arithmetic", "--lerning_rate", "1"]) == UsageError.exit_code
    for wrong in ({"load_in_4bit": True}, {"use_peft": True, "lora_target_modules": ["nowhere"]},
                  {"model_name_or_path": "/nowhere/at/all"}, {"success_func": "bcft.rewards.nothing"}):  # fmt: skip
        with pytest.raises(UsageError) as found:
            dry_run(load("sft", None, llama | wrong))
        assert "\n" not in str(found.value)


# What is left behind


def test_nothing_is_written_and_no_weights_are_loaded(tmp_path, monkeypatch, capsys, llama):
    from transformers import PreTrainedModel

    def refuse(*_, **__):
        raise AssertionError("weights")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    before = sorted(Path(llama["model_name_or_path"]).parent.rglob("*"))
    for run, keys in (("sft", TINY), ("filtered", TINY), ("sft", llama), ("filtered", llama)):
        told(capsys, load(run, None, keys))
    assert not list(tmp_path.iterdir())
    assert sorted(Path(llama["model_name_or_path"]).parent.rglob("*")) == before


def test_other_processes_than_the_first_print_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    dry_run(load("sft", None, TINY))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("name", "recipe"), [("sft", "bc_math"), ("filtered", "filtered_bc")])
def test_it_is_a_flag_of_the_command_and_needs_no_trl(name, recipe):
    code = (
        f"import sys; from bcft.{name} import main; "
        f"code = main(['recipes/{recipe}.yaml', '--dry-run', 'dataset_train_split=train[:50]']); "
        "sys.exit(code or 'trl' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    again = f"bcft {name} recipes/{recipe}.yaml 'dataset_train_split=train[:50]'"
    assert found.stdout.splitlines()[-1] == f"to run it   {again}"


@pytest.mark.parametrize(
    "argv",
    [
        ["recipes/bc_math.yaml"],
        ["recipes/bc_math.yaml", "--learning_rate", "3e-5", "--save_strategy", "no", "--allow-drift"],
        ["recipes/bc_math.yaml", "bf16=true", "reward_funcs=[a.b, c.d]", "success_func=", "max_length=null"],
        ["--model_name_or_path", "bcft:tiny-math", "--dataset_name", "my data.jsonl", "--seed", "3"],
        ["recipes/bc_math.yaml", "--model_name_or_path", "some/model", "--learning_rate", "1.0e-5"],
    ],
)
def test_the_command_told_is_the_recipe_again(argv, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = parse("sft", [*argv, "--dry-run"])
    again = parse("sft", shlex.split(command(recipe))[2:])
    assert dict(again.values) == dict(recipe.values)
    assert again.flags == recipe.flags - {"dry-run"}
