"""Is the challenger better? A test of a live trial's votes that may be looked at after every one of them. Pure.

    votes so far (wins, ties, losses of the challenger) → look → Look: interval, evidence, and whether the trial is over

**The bet.** Let p be the chance that a decided vote is for the challenger. Against "p ≤ m" we bet, at odds fair under
m, on a mixture of larger chances; the capital after the votes so far is an e-process: under the hypothesis its
expectation never exceeds the 1 it began with, so the chance that it *ever* reaches 1/alpha is at most alpha (Ville,
1939). That is why one may look after every vote and stop when one likes (Howard et al., "Time-uniform, nonparametric,
nonasymptotic confidence sequences", 2021; Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", 2024; Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", 2023; betting on a mixture:
Robbins, 1970). The same bet against every m gives a confidence sequence: bounds that hold at all
times at once. All three endings read off it:

    better   the lower bound is above 50%         worse   the upper bound is below 50%
    futile   the upper bound is below `worth`, the smallest improvement worth having, and the share of wins is not as
             far below 50%: a challenger that looks worse is looked at until that is known

Each bound fails with a chance of at most `alpha` over the whole trial, however long it is and whenever it is looked at:
so an equal or a worse challenger is called better in at most `alpha` of trials, and the two bounds together are an
interval of level 1 - 2 alpha.

**Ties** (and "both bad") say nothing about the direction, multiply the capital by 1 and are left out of p, as in the
sign test; they count towards `max_votes`.

**What is assumed**: whatever came before, the next decided vote is for an equal challenger with chance 1/2. So one pair
gives one vote: a second rater of the same pair, or a changed mind after the versions were revealed, would be betting on
a known outcome. The caller sees to that.

**What is known besides the vote.** The mixture may be any that is fixed before the first vote. `bets` leans half of it
towards the win rate of the held-out evaluation (the model's margins): right, it saves votes; wrong, it costs at most
what half the capital is worth; the error stays the same. Letting the size of a bet depend on the prompt, the answers'
length or their margin is not done: the promise "no better on average" says nothing about p given those, and a
challenger that wins where bets are large and loses where they are small would be promoted (`docs/benchmarks/gate.md`
shows it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import logsumexp

OUTCOMES = ("better", "worse", "futile", "max_votes")
EDGES = np.linspace(0.06, 0.20, 15)
"""How far above 1/2 the chances lie that are bet on: 56% to 70%."""
EVEN = (1 / len(EDGES),) * len(EDGES)
LARGEST_LOG = 700.0  # of what a float can hold
_EPSILON = 1e-9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rules:
    """What ends a trial; fixed before its first vote.

    `alpha`: chance of a wrong "better", and of a wrong "worse". `worth`: a challenger that wins less than this is not
    worth going on for. `max_votes`: counts ties. `weights`: of `EDGES`, how much is bet on each (see `bets`).
    """

    alpha: float = 0.05
    worth: float = 0.55
    max_votes: int = 1000
    weights: Sequence[float] = field(default=EVEN)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha is {self.alpha}, it must be between 0 and 0.5")
        if not 0.5 < self.worth < 1:
            raise ValueError(f"worth is {self.worth}, it must be between 0.5 and 1")
        if self.max_votes < 1:
            raise ValueError(f"max_votes is {self.max_votes}, it must be 1 or more")
        if len(self.weights) != len(EDGES) or min(self.weights) < 0 or abs(sum(self.weights) - 1) > _EPSILON:
            raise ValueError(f"weights must be {len(EDGES)} shares that add up to 1")


@dataclass(frozen=True, slots=True)
class Look:
    """What the votes so far say. `outcome` is None while the trial goes on, else one of `OUTCOMES`.

    `interval`: the two bounds on the challenger's share of decided votes. `e_better`, `e_worse`: the capital of the two
    bets against 1/2; 1/alpha decides.
    """

    wins: int
    ties: int
    losses: int
    interval: tuple[float, float]
    e_better: float
    e_worse: float
    outcome: str | None

    @property
    def votes(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def win_rate(self) -> float | None:
        """The share of decided votes for the challenger; None before the first."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else None


def look(wins: int, ties: int, losses: int, rules: Rules | None = None) -> Look:
    """Judge the votes so far. Raises ValueError for a number below 0."""
    rules = rules or Rules()
    if min(wins, ties, losses) < 0:
        raise ValueError(f"wins, ties, losses are {wins}, {ties}, {losses}; none can be below 0")
    low = lower_bound(wins, losses, rules.alpha, rules.weights)
    high = 1 - lower_bound(losses, wins, rules.alpha)
    share = wins / max(1, wins + losses)
    is_futile = high < rules.worth and share >= 1 - rules.worth
    outcome = "better" if low > 0.5 else "worse" if high < 0.5 else "futile" if is_futile else None
    if outcome is None and wins + ties + losses >= rules.max_votes:
        outcome = "max_votes"
    return Look(wins, ties, losses, (low, high), _capital(wins, losses, rules.weights), _capital(losses, wins), outcome)


