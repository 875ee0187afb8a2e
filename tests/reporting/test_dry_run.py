"""A dry run prints what the run turns out to be, and leaves nothing behind."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import gsm8k, llama_tokenizer, save_llama, write_jsonl
from transformers import PreTrainedModel, Trainer, TrainingArguments

from bcft import sft
from bcft.config.loader import load
from bcft.config.schema import EvaluationSettings, RoundSettings
from bcft.errors import DataError, UsageError
from bcft.evaluation.budget import Budget
from bcft.reporting.costs import steps
from bcft.reporting.dry_run import Plan, dry_run_filtered, dry_run_sft
from bcft.runs.history import is_due

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SHAPE = str(ROOT / "tests" / "data" / "llama-3.2-3b")
TINY = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return keys for a random two-layer Llama and 50 rows of GSM8K."""
    path = tmp_path_factory.mktemp("llama")
    rows = gsm8k(ROOT / "tests" / "data" / "gsm8k_50.jsonl")
    tokenizer = llama_tokenizer([row["question"] for row in rows], vocabulary=300)
    name = save_llama(path / "model", tokenizer, hidden=64, positions=1024)
    return {"model_name_or_path": name, "dataset_name": write_jsonl(path / "rows.jsonl", rows)}


def dry_run(config):
    plan = Plan(**config.sections, command_line=config.command_line)
    (dry_run_sft if config.command == "sft" else dry_run_filtered)(plan)


def printed(capsys, config):
    """Return what a dry run prints: by name, a name's lines joined."""
    dry_run(config)
    values, name = {}, ""
    for line in capsys.readouterr().out.splitlines():
        name = line[:12].strip() or name
        values[name] = f"{values.get(name, '')}\n{line[12:]}".strip()
    return values


# Counts against what is really built


STEPS = [
    {}, {"num_train_epochs": 1}, {"num_train_epochs": 0.3}, {"per_device_train_batch_size": 7},
    {"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 100}, {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
    {"max_steps": 5}, {"num_train_epochs": 2.5, "gradient_accumulation_steps": 2},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("keys", STEPS, ids=str)
def test_steps_are_those_of_transformers_trainer(tmp_path, keys):
    training = load("sft", None, TINY | keys).training
    names = "num_train_epochs per_device_train_batch_size gradient_accumulation_steps dataloader_drop_last max_steps"
    values = {name: getattr(training, name) for name in names.split()}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, **values)
    for rows in (9, 50, 64):
        trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=[{"x": 0.0}] * rows)
        counted = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
        assert steps(training, rows) == counted, rows


def test_each_process_takes_its_share_of_the_batches(monkeypatch):
    training = load("sft", None, TINY | {"num_train_epochs": 1, "gradient_accumulation_steps": 2}).training
    assert steps(training, 64) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [steps(training, rows) for rows in (1, 32, 64, 65)] == [1, 1, 2, 3]


@pytest.mark.slow
def test_steps_and_attempts_are_those_of_a_real_run(tmp_path, capsys):
    keys = TINY | {
        "output_dir": str(tmp_path), "num_train_epochs": 1.5, "per_device_train_batch_size": 6, "eval_test_problems": 5,
        "gradient_accumulation_steps": 3, "eval_test_samples": 2, "max_completion_length": 8,
    }  # fmt: skip
    lines = printed(capsys, load("sft", None, keys))
    metrics = sft.run(None, **keys)
    assert lines["steps"].startswith(f"{metrics['train']['steps']}; num_train_epochs 1.5, 18 rows per step")
    assert f"{metrics['train']['rows']} of 64 rows" in lines["rows"]
    attempts = len((tmp_path / "base" / "evaluation.jsonl").read_text().splitlines())
    harder = metrics["base"]["harder"]["n"] * (1 + 2)
    assert f"= {attempts + harder} attempts" in lines["evaluation"]


