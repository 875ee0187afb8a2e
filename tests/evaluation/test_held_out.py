"""Evaluation: paired, counted honestly, and the same one by one as in batches."""

import copy
import importlib
import linecache
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.tiny import llama_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.config.schema import EvaluationSettings
from bcft.data.examples import make_examples
from bcft.data.loading import Splits
from bcft.environments.single_turn import SingleTurn
from bcft.errors import FaultError
from bcft.evaluation import held_out
from bcft.evaluation.budget import samples_of
from bcft.evaluation.held_out import evaluate, evaluation_key, held_out_loss, measure
from bcft.evaluation.results import compare, stored
from bcft.generation import kv_cache
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision
from bcft.rollout import sample
from bcft.runs.storage import read_json, read_jsonl
from bcft.selection import scoring
from bcft.selection.scoring import Scorer, score
from bcft.types import IGNORED, Demonstration, Feedback, Problem, RolloutSettings, Sampling, Trajectory, Turn


@pytest.fixture(scope="module")
def policy():
    tokenizer = llama_tokenizer([""], vocabulary=262, chat=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config), Renderer(tokenizer), Precision("cpu", "no", torch.float32, "test"))


def demonstrations(n=6, start=0):
    problems = [Problem(f"p{i}", "x" * (i + 1), {"answer": str(i)}) for i in range(start, start + n)]
    return [
        Demonstration(problem, problem.prompt, ({"role": "assistant", "content": f"answer {problem.id[1:]}"},))
        for problem in problems
    ]


def rollout_settings(make=SingleTurn, max_turns=1):
    return RolloutSettings(make, Sampling(), max_new_tokens=12, max_turns=max_turns, step_timeout=60.0, seed=0)


def graded(*functions, success=None):
    """Return a scorer of functions; success: the one that decides about it."""
    return Scorer(functions, (1.0,) * len(functions), success)


@pytest.fixture
def evaluated(policy, tmp_path):
    """Return a function that evaluates the policy, each time in a directory of its own unless it is given one."""
    numbers = iter(range(1000))

    def evaluated(settings=None, *, success=None, scorer=None, **changes):
        values = {"samples": 3, "phase": "test", "label": "x", "directory": tmp_path / str(next(numbers))} | changes
        asked = scorer or graded(success=success)
        return evaluate(policy, demonstrations(), settings or rollout_settings(), scorer=asked, **values)

    return evaluated


def always(completions, **_):
    """Call every completion right."""
    return [1.0] * len(completions)


def test_problems_one_by_one_are_attempted_as_in_batches(evaluated, monkeypatch):
    together = evaluated()
    monkeypatch.setattr(kv_cache, "_MOST_ROWS", 1)
    assert evaluated().attempts == together.attempts


def test_every_problem_has_one_greedy_attempt_and_the_requested_samples(evaluated):
    evaluation = evaluated()
    assert len(evaluation.attempts) == 6 * (1 + 3)
    assert all([a["sample"] for a in attempts] == [-1, 0, 1, 2] for attempts in evaluation.problems.values())


def test_dev_and_test_draw_different_noise_and_the_same_phase_the_same(evaluated):
    one, two, dev = (
        {(a["problem_id"], a["sample"]): a["completion"] for a in evaluated(phase=phase).attempts}
        for phase in ("test", "test", "dev")
    )
    assert one == two
    assert one != dev
    assert all(one[key] == dev[key] for key in one if key[1] == -1)


def test_an_attempt_that_never_stops_is_not_solved(evaluated):
    stops = [(a["stop"] == "stop_token", a["success"]) for a in evaluated(success=always).attempts]
    assert {solved for stopped, solved in stops if not stopped} == {"no"}
    assert {solved for stopped, solved in stops if stopped} <= {"yes"}


def test_the_success_function_gets_trls_arguments_in_the_form_of_the_prompt():
    seen = {}

    def success(prompts, completions, answer, **_):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0, 0.0, None]

    message = [{"role": "user", "content": "b"}]
    problems = {p: Problem(p, prompt, {"answer": p}) for p, prompt in (("1", "a"), ("2", message), ("3", "c"))}
    replies = {"1": "x", "2": "y", "3": "z"}
    attempts = [Trajectory(0, p, 0, (Turn(text, (1,), (2,), "stop_token"),), "done") for p, text in replies.items()]
    scores = score(attempts, problems, [], weights=[], success=success)
    assert [scored.success for scored in scores] == ["yes", "no", "unknown"]
    assert seen == {
        "prompts": ["a", message, "c"],
        "completions": ["x", [{"role": "assistant", "content": "y"}], "z"],
        "answer": ["1", "2", "3"],
    }


