"""The filter of filtered behavior cloning, as one pure function: which trajectories to train on, and why not the rest.

`select` gives every trajectory a decision: the first of `REASONS` that applies, or `kept`. It reads no file, clock or
global generator, and the order of its input does not matter. Left out: the choice of the rounds in scope (the caller
passes them), the consequence of an empty round (the caller reads `kept` and `note`), and NaN rewards (`Candidate`
refuses them).

With 0/1 rewards and few successes the cutoff is 0 and rejects nothing. If success is known this does no harm, because
only successes are kept (`require_success: auto`). Success counts as unknown if any graded, finished trajectory has
unknown success: an environment that reports only its wins leaves every loss unknown. The filter then raises the cutoff
above the lowest reward. If all rewards are equal, they carry no information: only known successes pass, and without any
the round keeps nothing. `keep_quantile: 0` asks for no cutoff, and `require_success: false` for the rule of ArCHer's
code: the filter corrects neither, and with the second a note says when the cutoff rejects nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from bcft.config.keys import KEYS
from bcft.config.schema import RuleSettings
from bcft.config.values import convert, wanted
from bcft.types import Success, show

Status: TypeAlias = Literal["done", "truncated", "errored"]
Reason: TypeAlias = Literal[
    "errored",
    "ungraded",
    "truncated",
    "failed",
    "pass_rate",
    "below_min_reward",
    "below_cutoff",
    "duplicate",
    "max_per_problem",
    "tie_break",
]
Decision: TypeAlias = Reason | Literal["kept"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""In the order in which they are tried. `failed`: success is required, and the trajectory is not known to have it."""
MAX_ABS_REWARD = (
    1e100  # the difference of two rewards must not overflow, or a cutoff between them would not be a number
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """The facts of one trajectory that the filter reads. Raises ValueError for a value that cannot be ranked."""

    id: str
    problem_id: str
    reward: float
    """0.0 when not graded."""
    graded: bool
    """Whether any reward function graded it; an errored trajectory never is."""
    success: Success
    status: Status
    """`truncated`: at the token limit or with a full context. At the turn limit it is `done`, with a low reward."""
    digest: str
    """A hash of its actions: two trajectories of one problem with the same digest are duplicates."""
    round: int = 0
    """The round that rolled it out."""
    length: int = 0
    """How many tokens it has."""

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("problem_id", self.problem_id), ("digest", self.digest)):
            _require(isinstance(value, str) and value, f"{name} must be text, not {value!r}")
        about = f"trajectory {self.id}: "
        _require(_is_number(self.reward), f"{about}reward must be a finite number, not {self.reward!r}")
        _require(isinstance(self.graded, bool), f"{about}graded must be true or false, not {self.graded!r}")
        _require_one_of(f"{about}success", self.success, get_args(Success))
        _require_one_of(f"{about}status", self.status, get_args(Status))
        _require(_is_whole(self.round), f"{about}round must be an integer >= 0, not {self.round!r}")
        _require(_is_whole(self.length), f"{about}length must be an integer >= 0, not {self.length!r}")
        _require(not self.graded or self.status != "errored", f"{about}an errored trajectory cannot be graded")
        _require(self.graded or self.reward == 0, f"{about}an ungraded trajectory has reward 0.0, not {self.reward!r}")

    @property
    def rounded(self) -> float:
        """The reward as it is compared: to 9 decimals, so that 0.1 + 0.2 ties with 0.3."""
        return round(self.reward, 9) + 0.0  # no -0.0


@dataclass(frozen=True)
class Rule(RuleSettings):
    """The filter's settings: the keys of a recipe, and the seed and round of its draws.

    `pass_rate` is the share of known successes among a problem's attempts in scope whose success is known; a problem
    without any is inside. The random `control` keeps as many trajectories of each problem as the filter does. That
    number depends on the outcomes: the draws are right more often than average, because a problem without a success
    has none.

    Raises ValueError for a value that the recipe's key does not take, and for values that contradict each other.
    """

    seed: int = 0
    round: int = 0
    """The round that selects: every round draws anew."""

    def __post_init__(self) -> None:
        for name in (*(field.name for field in fields(RuleSettings)), "seed"):
            _require_value_of_key(name, getattr(self, name))
        _require(_is_whole(self.round), f"round: wants an integer >= 0, not {self.round!r}")
        super().__post_init__()


