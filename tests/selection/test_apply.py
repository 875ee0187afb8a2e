"""From scores to training examples: one rule, one set of decisions, and files that agree with them."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bcft.config.schema import RuleSettings, SelectionSettings
from bcft.runs.storage import read_jsonl
from bcft.selection.apply import apply_filter, rule_of
from bcft.selection.filter import REASONS, Rule
from bcft.selection.scoring import Score
from bcft.types import IGNORED, Problem, TrainingExample, Trajectory, Turn

PROBLEMS = {name: Problem(name, f"What is {name}?", {"answer": "7"}) for name in ("p", "q")}


def scored(sample, reward, *, problem="p", action=None, **turn):
    action = f"7 by {sample}" if action is None else action
    turns = (Turn(action, (1, 2), (3, 10 + sample), turn.pop("stop", "stop_token")),)
    success = "yes" if reward >= 1.0 else "no"
    return Score(Trajectory(1, problem, sample, turns, "done"), (("r", reward),), True, reward, success)


SCORES = (
    scored(0, 1.0),
    scored(1, 0.0),
    scored(2, 1.0, problem="q"),
    scored(3, 1.0, stop="max_tokens"),
    scored(4, 1.0, action=" \n"),
)


def applied(scores=SCORES, rule=None, **settings):
    values = {"source": "self", "train_on": "all_turns", "check_steps": None} | settings
    return apply_filter(scores, rule or Rule(keep_quantile=0.0), PROBLEMS, **values)


def test_the_kept_trajectories_that_say_something_become_examples():
    filtered = applied()
    assert filtered.selection.decisions == {
        "1-p-0": "kept", "1-p-1": "failed", "1-q-2": "kept", "1-p-3": "truncated", "1-p-4": "kept",
    }  # fmt: skip
    assert [example.id for example in filtered.examples] == ["1-p-0", "1-q-2"]
    first = filtered.examples[0]
    assert (first.input_ids, first.labels) == ((1, 2, 3, 10), (IGNORED, IGNORED, 3, 10))
    assert (first.source, first.reward, first.weight) == ("self", 1.0, 1.0)
    assert first.prompt == ({"role": "user", "content": "What is p?"},)
    assert first.completion == ({"role": "assistant", "content": "7 by 0"},)
    assert filtered.silent == 1
    assert filtered.scope == SCORES


WEIGHING = Rule(keep_quantile=0.0, require_success="true", row_weight="maxrl")


def test_rows_carry_weights_with_a_mean_of_1_and_the_metrics_and_conclusion_say_so():
    scores = (*SCORES, scored(6, 1.0), scored(7, 1.0))
    filtered = applied(scores, WEIGHING)
    # Of p, 0, 6 and 7 make a row; 4 is empty, but right: each weighs 1/4, and the success of q 1.
    assert {example.id: example.weight for example in filtered.examples} == pytest.approx(
        {"1-p-0": 4 / 7, "1-q-2": 16 / 7, "1-p-6": 4 / 7, "1-p-7": 4 / 7}
    )
    assert filtered.metrics["weights"] == pytest.approx({"min": 4 / 7, "max": 16 / 7, "effective_rows": 49 / 19})
    assert "The 4 rows weigh 0.571 to 2.29, as 3 equal ones would." in filtered.conclusion("", Path("runs/a"))
    none = applied(scores, replace(WEIGHING, row_weight="none"))
    assert {example.weight for example in none.examples} == {1.0}
    assert "weights" not in none.metrics


def test_a_row_of_every_part_of_a_conversation_weighs_as_its_trajectory():
    """A template that rewrites earlier text makes two rows of two turns; the mean is over rows."""
    turns = (Turn("7", (1, 2), (3, 4), "stop_token", observation=({"role": "user", "content": "again"},)),)
    turns = (*turns, Turn("8", (1, 9, 2), (5, 4), "stop_token", rewritten=True))
    long = Score(Trajectory(1, "p", 9, turns, "done"), (("r", 1.0),), True, 1.0, "yes")
    filtered = applied((long, scored(0, 1.0), scored(2, 1.0, problem="q")), WEIGHING)
    assert [example.id for example in filtered.examples] == ["1-p-9", "1-p-9", "1-p-0", "1-q-2"]
    assert [example.weight for example in filtered.examples] == pytest.approx([0.8, 0.8, 0.8, 1.6])


def test_what_weighs_0_beside_the_others_makes_no_row_and_is_counted():
    """Its tokens would still be counted in the loss, and `sft` on the same file would leave it out."""
    rule = Rule(keep_quantile=0.0, require_success="false", row_weight="reward", weight_temperature=1e-3)
    scores = (scored(0, 1.0), scored(1, 0.0), scored(2, 1.0, problem="q"))
    filtered = applied(scores, rule)
    assert {example.id: example.weight for example in filtered.examples} == {"1-p-0": 1.0, "1-q-2": 1.0}
    assert (filtered.rows, filtered.metrics["kept"]) == (2, 3)
    assert filtered.metrics["note"] == "1 kept trajectory weighs 0 beside the others: not used for training."


def test_with_nothing_kept_there_is_nothing_to_weigh():
    filtered = applied(SCORES[1:2], WEIGHING)
    assert (filtered.examples, filtered.rows, filtered.metrics.get("weights")) == ((), 0, None)


def test_metrics_add_up_and_mention_empty_kept_trajectories():
    metrics = applied().metrics
    assert metrics["kept"] == 3
    assert metrics["kept_fraction"] == 3 / 5
    assert metrics["problems_covered"] == 2
    assert metrics["rejected"] == dict.fromkeys(REASONS, 0) | {"failed": 1, "truncated": 1}
    assert metrics["note"] == "1 kept trajectory is empty and is not used for training."
    assert "kept_with_wrong_step" not in metrics


def test_several_empty_trajectories_are_counted_in_the_plural():
    empty = [scored(sample, 1.0, action=" " * sample) for sample in (4, 5)]
    assert applied(empty).metrics["note"] == "2 kept trajectories are empty and are not used for training."


def test_wrong_steps_are_counted_where_they_can_be_checked():
    checked = []

    def check_steps(prompt, completion):
        checked.append((prompt, completion))
        return completion.endswith("0")

    filtered = applied(check_steps=check_steps)
    assert checked == [("What is p?", "7 by 0"), ("What is q?", "7 by 2")]
    assert filtered.wrong_steps == filtered.metrics["kept_with_wrong_step"] == 1


def test_the_conclusion_says_how_many_were_kept_why_the_rest_was_not_and_the_next_command():
    conclusion = applied().conclusion("recipes/a.yaml", Path("runs/a"))
    assert conclusion == (
        "kept 3 of 5 attempts at 2 problems, cutoff 0 (rejected: 1 truncated, 1 failed). "
        "1 kept trajectory is empty and is not used for training. "
        "next: bcft sft recipes/a.yaml --dataset_name runs/a --output_dir DIR"
    )
    assert "bcft sft RECIPE --dataset_name" in applied().conclusion("", Path("runs/a"))


def test_without_a_kept_example_no_command_comes_next():
    conclusion = applied(SCORES[1:2]).conclusion("", Path("runs/a"))
    assert conclusion == (
        "kept 0 of 1 attempts at 0 problems, cutoff 0 (rejected: 1 failed). "
        "The filter kept none of 1 trajectory (1 failed): they are not known to have succeeded."
    )


def test_the_files_hold_every_decision_and_the_examples(tmp_path):
    filtered = applied()
    filtered.write(tmp_path)
    lines = read_jsonl(tmp_path / "scores.jsonl")
    assert [line["id"] for line in lines] == [score.trajectory.id for score in SCORES]
    assert {line["id"]: line["decision"] for line in lines} == filtered.selection.decisions
    assert {line["cutoff"] for line in lines} == {0.0}
    kept = read_jsonl(tmp_path / "kept.jsonl")
    assert tuple(TrainingExample.from_json(line) for line in kept) == filtered.examples
    assert list(kept[0]) == [
        "id", "problem_id", "turn", "source", "prompt", "completion", "input_ids", "labels", "reward", "weight",
    ]  # fmt: skip
    assert "null" not in (tmp_path / "scores.jsonl").read_text() + (tmp_path / "kept.jsonl").read_text()


def test_other_examples_can_be_written_beside_the_kept_ones(tmp_path):
    filtered = applied()
    replayed = TrainingExample("demonstration-0", "d", (1, 2), (IGNORED, 2))
    filtered.write(tmp_path, [*filtered.examples, replayed])
    written = [json.loads(line)["id"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert written == ["1-p-0", "1-q-2", "demonstration-0"]
    assert len(read_jsonl(tmp_path / "scores.jsonl")) == 5


def test_the_source_is_on_record():
    assert {example.source for example in applied(source="teacher").examples} == {"teacher"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"keep_quantile": 0.5, "min_reward": 0.25, "require_success": "true", "pass_rate": (0.1, 0.9)},
        {"max_per_problem": 2, "ties": "sample", "control": "random", "success_func": ""},
    ],
)
def test_the_rule_of_a_round_has_every_setting_of_the_recipe(keys):
    selection = SelectionSettings(**keys)
    rule = rule_of(selection, seed=5, number=3)
    assert (rule.seed, rule.round) == (5, 3)
    for field in fields(RuleSettings):
        assert getattr(rule, field.name) == getattr(selection, field.name)
