"""Plain BC as a user runs it: one command, files that load anywhere, the same command again, one-line errors."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pages import figure, read_page, section
from helpers.tiny import llama_tokenizer, save_llama, write_jsonl

from bcft import evaluate, preview, sft
from bcft.config.keys import KEYS
from bcft.config.loader import load
from bcft.errors import BcftError, CheckpointError, DataError, DivergedError, LockedError, UsageError
from bcft.policy.loading import load_policy
from bcft.runs.storage import committed, read_json, read_jsonl

SMALL = {
    "dataset_train_split": "train[:64]", "max_steps": 3, "per_device_train_batch_size": 8, "eval_test_problems": 6,
    "eval_test_samples": 2, "eval_dev_problems": 4, "max_completion_length": 8, "learning_rate": 1e-3,
}  # fmt: skip
TINY = {"model_name_or_path": "bcft:tiny-init", "dataset_name": "bcft:arithmetic", **SMALL}
ROOT = Path(__file__).parents[2]


def sha(model):
    return [p.detach().clone() for p in model.state_dict().values()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return path, sft.run(None, output_dir=str(path), **TINY)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random two-layer Llama with Llama-3.2's template, and a dataset of worked sums for it."""
    path = tmp_path_factory.mktemp("llama")
    draw = random.Random(0)
    rows = []
    for _ in range(60):
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        rows.append({"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"})
    rows = list({row["question"]: row for row in rows}.values())
    tokenizer = llama_tokenizer([row["question"] + row["answer"] for row in rows], vocabulary=320)
    data = write_jsonl(path / "sums.jsonl", rows)
    return save_llama(path / "model", tokenizer, hidden=64), data


def test_the_files_of_a_run_are_those_of_the_design(finished):
    path, metrics = finished
    for name in ("config.yaml", "versions.json", "status.json", "metrics.json", "README.md", "manifest.json",
                 "base/evaluation.json", "base/evaluation.jsonl", "final/evaluation.json", "final/evaluation.jsonl",
                 "model.safetensors", "tokenizer.json", "problems.jsonl"):  # fmt: skip
        assert (path / name).is_file(), name
    assert committed(path)
    assert read_json(path / "metrics.json") == metrics
    assert {"base", "final", "train", "vs_base", "conclusion"} <= metrics.keys()
    assert read_json(path / "status.json")["state"] == "done"
    assert not (path / "training_args.bin").exists()
    assert all(file.stat().st_mode & 0o044 for file in path.iterdir() if file.name != ".lock")


def test_a_run_leaves_its_losses_its_first_rows_and_a_report_of_both(finished):
    path, metrics = finished
    losses = read_jsonl(path / "losses.jsonl")
    assert [losses[0]["loss"], losses[-1]["loss"]] == [metrics["train"]["loss_first"], metrics["train"]["loss_last"]]
    rows = read_json(path / "rows.json")
    assert rows["counts"]["kept"] == metrics["train"]["rows"]
    assert rows["examples"] == preview.run(None, preview_rows=3, **_previewed())
    page = read_page((path / "report.html").read_text())
    assert [row["loss"] for row in figure(page, "loss")] == [line["loss"] for line in losses]
    assert len(section(page, "tokens").all("pre")) == 3


def _previewed():
    return {key: value for key, value in TINY.items() if "preview" in KEYS[key].commands}


