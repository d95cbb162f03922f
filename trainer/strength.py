"""Is it getting better? The strength of every version from all blind picks, with intervals. Pure.

    picks counted by (version shown first, version shown second) → fit → Fit → as_body, sentence

**The model** is Bradley and Terry's (1952) with Davidson's ties (1970) and an order effect (Davidson and Beaver, 1977).
With β the log strengths of the versions shown first and second, γ the pull of the first place, ν the tendency to tie:

    P(first) ∝ exp(β₁ + γ/2)      P(second) ∝ exp(β₂ - γ/2)      P(tie) ∝ exp((β₁ + β₂)/2 + ν)

It is a multinomial logit with a concave likelihood, maximised by SciPy; pairs of one version with itself tell γ and ν.
A normal prior of standard deviation `PRIOR_SD` on each parameter keeps a version that never lost from being infinitely
strong (with a hundred votes it moves a win rate by less than one point). Intervals are 95%, from the Hessian at the
maximum. What people read is the chance that a decided pick is for the version and against the reference, in fair order.

Versions that no chain of picks connects with the reference have no strength that could be compared, and get none.
(`choix` 0.4.1, the Python package for Bradley–Terry, has neither ties nor an order effect.)

Not covered: raters with different tastes, the same rater many times (the intervals take every pick as one more person),
versions whose quality depends on the topic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, logsumexp

PRIOR_SD = 2.0
Z_95 = 1.959963984540054
_FIRST, _TIE, _SECOND = range(3)

Floats = npt.NDArray[np.float64]


class Counted(Protocol):
    """How often pairs of two versions were judged, in shown order; `feedback_store.records.Comparisons` fits it."""

    @property
    def first_version(self) -> str: ...
    @property
    def second_version(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def ties(self) -> int: ...
    @property
    def second(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Strength:
    """A version's log strength above the reference, and its win rate against it; None where they cannot be compared.

    `votes`: picks of pairs with another version. `interval`: 95%, of the win rate.
    """

    version: str
    votes: int
    log_strength: float | None
    win_rate: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Fit:
    """All strengths, and what else moves a pick.

    `first_share`: how often the answer shown first wins a decided pick between equals, with its 95% interval.
    `tie_share`: how often equals tie.
    """

    reference: str
    strengths: tuple[Strength, ...]
    first_share: float
    first_interval: tuple[float, float]
    tie_share: float
    votes: int

    def of(self, version: str) -> Strength | None:
        """A version's strength, None where nobody judged it."""
        return next((one for one in self.strengths if one.version == version), None)


def fit(counts: Sequence[Counted], reference: str, versions: Sequence[str] = ()) -> Fit:
    """The strengths of `versions` and of all that were judged, against `reference`, in the order of `versions`."""
    judged = dict.fromkeys((reference, *versions, *(name for one in counts for name in _pair(one))))
    names = list(judged)
    comparable = _connected(counts, names, reference)
    free = [name for name in names if name in comparable and name != reference]
    designs, observed = _design(counts, comparable, free)
    estimate, covariance = _maximum(designs, observed, len(free) + 2)
    order, tie = estimate[-2], estimate[-1]
    spread = Z_95 * float(np.sqrt(covariance[-2, -2]))
    strengths = []
    for name in names:
        votes = sum(_total(one) for one in counts if name in _pair(one) and one.first_version != one.second_version)
        if name == reference:
            strengths.append(Strength(name, votes, 0.0, 0.5, (0.5, 0.5)))
        elif name in free:
            index = free.index(name)
            at, margin = float(estimate[index]), Z_95 * float(np.sqrt(covariance[index, index]))
            interval = (float(expit(at - margin)), float(expit(at + margin)))
            strengths.append(Strength(name, votes, at, float(expit(at)), interval))
        else:
            strengths.append(Strength(name, votes, None, None, None))
    shares = np.exp(np.array([0.0, tie, 0.0]))
    return Fit(
        reference=reference,
        strengths=tuple(strengths),
        first_share=float(expit(order)),
        first_interval=(float(expit(order - spread)), float(expit(order + spread))),
        tie_share=float(shares[_TIE] / shares.sum()),
        votes=sum(map(_total, counts)),
    )


def sentence(found: Fit, champion: str) -> str:
    """Is it getting better? In words with numbers, for the champion of now against the reference."""
    reference, strength = found.reference, found.of(champion)
    if champion == reference:
        return f"{champion} is the first champion: there is nothing before it to be better than."
    if strength is None or not strength.votes:
        return f"Not known: nobody has picked between {champion} and another version. A live trial would tell."
    if strength.win_rate is None or strength.interval is None:
        return (
            f"{champion} and {reference} cannot be compared: no pick leads from one to the other, not even by way of "
            "other versions. A live trial would tell."
        )
    low, high = strength.interval
    rate = f"{strength.win_rate:.0%} of decided picks against {reference} (95% interval {low:.0%}–{high:.0%})"
    if low > 0.5:
        return f"Yes: {champion}, the champion, wins {rate}."
    if high < 0.5:
        return f"No: {champion}, the champion, is worse than {reference}: it wins {rate}. Consider a rollback."
    return f"Not shown yet: {champion}, the champion, wins {rate}, which includes 50%."


