"""Simulated live trials, vote by vote, by the rules the product uses; for `bench_gate.py`.

The number of wins that ends a trial after n votes is found once for every n; a trial is then a line that meets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from trainer.sequential import EDGES, EVEN, Rules, bets, log_capital, look

NEVER = np.iinfo(np.int64).max
LIMIT = 5000  # votes simulated where the cap is taken off
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcomes:
    """Simulated trials: when each was called better, and when it ended in whatever way; NEVER where it did not."""

    better: Counts
    worse: Counts
    futile: Counts
    ended: Counts

    def share(self, what: Counts) -> float:
        return float((what < NEVER).mean())


@cache
def least_wins(votes: int, chance: float, weights: Sequence[float], alpha: float) -> Counts:
    """For every number of decided votes from 1, the fewest wins whose bet against `chance` has reached 1/alpha."""
    decided = np.arange(1, votes + 1)
    low, high = np.zeros(votes, dtype=np.int64), decided + 1
    while (low < high).any():
        middle = (low + high) // 2
        reached = log_capital(middle, decided - middle, chance, weights) >= -math.log(alpha)
        high = np.where((low < high) & reached, middle, high)
        low = np.where((low < high) & ~reached, middle + 1, low)
    return low


def first(condition: npt.NDArray[np.bool_]) -> Counts:
    """In each row the number, from 1, of the first column that is true."""
    return np.where(condition.any(axis=1), condition.argmax(axis=1) + 1, NEVER)


def simulate(
    chance: float | npt.NDArray[np.float64], trials: int, seed: int, rules: Rules, votes: int = LIMIT
) -> Outcomes:
    """Trials of decided votes, each for the challenger with `chance` (or with its own chance, by column)."""
    dice, batch, found = np.random.default_rng(seed), 500, []
    least = least_wins(votes, 0.5, rules.weights, rules.alpha)
    fewest = least_wins(votes, 0.5, EVEN, rules.alpha)  # of losses, for "worse"
    few = least_wins(votes, 1 - rules.worth, EVEN, rules.alpha)
    decided = np.arange(1, votes + 1)
    for begin in range(0, trials, batch):
        wins = np.cumsum(dice.random((min(batch, trials - begin), votes)) < chance, axis=1, dtype=np.int64)
        losses = decided - wins
        better, worse = first(wins >= least), first(losses >= fewest)
        futile = first((losses >= few) & (wins >= (1 - rules.worth) * decided))
        ended = np.minimum(np.minimum(better, worse), futile)
        found.append([np.where(one == ended, one, NEVER) for one in (better, worse, futile)] + [ended])
    return Outcomes(*(np.concatenate(columns) for columns in zip(*found, strict=True)))


def check_against_the_product(rules: Rules) -> None:
    """The lines used here and `look`, which the product asks after every vote, end trials at the same vote."""
    dice = np.random.default_rng(7)
    for chance in (0.4, 0.5, 0.62, 0.7):
        wins = np.cumsum(dice.random(400) < chance)
        one = simulate_one(wins, rules)
        outcome, at = None, NEVER
        for votes, won in enumerate(wins.tolist(), start=1):
            outcome = look(won, 0, votes - won, rules).outcome
            if outcome is not None:
                at = votes
                break
        assert one == (outcome, at), (chance, one, outcome, at)


def simulate_one(wins: npt.NDArray[np.int64], rules: Rules) -> tuple[str | None, int]:
    """How and when one trial ends by the lines; (None, NEVER) where it does not."""
    votes = len(wins)
    decided = np.arange(1, votes + 1)
    losses = decided - wins
    ends = {
        "better": wins >= least_wins(votes, 0.5, rules.weights, rules.alpha),
        "worse": losses >= least_wins(votes, 0.5, EVEN, rules.alpha),
        "futile": (losses >= least_wins(votes, 1 - rules.worth, EVEN, rules.alpha))
        & (wins >= (1 - rules.worth) * decided),
    }
    at = {name: int(first(condition[None])[0]) for name, condition in ends.items()}
    name = min(at, key=lambda one: at[one])
    return (None, NEVER) if at[name] == NEVER else (name, at[name])


def by_position(pull: float, chance: float, trials: int, seed: int, *, adjusted: bool, votes: int = 1500) -> Counts:
    """Votes until "better" where the first place pulls: a vote is for the challenger with `chance` ± `pull`.

    `adjusted`: the pull estimated from the votes before is taken out of each vote: y - b·s is bet on, with y = ±1 the
    vote, s = ±1 the place, which a fair coin decided, and b fixed before the vote, so its mean is that of y.
    """
    dice = np.random.default_rng(seed)
    place = np.where(dice.random((trials, votes)) < 0.5, 1.0, -1.0)
    vote = np.where(dice.random((trials, votes)) < chance + pull * place, 1.0, -1.0)
    if adjusted:
        before = np.cumsum(vote * place, axis=1) - vote * place
        vote = vote - np.clip(before / (np.arange(votes) + 20), -0.5, 0.5) * place
    edges = 2 * EDGES
    best = np.full((trials, votes), -np.inf)
    for edge, weight in zip(edges, EVEN, strict=True):
        best = np.logaddexp(best, np.log(weight) + np.cumsum(np.log1p(edge * vote), axis=1))
    return first(best >= math.log(20))


def by_size(trials: int, seed: int, votes: int = 1000) -> Counts:
    """Votes until "better" of a challenger that is not better, where bets are larger on pairs with a larger margin.

    Half of the pairs have a large margin: it wins 65% of those and 35% of the others, 50% in all.
    """
    dice = np.random.default_rng(seed)
    large = dice.random((trials, votes)) < 0.5
    vote = np.where(dice.random((trials, votes)) < np.where(large, 0.65, 0.35), 1.0, -1.0)
    capital = np.cumsum(np.log1p(np.where(large, 0.3, 0.05) * vote), axis=1)
    return first(capital >= math.log(20))


def first_only(chance: float, trials: int, seed: int, rules: Rules) -> Counts:
    """When the bet on "better" first reaches 1/alpha where nothing else ends a trial."""
    dice, least = np.random.default_rng(seed), least_wins(LIMIT, 0.5, rules.weights, rules.alpha)
    batches = range(0, trials, 500)
    found = [first(np.cumsum(dice.random((500, LIMIT)) < chance, axis=1) >= least) for _ in batches]
    return np.concatenate(found)[:trials]


def exact(chance: float, rules: Rules, votes: int) -> npt.NDArray[np.float64]:
    """The chance, to the last digit, of having been called better by each number of decided votes.

    By dynamic programming over the number of wins: no simulation.
    """
    least = least_wins(votes, 0.5, rules.weights, rules.alpha)
    fewest = least_wins(votes, 0.5, EVEN, rules.alpha)
    few = least_wins(votes, 1 - rules.worth, EVEN, rules.alpha)
    going_on, better = np.zeros(votes + 1), np.zeros(votes)
    going_on[0] = 1.0
    for number in range(1, votes + 1):
        going_on[1 : number + 1] = going_on[1 : number + 1] * (1 - chance) + going_on[:number] * chance
        going_on[0] *= 1 - chance
        wins = np.arange(number + 1)
        losses, found = number - wins, wins >= least[number - 1]
        better[number - 1] = going_on[: number + 1][found].sum()
        futile = (losses >= few[number - 1]) & (wins >= (1 - rules.worth) * number)
        going_on[: number + 1][found | (losses >= fewest[number - 1]) | futile] = 0.0
    return np.cumsum(better)


def leaning(chance: float, pairs: int, trials: int, seed: int, groups: int = 20) -> Counts:
    """Votes until "better" where half of the bet leans on an evaluation of `pairs` pairs with the same win rate."""
    dice, found = np.random.default_rng(seed), []
    for group in range(groups):
        wins = int(dice.binomial(pairs, chance))
        rules = Rules(weights=bets(wins, pairs - wins))
        found.append(simulate(chance, trials // groups, seed + group, rules).better)
    return np.concatenate(found)