def test_rows_of_an_evaluation_load_with_datasets_and_hold_no_null(finished):
    lines = (finished[0] / "final" / "evaluation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6 * (1 + 2)
    assert all(value is not None for row in rows for value in row.values())
    assert {"prompt", "completion", "answer", "success"} <= rows[0].keys()
    import datasets

    assert len(datasets.load_dataset("json", data_files=str(finished[0] / "final" / "evaluation.jsonl"))["train"]) == 18


def test_the_saved_model_loads_with_transformers_alone_and_stops_where_it_was_taught_to(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished[0])
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    assert tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id
    assert tokenizer.chat_template
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Work out 47 + 35 - 36 + 21."}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


def test_re_running_a_finished_run_prints_its_conclusion_and_trains_nothing(finished, capsys):
    path, metrics = finished
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert sft.run(None, output_dir=str(path), **TINY) == metrics
    assert "is finished" in capsys.readouterr().out
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_on_the_same_directory_is_refused_with_the_keys_that_differ(finished):
    with pytest.raises(UsageError, match=r"learning_rate was 0\.001, now 0\.01"):
        sft.run(None, output_dir=str(finished[0]), **TINY | {"learning_rate": 0.01})


def test_a_directory_in_use_is_refused(tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="in use by process 1 on elsewhere"):
            sft.run(None, output_dir=str(tmp_path), **TINY)


def test_a_run_that_diverges_leaves_no_model_and_its_exit_code(tmp_path):
    with pytest.raises(DivergedError):
        sft.run(None, output_dir=str(tmp_path), **TINY | {"learning_rate": 1e30, "max_grad_norm": 0.0})
    assert not (tmp_path / "model.safetensors").exists()
    assert read_json(tmp_path / "status.json")["exit_code"] == 5


def test_data_without_references_gives_loss_and_stop_rate_and_says_that_success_is_unknown(tmp_path, llama, capsys):
    rows = [{"prompt": f"Say {i}", "completion": f"It is {i}."} for i in range(80)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    metrics = sft.run(
        None, output_dir=str(tmp_path / "run"),
        **SMALL | {"model_name_or_path": llama[0], "dataset_name": data, "dataset_train_split": "train"},
    )  # fmt: skip
    assert "greedy" not in metrics["final"]
    assert metrics["final"]["loss"] < metrics["base"]["loss"]
    assert "success is unknown" in metrics["conclusion"]
    assert capsys.readouterr().out.strip().splitlines()[-1] == metrics["conclusion"]


def test_four_bit_lora_trains_in_fp32_reloads_bit_equal_and_leaves_the_base_alone(tmp_path, llama, monkeypatch):
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import load_file

    from bcft.training import trainer as training

    seen = {}
    original = training.fit

    def fit(trainer, rows, **keys):
        step = trainer.training_step

        def watched(*args, **kwargs):
            seen.setdefault("dtypes", set()).update(p.dtype for p in trainer.model.parameters() if p.requires_grad)
            return step(*args, **kwargs)

        trainer.training_step = watched
        found = original(trainer, rows, **keys)
        seen["adapter"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        seen["base"] = {
            n.replace("base_layer.", ""): p.clone() for n, p in trainer.model.base_model.model.state_dict().items()
        }
        return found

    monkeypatch.setattr(training, "fit", fit)
    model, data = llama
    keys = SMALL | {"dataset_name": data, "dataset_train_split": "train"}
    path = tmp_path / "run"
    keys |= {"use_peft": True, "load_in_4bit": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
    sft.run(None, output_dir=str(path), model_name_or_path=model, **keys)
    assert seen["dtypes"] == {torch.float32}
    # Weights, scales and all: as they are in a model that was only loaded.
    untouched = load_policy(model, load("sft", None, {"model_name_or_path": model, **keys}).model).model.state_dict()
    assert sum(tensor.dtype == torch.uint8 and "absmax" not in name for name, tensor in untouched.items()) >= 14
    assert all(torch.equal(tensor, seen["base"][name]) for name, tensor in untouched.items())
    saved = load_file(path / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert len(saved) == len(seen["adapter"])
    for name, tensor in saved.items():
        assert torch.equal(tensor, seen["adapter"][name.replace(".weight", ".default.weight")]), name
    reloaded = AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)
    adapter = {n: p for n, p in reloaded.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, seen["adapter"][n]) for n, p in adapter.items())
    asked = {k: v for k, v in keys.items() if k.startswith(("dataset", "eval_test", "max_comp", "use_peft", "load_in"))}
    found = evaluate.run(None, model_name_or_path=str(path), output_dir=str(tmp_path / "e"), **asked)
    assert found["model"]["n"] == read_json(path / "metrics.json")["final"]["n"]


def test_evaluate_of_a_finished_run_repeats_its_figures_and_compares(finished, tmp_path):
    keys = {k: v for k, v in TINY.items() if k.startswith(("dataset", "eval", "max_comp"))}
    found = evaluate.run(
        None, model_name_or_path=str(finished[0]), against="bcft:tiny-init", output_dir=str(tmp_path), **keys
    )
    figures = {k: v for k, v in finished[1]["final"].items() if k != "loss"}
    assert found["model"] == figures
    assert found["against"] == {k: v for k, v in finished[1]["base"].items() if k != "loss"}
    assert found["vs_base"] == finished[1]["vs_base"]
    assert (tmp_path / "evaluate" / "model" / "evaluation.jsonl").is_file()


def test_a_second_evaluation_into_a_directory_replaces_its_status(tmp_path):
    keys = {k: v for k, v in TINY.items() if k.startswith(("model", "dataset", "eval", "max_comp"))}
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "status.json").write_text('{"state": "failed"}')
    evaluate.run(None, output_dir=str(tmp_path), **keys)
    assert read_json(tmp_path / "evaluate" / "status.json")["state"] == "done"


def test_preview_shows_the_very_labels_that_are_trained(llama):
    model, data = llama
    rows = preview.run(None, model_name_or_path=model, dataset_name=data, preview_rows=2)
    assert len(rows) == 2
    for row in rows:
        supervised = "".join(token["text"] for token in row["tokens"] if token["label"] != -100)
        assert "####" in supervised
        assert supervised.endswith("<|eot_id|>")
        assert all(token["label"] in (-100, token["id"]) for token in row["tokens"])
        assert "What is" in "".join(token["text"] for token in row["tokens"] if token["label"] == -100)
    page = preview.page(rows, "counts")
    assert page.count('class="on"') > 10
    assert "<script" not in page


def test_pickled_weights_are_refused(tmp_path, llama):
    import shutil

    model, data = llama
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickled weights can run code"):
        sft.run(None, model_name_or_path=str(tmp_path / "m"), dataset_name=data, output_dir=str(tmp_path / "r"), **SMALL
                | {"dataset_train_split": "train"})  # fmt: skip


def test_a_reference_that_math_reward_does_not_accept_ends_the_run(tmp_path, llama):
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": f"p{i}", "completion": "c", "answer": "\\boxed{7"} for i in range(80)]
    )
    with pytest.raises(DataError, match=r"d\.jsonl:\d+: math_reward does not accept the reference"):
        sft.run(None, model_name_or_path=llama[0], dataset_name=data, output_dir=str(tmp_path / "r"),
                **SMALL | {"dataset_train_split": "train"})  # fmt: skip


def test_a_changed_dataset_is_refused_and_with_allow_drift_measured_anew(tmp_path, llama):
    rows = [{"prompt": f"{i} + {i}?", "completion": f"#### {2 * i}", "answer": str(2 * i)} for i in range(120)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    keys = SMALL | {"model_name_or_path": llama[0], "dataset_name": data, "output_dir": str(tmp_path / "r"),
                    "dataset_train_split": "train"}  # fmt: skip
    sft.run(None, **keys)
    first = attempted(tmp_path / "r" / "base")
    gone = sorted(first)[0]
    remaining = [row for row in rows if row["prompt"] != gone]
    write_jsonl(tmp_path / "d.jsonl", remaining)
    with pytest.raises(UsageError, match="the dataset's rows have changed"):
        sft.run(None, **keys)
    (tmp_path / "r" / "manifest.json").unlink()
    sft.run_config(load("sft", None, keys, flags={"allow-drift"}))
    again = attempted(tmp_path / "r" / "base")
    assert gone not in again
    assert again & first == first - {gone}


def attempted(directory):
    """Return the questions of an evaluation, as they stand in the prompts."""
    lines = [json.loads(line) for line in (directory / "evaluation.jsonl").read_text().splitlines()]
    return {re.search(r"\d+ \+ \d+\?", line["prompt"])[0] for line in lines}


def test_a_malformed_row_is_refused_before_a_run_directory_is_made(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "?", "completion": "!"}, {"prompt": 7, "completion": "!"}])
    with pytest.raises(DataError, match=r"d\.jsonl:2: prompt"):
        sft.run(None, output_dir=str(tmp_path / "r"), **TINY | {"dataset_name": data, "dataset_train_split": "train"})
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("field", "then", "told"),
    [("trl", "1.0", r"trl was 1\.0, now [\d.]+"), ("processes", 8, "processes was 8, now 1")],
)
def test_a_run_resumes_with_the_versions_it_was_started_with_and_a_finished_one_reports_anyway(
    tmp_path, field, then, told
):
    """Other versions or processes would make other weights than an uninterrupted run."""
    sft.run(None, output_dir=str(tmp_path), **TINY)
    found = read_json(tmp_path / "versions.json")
    found |= {"world_size": then} if field == "processes" else {"packages": found["packages"] | {field: then}}
    (tmp_path / "versions.json").write_text(json.dumps(found))
    sft.run(None, output_dir=str(tmp_path), **TINY)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UsageError, match=rf"was started with other versions or processes \({told}\): .*--allow-drift"):
        sft.run(None, output_dir=str(tmp_path), **TINY)
    sft.run_config(load("sft", None, TINY | {"output_dir": str(tmp_path)}, flags={"allow-drift"}))