def test_without_success_function_nothing_is_called_solved(evaluated):
    summary = evaluated().summary(None)
    assert "greedy" not in summary
    assert summary["ungraded"] == 24


def test_held_out_loss_is_the_token_mean_by_definition(policy, monkeypatch):
    examples, _ = make_examples(demonstrations(), policy.renderer, max_length=64)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            scores = policy.model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
            picked = [scores[i - 1, label] for i, label in enumerate(example.labels) if label != IGNORED]
            total, count = total - float(sum(picked)), count + len(picked)
    assert held_out_loss(policy, examples) == pytest.approx(total / count, rel=1e-5)
    monkeypatch.setattr(held_out, "LOSS_TOKENS", 1)  # every example by itself
    assert held_out_loss(policy, examples) == pytest.approx(total / count, rel=1e-5)


def test_each_split_has_its_own_number_of_samples_and_none_where_nothing_can_be_graded():
    settings = EvaluationSettings(eval_dev_samples=3, eval_test_samples=5)
    assert [samples_of(settings, split, graded=True) for split in ("dev", "test")] == [3, 5]
    assert [samples_of(settings, split, graded=False) for split in ("dev", "test")] == [0, 0]


class Doubtful:
    """An environment of two turns that grades the second one only."""

    def reset(self, problem, *, seed):  # noqa: ARG002
        self.turn = 0
        return problem.prompt

    def step(self, action):
        self.turn += 1
        if self.turn == 1:
            return Feedback("z", None, done=False, success=False)
        return Feedback(None, float(len(action)), done=True, success=True)


def test_attempts_in_an_environment_have_returns_turns_and_a_first_success(evaluated):
    evaluation = evaluated(rollout_settings(Doubtful, max_turns=2))
    assert len(evaluation.attempts) == 24
    for attempt in evaluation.attempts:
        _, observation, last = (message["content"] for message in attempt["messages"])
        assert (attempt["turns"], attempt["graded"], attempt["first"], observation) == (2, True, "no", "z")
        assert (attempt["completion"], attempt["return"]) == (last, len(last))
        assert attempt["success"] == ("yes" if attempt["stop"] == "stop_token" else "no")
    summary = evaluation.summary(None)
    returns = [sum(a["return"] for a in attempts[1:]) / 3 for attempts in evaluation.problems.values()]
    assert summary["return"]["mean"] == pytest.approx(sum(returns) / 6)
    assert summary["return"]["turns"] == 2
    assert summary["revision"]["first"] == 0


def test_measure_writes_its_result_and_samples_harder_problems_less(policy, tmp_path, capsys):
    splits = Splits(train=(), dev=(), test=tuple(demonstrations()), harder=tuple(demonstrations(2, start=6)))
    examples, _ = make_examples(demonstrations(), policy.renderer, max_length=64)
    directory = tmp_path / "base"
    assert stored(directory) is None
    measured = measure(
        policy, splits, rollout_settings(), split="test", samples=6, scorer=graded(success=always), examples=examples,
        directory=directory, label="base",
    )  # fmt: skip
    again = stored(directory)
    assert (again.evaluation, again.summary) == (measured.evaluation, measured.summary)
    assert measured.summary["loss"] == held_out_loss(policy, examples)
    assert (measured.summary["sampled"]["n"], measured.summary["harder"]["sampled"]["n"]) == (6, 4)
    assert len(read_jsonl(directory / "evaluation.jsonl")) == 6 * 7
    assert read_json(directory / "evaluation.json") == measured.summary
    assert sorted(file.name for file in directory.iterdir()) == ["evaluation.json", "evaluation.jsonl"]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["base", "base, harder"]
    nothing = measure(
        policy, splits, rollout_settings(), split="dev", samples=6, scorer=graded(success=always), examples=[],
        directory=tmp_path / "dev", label="",
    )  # fmt: skip
    assert (nothing.evaluation.attempts, nothing.summary, stored(tmp_path / "dev")) == ((), {}, None)
    assert capsys.readouterr().out == ""


# Nothing is played or asked twice


class Counted:
    """A success function that counts the attempts it is asked for, and raises from a given one on."""

    def __init__(self, raises_from=10**9):
        self.asked = 0
        self.raises_from = raises_from

    def __call__(self, completions, **_):
        if self.asked + len(completions) > self.raises_from:
            raise RuntimeError("the service is down")
        self.asked += len(completions)
        return [float(len(text) % 2) for text in completions]


