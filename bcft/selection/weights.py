"""What a kept row weighs in the loss, as pure functions over the records that the filter reads.

The loss of a step is the sum of weight x negative log-likelihood over its rows. Left out: the choice of the rows, which
is the filter's.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from math import exp, fsum

import numpy as np

from bcft.config.schema import RuleSettings
from bcft.data.weights import to_mean_1
from bcft.selection.filter import Candidate, Decision, Reason

_NOT_RIGHT: tuple[Reason, ...] = ("errored", "ungraded", "truncated", "failed")


def weigh(
    candidates: Iterable[Candidate],
    decisions: Mapping[str, Decision],
    rule: RuleSettings,
    *,
    empty: Collection[str] = (),
) -> dict[str, float]:
    """Return the weight of each kept trajectory, by id, before `of_rows`. The order of the candidates does not matter.

    maxrl: of N attempts at a problem K are right, and each of these weighs 1/K. With all of them kept and one step on
    the policy that made them, the sum of weight x score over a problem's attempts has as its expectation the gradient
    of the likelihood of being right, truncated at order N: sum over k = 1 ... N of (1 - p)^(k - 1) grad p, where p is
    the chance to be right (Tajwar et al. 2026, https://arxiv.org/abs/2602.02710). K counts before duplicates
    are merged and before `max_per_problem`. A truncated attempt is never trained, so it does not count as right.

    reward: exp(reward / weight_temperature), the weights of reward-weighted regression (Peters and Schaal 2007; Peng et
    al. 2019, https://arxiv.org/abs/1910.00177), up to a factor.

    With both, the duplicates of a kept trajectory add their weights to it. none: 1, whatever repeats it. empty: kept
    trajectories that make no row, which get no weight.
    """
    scope = list(candidates)
    rows = {(c.problem_id, c.digest): c.id for c in scope if decisions[c.id] == "kept" and c.id not in empty}
    if rule.row_weight == "none":
        return dict.fromkeys(rows.values(), 1.0)
    same: dict[str, list[Candidate]] = {identity: [] for identity in rows.values()}
    for candidate in scope:
        key = candidate.problem_id, candidate.digest
        if key in rows and decisions[candidate.id] in ("kept", "duplicate"):
            same[rows[key]].append(candidate)
    if rule.row_weight == "maxrl":
        right = Counter(c.problem_id for c in scope if decisions[c.id] not in _NOT_RIGHT)
        return {identity: len(group) / right[group[0].problem_id] for identity, group in same.items()}
    highest = max((c.rounded for group in same.values() for c in group), default=0.0)  # exp of 1000 is too large
    return {
        identity: fsum(exp((c.rounded - highest) / rule.weight_temperature) for c in group)
        for identity, group in same.items()
    }


def of_rows(weights: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """Return what each row of a trajectory weighs, 1 in the mean over all rows; rows: how many each trajectory makes.

    A trajectory is left out that weighs 0, because its weight is too small for a float beside the others: such rows are
    not trained, and so they are not in the mean.
    """
    given = {identity: weight for identity, weight in weights.items() if weight}
    if not given:
        return {}
    values, counts = np.array([*given.values()]), np.array([rows[identity] for identity in given])
    return dict(zip(given, to_mean_1(values, counts).tolist(), strict=True))
