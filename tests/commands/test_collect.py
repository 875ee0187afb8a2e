"""Rollouts are reusable: as demonstrations, and with other rewards and rules."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.runs import ROOT, interrupted

from bcft import collect, filtered, refilter, sft
from bcft.config.loader import load
from bcft.data.loading import load_splits
from bcft.errors import DataError, UsageError
from bcft.policy.loading import load_renderer
from bcft.rewards.math_answers import math_reward
from bcft.rollout import sample
from bcft.runs.storage import Journal, committed, read_json, read_jsonl

KEYS = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:400]",
    "max_completion_length": 72, "eval_dev_problems": 8, "eval_test_problems": 8,
}  # fmt: skip
SAVED = {key: KEYS[key] for key in ("model_name_or_path", "dataset_name")}
PLAY = {"prompts_per_round": 40, "num_generations": 4}
RULE = {"keep_quantile": 0.5, "max_per_problem": 2, "require_success": "false", "ties": "sample"}
SHORT = "helpers.functions.brevity"


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    path = tmp_path_factory.mktemp("collect") / "run"
    collect.run(None, output_dir=str(path), keep_quantile=0.0, **KEYS, **PLAY)
    return path


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Return a finished run of two rounds that selects by RULE."""
    path = tmp_path_factory.mktemp("filtered") / "run"
    keys = {"num_rounds": 2, "eval_dev_samples": 1, "eval_test_samples": 2, "history": "all", "learning_rate": 2e-4}
    filtered.run(None, output_dir=str(path), **KEYS, **PLAY, **RULE, **keys)
    return path


def kept(path):
    return [line["id"] for line in read_jsonl(path / "kept.jsonl")]


def test_collecting_makes_the_files_of_a_round(collected, rounds):
    first = rounds / "round_001"
    assert (collected / "rollouts.jsonl").read_bytes() == (first / "rollouts.jsonl").read_bytes()
    ours, theirs = (read_jsonl(path / "kept.jsonl")[0].keys() for path in (collected, first))
    assert ours == theirs
    assert committed(collected)
    assert {line["source"] for line in read_jsonl(collected / "kept.jsonl")} == {"teacher"}


def test_collecting_again_plays_nothing_and_reports_the_same(collected, capsys, monkeypatch):
    monkeypatch.setattr("bcft.rollout.sample.roll_out", None)
    collect.run(None, output_dir=str(collected), keep_quantile=0.0, **KEYS, **PLAY)
    assert capsys.readouterr().out.splitlines()[-1] == read_json(collected / "metrics.json")["conclusion"]


def test_without_a_cutoff_every_success_is_kept(collected):
    scores = read_jsonl(collected / "scores.jsonl")
    assert {s["decision"] for s in scores if s["success"] == "yes"} <= {"kept", "duplicate", "truncated"}
    assert {s["success"] for s in scores if s["decision"] == "kept"} == {"yes"}


def test_the_same_selection_keeps_the_same_attempts_in_filtered_and_from_its_files(rounds, tmp_path):
    refilter.run(None, rollouts=rounds / "round_001", output_dir=str(tmp_path / "one"), **SAVED, **RULE)
    refilter.run(None, rollouts=rounds, output_dir=str(tmp_path / "all"), **SAVED, **RULE)
    assert kept(tmp_path / "one") == kept(rounds / "round_001") != []
    assert kept(tmp_path / "all") == kept(rounds / "round_002") != []
    name = "scores.jsonl"
    assert (tmp_path / "one" / name).read_bytes() == (rounds / "round_001" / name).read_bytes()


def test_another_reward_and_quantile_keep_others_without_generating(collected, tmp_path, monkeypatch):
    monkeypatch.setattr("bcft.rollout.episode.play", None)
    monkeypatch.setattr("bcft.policy.loading.load_policy", None)
    keys = {"reward_funcs": [SHORT], "success_func": "", "keep_quantile": 0.9}
    metrics = refilter.run(None, rollouts=collected, output_dir=str(tmp_path), **SAVED, **keys)
    scores = read_jsonl(tmp_path / "scores.jsonl")
    cutoff = scores[0]["cutoff"]
    assert metrics["selection"]["kept"] == sum(s["decision"] == "kept" for s in scores) > 0
    assert all((s["reward"] >= cutoff) == (s["decision"] in ("kept", "duplicate", "truncated")) for s in scores)
    assert kept(tmp_path) != kept(collected)
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_sft_trains_the_very_ids_that_were_sampled_and_holds_out_what_the_run_did(collected):
    config = load("sft", None, KEYS | {"dataset_name": str(collected), "dataset_train_split": "train"})
    found, source = (load_splits(c.data, c.evaluation) for c in (config, load("sft", None, KEYS)))
    assert found.held_out == source.held_out
    renderer = load_renderer(KEYS["model_name_or_path"], config.model)
    assert {d.tokenizer for d in found.train} == {renderer.fingerprint}
    assert [d.sampled.input_ids for d in found.train] == [
        tuple(line["input_ids"]) for line in read_jsonl(collected / "kept.jsonl")
    ]


