"""The filter of filtered behaviour cloning, as one pure function: which trajectories are trained on, and why not.

`select` gives every trajectory the first of `REASONS` that applies, or keeps it. It reads no file, clock or global
generator, and the order of its input does not matter. Left out: which rounds are in scope (the caller passes them),
what an empty round leads to (the caller reads `kept` and `note`), and rewards that are NaN: `Candidate` refuses them.

With 0/1 rewards and few successes the cutoff is 0 and rejects nothing. Where success is known that does no harm, since
only successes are kept (`require_success: auto`). *Where it is unknown* means: of at least one graded trajectory that
is done, because an environment that reports only its wins leaves every loss unknown. There the cutoff is raised above
the lowest reward; and rewards that are all equal tell nothing, so that only known successes pass, and without any the
round stays empty. `keep_quantile: 0` asks for no cutoff, `require_success: false` for the origin's rule: neither is
corrected, and the note tells of the second.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from bcft.types import Success

Status: TypeAlias = Literal["done", "truncated", "errored"]
Reason: TypeAlias = Literal[
    "errored",
    "ungraded",
    "truncated",
    "failed",
    "outside_band",
    "below_floor",
    "below_cutoff",
    "duplicate",
    "over_cap",
    "tie_lost",
]
Fate: TypeAlias = Reason | Literal["kept"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""In the order in which they are tried. `failed`: success was required, and the trajectory is not known to have it."""
LARGEST = 1e100  # the difference of two rewards must not overflow, or no cutoff between them would be a number


@dataclass(frozen=True, slots=True)
class Candidate:
    """One trajectory, reduced to what decides its fate. Raises ValueError for a value that cannot be ranked."""

    id: str
    problem_id: str
    reward: float
    """0.0 when not graded."""
    graded: bool
    """Whether any reward function judged it; an errored trajectory never is."""
    success: Success
    status: Status
    """`truncated`: cut by the token limit or a full context. A reached turn limit is `done`, with a low reward."""
    digest: str
    """A hash of its actions: two of one problem with the same digest are duplicates."""
    round: int = 0
    """The round that played it."""

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("problem_id", self.problem_id), ("digest", self.digest)):
            _require(isinstance(value, str) and value, f"{name} must be text, not {value!r}")
        about = f"trajectory {self.id}: "
        _require(_is_number(self.reward), f"{about}reward must be a finite number, not {self.reward!r}")
        _require(isinstance(self.graded, bool), f"{about}graded must be true or false, not {self.graded!r}")
        _require_one_of(f"{about}success", self.success, get_args(Success))
        _require_one_of(f"{about}status", self.status, get_args(Status))
        _require(_is_whole(self.round), f"{about}round must be a whole number >= 0, not {self.round!r}")
        _require(not self.graded or self.status != "errored", f"{about}what errored cannot be graded")
        _require(self.graded or self.reward == 0, f"{about}what is ungraded has reward 0.0, not {self.reward!r}")

    @property
    def rounded(self) -> float:
        """The reward as it is compared: to 9 decimals, so that 0.1 + 0.2 ties with 0.3."""
        return round(self.reward, 9) + 0.0  # no -0.0


@dataclass(frozen=True, slots=True)
class Rule:
    """The filter's settings, named as in a recipe. Raises ValueError for one out of range."""

    keep_quantile: float = 0.9
    """In [0, 1]: the cutoff is this quantile of the graded rewards, so some 1 - keep_quantile of them are kept."""
    min_reward: float | None = None
    require_success: Literal["auto"] | bool = "auto"
    """auto: a known failure is never kept, unknown success may be; true: unknown is not kept either; false: ignored."""
    pass_rate: tuple[float, float] | None = None
    """Least and greatest share of a problem's attempts in scope that are known successes, of those where it is known:
    of problems outside nothing is kept. A problem without any known success or failure is inside."""
    max_per_problem: int | None = None
    ties: Literal["include", "sample"] = "include"
    """include keeps all at the cutoff; sample keeps round((1 - keep_quantile) x graded), equal rewards by lot."""
    control: Literal["none", "random"] = "none"
    """random draws, problem by problem, as many as the filter would keep, regardless of success, floor and cutoff.
    The number per problem leaks the outcome: where the filter keeps something, a random draw is right more often."""
    seed: int = 0
    round: int = 0
    """The round that selects: another round draws anew."""

    def __post_init__(self) -> None:
        quantile, floor, cap = self.keep_quantile, self.min_reward, self.max_per_problem
        success = self.require_success == "auto" or isinstance(self.require_success, bool)
        _require(_is_number(quantile) and 0 <= quantile <= 1, f"keep_quantile must be in [0, 1], not {quantile!r}")
        _require(floor is None or _is_number(floor), f"min_reward must be a finite number or null, not {floor!r}")
        _require(success, f"require_success must be auto, true or false, not {self.require_success!r}")
        _require(cap is None or _is_whole(cap, 1), f"max_per_problem must be a whole number >= 1 or null, not {cap!r}")
        band = self.pass_rate or (0.0, 1.0)
        ordered = len(band) == 2 and all(map(_is_number, band)) and 0 <= band[0] <= band[1] <= 1
        _require(ordered, f"pass_rate must be two numbers in [0, 1], the lower first, not {self.pass_rate!r}")
        _require_one_of("ties", self.ties, ("include", "sample"))
        _require_one_of("control", self.control, ("none", "random"))
        _require(_is_whole(self.seed), f"seed must be a whole number >= 0, not {self.seed!r}")
        _require(_is_whole(self.round), f"round must be a whole number >= 0, not {self.round!r}")
        _require(self.ties == "include" or quantile < 1, "ties: sample with keep_quantile: 1 would keep nothing")