def test_a_committed_file_that_changed_is_an_error_and_nothing_is_trained_over_it(tmp_path):
    sft.run(None, output_dir=str(tmp_path), **TINY)
    (tmp_path / "README.md").write_text("my own card")
    sft.run(None, output_dir=str(tmp_path), **TINY)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a file differs from its hash in manifest\.json"):
        sft.run(None, output_dir=str(tmp_path), **TINY)
    assert (tmp_path / "README.md").read_text() == "my own card"


def test_files_of_the_user_in_the_directory_are_left_alone(tmp_path):
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    sft.run(None, output_dir=str(tmp_path), **TINY)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert "key" not in read_json(tmp_path / "manifest.json")["files"]


def test_an_adapter_is_continued(tmp_path, llama):
    model, data = llama
    keys = SMALL | {"dataset_name": data, "dataset_train_split": "train", "use_peft": True, "lora_r": 2}
    sft.run(None, model_name_or_path=model, output_dir=str(tmp_path / "a"), **keys)
    found = sft.run(None, model_name_or_path=str(tmp_path / "a"), output_dir=str(tmp_path / "b"), **keys)
    assert found["base"]["loss"] == pytest.approx(read_json(tmp_path / "a" / "metrics.json")["final"]["loss"], rel=1e-3)
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()
    assert "AutoPeftModelForCausalLM" in (tmp_path / "b" / "README.md").read_text()