def test_collect_refilter_and_sft_run_as_the_readme_says(collected, tmp_path, capsys):
    refilter.run(None, rollouts=collected, output_dir=str(tmp_path / "chosen"), max_per_problem=1, **SAVED)
    keys = {k: v for k, v in KEYS.items() if k != "dataset_train_split"}
    keys |= {"dataset_name": tmp_path / "chosen", "eval_test_samples": 1, "max_steps": 2, "learning_rate": 1e-3}
    metrics = sft.run(None, output_dir=str(tmp_path / "model"), **keys)
    assert metrics["train"]["steps"] == 2
    rows = len(kept(tmp_path / "chosen"))
    assert f"{rows:,} with the ids that were sampled" in capsys.readouterr().out


def test_with_another_tokenizer_the_text_is_tokenized_and_the_run_says_so(collected, tmp_path, capsys):
    manifest = collected / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(re.sub(r'"tokenizer": "\w+"', '"tokenizer": "another"', whole))
    keys = {k: v for k, v in KEYS.items() if k != "dataset_train_split"}
    keys |= {"dataset_name": collected, "eval_test_problems": 0, "max_steps": 1}
    try:
        sft.run(None, output_dir=str(tmp_path), **keys)
    finally:
        manifest.write_text(whole)
    rows = len(kept(collected))
    assert f"{rows:,} were sampled with another tokenizer, and are tokenized from their text" in capsys.readouterr().out


