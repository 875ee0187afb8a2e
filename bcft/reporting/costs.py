"""How many optimizer steps and attempts a run takes, counted before it starts."""

import math

from bcft.config.schema import EvaluationSettings, RoundSettings, RuleSettings, TrainingSettings
from bcft.data.loading import Splits
from bcft.evaluation.budget import HARDER_SAMPLES, Budget, samples_of
from bcft.reporting.hub import Missing
from bcft.runs.distributed import world_size

Line = tuple[str, str]
"""A name and its value; a line without a name continues the line above."""


def steps(training: TrainingSettings, examples: int) -> int:
    """Return how many optimizer steps training on so many examples takes, as transformers' Trainer counts them."""
    if training.max_steps >= 0:
        return training.max_steps
    size, whole = training.per_device_train_batch_size, training.dataloader_drop_last
    batches = examples // size if whole else math.ceil(examples / size)
    mine = batches // world_size() if whole else math.ceil(batches / world_size())
    epoch = max(math.ceil(mine / training.gradient_accumulation_steps), 1)
    return math.ceil(training.num_train_epochs * epoch)


def sft_steps(splits: Splits | Missing, training: TrainingSettings, examples: int, *, exact: bool) -> str:
    """Return how many optimizer steps the run takes; at most, where the number of examples is not exact."""
    if training.max_steps < 0 and not examples:
        return str(splits)
    word = "" if exact or training.max_steps >= 0 else "at most "
    return f"{word}{steps(training, examples):,}"


def round_steps(
    rounds: RoundSettings, rule: RuleSettings, training: TrainingSettings, *, attempts: int, prompts: int, replay: int
) -> str:
    """Return the most steps of a round: with all attempts in scope kept, and with the share above the quantile.

    attempts, prompts: of a round; replay: how many demonstrations there are to replay.
    """
    span = rounds.num_rounds if rounds.history == "all" else min(rounds.history, rounds.num_rounds)
    scope = attempts * span
    most = min(scope, prompts * span * (rule.most_per_problem or scope))
    share = min(most, round((1 - rule.keep_quantile) * scope))
    cases = []
    for kept in dict.fromkeys((most, share)):
        replayed = min(kept, replay)
        beside = f" beside {replayed:,} demonstrations" if replayed else ""
        cases.append(f"{steps(training, kept + replayed):,} if {kept:,} of {scope:,} are kept{beside}")
    return f"per round at most {', '.join(cases)}; {batch(training)}"


def weight_lines(rule: RuleSettings) -> list[Line]:
    """Return the line about what kept rows weigh; none where all weigh 1."""
    words = {
        "maxrl": "maxrl: a right attempt 1/K, where K attempts at its problem are right",
        "reward": f"reward: exp(reward / {rule.weight_temperature:g})",
    }
    scale = "a duplicate adds its weight; scaled to a mean of 1 over the rows of a round"
    return [("weights", f"{words[rule.row_weight]}; {scale}")] if rule.row_weight in words else []


def batch(training: TrainingSettings) -> str:
    """Return in words how long training is and how many rows a step has."""
    factors = (training.per_device_train_batch_size, training.gradient_accumulation_steps, world_size())
    length = f"num_train_epochs {training.num_train_epochs:g}" if training.max_steps < 0 else "max_steps"
    return "{}, {} rows per step (batch {} x accumulation {} x processes {})".format(
        length, math.prod(factors), *factors
    )


def evaluations(
    rounds: RoundSettings, evaluation: EvaluationSettings, splits: Splits | Missing, *, played: int, graded: bool
) -> list[Line]:
    """Return the lines about evaluations beside rounds; played: attempts of a round."""
    sizes = _held_out(evaluation, splits)
    budget = Budget.of(rounds, evaluation, **sizes, played=played, graded=graded)
    return [
        ("evaluation", f"dev: {_sum(budget.evaluation, splits, 'dev', graded=graded)[1]}, {budget.times} times"),
        ("", f"test: {_sum(budget.evaluation, splits, 'test', graded=graded)[1]}, twice"),
        ("", str(budget)),
    ]


def before_and_after(evaluation: EvaluationSettings, splits: Splits | Missing, *, graded: bool) -> list[Line]:
    """Return the lines about the two evaluations on test of a run of `sft`."""
    attempts, words = _sum(evaluation, splits, "test", graded=graded)
    return [("evaluation", f"test: {words}"), ("", f"before and after training: {2 * attempts:,} attempts")]


def _held_out(evaluation: EvaluationSettings, splits: Splits | Missing) -> dict[str, int]:
    """Return how many problems each part has; without the dataset, how many it has at most."""
    if isinstance(splits, Splits):
        return {"dev": len(splits.dev), "test": len(splits.test), "harder": len(splits.harder)}
    return {"dev": evaluation.eval_dev_problems, "test": evaluation.eval_test_problems, "harder": 0}


def _sum(evaluation: EvaluationSettings, splits: Splits | Missing, split: str, *, graded: bool) -> tuple[int, str]:
    """Return the attempts of one evaluation, and the sum they come from; at most so many without the dataset."""
    sizes, samples = _held_out(evaluation, splits), samples_of(evaluation, split, graded=graded)
    harder, few = sizes["harder"] if split == "test" else 0, min(samples, HARDER_SAMPLES)
    total = sizes[split] * (1 + samples) + harder * (1 + few)
    more = f" + {harder:,} harder x (1 + {few})" if harder else ""
    word = "" if isinstance(splits, Splits) else "at most "
    return total, f"{word}{sizes[split]:,} problems x (1 greedy + {samples} sampled){more} = {total:,} attempts"