def as_body(
    found: Fit, champion: str, promotions: Mapping[str, Sequence[str]], made: Mapping[str, str | None]
) -> dict[str, Any]:
    """The body of GET /v1/strength. `promotions`: version → the times it became champion; `made`: when it was made."""
    return {
        "sentence": sentence(found, champion),
        "champion": champion,
        "reference": found.reference,
        "votes": found.votes,
        "first_share": found.first_share,
        "first_interval": list(found.first_interval),
        "tie_share": found.tie_share,
        "versions": [
            {
                "version": one.version,
                "votes": one.votes,
                "win_rate": one.win_rate,
                "interval": None if one.interval is None else list(one.interval),
                "log_strength": one.log_strength,
                "note": _note(one, found.reference),
                "made_at": made.get(one.version),
                "promoted_at": list(promotions.get(one.version, ())),
            }
            for one in found.strengths
        ],
    }


def _note(one: Strength, reference: str) -> str:
    if not one.votes:
        return "cannot be compared: nobody has picked between it and another version"
    return "" if one.win_rate is not None else f"cannot be compared: no chain of picks leads to {reference}"


def _pair(one: Counted) -> tuple[str, str]:
    return one.first_version, one.second_version


def _total(one: Counted) -> int:
    return one.first + one.ties + one.second


def _connected(counts: Sequence[Counted], names: Sequence[str], reference: str) -> set[str]:
    """The versions that a chain of picks connects with the reference."""
    place = {name: index for index, name in enumerate(names)}
    edges = np.array([[place[name] for name in _pair(one)] for one in counts if _total(one)], dtype=np.intp)
    edges = edges.reshape(-1, 2)
    graph = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(names), len(names)))
    labels = connected_components(graph, directed=False)[1]
    return {name for name in names if labels[place[name]] == labels[place[reference]]}


def _design(counts: Sequence[Counted], comparable: set[str], free: Sequence[str]) -> tuple[Floats, Floats]:
    """Features (cells, 3 outcomes, parameters) and how often each outcome was seen (cells, 3).

    Pairs of one version with itself, whichever it is, count for the order effect and the ties.
    """
    kept = [one for one in counts if one.first_version == one.second_version or one.first_version in comparable]
    features = np.zeros((len(kept), 3, len(free) + 2))
    place = {name: index for index, name in enumerate(free)}
    for cell, one in zip(features, kept, strict=True):
        for name, outcome in ((one.first_version, _FIRST), (one.second_version, _SECOND)):
            if name in place:
                cell[outcome, place[name]] += 1
                cell[_TIE, place[name]] += 0.5
    features[:, _FIRST, -2], features[:, _SECOND, -2], features[:, _TIE, -1] = 0.5, -0.5, 1
    return features, np.array([[one.first, one.ties, one.second] for one in kept], dtype=np.float64).reshape(-1, 3)


def _maximum(features: Floats, observed: Floats, parameters: int) -> tuple[Floats, Floats]:
    """The most likely parameters and their covariance."""
    totals = observed.sum(axis=1)

    def shares(at: Floats) -> Floats:
        utilities = features @ at
        result: Floats = np.exp(utilities - logsumexp(utilities, axis=1, keepdims=True))
        return result

    def loss(at: Floats) -> float:
        utilities = features @ at
        likelihood = (observed * (utilities - logsumexp(utilities, axis=1, keepdims=True))).sum()
        return float((at @ at) / (2 * PRIOR_SD**2) - likelihood)

    def slope(at: Floats) -> Floats:
        result: Floats = at / PRIOR_SD**2 - np.einsum("co,cop->p", observed - totals[:, None] * shares(at), features)
        return result

    def curvature(at: Floats) -> Floats:
        now = shares(at)
        mean = np.einsum("co,cop->cp", now, features)
        spread = np.einsum("c,co,cop,coq->pq", totals, now, features, features)
        result: Floats = spread - np.einsum("c,cp,cq->pq", totals, mean, mean) + np.eye(parameters) / PRIOR_SD**2
        return result

    found = minimize(loss, np.zeros(parameters), jac=slope, hess=curvature, method="trust-exact")
    estimate: Floats = found.x
    covariance: Floats = np.linalg.inv(curvature(estimate)).astype(np.float64)
    return estimate, covariance
