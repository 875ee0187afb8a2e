"""What a policy forgets: 0 for itself, never negative, the mean log-ratio of what the base says, read off one file."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers.episodes import FORGETFUL, Counting, attempts, by_id, played, retold
from helpers.tiny import llama_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.config.schema import ModelSettings
from bcft.environments.single_turn import SingleTurn
from bcft.evaluation import divergence as module
from bcft.evaluation.divergence import REFERENCE, divergence, kl, record_base
from bcft.evaluation.held_out import attempts_place
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import Policy, Precision, with_adapter
from bcft.rollout import sample
from bcft.rollout.episode import Attempt
from bcft.rollout.sample import play_journaled
from bcft.runs.clock import Clock
from bcft.types import Problem, RolloutSettings, Sampling

SETTINGS = RolloutSettings(SingleTurn, Sampling(), max_new_tokens=12, max_turns=1, step_timeout=60.0, seed=0)
PROBLEMS = [Problem(f"p{i:02}", "x" * (i + 1)) for i in range(40)]
LORA = ModelSettings(use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=("all-linear",))


@pytest.fixture(scope="module")
def base():
    tokenizer = llama_tokenizer([""], vocabulary=262, chat=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config), Renderer(tokenizer), Precision("cpu", "no", torch.float32, "test"))


def changed(policy, by=0.02):
    """Return a policy whose trained weights differ by some noise."""
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return replace(policy, model=model)


def record(policy, directory, *, samples=1, problems=PROBLEMS):
    record_base(policy, problems, SETTINGS, samples=samples, directory=directory, label="")
    return directory


def says(model, trajectories):
    """Return the log-probabilities (V,) before each own token of single turns, and these tokens."""
    rows, tokens = [], []
    for trajectory in trajectories:
        (turn,) = trajectory.turns
        ids = [*turn.ids, *turn.action_ids]
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        if turn.action.strip():
            rows.append(logprobs[len(turn.ids) - 1 : -1])
            tokens += turn.action_ids
    return torch.cat(rows), torch.tensor(tokens)


def attempted(policy, directory, samples):
    """Return the attempts that the base has played at the problems."""
    place = attempts_place(directory, "dev", policy, SETTINGS, PROBLEMS)
    wanted = [Attempt(problem, 0, k) for problem in PROBLEMS for k in range(samples)]
    return play_journaled(policy, wanted, SETTINGS, directory=place, clock=Clock(), label="", phase="dev")


def distributions(seed, rows=50, tokens=9):
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)).mul(3).log_softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_a_divergence_is_never_negative_and_exactly_0_of_a_policy_from_itself(seed):
    one, two = distributions(seed), distributions(seed + 100)
    assert kl(one, two) > 0
    assert kl(one, one) == 0.0
    assert kl(one, two) != kl(two, one)


def test_a_divergence_worked_by_hand():
    one, two = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert kl(one, two) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_the_base_diverges_from_itself_by_exactly_0_and_another_policy_by_more(base, tmp_path):
    record(base, tmp_path)
    assert divergence(base, tmp_path, label="") == 0.0
    little, much = (divergence(changed(base, by), tmp_path, label="") for by in (0.01, 0.1))
    assert 0 < little < much


def test_it_is_the_mean_over_own_tokens_of_the_whole_distributions(base, tmp_path, monkeypatch):
    other, trajectories = changed(base), attempted(base, tmp_path, 1)
    (one, _), (two, _) = (says(policy.model, trajectories) for policy in (base, other))
    exact = float((one.exp() * (one - two)).sum(1).mean())
    monkeypatch.setattr(module, "CHUNK", 5)
    some = divergence(other, record(base, tmp_path), label="")
    monkeypatch.setattr(module, "TOP", 1000)
    every = divergence(other, record(base, tmp_path), label="")
    assert every == pytest.approx(exact, abs=1e-6)
    assert 0.9 * exact < some <= exact + 1e-6


def test_the_mean_log_ratio_of_what_the_base_says_agrees_within_its_error(base, tmp_path):
    """At temperature 1 both estimate the same number."""
    other, trajectories = changed(base, 0.05), attempted(base, tmp_path, 3)
    (one, tokens), (two, _) = (says(policy.model, trajectories) for policy in (base, other))
    ratios = (one - two).gather(1, tokens[:, None])[:, 0]
    error = float(ratios.std()) / math.sqrt(len(ratios))
    figure = divergence(other, record(base, tmp_path, samples=3), label="")
    assert abs(float(ratios.mean()) - figure) < 4 * error


def test_an_adapter_diverges_from_what_it_is_when_switched_off(base, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOP", 1000)
    policy = with_adapter(replace(base, model=copy.deepcopy(base.model)), LORA, seed=0)
    record(policy, tmp_path)
    other = changed(policy)
    trajectories = attempted(policy, tmp_path, 1)
    two, _ = says(other.model, trajectories)
    with other.model.disable_adapter():
        one, _ = says(other.model, trajectories)
    expected = float((one.exp() * (one - two)).sum(1).mean())
    assert divergence(other, tmp_path, label="") == pytest.approx(expected, abs=1e-6)
    assert expected > 1e-3


def test_attempts_that_were_evaluated_are_not_played_again_and_the_first_samples_come_first(
    base, tmp_path, monkeypatch
):
    attempted(base, tmp_path, 3)
    monkeypatch.setattr(sample, "play_attempts", lambda _, missing, *__, **___: iter(missing and 1 / 0))
    monkeypatch.setattr(module, "ATTEMPTS", len(PROBLEMS) + 2)
    seen = []
    monkeypatch.setattr(module, "_rows", lambda trajectories, _: seen.extend(trajectories) or [])
    record(base, tmp_path, samples=3)
    assert [t.sample for t in seen] == [0] * len(PROBLEMS) + [1] * 2
    assert divergence(base, tmp_path, label="") is None


def test_without_sampled_attempts_there_is_no_figure(base, tmp_path):
    assert divergence(base, tmp_path, label="") is None
    assert divergence(base, record(base, tmp_path, samples=0), label="") is None
    assert divergence(base, record(base, tmp_path, problems=[]), label="") is None
    assert (tmp_path / REFERENCE).is_file()


def test_only_what_the_base_has_said_counts_in_every_row_of_a_conversation():
    renderer = Renderer(retold(FORGETFUL))
    trajectories = list(by_id(played(attempts(n=2, samples=1), Counting, renderer)).values())
    problems = {attempt.problem.id: attempt.problem for attempt in attempts(n=2)}
    rows = module._rows(trajectories, problems)
    said = sorted(tuple(turn.action_ids) for t in trajectories for turn in t.turns)
    own = []
    for ids, mine in rows:
        mine = [*mine, False]
        starts = [i for i in range(len(ids)) if mine[i] and not mine[i - 1]]
        own += [tuple(ids[start : mine.index(False, start)]) for start in starts]
    assert sorted(own) == said
    assert len(said) == 2 * Counting.turns
    assert module._rows([replace(t, ended="error", error="it broke") for t in trajectories], problems) == []


def test_long_attempts_are_read_in_part_and_not_all_of_many(monkeypatch):
    renderer = Renderer(llama_tokenizer(["say a number"], vocabulary=300))
    trajectories = played(attempts(n=5, samples=1), Counting, renderer)
    problems = {attempt.problem.id: attempt.problem for attempt in attempts(n=5)}
    monkeypatch.setattr(module, "ROW_TOKENS", 4)
    rows = module._rows(trajectories, problems)
    assert [len(ids) - own.index(True) for ids, own in rows] == [4] * 5
    monkeypatch.setattr(module, "POSITIONS", 8)
    assert len(module._rows(trajectories, problems)) == 2
