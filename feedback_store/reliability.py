"""How far a rater can be relied on, and what their preferences weigh for that. Pure: no store, no clock.

    judgements (who called which of two answers better) + gold answers --reliabilities--> Reliability of each rater

The method is that of Dawid and Skene (1979, "Maximum Likelihood Estimation of Observer Error-Rates Using the EM
Algorithm") with one coin a rater: every rater names the better answer with a probability of their own, whichever it
is; which answers are better, and these probabilities, are estimated in turn. On gold pairs the better answer is known.
Every rater begins as if they had judged `PRIOR_RIGHT + PRIOR_WRONG` answers already, so that one who shares few with
others stays near 80%. (crowd-kit has the method without such a prior, and would bring scikit-learn and more.) 80% is
two raters who agree in 68% of what they judge; of InstructGPT's labelers it was 73% (Ouyang et al., 2022).

A row's weight is what is left of its signal when a rater errs at random: 2p - 1 for a probability p (Natarajan et al.,
2013, "Learning with Noisy Labels"), against that of the prior; 1 at most, and 0 for who is right in half or less.
Nothing is turned round: who is systematically wrong is named, and teaches nothing.

What it does not see: a majority that errs together is right for this method, where gold pairs do not say otherwise.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

PRIOR_RIGHT, PRIOR_WRONG = 8.0, 2.0
PRIOR = PRIOR_RIGHT / (PRIOR_RIGHT + PRIOR_WRONG)
ROUNDS = 500
CLOSE = 1e-9
INVERTED_DEVIATIONS = 2.0


class Judgement(NamedTuple):
    """A rater called one of the two answers of an item better: ``a_is_better`` for the one that sorts first."""

    item: Hashable
    rater: str
    a_is_better: bool


class GoldAnswers(NamedTuple):
    """How many gold pairs a rater decided, and how many of them rightly; ties and skips are no decisions."""

    right: int
    answered: int


@dataclass(frozen=True, slots=True)
class Reliability:
    """``accuracy`` is the estimated probability of naming the better answer, ``weight`` what a row of theirs counts.

    ``shared`` counts the items they judged with others. ``is_inverted``: right in clearly less than half, by
    `INVERTED_DEVIATIONS` standard deviations of what is believed of them.
    """

    accuracy: float
    weight: float
    shared: int
    gold_right: int
    gold_answered: int
    is_inverted: bool

    def as_dict(self) -> dict[str, Any]:
        """As a manifest keeps it."""
        return asdict(self)


def reliabilities(
    judgements: Iterable[Judgement], gold: Mapping[str, GoldAnswers] | None = None
) -> dict[str, Reliability]:
    """Every rater of ``judgements`` and ``gold``, by name. No order of the judgements changes a digit."""
    gold, judgements = gold or {}, list(judgements)
    raters = sorted({judgement.rater for judgement in judgements} | set(gold))
    accuracy, counted = _estimated(_shared(judgements), raters, gold)
    return {rater: _reliability(accuracy[rater], counted[rater], gold.get(rater)) for rater in raters}


def agreement_with_others(judgements: Iterable[Judgement]) -> dict[str, tuple[int, int]]:
    """For each rater: on how many items they agree with the majority of the others, of how many; ties do not count."""
    agreed: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    for said in _shared(judgements):
        for rater, own in said.items():
            others = [a for one, a in said.items() if one != rater]
            if 2 * sum(others) != len(others):
                compared[rater] += 1
                agreed[rater] += own == (2 * sum(others) > len(others))
    return {rater: (agreed[rater], compared[rater]) for rater in sorted(compared)}


def weight_of(accuracy: float) -> float:
    """What a row of a rater counts, from 0 to 1 in steps of 0.01."""
    return round(min(1.0, max(0.0, (2 * accuracy - 1) / (2 * PRIOR - 1))), 2)


def _shared(judgements: Iterable[Judgement]) -> list[dict[str, bool]]:
    """What each rater said of every item that two or more of them judged."""
    sides: dict[tuple[Hashable, str], set[bool]] = defaultdict(set)
    for item, rater, a_is_better in judgements:
        sides[item, rater].add(a_is_better)
    by_item: dict[Hashable, dict[str, bool]] = defaultdict(dict)
    for (item, rater), said in sides.items():
        if len(said) == 1:  # who said both says nothing
            (by_item[item][rater],) = said
    return [dict(sorted(said.items())) for said in by_item.values() if len(said) > 1]


def _estimated(
    items: list[dict[str, bool]], raters: list[str], gold: Mapping[str, GoldAnswers]
) -> tuple[dict[str, float], Counter[str]]:
    """How often each rater is right, by EM, and how many items each shares."""
    counted = Counter(rater for said in items for rater in said)
    # Items on which the same raters part in the same way are one kind: there are few of them, however many items.
    kinds = sorted(
        Counter(tuple((one, a == next(iter(said.values()))) for one, a in said.items()) for said in items).items()
    )
    accuracy = dict.fromkeys(raters, PRIOR)
    for _ in range(ROUNDS):
        right: dict[str, list[float]] = {rater: [] for rater in raters}
        for said, number in kinds:
            odds = math.fsum(_log_odds(accuracy[rater]) * (1 if with_first else -1) for rater, with_first in said)
            first_is_right = 1 / (1 + math.exp(-max(-700.0, min(700.0, odds))))
            for rater, with_first in said:
                right[rater].append(number * (first_is_right if with_first else 1 - first_is_right))
        before, accuracy = accuracy, {}
        for rater in raters:
            known = gold.get(rater, GoldAnswers(0, 0))
            rights = PRIOR_RIGHT + known.right + math.fsum(right[rater])
            accuracy[rater] = rights / (PRIOR_RIGHT + PRIOR_WRONG + known.answered + counted[rater])
        if all(abs(accuracy[rater] - before[rater]) < CLOSE for rater in raters):
            break
    return accuracy, counted


def _log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _reliability(accuracy: float, shared: int, gold: GoldAnswers | None) -> Reliability:
    gold = gold or GoldAnswers(0, 0)
    believed = PRIOR_RIGHT + PRIOR_WRONG + shared + gold.answered
    deviation = math.sqrt(accuracy * (1 - accuracy) / (believed + 1))  # of a Beta distribution
    return Reliability(
        accuracy=round(accuracy, 4),
        weight=weight_of(accuracy),
        shared=shared,
        gold_right=gold.right,
        gold_answered=gold.answered,
        is_inverted=accuracy < 0.5 - INVERTED_DEVIATIONS * deviation,
    )
