"""What evaluation costs: by default at most a third of a run, and never another number than the recipe fixes."""

import subprocess
import sys

import pytest

from bcft.config.schema import EvaluationSettings, RoundSettings
from bcft.evaluation.budget import TEST_SAMPLES, Budget, samples_of
from bcft.runs.progress import duration

SIZES = [
    (10, 2048, 128, 500, 0),
    (10, 2048, 128, 500, 200),
    (10, 2048, 128, 100, 0),
    (3, 4096, 128, 500, 0),
    (20, 512, 128, 200, 0),
    (50, 1024, 16, 20, 0),
    (1, 12288, 128, 500, 200),
    (7, 3000, 1, 1, 0),
]
"""Rounds, attempts of a round, and dev, test and harder problems."""


def budget(rounds, played, dev, test, harder, *, graded=True, evaluation=None, **settings):
    return Budget.of(
        RoundSettings(num_rounds=rounds, **settings), EvaluationSettings(**evaluation or {}), dev=dev, test=test,
        harder=harder, played=played, graded=graded,
    )  # fmt: skip


def by_hand(rounds, played, dev, test, harder, *, every, samples):
    """Return the share of evaluation in all attempts, counted one by one."""
    evaluations = [0, *(n for n in range(1, rounds + 1) if n % every == 0 or n == rounds)]
    measured = sum(dev * 5 for _ in evaluations) + 2 * (test * (1 + samples) + harder * (1 + min(samples, 4)))
    return measured / (measured + rounds * played)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_by_default_evaluation_takes_at_most_a_third_and_more_samples_would_take_more(sizes):
    found = budget(*sizes)
    every, samples = found.rounds.eval_every, found.evaluation.eval_test_samples
    assert found.share == pytest.approx(by_hand(*sizes, every=every, samples=samples))
    assert found.share <= 1 / 3
    for more in TEST_SAMPLES[: TEST_SAMPLES.index(samples)]:
        wider = max(every, sizes[0] // 4)
        assert min(by_hand(*sizes, every=n, samples=more) for n in range(1, wider + 1)) > 1 / 3
    assert every == 1 or by_hand(*sizes, every=every - 1, samples=samples) > 1 / 3


def test_the_keys_defaults_by_hand():
    found = budget(10, 2048, 128, 500, 0)
    assert (found.evaluation.eval_test_samples, found.rounds.eval_every) == (4, 2)
    assert (found.dev, found.times, found.test) == (640, 6, 2500)
    assert str(found) == "8,840 attempts beside 20,480 of rounds: 30 % of all attempts"


PLANS = [
    ((10, 2048, 128, 500, 0), {}, "3,140 attempts at the start, 640 in 5 of 10 rounds, 2,500 at the end (30 %"),
    ((3, 4096, 128, 500, 0), {}, "2,140 attempts at the start, 640 in each of 3 rounds, 1,500 at the end (31 %"),
    ((1, 12288, 128, 500, 200), {}, "2,740 attempts at the start, 640 in the round, 2,100 at the end (31 %"),
    ((5, 64, 8, 0, 0), {"eval_every": 5}, "40 attempts at the start, 40 in 1 of 5 rounds (20 %"),
    ((5, 64, 0, 10, 0), {"warmup_rounds": 1}, "50 attempts at the start, 50 at the end (24 %"),
]


@pytest.mark.parametrize(("sizes", "settings", "plan"), PLANS, ids=str)
def test_the_plan_says_when_how_many_attempts_are_evaluated(sizes, settings, plan):
    found = budget(*sizes, **settings)
    assert found.plan == f"{plan} of all attempts)"
    assert found.opening + (found.times - 1) * found.dev + found.test == found.evaluated


def test_the_scales_of_the_last_choice_are_counted_as_evaluations_on_dev_at_the_end():
    plain, scaled = (budget(6, 4096, 128, 500, 0, ship_scale=scales) for scales in (None, (1.0, 0.5, 0.75)))
    assert scaled.ending == scaled.test + 2 * scaled.dev
    assert scaled.evaluated == scaled.opening + (scaled.times - 1) * scaled.dev + scaled.ending
    assert scaled.share <= 1 / 3
    assert f"{scaled.ending:,} at the end" in scaled.plan
    assert budget(6, 4096, 128, 500, 0, ship_scale=(1.0,)).plan == plain.plan


def test_without_held_out_problems_the_plan_is_none():
    assert budget(5, 64, 0, 0, 0).plan == "none"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_time_of_all_evaluation_follows_from_that_of_the_base(sizes):
    found = budget(*sizes)
    assert found.time(60.0 * found.opening) == (
        f"about {duration(60.0 * found.evaluated)} in all, of which {duration(60.0 * found.opening)} have passed"
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_time_of_all_evaluation_is_expected_at_the_rate_of_the_sanity_check(sizes):
    found = budget(*sizes)
    whole = duration(2.0 * found.evaluated)
    assert found.expected(2.0 * 64, attempts=64) == f"about {whole} in all at the rate of the sanity check"


@pytest.mark.parametrize("samples", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("every", [1, 3, "auto"])
def test_numbers_that_a_recipe_fixes_stay(samples, every):
    found = budget(10, 64, 128, 500, 200, evaluation={"eval_test_samples": samples}, eval_every=every)
    assert found.evaluation.eval_test_samples == samples
    assert found.rounds.eval_every == (20 if every == "auto" else every)  # auto: dev alone takes a third
    assert found.test == 500 * (1 + samples) + 200 * (1 + min(samples, 4))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_with_fixed_rounds_on_dev_only_the_samples_on_test_are_chosen(every):
    found = budget(10, 2048, 128, 100, 0, eval_every=every)
    assert found.rounds.eval_every == every
    assert found.share <= 1 / 3


def test_where_nothing_fits_the_fewest_samples_are_taken():
    assert budget(2, 36, 128, 500, 200).evaluation.eval_test_samples == TEST_SAMPLES[-1]


def test_where_nothing_can_be_graded_attempts_are_greedy_only():
    found = budget(10, 2048, 128, 500, 200, graded=False)
    assert (found.dev, found.test) == (128, 700)


def test_warm_up_rounds_are_not_evaluated():
    assert budget(10, 2048, 128, 100, 0, warmup_rounds=4, eval_every=1).times == 1 + 6


def test_outside_rounds_auto_is_the_most_samples():
    evaluation = EvaluationSettings()
    assert evaluation.eval_test_samples == "auto"
    assert [samples_of(evaluation, split, graded=True) for split in ("dev", "test")] == [4, 16]
    assert [samples_of(evaluation, split, graded=False) for split in ("dev", "test")] == [0, 0]


def test_counting_loads_no_framework():
    code = "import sys, bcft.evaluation.budget; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "peft", "datasets"} & set(done.stdout.split())
