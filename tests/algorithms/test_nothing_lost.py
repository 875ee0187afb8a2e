"""What was paid for stays: weights, attempts and answers outlive whatever fails after them."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from helpers.runs import TINY, PowerCut, equal, interrupted, of_round, text, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from bcft import filtered, sft
from bcft.algorithms import filtered_bc, learner, opening, rounds, session
from bcft.algorithms import sft as plain_bc
from bcft.config.loader import load
from bcft.errors import FaultError, StorageError, UsageError
from bcft.evaluation import budget, held_out
from bcft.policy.loading import locate
from bcft.runs.storage import read_json
from bcft.training import trainer

SFT = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:64]",
    "eval_dev_problems": 4, "eval_test_problems": 6, "eval_test_samples": 2, "max_completion_length": 48,
    "max_steps": 3, "learning_rate": 1e-3, "save_strategy": "no",
}  # fmt: skip
FAULTS = {
    "raises": "raise KeyError('answer')",
    "raises after others were graded": "raise KeyError('answer') if len(completions) < 12 else ValueError('late')",
    "returns too few": "return [1.0]",
    "returns text": "return ['yes'] * len(completions)",
    "returns nothing": "return None",
    "returns what is not finite": "return [float('nan')] * len(completions)",
}
"""What a success function does once training has begun."""


@pytest.fixture
def grader(tmp_path, monkeypatch):
    """Return a function that writes a success function with a fault, or repairs it: `grader.grade`."""
    monkeypatch.syspath_prepend(tmp_path / "code")
    (tmp_path / "code").mkdir()

    def write(fault):
        body = f"    if trainer_state.global_step:\n        {fault}\n" if fault else ""
        (tmp_path / "code" / "grader.py").write_text(
            f"def grade(completions, trainer_state, **_):\n{body}    return [float(len(t) % 2) for t in completions]\n"
        )
        sys.modules.pop("grader", None)

    yield write
    sys.modules.pop("grader", None)


# sft


@pytest.mark.parametrize("fault", ["raises", *(pytest.param(name, marks=pytest.mark.slow) for name in [*FAULTS][1:])])
def test_weights_outlive_a_success_function_that_fails_in_the_last_evaluation(tmp_path, grader, work, fault):
    keys = SFT | {"output_dir": str(tmp_path / "run"), "success_func": "grader.grade"}
    grader(FAULTS[fault])
    tokens = [f"{key}={value}" for key, value in keys.items()]
    assert sft.main(tokens) == 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    untrained = AutoModelForCausalLM.from_pretrained(locate("bcft:tiny-math"))
    assert not torch.equal(model.lm_head.weight, untrained.lm_head.weight)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert sft.main(tokens) == 4  # and once more
    grader("")
    assert sft.main(tokens) == 0
    assert (work["trained"], len(work["played"])) == (1, 2 * (6 + 6) * 3)  # with as many harder problems
    assert equal(saved, load_file(tmp_path / "run" / "model.safetensors"))
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["train"]["steps"] == 3
    assert metrics["final"]["sampled"]["n"] == 2
    assert not (tmp_path / "run" / "sealed.json").exists()
    assert sft.main(tokens) == 0


CUTS = {
    "after training": (trainer, "fit", "after", 1, 1),
    "in saving": (plain_bc, "save_policy", "after", 1, 2),
    "before the last evaluation": (plain_bc, "measure", "before", 2, 1),
    "after playing the last evaluation": (held_out, "play_journaled", "after", 3, 1),
    "after the last evaluation": (plain_bc, "measure", "after", 2, 1),
    "before the metrics": (plain_bc, "write_json", "before", 1, 1),
    "before the card": (session, "write_card", "before", 1, 1),
    "before the run is committed": (plain_bc, "write_manifest", "before", 2, 1),
}
"""Where a run of `sft` ends, and how often it then trains in all."""


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    """A run of `sft` that was left alone."""
    path = tmp_path_factory.mktemp("cloned")
    sft.run(None, output_dir=str(path), **SFT)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_sft_resumes_from_the_weights_it_has_saved(tmp_path, monkeypatch, work, cloned, cut):
    holder, name, when, times, trained = CUTS[cut]
    interrupted(monkeypatch, tmp_path, holder, name, when=when, times=times, run=sft.run, **SFT)
    sft.run(None, output_dir=str(tmp_path), **SFT)
    assert work["trained"] == trained
    one, two = (load_file(path / "model.safetensors") for path in (cloned, tmp_path))
    assert equal(one, two)
    one, two = (read_json(path / "metrics.json") for path in (cloned, tmp_path))
    for part in ("base", "final", "vs_base", "conclusion"):
        assert one[part] == two[part]
    assert len(work["played"]) == 2 * (6 * 3 + len_harder(one))


def len_harder(metrics):
    return metrics["base"]["harder"]["n"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, RuntimeError, PowerCut])
def test_a_tracker_that_fails_at_the_end_loses_no_weights(tmp_path, monkeypatch, work, error):
    class Tracker(TrainerCallback):
        def on_train_end(self, *_, **__):
            raise error("the tracker is down")

    monkeypatch.setattr(trainer, "CountSteps", lambda _: Tracker())
    with pytest.raises(error):
        sft.run(None, output_dir=str(tmp_path), **SFT)
    monkeypatch.undo()
    saved = load_file(tmp_path / "model.safetensors")
    metrics = sft.run(None, output_dir=str(tmp_path), **SFT)
    assert (metrics["train"]["steps"], work["trained"]) == (3, 1)
    assert equal(saved, load_file(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_an_adapter_resumes_from_the_weights_it_has_saved(tmp_path, monkeypatch, work):
    keys = SFT | {
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "eval_test_problems": 2,
        "learning_rate": 0.1,
    }
    interrupted(monkeypatch, tmp_path, plain_bc, "measure", when="before", times=2, run=sft.run, **keys)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    sft.run(None, output_dir=str(tmp_path), **keys)
    assert work["trained"] == 1
    assert equal(saved, load_file(tmp_path / "adapter_model.safetensors"))
    before, after = ((tmp_path / name / "evaluation.jsonl").read_text() for name in ("base", "final"))
    assert before != after


@pytest.mark.slow
def test_damaged_weights_are_trained_again(tmp_path, monkeypatch, work, cloned):
    interrupted(monkeypatch, tmp_path, plain_bc, "measure", when="after", times=2, run=sft.run, **SFT)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    sft.run(None, output_dir=str(tmp_path), **SFT)
    assert work["trained"] == 2
    assert equal(load_file(cloned / "model.safetensors"), load_file(tmp_path / "model.safetensors"))


# filtered


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of two rounds that was left alone."""
    path = tmp_path_factory.mktemp("alone")
    filtered.run(None, output_dir=str(path), **TINY)
    return path


