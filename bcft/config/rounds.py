"""The settings of rounds: how attempts are scored, selected and trained on, and how the policy is evaluated."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from bcft.config.declare import GRADING, SELECTING, SPLITTING, Conflict, Settings, library, own

of_rule = partial(own, commands=SELECTING)
of_rounds = partial(own, commands=("filtered",))


@dataclass(frozen=True)
class RuleSettings(Settings):
    """The filter's rule, and what the rows that it keeps weigh."""

    keep_quantile: float = of_rule(
        0.9,
        "the cutoff is this quantile of all graded rewards; higher keeps less: at most about 1 - keep_quantile if all "
        "rewards differ, more if several are equal to the cutoff",
        limits=">= 0 and <= 1",
    )
    min_reward: float | None = of_rule(None, "trajectories below this reward are rejected; higher keeps less")
    require_success: Literal["auto", "true", "false"] = of_rule(
        "auto",
        "auto: reject known failures; true: reject unknown success as well; false: by reward alone, as in ArCHer's "
        "code",
    )
    pass_rate: tuple[float, ...] | None = of_rule(
        None,
        "least and greatest share of a problem's attempts that may succeed, such as [0.1, 0.9]; problems solved less "
        "or more often are rejected; a narrower interval keeps less",
    )
    max_per_problem: int | None = of_rule(
        None, "most trajectories kept of one problem; lower spreads a round over more problems", limits=">= 1"
    )
    select: Literal["reward", "shortest"] = of_rule(
        "reward",
        "which trajectories of a problem max_per_problem keeps. reward: the highest rewards, drawn among equals; "
        "shortest: the fewest tokens, of those that pass the other rules; the shortest one if max_per_problem is null",
    )
    ties: Literal["include", "sample"] = of_rule(
        "include", "include: keep everything at the cutoff; sample: keep round((1 - keep_quantile) x graded)"
    )
    control: Literal["none", "random"] = of_rounds(
        "none",
        "random: keep as many trajectories of each problem as the filter would, and draw which ones without looking at "
        "rewards; a control, not a method",
    )
    row_weight: Literal["none", "maxrl", "reward"] = of_rule(
        "none",
        "what a kept row weighs in the loss. none: 1; maxrl: 1/K where K attempts at its problem are right; reward: "
        "exp(reward / weight_temperature). A duplicate adds its weight, and the weights are scaled to a mean of 1",
    )
    weight_temperature: float = of_rule(
        1.0, "of row_weight: reward; lower gives the highest rewards more of the weight", limits="> 0"
    )

    @property
    def most_per_problem(self) -> int | None:
        """The most trajectories kept of a problem; None: no limit."""
        return 1 if self.select == "shortest" and self.max_per_problem is None else self.max_per_problem

    def conflicts(self) -> Iterator[Conflict]:
        """Yield a pass rate that is not an interval, a rule that would keep nothing, and rules that do not fit."""
        rate = self.pass_rate
        if rate is not None and not (len(rate) == 2 and 0 <= rate[0] <= rate[1] <= 1):
            wanted = "wants two numbers in [0, 1], the lower first, such as [0.1, 0.9]"
            yield ("pass_rate",), f"{wanted}, not {list(rate)!s:.60}"
        if self.ties == "sample" and self.keep_quantile == 1:
            yield ("ties", "keep_quantile"), "ties: sample with keep_quantile: 1 would keep nothing"
        if self.select == "shortest" and self.require_success == "false":
            yield (
                ("select", "require_success"),
                "shortest with require_success: false would keep the shortest attempts, right or wrong",
            )
        if self.row_weight == "maxrl" and self.require_success != "true":
            yield ("row_weight", "require_success"), 'maxrl weighs known successes: add `require_success: "true"`'
        if self.row_weight != "none" and self.control == "random":
            yield (
                ("row_weight", "control"),
                f"{self.row_weight} looks at rewards, and control: random draws without: leave one of them out",
            )


@dataclass(frozen=True)
class SelectionSettings(RuleSettings):
    """The functions that score trajectories, and the rule that selects them."""

    reward_funcs: tuple[str, ...] | None = own(
        None,
        "dotted paths of reward functions with TRL's signature; a single one also decides success; "
        "null: bcft.rewards.math_reward, or none with an environment",
        commands=GRADING,
    )
    reward_weights: tuple[float, ...] | None = library("reward_weights", commands=GRADING)
    reward_args: Mapping[str, Any] = own(
        {},
        "keyword arguments of the reward functions, each for those that take it, such as {percent_as_number: true}",
        commands=GRADING,
    )
    success_func: str | None = own(
        None,
        "dotted path of a function that returns 1.0 or more for a completion that solves its problem; null: the "
        "only one of reward_funcs; required with several; '': none, for rewards that do not show success",
        commands=GRADING,
    )
    rollouts: str | tuple[str, ...] | None = own(
        None,
        "saved rollouts to select from: a rollouts.jsonl, a round, or a run directory; a list of them is selected from "
        "together",
        commands=("refilter",),
    )


