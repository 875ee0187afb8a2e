"""Runs in an environment: what is rolled out, trained and evaluated over several turns."""

import json
from pathlib import Path

import pytest
from helpers.functions import Coin

from bcft import collect, evaluate, filtered, refilter, sft
from bcft.config.loader import load
from bcft.data.loading import load_splits
from bcft.errors import DataError, FaultError, UsageError
from bcft.runs.storage import read_json, read_jsonl
from bcft.training import trainer
from bcft.types import IGNORED, Trajectory

KEYS = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:200]",
    "environment": "bcft.environments.two_attempts.TwoAttempts", "max_completion_length": 72, "num_rounds": 1,
    "prompts_per_round": 24, "num_generations": 3, "learning_rate": 2e-4, "eval_dev_problems": 4,
    "eval_dev_samples": 1, "eval_test_problems": 6, "eval_test_samples": 2, "keep_quantile": 0.0,
}  # fmt: skip
KEYS["environment_args"] = {"reward_func": "helpers.functions.even"}
SINGLE = {key: value for key, value in KEYS.items() if not key.startswith("environment")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("two") / "run"
    filtered.run(None, output_dir=str(path), require_success="false", **KEYS)
    return path


def test_every_attempt_has_both_turns_and_is_trained_as_it_was_sampled(run):
    place = run / "round_001"
    played = {line["id"]: Trajectory.from_json(line) for line in read_jsonl(place / "rollouts.jsonl")}
    kept = read_jsonl(place / "kept.jsonl")
    assert {len(t.turns) for t in played.values()} == {2}
    assert kept
    for line in kept:
        first, second = played[line["id"]].turns
        whole = first.ids + first.action_ids + second.ids + second.action_ids
        said = [label for label in line["labels"] if label != IGNORED]
        if second.action.strip():  # else it is not trained, and what would stand behind the last label is left out
            assert tuple(line["input_ids"]) == whole
            assert said == [*first.action_ids, *second.action_ids]
        assert tuple(line["input_ids"]) == whole[: len(line["input_ids"])]


def test_first_and_second_attempts_are_counted_apart(run):
    base = read_json(run / "metrics.json")["base"]
    lines = read_jsonl(run / "round_000" / "test" / "evaluation.jsonl")
    revision = base["revision"]
    assert revision["n"] == len(lines) == 6 * 3
    assert revision["first"] == pytest.approx(sum(line["first"] == "yes" for line in lines) / len(lines))
    assert revision["wrong_to_right"] == sum((line["first"], line["success"]) == ("no", "yes") for line in lines)
    assert base["return"]["turns"] == 2
    assert "harder" in base


@pytest.mark.slow
def test_the_first_attempt_of_two_is_that_of_a_single_turn(run, tmp_path):
    """Same identity, same noise: what comes after a turn changes nothing in it."""
    filtered.run(None, output_dir=str(tmp_path), **SINGLE)
    two, one = (read_jsonl(path / "round_001" / "rollouts.jsonl") for path in (run, tmp_path))
    assert [line["turns"][0]["action_ids"] for line in two] == [line["turns"][0]["action_ids"] for line in one]


@pytest.mark.slow
def test_evaluate_compares_by_return_and_says_so(run, tmp_path):
    names = ("dataset_name", "environment", "environment_args", "max_completion_length", "eval_test_problems")
    keys = {key: KEYS[key] for key in names}
    model = str(run / "best")
    found = evaluate.run(
        None, model_name_or_path=model, against="bcft:tiny-math", output_dir=str(tmp_path), eval_test_samples=2, **keys
    )
    assert "a mean return of" in found["conclusion"]
    low, high = found["vs_base"]["return_ci95"]
    assert low <= found["vs_base"]["return_delta"] <= high
    assert found["against"]["return"] == read_json(run / "metrics.json")["base"]["return"]


def test_an_environment_given_from_python_is_on_record_and_its_turns_are_limited(tmp_path):
    filtered.run(None, output_dir=str(tmp_path), environment=Coin, max_turns=3, warmup_rounds=0, **SINGLE)
    lines = read_jsonl(tmp_path / "round_001" / "rollouts.jsonl")
    assert {(len(line["turns"]), line["ended"]) for line in lines} == {(3, "turn_limit")}
    scores = read_jsonl(tmp_path / "round_001" / "scores.jsonl")
    paid = {line["id"]: sum(turn["reward"] for turn in line["turns"]) for line in lines}
    assert {s["id"]: s["reward"] for s in scores} == paid
    names = ("model_name_or_path", "dataset_name", "keep_quantile")
    saved = {key: KEYS[key] for key in names}  # no environment here: what was played knows its own
    refilter.run(None, rollouts=tmp_path, output_dir=str(tmp_path / "again"), **saved)
    assert read_jsonl(tmp_path / "again" / "scores.jsonl") == scores
    with pytest.raises(UsageError, match="environment was"):
        filtered.run(None, output_dir=str(tmp_path), max_turns=3, **KEYS)


def test_environment_args_reach_the_environment(tmp_path):
    few = {"prompts_per_round": 6, "eval_dev_problems": 1, "eval_test_problems": 1, "eval_test_samples": 1}
    given = {"environment_args": KEYS["environment_args"] | {"review": "Sure?"}}
    filtered.run(None, output_dir=str(tmp_path), require_success="false", **KEYS | few | given)
    (line, *_) = read_jsonl(tmp_path / "round_001" / "rollouts.jsonl")
    assert line["turns"][0]["observation"] == [{"role": "user", "content": "Sure?"}]


# Settings of the loop


def splits(keys):
    config = load("filtered", None, keys)
    return load_splits(config.data, config.evaluation)


@pytest.mark.slow
def test_replayed_demonstrations_are_as_many_as_were_kept_and_other_ones_each_round(tmp_path):
    filtered.run(None, output_dir=str(tmp_path), replay_dataset="bcft:arithmetic", **SINGLE | {"num_rounds": 2})
    drawn = []
    for number in (1, 2):
        lines = read_jsonl(tmp_path / f"round_{number:03d}" / "kept.jsonl")
        sources = [line["source"] for line in lines]
        assert sources.count("demonstration") == sources.count("self") > 0
        drawn.append({line["id"] for line in lines if line["source"] == "demonstration"})
        assert read_json(tmp_path / f"round_{number:03d}" / "metrics.json")["train"]["rows"] == len(lines)
    assert drawn[0] != drawn[1]
    held_out = {line["problem_id"] for line in read_jsonl(tmp_path / "round_000" / "test" / "evaluation.jsonl")}
    assert not held_out & {line["problem_id"] for line in lines}


def test_replayed_rows_are_data_of_the_run_and_errors_name_their_key(tmp_path):
    """A file that changes between two commands would make another round than the interrupted one."""
    file, keys = tmp_path / "mine.jsonl", {**SINGLE, "dataset_train_split": "train"}
    loaded = []
    for right in ("2", "3"):
        rows = [{"prompt": f"Say {n}.", "completion": right if n == 40 else "1"} for n in range(60)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loaded.append(splits(keys | {"replay_dataset": str(file)}))
    assert loaded[0].replay != loaded[1].replay
    assert loaded[0].digest != loaded[1].digest
    with pytest.raises(DataError, match=r"^replay_dataset: .*none\.jsonl does not exist"):
        splits(keys | {"replay_dataset": str(tmp_path / "none.jsonl")})
    asked = loaded[0].test[0].problem.prompt
    file.write_text(json.dumps({"prompt": asked, "completion": "9"}) + "\n")
    with pytest.raises(DataError, match=r"^replay_dataset: .*mine\.jsonl: no demonstration"):
        splits(keys | {"replay_dataset": str(file)})


@pytest.mark.parametrize("command", [sft.run, evaluate.run, filtered.run, collect.run])
def test_an_environment_that_cannot_be_made_is_refused_before_anything_is_loaded_or_written(
    tmp_path, command, monkeypatch
):
    """Else the directory would record the mistake, and refuse the corrected recipe."""
    monkeypatch.setattr("bcft.policy.loading.load_model", None)
    names = ("model_name_or_path", "dataset_name", "dataset_train_split", "eval_test_problems", "eval_dev_problems")
    keys = {key: KEYS[key] for key in names} | {"output_dir": str(tmp_path)}
    keys |= {"learning_rate": 1e-4} if command in (sft.run, filtered.run) else {}
    for wrong, told in (
        ({"environment": "helpers.functions.Nobody"}, "has no function 'Nobody'"),
        ({"environment": "helpers.functions.Coin", "environment_args": {"side": 1}}, "environment_args: .*side"),
    ):
        with pytest.raises(UsageError, match=told):
            command(None, **keys | wrong)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", [sft.run, evaluate.run, filtered.run])
def test_an_environment_that_breaks_ends_any_command_by_name(tmp_path, command):
    """An evaluation of nothing but errors would else say that success cannot be told."""
    names = ("model_name_or_path", "dataset_name", "dataset_train_split", "eval_test_problems", "eval_dev_problems")
    keys = {key: KEYS[key] for key in names} | {"environment": "helpers.functions.Broken"}
    keys |= {"learning_rate": 1e-4} if command in (sft.run, filtered.run) else {}
    with pytest.raises(FaultError, match=r"trajectories failed; .* the game server is down"):
        command(None, output_dir=str(tmp_path), max_completion_length=8, **keys)


@pytest.mark.slow
def test_the_learning_rate_of_a_round_decays(tmp_path, monkeypatch):
    rates, fit = [], trainer.fit

    def noting(made, *rest, **keys):
        rates.append(made.args.learning_rate)
        return fit(made, *rest, **keys)

    monkeypatch.setattr(trainer, "fit", noting)
    filtered.run(None, output_dir=str(tmp_path), learning_rate_decay=0.5, **SINGLE | {"num_rounds": 3})
    assert rates == [2e-4, 1e-4, 5e-5]


def test_nothing_is_kept_of_problems_outside_the_pass_rate(tmp_path):
    filtered.run(None, output_dir=str(tmp_path), pass_rate=[0.5, 1.0], **SINGLE)
    scores = read_jsonl(tmp_path / "round_001" / "scores.jsonl")
    solved = {}
    for s in scores:
        solved.setdefault(s["id"].split("-")[1], []).append(s["success"] == "yes")
    for s in scores:
        rate = sum(solved[s["id"].split("-")[1]]) / 3
        assert (s["decision"] == "pass_rate") <= (rate < 0.5)
        assert (s["decision"] == "kept") <= (rate >= 0.5)
    assert {s["decision"] for s in scores} >= {"kept", "pass_rate"}


# The recipes


@pytest.mark.slow
@pytest.mark.nightly  # the step `recipes grid_walk` shows it at full size
def test_a_cloned_walker_walks_shorter_ways_after_three_rounds(tmp_path):
    recipes = Path(__file__).parents[2] / "recipes" / "grid_walk"
    small = {"eval_test_problems": 40, "eval_test_samples": 2, "eval_dev_problems": 20}
    sft.run(recipes / "bc.yaml", output_dir=str(tmp_path / "bc"), max_steps=100, **small)
    found = filtered.run(
        recipes / "filtered_bc.yaml",
        model_name_or_path=tmp_path / "bc",
        output_dir=str(tmp_path / "filtered"),
        learning_rate=1e-3,
        num_rounds=3,
        **small,
    )
    assert found["vs_base"]["conclusion"] == "better"
    for line in read_jsonl(tmp_path / "filtered" / "metrics.jsonl"):
        assert line["selection"]["kept_fraction"] == pytest.approx(0.1, abs=0.01)
