"""Evaluation: paired, counted honestly, and the same one by one as in batches."""

import pytest
import torch
from helpers.tiny import llama_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.config.schema import EvaluationSettings
from bcft.data.examples import make_examples
from bcft.data.loading import Splits
from bcft.environments.single_turn import SingleTurn
from bcft.evaluation import held_out
from bcft.evaluation.held_out import evaluate, held_out_loss, measure, samples_of
from bcft.evaluation.results import stored
from bcft.generation import hf
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision
from bcft.runs.storage import read_json, read_jsonl
from bcft.selection.scoring import score
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


def evaluated(policy, settings=None, **changes):
    values = {"success": None, "samples": 3, "phase": "test", "label": "x"} | changes
    return evaluate(policy, demonstrations(), settings or rollout_settings(), **values)


def always(completions, **_):
    """Call every completion right."""
    return [1.0] * len(completions)


def test_problems_one_by_one_are_attempted_as_in_batches(policy, monkeypatch):
    together = evaluated(policy)
    monkeypatch.setattr(hf, "_MOST_ROWS", 1)
    assert evaluated(policy).attempts == together.attempts


def test_every_problem_has_one_greedy_attempt_and_the_requested_samples(policy):
    evaluation = evaluated(policy)
    assert len(evaluation.attempts) == 6 * (1 + 3)
    assert all([a["sample"] for a in attempts] == [-1, 0, 1, 2] for attempts in evaluation.problems.values())


def test_dev_and_test_draw_different_noise_and_the_same_phase_the_same(policy):
    one, two, dev = (
        {(a["problem_id"], a["sample"]): a["completion"] for a in evaluated(policy, phase=phase).attempts}
        for phase in ("test", "test", "dev")
    )
    assert one == two
    assert one != dev
    assert all(one[key] == dev[key] for key in one if key[1] == -1)


def test_an_attempt_that_never_stops_is_not_solved(policy):
    stops = [(a["stop"] == "stop_token", a["success"]) for a in evaluated(policy, success=always).attempts]
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


def test_without_success_function_nothing_is_called_solved(policy):
    summary = evaluated(policy).summary(None)
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


def test_attempts_in_an_environment_have_returns_turns_and_a_first_success(policy):
    evaluation = evaluated(policy, rollout_settings(Doubtful, max_turns=2))
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
        policy, splits, rollout_settings(), split="test", samples=6, success=always, examples=examples,
        directory=directory, quiet=False,
    )  # fmt: skip
    again = stored(directory)
    assert (again.evaluation, again.summary) == (measured.evaluation, measured.summary)
    assert measured.summary["loss"] == held_out_loss(policy, examples)
    assert (measured.summary["sampled"]["n"], measured.summary["harder"]["sampled"]["n"]) == (6, 4)
    assert len(read_jsonl(directory / "evaluation.jsonl")) == 6 * 7
    assert read_json(directory / "evaluation.json") == measured.summary
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["base", "base, harder"]
    nothing = measure(
        policy, splits, rollout_settings(), split="dev", samples=6, success=always, examples=[],
        directory=tmp_path / "dev", quiet=True,
    )  # fmt: skip
    assert (nothing.evaluation.attempts, nothing.summary, stored(tmp_path / "dev")) == ((), {}, None)
    assert capsys.readouterr().out == ""