@pytest.mark.parametrize("every", ["auto", 1, 3, 5])
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_rounds_that_train_are_evaluated_where_they_are_due(every, warmup):
    rounds = RoundSettings(eval_every=every, num_rounds=10, warmup_rounds=warmup)
    due = [is_due(rounds, number, evaluated=640, played=512) for number in range(warmup + 1, 11)]
    sizes = {"dev": 128, "test": 0, "harder": 0, "played": 512, "graded": True}
    assert Budget.of(rounds, EvaluationSettings(eval_test_samples=16), **sizes).times == 1 + sum(due)
    expected = {"auto": [3, 6, 9, 10], 1: range(1, 11), 3: [3, 6, 9, 10], 5: [5, 10]}[every]
    assert sum(due) == sum(number > warmup for number in expected)


# Worked examples


@pytest.mark.parametrize(("name", "run"), [("bc_math", "sft"), ("filtered_bc", "filtered")])
def test_of_the_first_recipes_nothing_is_unknown(capsys, name, run):
    lines = printed(capsys, load(run, RECIPES / f"{name}.yaml", {}, flags={"dry-run"}))
    assert "unknown" not in str(lines)
    assert lines["model"] == "bcft:tiny-math: 101,120 parameters, all trained"
    assert lines["to run it"] == f"bcft {run} {RECIPES / name}.yaml"
    assert "500 problems x (1 greedy + 16 sampled) + 200 harder x (1 + 4) = 9,500 attempts" in lines["evaluation"]
    if run == "sft":
        assert lines["data"] == "2,000 demonstrations to train on, 128 dev and 500 test problems held out"
        assert lines["steps"].startswith("126; num_train_epochs 2, 32 rows per step")
        assert "before and after training: 19,000 attempts" in lines["evaluation"]
    else:
        assert "256 prompts x 4 generations = 1,024 attempts each" in lines["rounds"]
        assert "at most 73,728 tokens" in lines["rounds"]
        assert "at most 32 if 1,024 of 1,024 are kept, 4 if 102 of 1,024 are kept" in lines["steps"]
        assert "27,320 attempts beside 12,288 of rounds: 69 %" in lines["evaluation"]


def test_history_and_max_per_problem_bound_the_rows_of_a_round(capsys):
    keys = TINY | {"num_rounds": 4, "prompts_per_round": 32, "num_generations": 4, "num_train_epochs": 1}
    lines = printed(capsys, load("filtered", None, keys | {"history": 2, "max_per_problem": 1, "keep_quantile": 0.5}))
    assert "at most 8 if 64 of 256 are kept; num_train_epochs 1, 8 rows per step" in lines["steps"]


def test_replayed_demonstrations_are_rows_as_well(capsys):
    keys = TINY | {"num_rounds": 1, "prompts_per_round": 32, "num_generations": 4, "num_train_epochs": 1}
    keys |= {"replay_dataset": "bcft:arithmetic", "keep_quantile": 0.5, "dataset_train_split": "train[:100]"}
    lines = printed(capsys, load("filtered", None, keys))
    most, share = "29 if 128 of 128 are kept beside 100", "16 if 64 of 128 are kept beside 64"
    assert lines["steps"].startswith(f"per round at most {most} demonstrations, {share} demonstrations; ")


def test_what_is_taken_off_replayed_rows_is_said_as_in_the_run(capsys, tmp_path, llama):
    stop = json.loads((Path(llama["model_name_or_path"]) / "tokenizer_config.json").read_text())["eos_token"]
    rows = [{"prompt": f"{i}?", "completion": f"{i}{stop}"} for i in range(5)]
    keys = llama | {"replay_dataset": write_jsonl(tmp_path / "replay.jsonl", rows)}
    with pytest.raises(DataError, match=r"replay\.jsonl:1: .* special_tokens: strip"):
        dry_run(load("filtered", None, keys))
    environment = {"environment": "bcft.environments.two_attempts.TwoAttempts"}
    for more in ({}, environment):  # one that makes the prompts itself changes nothing about the rows to replay
        lines = printed(capsys, load("filtered", None, keys | more | {"special_tokens": "strip"}))
        assert any(re.search(r"\b5\b", line) for line in lines["prompts"].splitlines()[1:])