@dataclass(frozen=True, slots=True)
class Selection:
    """What became of every candidate."""

    fates: Mapping[str, Fate]
    """Trajectory id -> fate, by round and id."""
    cutoff: float
    """The least reward that passes, 0.0 when nothing is graded; under `control` the one of the filter."""
    requested_fraction: float
    graded: int
    problems_covered: int
    """Of how many problems something is kept."""
    note: str
    """What a reader must know: the cutoff was raised or rejects nothing, or why nothing is kept. Mostly empty."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The ids to train on, by round and id."""
        return tuple(identity for identity, fate in self.fates.items() if fate == "kept")

    @property
    def kept_fraction(self) -> float:
        """Kept of graded, to be read beside `requested_fraction`; 0.0 when nothing is graded."""
        return len(self.kept) / max(1, self.graded)

    @property
    def rejected(self) -> dict[Reason, int]:
        """How many were rejected for each reason, zeros included; with the kept they add up to the candidates."""
        counts = Counter(self.fates.values())
        return {reason: counts[reason] for reason in REASONS}


def select(candidates: Iterable[Candidate], rule: Rule) -> Selection:
    """Give each candidate the first of `REASONS` that applies, or keep it.

    The cutoff is the `keep_quantile` of all graded rewards, those of truncated and duplicate trajectories included, and
    what reaches it passes, as in the code of ArCHer (Zhou et al. 2024, https://arxiv.org/abs/2402.19446). Of duplicates
    the one with the higher reward stays, then the earlier; over the cap are the lower rewards, equals by lot.

    Raises ValueError when an id stands twice.
    """
    scope = sorted(candidates, key=lambda one: (one.round, one.id))
    twice = [identity for identity, n in Counter(one.id for one in scope).items() if n > 1]
    _require(not twice, f"every trajectory must stand once in scope, but {', '.join(twice[:3])} stands twice")
    bar = _bar(scope, rule)
    fates = _filter(scope, rule, bar)
    note = bar.note if "kept" in fates.values() else f"{bar.note} {_diagnosis(fates)}".strip()
    if rule.control == "random":
        fates = _control(scope, rule, fates)
    return Selection(
        fates=fates,
        cutoff=bar.cutoff,
        requested_fraction=round(1 - rule.keep_quantile, 9),
        graded=sum(one.graded for one in scope),
        problems_covered=len({one.problem_id for one in _kept(scope, fates)}),
        note=note,
    )


@dataclass(frozen=True, slots=True)
class _Bar:
    """What a trajectory must reach; a success in `refuses` counts as failed."""

    cutoff: float
    refuses: tuple[Success, ...]
    note: str = ""


def _bar(scope: list[Candidate], rule: Rule) -> _Bar:
    """Return the quantile of the graded rewards, corrected where it would reject nothing and success is unknown."""
    rewards = [one.rounded for one in scope if one.graded]
    refuses: dict[str | bool, tuple[Success, ...]] = {"auto": ("no",), True: ("no", "unknown"), False: ()}
    cutoff = float(np.quantile(rewards, rule.keep_quantile, method="linear")) if rewards else 0.0
    bar = _Bar(cutoff, refuses[rule.require_success])
    lowest, *higher = sorted(set(rewards)) or [cutoff]
    if not rewards or cutoff > lowest or rule.keep_quantile == 0 or rule.require_success is True:
        return bar
    if rule.require_success is False:
        return replace(bar, note=f"The cutoff is the lowest reward, {lowest}, and rejects nothing.")
    unknown = sum(one.graded and one.status == "done" and one.success == "unknown" for one in scope)
    if not unknown:
        return bar
    of = f"success is unknown for {unknown} of {len(rewards)} graded trajectories"
    if not higher:
        told = f"All graded rewards are {lowest}, and {of}: nothing can tell these apart, and none is kept."
        return _Bar(lowest, ("no", "unknown"), told)
    return replace(bar, cutoff=higher[0], note=f"The cutoff was raised above the lowest reward, {lowest}: {of}.")