@dataclass(frozen=True, slots=True)
class Selection:
    """The decision about every candidate, and figures derived from it."""

    decisions: Mapping[str, Decision]
    """Trajectory id -> decision, by round and id."""
    cutoff: float
    """The lowest reward that passes, 0.0 when nothing is graded; under `control` that of the filter."""
    requested_fraction: float
    graded: int
    problems_covered: int
    """How many problems have a kept trajectory."""
    note: str
    """A remark for the report: the cutoff was raised or rejects nothing, or why nothing is kept. Mostly empty."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The ids to train on, by round and id."""
        return tuple(identity for identity, decision in self.decisions.items() if decision == "kept")

    @property
    def kept_fraction(self) -> float:
        """Kept of graded, to compare with `requested_fraction`; 0.0 when nothing is graded."""
        return len(self.kept) / max(1, self.graded)

    @property
    def rejected(self) -> dict[Reason, int]:
        """How many were rejected for each reason, zeros included; with the kept they add up to the candidates."""
        counts = Counter(self.decisions.values())
        return {reason: counts[reason] for reason in REASONS}


def select(candidates: Iterable[Candidate], rule: Rule) -> Selection:
    """Give each candidate the first of `REASONS` that applies, or keep it.

    The cutoff is the `keep_quantile` of all graded rewards, those of truncated and duplicate trajectories included, and
    a reward at the cutoff passes, as in the code of ArCHer (Zhou et al. 2024, https://arxiv.org/abs/2402.19446). Of
    duplicates the one with the higher reward stays, then the earlier one. `max_per_problem` rejects the lower rewards,
    with `select: shortest` the longer ones, and draws among equals.

    Raises ValueError when an id occurs twice.
    """
    scope = sorted(candidates, key=lambda candidate: (candidate.round, candidate.id))
    twice = [identity for identity, n in Counter(candidate.id for candidate in scope).items() if n > 1]
    _require(not twice, f"trajectories that are in scope twice: {', '.join(twice[:3])}")
    requirement = _requirement(scope, rule)
    decisions = _filter(scope, rule, requirement)
    note = requirement.note
    if "kept" not in decisions.values():
        note = f"{note} {_diagnosis(decisions)}".strip()
    if rule.control == "random":
        decisions = _control(scope, rule, decisions)
    return Selection(
        decisions=decisions,
        cutoff=requirement.cutoff,
        requested_fraction=round(1 - rule.keep_quantile, 9),
        graded=sum(candidate.graded for candidate in scope),
        problems_covered=len({candidate.problem_id for candidate in _kept(scope, decisions)}),
        note=note,
    )


@dataclass(frozen=True, slots=True)
class _Requirement:
    """The lowest reward that passes, and which values of success count as failed."""

    cutoff: float
    failed: tuple[Success, ...]
    note: str = ""


def _requirement(scope: list[Candidate], rule: Rule) -> _Requirement:
    """Return the quantile of the graded rewards, raised if it would reject nothing and success is unknown."""
    rewards = [candidate.rounded for candidate in scope if candidate.graded]
    failed: dict[str, tuple[Success, ...]] = {"auto": ("no",), "true": ("no", "unknown"), "false": ()}
    cutoff = float(np.quantile(rewards, rule.keep_quantile, method="linear")) if rewards else 0.0
    requirement = _Requirement(cutoff, failed[rule.require_success])
    lowest, *higher = sorted(set(rewards)) or [cutoff]
    if not rewards or cutoff > lowest or rule.keep_quantile == 0 or rule.require_success == "true":
        return requirement
    if rule.require_success == "false":
        return replace(requirement, note=f"The cutoff is the lowest reward, {lowest}, and rejects nothing.")
    done = [candidate for candidate in scope if candidate.graded and candidate.status == "done"]
    unknown = sum(candidate.success == "unknown" for candidate in done)
    if not unknown:
        return requirement
    why = f"success is unknown for {unknown} of {len(rewards)} graded trajectories"
    if not higher:
        note = f"All graded rewards are {lowest}, and {why}: only known successes can be kept."
        return _Requirement(lowest, ("no", "unknown"), note)
    note = f"The cutoff was raised above the lowest reward, {lowest}: {why}."
    return replace(requirement, cutoff=higher[0], note=note)


def _filter(scope: list[Candidate], rule: Rule, requirement: _Requirement) -> dict[str, Decision]:
    outside = _outside_pass_rate(scope, rule)
    decisions = {candidate.id: _decide_alone(candidate, rule, requirement, outside) for candidate in scope}
    decisions |= _duplicates(_kept(scope, decisions))
    decisions |= _over_max_per_problem(_kept(scope, decisions), rule)
    if rule.ties == "sample":
        ranked = sorted(_kept(scope, decisions), key=lambda c: (-c.rounded, _random_rank(rule, "ties", c)))
        quota = round((1 - rule.keep_quantile) * sum(candidate.graded for candidate in scope))
        decisions |= {candidate.id: "tie_break" for candidate in ranked[quota:]}
    return decisions


def _outside_pass_rate(scope: list[Candidate], rule: Rule) -> set[str]:
    """Return the problems that are solved too rarely or too often."""
    if rule.pass_rate is None:
        return set()
    known = Counter(candidate.problem_id for candidate in scope if candidate.success != "unknown")
    solved = Counter(candidate.problem_id for candidate in scope if candidate.success == "yes")
    low, high = rule.pass_rate
    return {problem for problem, n in known.items() if not low <= solved[problem] / n <= high}


