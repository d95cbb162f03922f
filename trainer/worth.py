"""Is it worth retraining yet? From the runs so far and the preferences there are now: the expected gain. Pure.

    judged runs + preferences of now → expect → Worth(gain, low, high, needed, sentence)

A version that learned from n preferences has the strength s(n) = A (1 − (1 + n/k)^−α), in log-odds of beating the base
on a held-out pair: a power law, the shape that learning curves have been seen to take (Hestness et al., 2017,
arXiv:1712.00409) and that has served to foretell them from a few points (Figueroa et al., 2012,
doi:10.1186/1472-6947-12-8). Two runs on the same preferences differ all the same, by a normal with scale τ, so that a
champion that was promoted for being good is expected to have been lucky too. A run's wins and losses against the
champion of its time measure the difference of two strengths.

A, k, α and τ have priors (wide; `PRIORS`) and are fitted to the runs with scipy: the most probable values, a Laplace
approximation there, and importance weights on draws from it, so that few runs give wide intervals and none give the
prior's. Where raters agree less, a preference counts for less: with a share p of equal votes between two people, about
|2p − 1| of a preference without noise (Natarajan et al., 2013: what can be learned from labels turned round with
probability ε goes with (1 − 2ε)²; p = 1 − 2ε(1 − ε) gives 2p − 1 = (1 − 2ε)²).

An estimate, no promise: it knows how many preferences there are and not what is in them, and takes the next run to be
like those before it. The interval is that of the win rate itself; 40 held-out pairs measure it to ±15 points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PRIORS = {"A": (0.6, 1.1), "k": (300.0, 1.2), "alpha": (0.5, 0.5), "tau": (0.2, 0.6)}
"""Median and standard deviation of the logarithm, of each parameter of the curve."""
DRAWS = 2000
NEWEST_RUNS = 40  # older ones tell little of the champion of now, and cost
INTERVAL = 0.8
WORTH_POINTS, WORTH_PROBABILITY = 2.0, 2 / 3  # it is worth it: expect this much, and be this sure of any gain
TARGET_POINTS, LIKELY = 5.0, 0.5  # "so many more would make +5 likely": more likely than not
FARTHEST = 100_000
LEAST_QUALITY = 0.1


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A version, how many preferences it learned from, and how it did against the champion of its time."""

    version: str
    preferences: int
    champion: str
    wins: int
    losses: int


@dataclass(frozen=True, slots=True)
class Worth:
    """What to expect of a run now, in points of held-out win rate above 50% against the champion.

    `low` and `high` bound it with 80% probability; `chance` is that of any gain at all. `needed` is how many more
    preferences would make a gain of 5 points more likely than not: 0 where it is, None where no number would.
    `judged` runs are behind it: with none it is the prior alone.
    """

    gain: float
    low: float
    high: float
    chance: float
    worth_it: bool
    needed: int | None
    new: int
    judged: int

    @property
    def sentence(self) -> str:
        """All of it in words."""
        new = f"{self.new:,} new preference{'' if self.new == 1 else 's'} from picks since the last retrain"
        point = "point" if abs(round(self.gain)) == 1 else "points"
        expected = f"expect {_points(self.gain)} {point} ({_points(self.low)} to {_points(self.high)})"
        if self.needed == 0:
            more = "+5 or more is likely"
        elif self.needed is None:
            more = "more of the same would not make +5 likely"
        else:
            more = f"about {self.needed:,} more would make +5 likely"
        ground = f"Estimated from {self.judged} judged run{'' if self.judged == 1 else 's'}."
        if not self.judged:
            ground = "No run has been judged yet: a guess from learning curves of other models."
        decision = "worth it" if self.worth_it else "not yet"
        return f"{new}: {expected} of held-out win rate: {decision}; {more}. {ground}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {**asdict(self), "sentence": self.sentence}


def quality(percent_agreement: float | None) -> float:
    """What a preference counts for, from 0.1 to 1, given the percentage of equal votes; 1 where it is not known."""
    return 1.0 if percent_agreement is None else max(LEAST_QUALITY, 2 * percent_agreement / 100 - 1)