@pytest.fixture
def played(monkeypatch):
    """The attempts that were played."""
    played, play = [], sample.play_attempts

    def counting(policy, attempts, *rest, **keys):
        played.extend(attempts)
        return play(policy, attempts, *rest, **keys)

    monkeypatch.setattr(sample, "play_attempts", counting)
    return played


def measured_at(policy, directory, success, *, split="test", samples=3, settings=None, harder=2):
    splits = Splits(
        train=(), dev=tuple(demonstrations()), test=tuple(demonstrations()),
        harder=tuple(demonstrations(harder, start=6)),
    )  # fmt: skip
    return measure(
        policy, splits, settings or rollout_settings(), split=split, samples=samples, scorer=graded(success=success),
        examples=[], directory=directory, label="",
    )  # fmt: skip


@pytest.mark.parametrize("raises_from", [0, 1, 7, 12, 24])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_failed_evaluation_is_repeated_without_playing_or_asking_again(
    policy, tmp_path, monkeypatch, played, split, raises_from
):
    monkeypatch.setattr(scoring, "BATCH", 4)
    alone = measured_at(policy, tmp_path / "alone", Counted(), split=split)
    everything = len(played)
    assert everything == (24 + 8 * (split == "test"))
    success = Counted(raises_from)
    if everything > raises_from:
        with pytest.raises(FaultError, match="the service is down"):
            measured_at(policy, tmp_path / "run", success, split=split)
        assert not (tmp_path / "run" / "evaluation.json").exists()
    success.raises_from = 10**9
    again = measured_at(policy, tmp_path / "run", success, split=split)
    assert (again.evaluation, again.summary) == (alone.evaluation, alone.summary)
    assert len(played) == 2 * everything
    assert success.asked == everything


OTHER_WORK = {
    "weights": lambda policy: {"policy": nudged(policy)},
    "sampling": lambda _: {"settings": replace(rollout_settings(), sampling=Sampling(temperature=0.5))},
    "length": lambda _: {"settings": replace(rollout_settings(), max_new_tokens=8)},
    "seed": lambda _: {"settings": replace(rollout_settings(), seed=1)},
    "split": lambda _: {"split": "dev"},
}


def nudged(policy):
    """Return the policy with one weight changed a little."""
    network = copy.deepcopy(policy.model)
    with torch.no_grad():
        network.lm_head.weight[3, 3] += 1e-3
    return replace(policy, model=network)


@pytest.mark.parametrize("what", OTHER_WORK)
def test_attempts_of_other_weights_or_settings_are_never_taken_for_these(policy, tmp_path, played, what):
    given = {"policy": policy, "directory": tmp_path / "run", "success": Counted(0), "harder": 0}
    with pytest.raises(FaultError):
        measured_at(**given)
    other = given | {"success": Counted()} | OTHER_WORK[what](policy)
    before = len(played)
    found = measured_at(**other)
    assert len(played) - before == 24
    assert found.evaluation == measured_at(**other | {"directory": tmp_path / "alone"}).evaluation
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["evaluation.json", "evaluation.jsonl"]


def test_the_spelling_of_a_factory_or_a_timeout_is_not_another_evaluation(policy):
    problems = [d.problem for d in demonstrations()]
    keys = {
        evaluation_key(policy, rollout_settings(partial(make, size=size)), problems)
        for make, size in ((Doubtful, 1), (Doubtful, 1), (Doubtful, 2), (lambda size: size, 1))
    }
    assert len(keys) == 3
    slower = replace(rollout_settings(), step_timeout=1e6)
    assert evaluation_key(policy, slower, problems) == evaluation_key(policy, rollout_settings(), problems)


@pytest.mark.parametrize("change", ["return prompt + 'x'", "return None", "raise ValueError", "pass", "return problem"])
def test_a_factory_with_another_source_is_another_evaluation(policy, tmp_path, monkeypatch, change):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    problems, keys = [d.problem for d in demonstrations()], []
    for body in ("return prompt", "return prompt", change):
        (tmp_path / "worlds.py").write_text(f"class World:\n    def reset(self, problem, *, seed):\n        {body}\n")
        monkeypatch.delitem(sys.modules, "worlds", raising=False)
        importlib.invalidate_caches()
        linecache.clearcache()
        made = partial(importlib.import_module("worlds").World)
        keys.append(evaluation_key(policy, rollout_settings(made), problems))
    assert keys[0] == keys[1] != keys[2]