ROUND_CUTS = {
    "after scoring": (filtered_bc, "score_round", 2, 0, 1),
    "after the selection": (filtered_bc, "select_round", 2, 0, 1),
    "after saving": (filtered_bc, "train_round", 2, 0, 0),
    "after playing dev": (held_out, "play_journaled", 5, 0, 0),
    "after the evaluation": (filtered_bc, "evaluate_round", 2, 0, 0),
}
"""Where the second round ends; how many attempts are then played in it, and how often it trains."""


@pytest.mark.slow
@pytest.mark.parametrize("cut", ROUND_CUTS)
def test_an_interrupted_round_plays_nothing_again_and_trains_only_without_saved_weights(
    tmp_path, monkeypatch, work, alone, cut
):
    holder, name, times, played, trained = ROUND_CUTS[cut]
    interrupted(monkeypatch, tmp_path, holder, name, times=times, **TINY)
    work["played"].clear()
    work["trained"] = 0
    filtered.run(None, output_dir=str(tmp_path), **TINY)
    assert (work["played"].count("rollout"), work["trained"]) == (played, trained)
    dev = {"after scoring": 24, "after the selection": 24, "after saving": 24}.get(cut, 0)
    assert work["played"].count("dev") == dev
    assert equal(weights(alone, 2), weights(tmp_path, 2))
    assert text(alone, 2, "kept.jsonl") == text(tmp_path, 2, "kept.jsonl")
    one, two = (read_json(path / "metrics.json") for path in (alone, tmp_path))
    assert one == two
    one, two = ({k: v for k, v in of_round(p, 2, "metrics.json").items() if k != "seconds"} for p in (alone, tmp_path))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["weights", "rows", "no figures"])
def test_saved_weights_count_only_whole_and_for_the_same_rows(tmp_path, monkeypatch, work, alone, damage):
    interrupted(monkeypatch, tmp_path, filtered_bc, "evaluate_round", times=1, **TINY)
    model = tmp_path / "round_001" / "model"
    if damage == "weights":
        (model / "model.safetensors").write_bytes(b"x")
    else:
        manifest = json.loads((model / "manifest.json").read_text())
        manifest |= {"rows": "0"} if damage == "rows" else {}
        if damage == "no figures":
            del manifest["rows"]
        (model / "manifest.json").write_text(json.dumps(manifest))
    work["trained"] = 0
    filtered.run(None, output_dir=str(tmp_path), **TINY | {"num_rounds": 2})
    assert work["trained"] == 2
    assert equal(weights(alone, 2), weights(tmp_path, 2))