def expect(
    runs: Sequence[JudgedRun],
    champion: str,
    preferences: int,
    new: int,
    *,
    percent_agreement: float | None = None,
    seed: int = 0,
) -> Worth:
    """What a run on `preferences` would gain over `champion`; `new` of them came since the last run.

    `runs` are the judged ones, oldest first. A champion that is no run's version is taken for the base. Raises
    ValueError for negative counts.
    """
    if preferences < 0 or new < 0:
        raise ValueError(f"expect({preferences=}, {new=}): both must be 0 or more")
    counts_for = quality(percent_agreement)
    judged = [run for run in runs if run.wins + run.losses > 0][-NEWEST_RUNS:]
    curve = _fit(judged, champion, counts_for, seed)
    gain, low, high, chance = curve.gain(preferences)
    worth_it = gain >= WORTH_POINTS and chance >= WORTH_PROBABILITY and preferences > 0
    return Worth(
        gain=round(gain, 1),
        low=round(low, 1),
        high=round(high, 1),
        chance=round(chance, 3),
        worth_it=worth_it,
        needed=_needed(curve, preferences),
        new=new,
        judged=len(judged),
    )


@dataclass(frozen=True, slots=True)
class _Curve:
    """Weighted draws of the curve's parameters and of the champion's strength."""

    parameters: Array  # A, k, alpha, tau
    champion: Array
    noise: Array  # standard normal: how lucky the next run is
    weights: Array
    counts_for: float

    def gains(self, preferences: int) -> Array:
        """Points of win rate above 50% for each draw."""
        a, k, alpha, tau = self.parameters.T
        strength = _strength(a, k, alpha, preferences * self.counts_for) + tau * self.noise
        points: Array = 100 * (_win_rate(strength - self.champion) - 0.5)
        return points

    def gain(self, preferences: int) -> tuple[float, float, float, float]:
        """Median, both bounds, and the chance of any gain."""
        gains = self.gains(preferences)
        outside = (1 - INTERVAL) / 2
        order = np.argsort(gains)
        quantiles = np.interp([outside, 0.5, 1 - outside], np.cumsum(self.weights[order]), gains[order])
        low, median, high = (float(one) for one in quantiles)
        return median, low, high, float((gains > 0) @ self.weights)

    def is_likely(self, preferences: int) -> bool:
        """Whether the gain that is aimed at is likely."""
        return bool((self.gains(preferences) >= TARGET_POINTS) @ self.weights >= LIKELY)


@dataclass(frozen=True, slots=True)
class _Evidence:
    """The judged runs as arrays: versions (columns) and comparisons (rows)."""

    counts: Array  # preferences each version learned from
    is_run: Array  # 0 for the base, which has no luck
    design: Array  # +1 for the candidate of a comparison, -1 for its champion
    measured: Array  # log-odds of a win
    error: Array  # variance that counting few pairs gives them

    def unexplained(self, parameters: Array) -> tuple[Array, Array]:
        """For each row of `parameters`: what the curve leaves of `measured`, and its covariance."""
        a, k, alpha, tau = parameters.T[:, :, None]
        residual = self.measured - _strength(a, k, alpha, self.counts) @ self.design.T
        luck = (self.design * self.is_run) @ self.design.T
        return residual, np.diag(self.error) + tau[:, :, None] ** 2 * luck

    def log_likelihood(self, parameters: Array) -> Array:
        """Of each row of `parameters`, up to a constant."""
        residual, spread = self.unexplained(parameters)
        explained = np.linalg.solve(spread, residual[:, :, None])[:, :, 0]
        found: Array = -0.5 * (np.linalg.slogdet(spread)[1] + np.sum(residual * explained, axis=1))
        return found

    def strength(self, where: int, parameters: Array, luck: Array) -> Array:
        """A draw of a version's strength for each row: its place on the curve, and what comparisons tell of its luck.

        `luck` is standard normal, one a row.
        """
        a, k, alpha, tau = parameters.T
        strength = _strength(a, k, alpha, self.counts[where])
        if not self.is_run[where]:
            return strength
        residual, spread = self.unexplained(parameters)
        shared = tau[:, None] ** 2 * self.design[:, where]
        weights = np.linalg.solve(spread, shared[:, :, None])[:, :, 0]
        variance = np.clip(tau**2 - np.sum(shared * weights, axis=1), 0, None)
        found: Array = strength + np.sum(weights * residual, axis=1) + np.sqrt(variance) * luck
        return found


