"""Evaluation: paired, counted honestly, and the same one by one as in batches."""

import pytest
import torch
from tiny import llama_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.data.examples import make_rows
from bcft.evaluation import held_out as evaluation
from bcft.evaluation.held_out import Evaluation, compare, evaluate, held_out_loss
from bcft.generation import hf
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision
from bcft.selection.scoring import score
from bcft.types import IGNORED, Demonstration, Problem, Sampling, Trajectory, Turn


@pytest.fixture(scope="module")
def policy():
    tokenizer = llama_tokenizer([""], vocabulary=262, chat=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config), Renderer(tokenizer), Precision("cpu", "no", torch.float32, "test"))


def problems(n=6):
    return [Demonstration(Problem(f"p{i}", "x" * (i + 1), {"answer": str(i)}), f"answer {i}") for i in range(n)]


def measured(policy, **settings):
    values = {
        "success": None, "sampling": Sampling(), "samples": 3, "max_new_tokens": 12, "seed": 0, "phase": "test",
        "label": "x",
    } | settings  # fmt: skip
    return evaluate(policy, problems(), **values)


def test_problems_one_by_one_are_attempted_as_in_batches(policy, monkeypatch):
    together = measured(policy)
    monkeypatch.setattr(hf, "_MOST_ROWS", 1)
    assert measured(policy).attempts == together.attempts


def test_every_problem_has_one_greedy_and_the_samples_asked_for(policy):
    found = measured(policy)
    assert len(found.attempts) == 6 * (1 + 3)
    assert all([a["sample"] for a in attempts] == [-1, 0, 1, 2] for attempts in found.problems.values())


def test_dev_and_test_draw_different_noise_and_the_same_phase_the_same(policy):
    one, two, dev = (
        {(a["problem_id"], a["sample"]): a["completion"] for a in measured(policy, phase=phase).attempts}
        for phase in ("test", "test", "dev")
    )
    assert one == two
    assert one != dev
    assert all(one[key] == dev[key] for key in one if key[1] == -1)


def test_an_attempt_that_never_stops_is_not_solved(policy):
    found = measured(policy, success=lambda completions, **_: [1.0] * len(completions))
    stops = [(a["stop"] == "stop_token", a["success"]) for a in found.attempts]
    assert {solved for stopped, solved in stops if not stopped} == {"no"}
    assert {solved for stopped, solved in stops if stopped} <= {"yes"}


def test_the_success_function_gets_trls_arguments_in_the_form_of_the_prompt():
    seen = {}

    def success(prompts, completions, answer, **_):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0, 0.0, None]

    message = [{"role": "user", "content": "b"}]
    problems = {p: Problem(p, prompt, {"answer": p}) for p, prompt in (("1", "a"), ("2", message), ("3", "c"))}
    said = {"1": "x", "2": "y", "3": "z"}
    attempts = [Trajectory(0, p, 0, (Turn(text, (1,), (2,), "stop_token"),), "done") for p, text in said.items()]
    scores = score(attempts, problems, [], weights=[], success=success)
    assert [found.success for found in scores] == ["yes", "no", "unknown"]
    assert seen == {
        "prompts": ["a", message, "c"],
        "completions": ["x", [{"role": "assistant", "content": "y"}], "z"],
        "answer": ["1", "2", "3"],
    }


def attempts(table):
    """Return an evaluation from `{problem: 'greedy samples'}`, + solved, - not."""
    return Evaluation(
        tuple(
            {"problem_id": key, "sample": i - 1, "completion": "7" if c == "+" else "8", "stop": "stop_token",
             "success": "yes" if c == "+" else "no"}
            for key, marks in table.items()
            for i, c in enumerate(marks)
        )
    )  # fmt: skip


def test_a_summary_by_hand():
    summary = attempts({"a": "+++-+", "b": "-+---", "c": "-----"}).summary()
    assert summary["n"] == 3
    assert summary["greedy"]["success"] == pytest.approx(1 / 3)
    sampled = summary["sampled"]
    assert (sampled["n"], sampled["k"]) == (4, 2)
    assert sampled["pass@1"] == pytest.approx((3 / 4 + 1 / 4 + 0) / 3)
    # pass@2 of 4: 1 - C(1,2)/C(4,2) = 1; 1 - C(3,2)/C(4,2) = 1/2; 0.
    assert sampled["pass@k"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    # The first two samples vote: + + is right; + - is a tie, to the earlier, right; - - is wrong.
    assert sampled["maj@k"] == pytest.approx(2 / 3)


def test_first_and_second_attempts_are_counted_of_those_that_came_to_both():
    """An environment that failed once, a context that was full: neither takes the figure from the others."""
    both = [("no", "yes"), ("yes", "yes"), ("yes", "no")]
    lines = [
        {"problem_id": f"p{i}", "sample": -1, "turns": 2, "first": first, "success": last, "stop": "stop_token"}
        for i, (first, last) in enumerate(both)
    ]
    for more in ({"turns": 1, "success": "unknown"}, {"turns": 1, "stop": "context_full"}, {"success": "unknown"}):
        lines.append({**lines[0], "problem_id": f"q{len(lines)}", **more})
    told = Evaluation(tuple(line | {"graded": False} for line in lines)).summary()["revision"]
    assert told == {"n": 3, "first": 2 / 3, "last": 2 / 3, "wrong_to_right": 1, "right_to_wrong": 1}


def test_comparison_is_paired_and_its_sign_is_that_of_the_other_minus_the_base():
    worse, better = attempts(dict.fromkeys("abcdefgh", "-+---")), attempts(dict.fromkeys("abcdefgh", "+++++"))
    found = compare(worse, better)
    assert found["delta"] == pytest.approx(0.75)
    assert found["conclusion"] == "better"
    assert compare(better, worse)["conclusion"] == "worse"
    assert compare(better, better)["conclusion"] == "not_distinguishable"
    # All eight greedy answers changed to right: two-sided exact McNemar is 2 / 2^8.
    assert found["greedy_p_value"] == pytest.approx(2 / 256)


def test_without_success_function_nothing_is_called_solved(policy):
    summary = measured(policy).summary()
    assert "greedy" not in summary
    assert summary["ungraded"] == 24


def test_held_out_loss_is_the_token_mean_by_definition(policy, monkeypatch):
    rows, _ = make_rows(problems(), policy.renderer, max_length=64)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            scores = policy.model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            picked = [scores[i - 1, label] for i, label in enumerate(row.labels) if label != IGNORED]
            total, count = total - float(sum(picked)), count + len(picked)
    assert held_out_loss(policy, rows) == pytest.approx(total / count, rel=1e-5)
    monkeypatch.setattr(evaluation, "_batches", lambda rows, most_tokens: ([row] for row in rows))  # noqa: ARG005
    assert held_out_loss(policy, rows) == pytest.approx(total / count, rel=1e-5)