def _filter(scope: list[Candidate], rule: Rule, bar: _Bar) -> dict[str, Fate]:
    outside = _outside(scope, rule)
    fates = {one.id: _alone(one, rule, bar, outside) for one in scope}
    fates |= _repeated(_kept(scope, fates))
    fates |= _over_cap(_kept(scope, fates), rule)
    if rule.ties == "sample":
        ranked = sorted(_kept(scope, fates), key=lambda one: (-one.rounded, _lot(rule, "ties", one)))
        quota = round((1 - rule.keep_quantile) * sum(one.graded for one in scope))
        fates |= {one.id: "tie_lost" for one in ranked[quota:]}
    return fates


def _outside(scope: list[Candidate], rule: Rule) -> set[str]:
    """Return the problems that are solved too seldom or too often."""
    if rule.pass_rate is None:
        return set()
    known, solved = (
        Counter(one.problem_id for one in scope if one.success in which) for which in (("yes", "no"), ("yes",))
    )
    low, high = rule.pass_rate
    return {problem for problem, n in known.items() if not low <= solved[problem] / n <= high}


def _alone(one: Candidate, rule: Rule, bar: _Bar, outside: set[str]) -> Fate:
    """Return the fate that does not depend on which of the others are kept."""
    if one.status == "errored":
        return "errored"
    if not one.graded:
        return "ungraded"
    if one.status == "truncated":
        return "truncated"
    if one.success in bar.refuses:
        return "failed"
    if one.problem_id in outside:
        return "outside_band"
    if rule.min_reward is not None and one.rounded < round(rule.min_reward, 9):
        return "below_floor"
    return "below_cutoff" if one.rounded < bar.cutoff else "kept"


def _repeated(left: list[Candidate]) -> dict[str, Fate]:
    first: dict[tuple[str, str], str] = {}
    for one in sorted(left, key=lambda one: (-one.rounded, one.round, one.id)):
        first.setdefault((one.problem_id, one.digest), one.id)
    return {one.id: "duplicate" for one in left if first[one.problem_id, one.digest] != one.id}


def _over_cap(left: list[Candidate], rule: Rule) -> dict[str, Fate]:
    fates: dict[str, Fate] = {}
    taken: Counter[str] = Counter()
    for one in sorted(left, key=lambda one: (-one.rounded, _lot(rule, "cap", one))):
        if taken[one.problem_id] == rule.max_per_problem:
            fates[one.id] = "over_cap"
        else:
            taken[one.problem_id] += 1
    return fates


def _control(scope: list[Candidate], rule: Rule, filtered: Mapping[str, Fate]) -> dict[str, Fate]:
    """Return other fates, by lot: per problem as many kept as the filter kept there.

    The lots see neither reward nor success. As many can always be found, because what the filter kept passes the other
    rules too. Who passes them and is not drawn is `tie_lost`: without an outcome all are tied.
    """
    quota = Counter(one.problem_id for one in _kept(scope, filtered))
    blind = [replace(one, reward=0.0, success="unknown") for one in scope]
    fates = _filter(blind, replace(rule, min_reward=None, ties="include"), _Bar(0.0, ()))
    for one in sorted(_kept(blind, fates), key=lambda one: _lot(rule, "control", one)):
        quota[one.problem_id] -= 1
        if quota[one.problem_id] < 0:
            fates[one.id] = "tie_lost"
    return fates


def _lot(rule: Rule, purpose: str, one: Candidate) -> str:
    """Return what a trajectory drew; the smallest wins. Each purpose is a draw of its own.

    One for all would favour problems with many successes, and the control would find the filter's choice again.
    """
    return sha256(f"{rule.seed}\x1f{rule.round}\x1f{purpose}\x1f{one.id}".encode()).hexdigest()


def _kept(scope: list[Candidate], fates: Mapping[str, Fate]) -> list[Candidate]:
    return [one for one in scope if fates[one.id] == "kept"]


_CAUSES: Mapping[Reason, str] = {
    "errored": "the environment or the judge broke",
    "ungraded": "no reward function could judge them",
    "truncated": "they were cut off; see max_completion_length",
    "failed": "they are not known to have succeeded",
    "outside_band": "their problems are solved too seldom or too often for pass_rate",
    "below_floor": "their rewards are below min_reward",
    "below_cutoff": "they are below the cutoff, and what reached it fell to other rules",
    "tie_lost": "ties: sample keeps round((1 - keep_quantile) x graded), which is 0 of so few",
}


def _diagnosis(fates: Mapping[str, Fate]) -> str:
    """Say why nothing is kept, with the commonest reason in words."""
    if not fates:
        return "Nothing was kept: there was no trajectory to select from."
    counts = Counter(fates.values())
    listed = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason])
    main = "tie_lost" if counts["tie_lost"] else max(REASONS, key=counts.__getitem__)
    return f"Nothing was kept of {len(fates)} trajectories ({listed}): {_CAUSES[main]}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST  # NaN is not


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _require_one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, not {value!r}")


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