def _evidence(runs: Sequence[JudgedRun], names: Sequence[str], counts_for: float) -> _Evidence:
    learned = {run.version: run.preferences * counts_for for run in runs}
    design = np.zeros((len(runs), len(names)))
    for row, run in enumerate(runs):
        design[row, names.index(run.version)] += 1
        design[row, names.index(run.champion)] -= 1
    wins, losses = (np.array([getattr(run, key) for run in runs], dtype=np.float64) + 0.5 for key in ("wins", "losses"))
    return _Evidence(
        counts=np.array([learned.get(name, 0.0) for name in names]),
        is_run=np.array([name in learned for name in names], dtype=np.float64),
        design=design,
        measured=np.log(wins / losses),
        error=1 / wins + 1 / losses,
    )


def _fit(runs: Sequence[JudgedRun], champion: str, counts_for: float, seed: int) -> _Curve:
    from scipy.optimize import minimize
    from scipy.stats import multivariate_t, norm

    names = list(dict.fromkeys([*(run.version for run in runs), *(run.champion for run in runs), champion]))
    evidence = _evidence(runs, names, counts_for)
    centre = np.array([math.log(median) for median, _ in PRIORS.values()])
    scale = np.array([deviation for _, deviation in PRIORS.values()])

    def log_posterior(logs: Array) -> Array:
        prior: Array = -0.5 * np.sum(((logs - centre) / scale) ** 2, axis=1)
        return prior + evidence.log_likelihood(np.exp(logs))

    best = minimize(lambda logs: -log_posterior(logs[None])[0], centre, method="BFGS")
    random = np.random.default_rng(seed)
    proposal = multivariate_t(best.x, _covariance(best.hess_inv, scale), df=5, seed=random)
    draws = proposal.rvs(DRAWS)
    log_weights = log_posterior(draws) - proposal.logpdf(draws)
    weights = np.exp(log_weights - log_weights.max())
    luck = norm.rvs(size=(2, DRAWS), random_state=random)
    parameters = np.exp(draws)
    served = evidence.strength(names.index(champion), parameters, luck[0])
    return _Curve(parameters, served, luck[1], weights / weights.sum(), counts_for)


def _covariance(approximation: Array, scale: Array) -> Array:
    """BFGS's inverse Hessian where it is a covariance, no wider than the prior; else the prior's."""
    symmetric = (approximation + approximation.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    if not np.isfinite(values).all() or values.min() <= 0:
        return np.diag(scale**2)
    covariance: Array = (vectors * np.clip(values, 0.01, float(scale.max()) ** 2)) @ vectors.T
    return covariance


def _strength(a: Array, k: Array, alpha: Array, preferences: Any) -> Array:
    strength: Array = a * (1 - (1 + preferences / k) ** -alpha)
    return strength


def _win_rate(strength: Array) -> Array:
    rate: Array = 1 / (1 + np.exp(-strength))
    return rate


def _needed(curve: _Curve, preferences: int) -> int | None:
    """How many more make the aim likely, to two digits; 0 where none, None where not even very many do."""
    if curve.is_likely(preferences):
        return 0
    low, high = 0, 10
    while not curve.is_likely(preferences + high):
        low, high = high, 2 * high
        if high > FARTHEST:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if curve.is_likely(preferences + middle) else (middle, high)
    digit: int = 10 ** max(0, len(str(high)) - 2)
    return math.ceil(high / digit) * digit


def _points(points: float) -> str:
    rounded = round(points)
    return f"+{rounded}" if rounded > 0 else f"−{-rounded}" if rounded < 0 else "0"