@pytest.mark.slow
def test_a_reward_that_raises_does_it_before_the_base_is_evaluated_and_repaired_plays_nothing_again(tmp_path, work):
    def broken(**_):
        raise ConnectionError("no credit left")

    def repaired(completions, **_):
        return [float(len(text) % 5) for text in completions]

    keys = TINY | {"output_dir": str(tmp_path), "success_func": "", "num_rounds": 1}
    with pytest.raises(FaultError, match="no credit left"):
        filtered.run(None, reward_funcs=broken, **keys)
    assert work["played"] == ["rollout"] * 12 * 3
    with pytest.raises(UsageError, match="reward_funcs was"):
        filtered.run(None, reward_funcs=repaired, **keys)
    filtered.run(None, reward_funcs=repaired, allow_drift=True, **keys)
    assert work["played"].count("rollout") == 12 * 3
    assert all(row["reward"] < 5 for row in of_round(tmp_path, 1, "scores.jsonl"))


# Finished runs


@pytest.mark.slow
def test_a_finished_run_is_prolonged_and_ends_as_a_longer_one(tmp_path, work, alone):
    filtered.run(None, output_dir=str(tmp_path), **TINY | {"num_rounds": 1})
    test = text(tmp_path, 0, "test/evaluation.jsonl")
    work["trained"] = 0
    metrics = filtered.run(None, output_dir=str(tmp_path), **TINY)
    assert (metrics["rounds"], work["trained"]) == (2, 1)
    assert metrics == read_json(alone / "metrics.json")
    for number in (1, 2):
        assert text(alone, number, "kept.jsonl") == text(tmp_path, number, "kept.jsonl")
    assert equal(weights(alone, 2), weights(tmp_path, 2))
    assert text(tmp_path, 0, "test/evaluation.jsonl") == test
    assert equal(load_file(alone / "best" / "model.safetensors"), load_file(tmp_path / "best" / "model.safetensors"))


@pytest.mark.slow
def test_a_prolonged_run_that_is_interrupted_keeps_what_it_had_and_resumes(tmp_path, monkeypatch, alone):
    filtered.run(None, output_dir=str(tmp_path), **TINY | {"num_rounds": 1})
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    interrupted(monkeypatch, tmp_path, filtered_bc, "score_round", **TINY)
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == best
    assert read_json(tmp_path / "metrics.json")["rounds"] == 1
    assert filtered.run(None, output_dir=str(tmp_path), **TINY) == read_json(alone / "metrics.json")


@pytest.mark.slow
def test_an_evaluation_that_a_prolonged_run_no_longer_needs_is_kept(tmp_path, monkeypatch, work):
    keys = TINY | {"eval_every": 2}
    interrupted(monkeypatch, tmp_path, filtered_bc, "commit", when="before", **keys | {"num_rounds": 1})
    assert work["played"].count("dev") == 2 * 24
    filtered.run(None, output_dir=str(tmp_path), **keys | {"num_rounds": 2})
    assert work["played"].count("dev") == 3 * 24
    assert of_round(tmp_path, 1, "metrics.json")["eval"]["n"] == 8


@pytest.mark.slow
def test_the_test_of_a_prolonged_run_has_as_many_samples_as_that_of_its_base(tmp_path, monkeypatch):
    keys = {key: value for key, value in TINY.items() if key != "eval_test_samples"} | {"eval_test_problems": 4}
    first = filtered.run(None, output_dir=str(tmp_path), **keys | {"num_rounds": 1})
    monkeypatch.setattr(budget, "TEST_SAMPLES", (3,))
    longer = filtered.run(None, output_dir=str(tmp_path), **keys | {"num_rounds": 2})
    assert longer["best_round"]
    assert first["base"]["sampled"]["n"] == longer["base"]["sampled"]["n"] == longer["best"]["sampled"]["n"] == 2