def test_with_allow_drift_nothing_of_another_recipe_is_kept(tmp_path, monkeypatch):
    keys = {**KEYS, "prompts_per_round": 6, "num_generations": 2, "keep_quantile": 0.0}
    collect.run(None, output_dir=str(tmp_path / "hotter"), temperature=1.5, **keys)
    monkeypatch.setattr(sample, "CHUNK", 4)
    interrupted(monkeypatch, tmp_path / "drifted", Journal, "append", run=collect.run, **keys)
    monkeypatch.undo()
    config = load("collect", None, keys | {"output_dir": str(tmp_path / "drifted"), "temperature": 1.5})
    with pytest.raises(UsageError, match=r"temperature was 1\.0, now 1\.5"):
        collect.run_config(config)
    collect.run_config(replace(config, flags=frozenset({"allow-drift"})))
    one, two = ((tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("hotter", "drifted"))
    assert one == two


def test_refilter_and_its_report_load_no_framework(collected, tmp_path):
    arguments = [*(f"{key}={value}" for key, value in SAVED.items()), f"rollouts={collected}", f"output_dir={tmp_path}"]
    code = f"import sys; from bcft import refilter; sys.exit(refilter.main({arguments!r}) or print(*sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "trl", "peft", "datasets"} & set(done.stdout.split())


def test_a_second_refilter_into_a_directory_replaces_its_status(collected, tmp_path):
    (tmp_path / "status.json").write_text('{"state": "failed"}')
    refilter.run(None, rollouts=collected, output_dir=str(tmp_path), **SAVED)
    assert read_json(tmp_path / "status.json")["state"] == "done"


def test_every_file_loads_with_datasets(collected):
    import datasets

    for name in ("rollouts", "scores", "kept", "problems"):
        loaded = datasets.load_dataset("json", data_files=str(collected / f"{name}.jsonl"), split="train")
        assert len(loaded) == len(read_jsonl(collected / f"{name}.jsonl"))


def test_files_that_are_not_rollouts_are_refused_in_one_line(collected, tmp_path):
    with pytest.raises(UsageError, match="rollouts: required"):
        refilter.run(None, output_dir=str(tmp_path), **SAVED)
    with pytest.raises(UsageError, match=r"has no rollouts\.jsonl"):
        refilter.run(None, rollouts=tmp_path, output_dir=str(tmp_path / "x"), **SAVED)
    with pytest.raises(UsageError, match="holds the rollouts"):
        refilter.run(None, rollouts=collected, output_dir=str(collected), **SAVED)
    bent = tmp_path / "bent"
    bent.mkdir()
    for name in ("config.yaml", "problems.jsonl", "manifest.json"):
        (bent / name).write_bytes((collected / name).read_bytes())
    lines = read_jsonl(collected / "rollouts.jsonl")
    (bent / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(DataError, match="changed since it was written"):
        refilter.run(None, rollouts=bent, output_dir=str(tmp_path / "y"), **SAVED)


def test_a_reward_by_name_grades_as_it_does_in_the_run(collected, tmp_path):
    keys = {"reward_funcs": ["bcft.rewards.math_reward"], "keep_quantile": 0.0}
    refilter.run(None, rollouts=collected, output_dir=str(tmp_path), **SAVED, **keys)
    assert kept(tmp_path) == kept(collected)
    problems = {line["problem_id"]: line for line in read_jsonl(collected / "problems.jsonl")}
    played = {line["id"]: line for line in read_jsonl(collected / "rollouts.jsonl")}
    for line in read_jsonl(tmp_path / "scores.jsonl")[:8]:
        attempt = played[line["id"]]
        said, answer = attempt["turns"][-1]["action"], problems[attempt["problem_id"]]["answer"]
        assert math_reward(prompts=["?"], completions=[said], answer=[answer]) == [line["reward"]]


# Nothing that was paid for is lost


@pytest.fixture
def bill(tmp_path, monkeypatch):
    """Return the file in which `paid.grade`, which answers differently each time, counts what it was asked."""
    (tmp_path / "paid.py").write_text(
        f"bill = {str(tmp_path / 'bill')!r}\n"
        "def grade(completions, **_):\n"
        "    with open(bill, 'a') as file:\n"
        "        before = file.tell()\n"
        "        file.write('.' * len(completions))\n"
        "    return [float((before + n) * 7919 % 101) for n in range(len(completions))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "paid", raising=False)
    return tmp_path / "bill"


@pytest.mark.parametrize(
    ("name", "when"), [("apply_filter", "before"), ("apply_filter", "after"), ("tally", "before"),
                       ("write_json", "before"), ("write_manifest", "before")],
)  # fmt: skip
def test_an_interrupted_collection_asks_for_no_attempt_twice(tmp_path, monkeypatch, bill, name, when):
    keys = KEYS | {"prompts_per_round": 6, "num_generations": 2, "reward_funcs": "paid.grade", "keep_quantile": 0.5}
    keys |= {"success_func": ""}
    collect.run(None, output_dir=str(tmp_path / "alone"), **keys)
    assert len(bill.read_text()) == 12
    bill.write_text("")
    interrupted(monkeypatch, tmp_path / "cut", collect, name, when=when, run=collect.run, **keys)
    collect.run(None, output_dir=str(tmp_path / "cut"), **keys)
    assert len(bill.read_text()) == 12
    one, two = ((tmp_path / run / "kept.jsonl").read_bytes() for run in ("alone", "cut"))
    assert one == two


@pytest.mark.parametrize(
    ("changed", "asked"),
    [({"keep_quantile": 0.3}, 12), ({"max_per_problem": 1}, 12), ({"min_reward": 5.0}, 12), ({"ties": "sample"}, 12),
     ({"temperature": 0.5}, 24)],
)  # fmt: skip
@pytest.mark.parametrize("name", ["apply_filter", "write_manifest"])
def test_another_rule_neither_plays_nor_asks_again(tmp_path, monkeypatch, bill, name, changed, asked):
    keys = KEYS | {"prompts_per_round": 6, "num_generations": 2, "reward_funcs": "paid.grade", "keep_quantile": 0.5}
    keys |= {"success_func": ""}
    interrupted(monkeypatch, tmp_path / "cut", collect, name, when="before", run=collect.run, **keys)
    played, play = [], sample.play_attempts
    with monkeypatch.context() as patch:
        patch.setattr(sample, "play_attempts", lambda *given, **k: played.extend(given[1]) or play(*given, **k))
        collect.run(None, output_dir=str(tmp_path / "cut"), allow_drift=True, **keys | changed)
    assert (len(played), len(bill.read_text())) == (asked - 12, asked)


def test_rows_and_flags_are_taken_from_python(tmp_path, capsys):
    rows = [{"prompt": f"Work out {a} + {b}.", "answer": str(a + b)} for a in range(5, 12) for b in range(5, 12)]
    keys = {k: v for k, v in KEYS.items() if not k.startswith("dataset")} | {"eval_dev_problems": 2}
    keys |= {"prompts_per_round": 3, "num_generations": 2, "eval_test_problems": 2}
    metrics = collect.run(keys, train_dataset=rows, output_dir=str(tmp_path), quiet=True)
    assert metrics["rollout"]["played"] == 6
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(UsageError, match="dataset_name was"):
        collect.run(keys, train_dataset=rows[1:], output_dir=str(tmp_path))
    with pytest.raises(DataError, match="another answer"):
        collect.run(keys, train_dataset=[*rows, rows[0] | {"answer": "0"}], output_dir=str(tmp_path / "other"))