@pytest.mark.parametrize("dev", [0, 8])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_loss_on_dev_needs_dev_rows(capsys, strategy, dev):
    keys = TINY | {"eval_strategy": strategy, "eval_dev_problems": dev}
    if dev:
        assert printed(capsys, load("sft", None, keys))["steps"]
        return
    with pytest.raises(UsageError, match="eval_strategy: there are no dev rows"):
        dry_run(load("sft", None, keys))


# What is not on this machine


def test_of_a_directory_with_only_a_configuration_all_but_tokens_is_known(capsys):
    keys = {"model_name_or_path": SHAPE, "dataset_name": TINY["dataset_name"], "dataset_config": None, "bf16": True}
    lines = printed(capsys, load("filtered", RECIPES / "llama-3.2-3b" / "filtered_bc_qlora.yaml", keys))
    assert "no tokenizer" in lines["prompts"]
    assert "3,212,749,824 parameters" in lines["model"]
    assert "rows of 1,024 tokens assumed" in lines["memory"]
    assert lines["peak"].startswith("about ")
    lines = printed(capsys, load("sft", RECIPES / "llama-3.2-3b" / "bc_math.yaml", keys))
    assert "no tokenizer" in lines["rows"]
    assert lines["steps"].startswith("at most ")


def test_without_a_network_the_known_part_of_the_3b_recipe_is_printed_and_the_exit_code_is_0(capsys):
    recipe = str(RECIPES / "llama-3.2-3b" / "bc_math.yaml")
    assert sft.main([recipe, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "unknown: openai/gsm8k is not on this machine" in text
    assert "unknown: meta-llama/Llama-3.2-3B-Instruct is not on this machine" in text
    assert "at most 256 problems x (1 greedy + 8 sampled) = 2,304 attempts" in text
    assert text.splitlines()[-1].endswith(f"bcft sft {recipe}")


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
        with pytest.raises(UsageError) as caught:
            dry_run(load("sft", None, llama | wrong))
        assert "\n" not in str(caught.value)


# What is left behind


def test_nothing_is_written_and_no_weights_are_loaded(tmp_path, monkeypatch, capsys, llama):
    def refuse(*_, **__):
        raise AssertionError("weights")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    before = sorted(Path(llama["model_name_or_path"]).parent.rglob("*"))
    for run, keys in (("sft", TINY), ("filtered", TINY), ("sft", llama), ("filtered", llama)):
        printed(capsys, load(run, None, keys))
    assert not list(tmp_path.iterdir())
    assert sorted(Path(llama["model_name_or_path"]).parent.rglob("*")) == before


def test_other_processes_than_the_first_print_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    dry_run(load("sft", None, TINY))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "recipe"), [pytest.param("sft", "bc_math", marks=pytest.mark.slow), ("filtered", "filtered_bc")]
)
def test_it_is_a_flag_of_the_command_and_needs_no_trl(name, recipe):
    code = (
        f"import sys; from bcft.{name} import main; "
        f"code = main(['recipes/{recipe}.yaml', '--dry-run', 'dataset_train_split=train[:50]']); "
        "sys.exit(code or 'trl' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    again = f"bcft {name} recipes/{recipe}.yaml 'dataset_train_split=train[:50]'"
    assert ended.stdout.splitlines()[-1] == f"to run it   {again}"


def test_no_framework_is_loaded_before_the_hub_is_asked():
    """The libraries read HF_HUB_OFFLINE when they are imported."""
    code = (
        "import sys, bcft.reporting.dry_run as dry_run; frameworks = {'torch', 'transformers', 'huggingface_hub'}; "
        "sys.exit(bool(frameworks & sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