OTHER = {
    "learning_rate": 1e-3, "temperature": 0.5, "seed": 3, "keep_quantile": 0.5, "eval_test_samples": 3,
    "num_rounds": 1, "adam_beta1": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("flag", [False, True])
def test_a_finished_run_is_not_taken_for_one_with_another_recipe(alone, key, flag):
    with pytest.raises(UsageError, match=rf"{key} was .*, now {OTHER[key]}") as refused:
        filtered.run(None, output_dir=str(alone), allow_drift=flag, **TINY | {key: OTHER[key]})
    assert "it is finished: give another output_dir, or remove it" in str(refused.value)
    assert ("num_rounds may be raised" in str(refused.value)) == (key == "num_rounds")


def test_every_key_that_differs_has_a_line(alone, capsys):
    changed = {"learning_rate": 1e-3, "temperature": 0.5, "seed": 3}
    tokens = [f"{key}={value}" for key, value in (TINY | changed).items()]
    assert filtered.main([*tokens, f"output_dir={alone}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [sum(f"{key} was" in line for line in lines) for key in changed] == [1, 1, 1]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 2e-3), ("max_steps", 4), ("seed", 1), ("eval_test_samples", 1)]
)
def test_a_finished_run_of_sft_is_not_taken_for_one_with_another_recipe(cloned, key, value):
    with pytest.raises(UsageError, match=f"{key} was .*it is finished"):
        sft.run(None, output_dir=str(cloned), **SFT | {key: value})


SAME = [
    {"report_to": "none"}, {"run_name": "again"}, {"logging_steps": 5}, {"adam_beta1": 0.9}, {"adam_epsilon": 1e-8},
    {"learning_rate": "2e-4"}, {"dataloader_num_workers": 0}, {"eval_every": 1},
]  # fmt: skip


@pytest.mark.parametrize("same", SAME, ids=str)
def test_what_changes_no_result_is_the_same_recipe(alone, capsys, same):
    assert filtered.run(None, output_dir=str(alone), **TINY | same) == read_json(alone / "metrics.json")
    assert "is finished" in capsys.readouterr().out


def test_a_path_spelled_otherwise_is_the_same_recipe(tmp_path, monkeypatch, cloned):
    monkeypatch.chdir(tmp_path)
    keys = SFT | {"model_name_or_path": str(cloned), "eval_test_problems": 0, "max_steps": 1}
    first = sft.run(None, output_dir=str(tmp_path / "run"), **keys)
    for name in (f"{cloned}/", f"{cloned}/../{cloned.name}"):
        assert sft.run(None, output_dir="./run", **keys | {"model_name_or_path": name}, quiet=True) == first
    with pytest.raises(UsageError, match="model_name_or_path was"):
        sft.run(None, output_dir="run", **keys | {"model_name_or_path": "bcft:tiny-math"})


# What fails after the result is there


@pytest.mark.slow
def test_a_report_that_cannot_be_written_loses_nothing_and_the_conclusion_is_printed(tmp_path, monkeypatch, capsys):
    config = load("filtered", None, TINY | {"num_rounds": 1, "output_dir": str(tmp_path)})

    def failing(*_, **__):
        raise StorageError("cannot write report.html")

    with monkeypatch.context() as patch:
        patch.setattr(session, "write_report", failing)
        with pytest.raises(StorageError):
            filtered.run_config(config)
    metrics = read_json(tmp_path / "metrics.json")
    assert capsys.readouterr().out.splitlines()[-1] == metrics["conclusion"]
    assert (tmp_path / "manifest.json").exists()
    assert filtered.run_config(config) == metrics
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("holder", "name", "times"), [(learner, "save_policy", 2), (rounds, "save_policy", 1)])
def test_a_full_disk_leaves_earlier_files_whole(tmp_path, monkeypatch, alone, holder, name, times):
    original, calls = holder.save_policy, iter(range(1, 100))

    def full(*arguments):
        if next(calls) == times:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, full)
        with pytest.raises(StorageError, match="No space left on device"):
            filtered.run(None, output_dir=str(tmp_path), **TINY)
    assert (tmp_path / "round_001" / "kept.jsonl").read_bytes() == (alone / "round_001" / "kept.jsonl").read_bytes()
    assert filtered.run(None, output_dir=str(tmp_path), **TINY) == read_json(alone / "metrics.json")


def test_the_line_about_the_policy_names_what_its_own_file_held(tmp_path, monkeypatch, capsys):
    original = opening.load_policy
    monkeypatch.setattr(opening, "load_policy", lambda *given: replace(original(*given), note="a repetition_penalty"))
    monkeypatch.setattr(opening, "play_journaled", stop)
    with pytest.raises(PowerCut):
        filtered.run(None, output_dir=str(tmp_path), **TINY)
    assert "a repetition_penalty" in capsys.readouterr().out.splitlines()


def stop(*_, **__):
    raise PowerCut