def _decide_alone(candidate: Candidate, rule: Rule, requirement: _Requirement, outside: set[str]) -> Decision:
    """Return the decision that does not depend on which of the others are kept."""
    if candidate.status == "errored":
        return "errored"
    if not candidate.graded:
        return "ungraded"
    if candidate.status == "truncated":
        return "truncated"
    if candidate.success in requirement.failed:
        return "failed"
    if candidate.problem_id in outside:
        return "pass_rate"
    if rule.min_reward is not None and candidate.rounded < round(rule.min_reward, 9):
        return "below_min_reward"
    return "below_cutoff" if candidate.rounded < requirement.cutoff else "kept"


def _duplicates(left: list[Candidate]) -> dict[str, Decision]:
    first: dict[tuple[str, str], str] = {}
    for candidate in sorted(left, key=lambda c: (-c.rounded, c.round, c.id)):
        first.setdefault((candidate.problem_id, candidate.digest), candidate.id)
    return {c.id: "duplicate" for c in left if first[c.problem_id, c.digest] != c.id}


def _over_max_per_problem(left: list[Candidate], rule: Rule) -> dict[str, Decision]:
    decisions: dict[str, Decision] = {}
    taken: Counter[str] = Counter()
    most, shortest = rule.most_per_problem, rule.select == "shortest"
    if most is None:
        return decisions
    for candidate in sorted(left, key=lambda c: (c.length * shortest, -c.rounded, _random_rank(rule, "cap", c))):
        if taken[candidate.problem_id] == most:
            decisions[candidate.id] = "max_per_problem"
        else:
            taken[candidate.problem_id] += 1
    return decisions


def _control(scope: list[Candidate], rule: Rule, filtered: Mapping[str, Decision]) -> dict[str, Decision]:
    """Return random decisions instead: they keep as many trajectories of each problem as the filter does.

    The draws depend on neither reward nor success; only their number does. There are always enough candidates, because
    every trajectory that the filter keeps passes the other rules too. One that passes them and is not drawn is a
    `tie_break`: without an outcome all are tied.
    """
    quota = Counter(candidate.problem_id for candidate in _kept(scope, filtered))
    blind = [replace(candidate, reward=0.0, success="unknown", length=0) for candidate in scope]
    decisions = _filter(blind, replace(rule, min_reward=None, ties="include"), _Requirement(0.0, ()))
    for candidate in sorted(_kept(blind, decisions), key=lambda c: _random_rank(rule, "control", c)):
        quota[candidate.problem_id] -= 1
        if quota[candidate.problem_id] < 0:
            decisions[candidate.id] = "tie_break"
    return decisions


def _random_rank(rule: Rule, purpose: Literal["ties", "cap", "control"], candidate: Candidate) -> str:
    """Return a trajectory's random rank; the smallest wins. Each purpose has ranks of its own.

    With one rank for all, problems with many successes would be favored, and the control would repeat the filter's
    choice. The format never changes, or an old run could not be repeated.
    """
    return sha256(f"{rule.seed}\x1f{rule.round}\x1f{purpose}\x1f{candidate.id}".encode()).hexdigest()


def _kept(scope: list[Candidate], decisions: Mapping[str, Decision]) -> list[Candidate]:
    return [candidate for candidate in scope if decisions[candidate.id] == "kept"]


_CAUSES: Mapping[Reason, str] = {
    "errored": "the environment failed",
    "ungraded": "no reward function could grade them",
    "truncated": "they were truncated; raise max_completion_length",
    "failed": "they are not known to have succeeded",
    "pass_rate": "their problems are solved too rarely or too often for pass_rate",
    "below_min_reward": "their rewards are below min_reward",
    "below_cutoff": "they are below the cutoff, and other rules reject those that reach it",
    "tie_break": "ties: sample keeps round((1 - keep_quantile) x graded), which is 0 for so few",
}


def _diagnosis(decisions: Mapping[str, Decision]) -> str:
    """Say why nothing is kept, with the most common reason in words."""
    if not decisions:
        return "The filter kept nothing: there is no trajectory to select from."
    counts = Counter(decisions.values())
    listed = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    main = "tie_break" if counts["tie_break"] else max(REASONS, key=counts.__getitem__)
    total = f"{len(decisions)} {'trajectory' if len(decisions) == 1 else 'trajectories'}"
    return f"The filter kept none of {total} ({listed}): {_CAUSES[main]}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_ABS_REWARD  # NaN is not


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require_value_of_key(name: str, value: Any) -> None:
    """Check a value by the recipe's key of that name. A recipe's numbers may be text, those of a rule may not."""
    key = KEYS[name]
    try:
        converted = convert(value, key)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    given = list(value) if isinstance(value, tuple) else value
    _require(converted == given, f"{name}: wants {wanted(key)}, not {show(value)}")


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}")


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