def log_capital(wins: npt.ArrayLike, losses: npt.ArrayLike, chance: float, weights: Sequence[float] = EVEN) -> Floats:
    """The logarithm of the capital won by betting on wins against "p ≤ `chance`"; arrays give an array."""
    for_chance = chance + 2 * (1 - chance) * EDGES
    won, lost = (np.asarray(count, dtype=np.float64)[..., None] for count in (wins, losses))
    capitals = won * np.log(for_chance / chance) + lost * np.log((1 - for_chance) / (1 - chance))
    result: Floats = logsumexp(capitals, axis=-1, b=np.asarray(weights))
    return result


def _capital(wins: int, losses: int, weights: Sequence[float] = EVEN) -> float:
    return math.exp(min(LARGEST_LOG, float(log_capital(wins, losses, 0.5, weights))))


def lower_bound(wins: int, losses: int, alpha: float, weights: Sequence[float] = EVEN) -> float:
    """The largest chance that the votes speak against, at level `alpha` at all times; 0 where they speak against none.

    The capital falls as `chance` rises towards the share of wins, so the bound is where it is 1/alpha.
    """
    share = wins / (wins + losses) if wins + losses else 0.0
    if share <= _EPSILON:
        return 0.0

    def over(chance: float) -> float:
        return float(log_capital(wins, losses, chance, weights)) + float(np.log(alpha))

    bottom, top = _EPSILON, share - _EPSILON
    if over(bottom) <= 0:
        return 0.0
    return top if over(top) > 0 else float(brentq(over, bottom, top, xtol=1e-6))


def bets(wins: int, losses: int) -> tuple[float, ...]:
    """Weights for `Rules` that lean half of the bet towards what an earlier evaluation found, in pairs it decided.

    Fixed before the first vote, so whatever the evaluation is worth, the error of the trial is not touched.
    """
    chances = 0.5 + EDGES
    log_likelihood = wins * np.log(chances) + losses * np.log(1 - chances)
    leaning = np.exp(log_likelihood - logsumexp(log_likelihood))
    weights = (leaning + np.asarray(EVEN)) / 2
    return tuple(float(weight) for weight in weights / weights.sum())


def votes_to_go(seen: Look, rules: Rules) -> int | None:
    """About how many more votes, ties included, would show it better if the share of wins stays; None where it is not
    above 50%, or past `max_votes`."""
    share = seen.win_rate
    if share is None or share <= 0.5:
        return None
    decided = np.arange(seen.wins + seen.losses + 1, rules.max_votes + 1)
    enough = log_capital(decided * share, decided * (1 - share), 0.5, rules.weights) >= -math.log(rules.alpha)
    if not enough.any():
        return None
    more = int(decided[enough.argmax()]) - seen.wins - seen.losses
    return math.ceil(more * seen.votes / (seen.wins + seen.losses))


def sentence(seen: Look, rules: Rules, challenger: str, champion: str) -> str:
    """What the votes say, in words with numbers."""
    if seen.win_rate is None:
        ties = f" ({_count(seen.ties, 'tie')} so far)" if seen.ties else ""
        return f"Nobody has preferred {challenger} or {champion} yet{ties}."
    low, high = (f"{bound:.1%}" if abs(bound - 0.5) < 0.01 else f"{bound:.0%}" for bound in seen.interval)
    counted = f"{_count(seen.wins, 'win')}, {_count(seen.ties, 'tie')}, {_count(seen.losses, 'loss', 'losses')}"
    told = (
        f"{counted} of {challenger} against {champion}: it wins {seen.win_rate:.0%} of decided votes, and the interval "
        f"that holds at every look is {low}–{high}."
    )
    if seen.outcome == "better":
        return f"{told} {challenger} is better than {champion}."
    if seen.outcome == "worse":
        return f"{told} {challenger} is worse than {champion}: keeping {champion}."
    if seen.outcome == "futile":
        return f"{told} {rules.worth:.0%}, the least that would be worth it, is ruled out: keeping {champion}."
    if seen.outcome == "max_votes":
        return f"{told} Not enough evidence after the most votes asked for, {rules.max_votes}: keeping {champion}."
    to_go = votes_to_go(seen, rules)
    more = f" About {to_go} more votes like these would settle it." if to_go else ""
    return f"{told} Not enough evidence so far.{more}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