@dataclass(frozen=True)
class RoundSettings(Settings):
    """The rounds of filtered behavior cloning."""

    num_rounds: int = of_rounds(10, "rounds of roll out, score, select and train; more take longer", limits=">= 1")
    prompts_per_round: int = own(
        256,
        "training problems attempted in a round, drawn without replacement; more give more to select from",
        commands=("filtered", "collect"),
        limits=">= 1",
    )
    warmup_rounds: int = of_rounds(
        0,
        "first rounds that roll out and score but do not train; with `history`, more give the first training round "
        "more to select from",
        limits=">= 0",
    )
    history: int | Literal["all"] = of_rounds(
        1,
        "rounds whose trajectories are selected from, the current one included; more preserve older behavior; all: "
        "every round",
        limits=">= 1",
    )
    init_from: Literal["previous", "base", "best"] = of_rounds(
        "previous",
        "the weights a round trains from. previous: those it rolled out; base: the model as given; best: the best "
        "round on dev, which then also rolls out",
    )
    reset_optimizer: bool = of_rounds(
        True, "true: a fresh optimizer each round; false: its moments carry over and are saved with the weights"
    )
    learning_rate_decay: float = of_rounds(
        1.0,
        "the learning rate of round n is learning_rate x learning_rate_decay ** (n - 1); lower slows later rounds",
        limits="> 0 and <= 1",
    )
    on_empty: Literal["skip", "stop"] = of_rounds(
        "skip", "after a round that keeps nothing: skip its training, or stop the run"
    )
    early_stop: int | None = of_rounds(
        None,
        "stop after this many evaluations without a better round on dev, or when pass@k on dev falls below the base's; "
        "lower stops sooner; null: run all rounds",
        limits=">= 1",
    )
    ship_scale: tuple[float, ...] | None = of_rounds(
        None,
        "scales of the chosen round's change from the base, such as [0.5, 0.75, 1.0] (WiSE-FT): each is evaluated on "
        "dev, and best/ holds the best of them, the larger of equals; lower stays closer to the base; null: the round "
        "as it is",
    )
    eval_every: int | Literal["auto"] = of_rounds(
        "auto",
        "rounds from one evaluation on dev to the next; higher evaluates less; auto: under a third of all attempts",
        limits=">= 1",
    )

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales to choose from, the smallest first; empty where there is no choice but the round as it is."""
        given = tuple(sorted(self.ship_scale or ()))
        return () if given == (1.0,) else given

    def conflicts(self) -> Iterator[Conflict]:
        """Yield warm-up that leaves no round to train, and scales that are none."""
        if self.warmup_rounds >= self.num_rounds:
            yield ("warmup_rounds", "num_rounds"), "warm-up rounds leave none that trains"
        scales = self.ship_scale
        if scales is not None and not (scales and all(0 < s <= 1 for s in scales) and len({*scales}) == len(scales)):
            wanted = "wants different numbers > 0 and <= 1, such as [0.5, 0.75, 1.0]"
            yield ("ship_scale",), f"{wanted}, not {list(scales)!s:.60}"


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """Held-out evaluation: the numbers of problems and samples, and the run to compare with."""

    eval_split: Literal["dev", "test"] = own("test", "which held-out problems are evaluated", commands=("evaluate",))
    eval_dev_problems: int = own(
        128,
        "problems held out as dev; more make the choice of a round more reliable",
        commands=SPLITTING,
        limits=">= 0",
    )
    eval_dev_samples: int = own(
        4,
        "sampled attempts at each dev problem; more narrow the interval and take longer",
        commands=("filtered", "evaluate"),
        limits=">= 1",
    )
    eval_test_problems: int = own(
        500,
        "test problems evaluated; more narrow the interval and take longer; 0: none",
        commands=SPLITTING,
        limits=">= 0",
    )
    eval_test_samples: int | Literal["auto"] = own(
        "auto",
        "sampled attempts at each test problem; more narrow the interval and take longer; auto: 16, and in `filtered` "
        "the most of 16, 8, 4 and 2 with which all evaluation is at most a third of the run's attempts",
        commands=("sft", "filtered", "evaluate"),
        limits=">= 1",
    )
    against: str | None = own(
        None,
        "a model, an adapter or a run directory to compare with; in `filtered`, another run to draw into the report, "
        "such as the random control",
        commands=("evaluate", "filtered"),
    )