BAD_FUNCTIONS = {
    "raises": "def f(completions, **_): raise KeyError('x')",
    "returns too few": "def f(completions, **_): return [1.0]",
    "does not parse": "def f(:",
}


@pytest.mark.parametrize("case", BAD_FUNCTIONS)
def test_a_success_function_that_fails_is_an_error_of_one_line(tmp_path, monkeypatch, case):
    name = "bad_" + case.replace(" ", "_")
    (tmp_path / f"{name}.py").write_text(BAD_FUNCTIONS[case])
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BcftError, match=r"raised KeyError|returned 1 values|cannot import") as found:
        sft.run(None, output_dir=str(tmp_path / "r"), success_func=f"{name}.f", **TINY)
    assert "\n" not in str(found.value)


def test_columns_that_json_has_no_form_for_are_written_as_text(tmp_path, llama):
    import datetime

    import pyarrow
    import pyarrow.parquet

    odd = {"when": datetime.datetime(2026, 1, 1), "x": float("nan")}
    rows = [{"prompt": f"Say\u2028{i}", "completion": "\u2028It.", **odd} for i in range(80)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    keys = SMALL | {"model_name_or_path": llama[0], "dataset_name": str(tmp_path / "d.parquet"),
                    "dataset_train_split": "train", "output_dir": str(tmp_path / "r")}  # fmt: skip
    sft.run(None, **keys)
    (tmp_path / "r" / "manifest.json").unlink()
    sft.run(None, **keys)
    assert "2026-01-01" in (tmp_path / "r" / "problems.jsonl").read_text()


@pytest.mark.parametrize(
    "path", ["nowhere.f", "bcft.rewards.nothing", "bcft.rewards.sandbox.MAX_TEXT_CHARS", "math.pi"]
)
def test_a_success_function_that_does_not_exist_is_refused_with_its_key(tmp_path, path):
    with pytest.raises(UsageError, match="success_func"):
        sft.run(None, output_dir=str(tmp_path), success_func=path, **TINY)


CODES = {
    "help": (["--help"], 0, "usage: bcft sft"),
    "no recipe": (["missing.yaml"], 2, "bcft: error: missing.yaml: no such recipe file"),
    "unknown key": (["recipes/bc_math.yaml", "--lerning_rate", "1"], 2, "did you mean learning_rate?"),
    "no such model": (["dataset_name=bcft:arithmetic", "model_name_or_path=/nowhere/at/all"], 2, "/nowhere/at/all"),
    "no such data": (["dataset_name=missing.jsonl", "model_name_or_path=bcft:tiny-init"], 3, "missing.jsonl"),
}


@pytest.mark.parametrize("case", CODES)
def test_exit_codes_and_one_line_errors_as_a_shell_sees_them(tmp_path, case):
    arguments, code, fragment = CODES[case]
    extra = [] if case == "help" else [f"--output_dir={tmp_path}"]
    found = subprocess.run(
        [sys.executable, "-m", "bcft.sft", *arguments, *extra], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == code, found.stderr
    assert fragment in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    if code:
        assert [line for line in found.stderr.splitlines() if line] == [
            line for line in found.stderr.splitlines() if line.startswith("bcft: error: ")
        ]