def test_attempts_at_harder_problems_do_not_depend_on_the_test_problems(policy, tmp_path, played):
    with pytest.raises(FaultError):
        measured_at(policy, tmp_path / "run", Counted(24 + 3))
    assert len(played) == 24 + 8
    splits = Splits(
        train=(), dev=(), test=tuple(demonstrations(4)), harder=tuple(demonstrations(2, start=6)),
    )  # fmt: skip
    measure(
        policy, splits, rollout_settings(), split="test", samples=3, scorer=graded(success=Counted()), examples=[],
        directory=tmp_path / "run", label="",
    )  # fmt: skip
    assert len(played) == 24 + 8 + 16


# The reward in the place of success


def length(completions, **_):
    """Reward length."""
    return [float(len(text)) for text in completions]


def seldom(completions, **_):
    """Grade one of three lengths only."""
    return [float(len(text)) if len(text) % 3 == 0 else None for text in completions]


@pytest.mark.parametrize(
    ("functions", "weights", "value"),
    [
        ([length], (1.0,), lambda n: n),
        ([length], (-0.5,), lambda n: -0.5 * n),
        ([length, always], (1.0, 2.0), lambda n: n + 2),
        ([seldom], (1.0,), lambda n: n if n % 3 == 0 else None),
        ([seldom, always], (1.0, 1.0), lambda n: n + 1 if n % 3 == 0 else 1),
    ],
)
def test_where_success_cannot_be_known_the_mean_reward_is_measured(evaluated, functions, weights, value):
    evaluation = evaluated(scorer=Scorer(tuple(functions), weights, None))
    wanted = [value(len(a["completion"])) for a in evaluation.attempts]
    assert [a["reward"] if a["graded"] else None for a in evaluation.attempts] == wanted
    assert {a["success"] for a in evaluation.attempts} == {"unknown"}
    means = []
    for attempts in evaluation.problems.values():
        given = [value(len(a["completion"])) for a in attempts[1:]]
        given = [reward for reward in given if reward is not None]
        means += [sum(given) / len(given)] if given else []
    summary = evaluation.summary(None)
    assert summary["reward"]["mean"] == pytest.approx(sum(means) / len(means))
    assert summary["ungraded"] == wanted.count(None)
    assert not {"greedy", "sampled", "return"} & summary.keys()


def test_a_reward_that_grades_nothing_measures_nothing(evaluated):
    summary = evaluated(scorer=graded(lambda completions, **_: [None] * len(completions))).summary(None)
    assert "reward" not in summary
    assert summary["ungraded"] == 24


def test_of_an_environment_the_reward_adds_to_the_return_where_success_is_unknown(evaluated):
    class Paying(Doubtful):
        def step(self, action):
            return replace(super().step(action), success=None)

    scorer = Scorer((length,), (1.0,), None, environment=True)
    alone = evaluated(rollout_settings(Paying, max_turns=2)).attempts
    both = evaluated(rollout_settings(Paying, max_turns=2), scorer=scorer).attempts
    assert all(b["return"] > a["return"] for a, b in zip(alone, both, strict=True) if b["completion"])
    known = evaluated(rollout_settings(Doubtful, max_turns=2), scorer=scorer).attempts
    assert [a["return"] for a in known] == [a["return"] for a in both]


class Winning:
    """Says in the attempts at some problems that they were won, and nothing about the others; gives no reward."""

    instant = True
    won = 0

    def reset(self, problem, *, seed):  # noqa: ARG002
        self.prompt = problem.prompt
        return self.prompt

    def step(self, action):  # noqa: ARG002
        return Feedback(None, None, done=True, success=True if len(self.prompt) <= self.won else None)


@pytest.mark.parametrize("won", [0, 1, 3, 5, 6])
def test_what_is_measured_follows_from_the_recipe_whatever_the_attempts_were(evaluated, monkeypatch, won):
    """One win in an evaluation made it one of the environment's rewards alone, subtracted from sums with functions."""
    scorer = Scorer((length,), (1.0,), None, environment=True)
    before = evaluated(rollout_settings(Winning, max_turns=2), scorer=scorer)
    monkeypatch.setattr(Winning, "won", won)
    after = evaluated(rollout_settings(Winning, max_turns=2), scorer=scorer)
    assert {before.average, after.average} == {"return"}
    assert [a["return"] for a in after.attempts] == [float(len(a["completion"])) for a in before.attempts]
    assert compare(before, after)["return_delta"] == 0.0
    wins = [a for a in after.attempts if a["success"] != "unknown"]
    assert len(wins) == 4 * won
    assert ("greedy" in after.summary(None)) == bool(won)
