"""Which raters look suspicious, and why, in sentences with numbers. Pure; nothing is done to anybody here.

    evidence of each rater (gold, agreement, places, seconds) --suspicions--> sentences of those it is exact to suspect

Four questions are asked of every rater who gives enough to ask, each by an exact one-sided binomial test against what a
rater in good faith may still do:

    gold        right less often than a rater who is right in `USUAL_RIGHT`
    agreement   with the majority of the others less often than `USUAL_AGREEMENT`, which is low on purpose: between
                people who mean well it was 63% (Bai et al., 2022) to 73% (Ouyang et al., 2022)
    place       more of one place than `USUAL_PLACE`: answers in the first place draw people, but not so far
    speed       more picks faster than `rater_tallies.FAST_S` than one in ten

Together they are held to `LIMIT`: a list of raters who all behave so raises one false alarm in a hundred lists, however
many they are (Bonferroni: each test is held to LIMIT by the number of tests). So few words are never enough, and a
careful poisoner passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from feedback_store.rater_tallies import FAST_S

LIMIT = 0.01
USUAL_RIGHT = 0.8
USUAL_AGREEMENT = 0.63
USUAL_PLACE = 0.7
USUAL_FAST = 0.1


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rater did, counted; see `feedback_store.rater_tallies` and `feedback_store.reliability`."""

    gold_right: int = 0
    gold_answered: int = 0
    agreed: int = 0
    compared: int = 0
    first: int = 0
    second: int = 0
    fast: int = 0
    timed: int = 0
    median_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Test:
    """`count` of `of` is too many for a share of at most `share`; `sentence` says so, given the p value."""

    rater: str
    count: int
    of: int
    share: float
    sentence: Callable[[float], str]

    @property
    def p_value(self) -> float:
        from scipy.stats import binomtest

        return float(binomtest(self.count, self.of, self.share, alternative="greater").pvalue)


def suspicions(evidence: Mapping[str, Evidence]) -> dict[str, list[str]]:
    """The sentences about each rater, the most telling one first; an empty list for who gives no reason."""
    tests = [test for rater, found in sorted(evidence.items()) for test in _tests(rater, found) if test.of]
    told: dict[str, list[tuple[float, str]]] = {rater: [] for rater in evidence}
    for test in tests:
        p_value = test.p_value
        if p_value < LIMIT / len(tests):
            told[test.rater].append((p_value, test.sentence(p_value)))
    return {rater: [sentence for _, sentence in sorted(found)] for rater, found in told.items()}


def share_of(count: int, of: int) -> dict[str, float | int | list[float] | None]:
    """{"count", "of", "share", "interval"}: a share with its 95% interval (Wilson, 1927); None for none of none."""
    if not of:
        return {"count": count, "of": of, "share": None, "interval": None}
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(count, of, method="wilson")
    return {"count": count, "of": of, "share": count / of, "interval": [float(low), float(high)]}


def _tests(rater: str, found: Evidence) -> Iterator[_Test]:
    wrong, apart = found.gold_answered - found.gold_right, found.compared - found.agreed
    yield _Test(
        rater, wrong, found.gold_answered, 1 - USUAL_RIGHT,
        lambda p: f"{wrong} of {found.gold_answered} gold pairs wrong{_if_guessing(wrong, found.gold_answered)} "
        f"({_odds(p)} for somebody right in {USUAL_RIGHT:.0%}).",
    )  # fmt: skip
    yield _Test(
        rater, apart, found.compared, 1 - USUAL_AGREEMENT,
        lambda p: f"Against the majority of the others in {apart} of {found.compared} pairs judged in common"
        f"{_if_guessing(apart, found.compared)} ({_odds(p)} for somebody who agrees in {USUAL_AGREEMENT:.0%}).",
    )  # fmt: skip
    place, most = ("first", found.first) if found.first >= found.second else ("second", found.second)
    decided = found.first + found.second
    yield _Test(
        rater, most, decided, USUAL_PLACE,
        lambda p: f"{most} of {decided} picks took the {place} answer ({_odds(p)} for somebody who takes it in "
        f"{USUAL_PLACE:.0%}).",
    )  # fmt: skip
    yield _Test(
        rater, found.fast, found.timed, USUAL_FAST,
        lambda p: f"{found.fast} of {found.timed} picks came within {FAST_S:g} s of the pair, half within "
        f"{found.median_s:.1f} s ({_odds(p)} for somebody who does so in {USUAL_FAST:.0%}).",
    )  # fmt: skip


def _if_guessing(wrong: int, of: int) -> str:
    """What the number looks like: clearly more wrong than a coin, or like a coin."""
    from scipy.stats import binomtest

    if binomtest(wrong, of, 0.5, alternative="greater").pvalue < LIMIT:
        return ", more than by guessing: turned round on purpose, or the task misunderstood"
    return ", as by guessing" if binomtest(wrong, of, 0.5).pvalue >= LIMIT else ""


def _odds(p_value: float) -> str:
    """A p value as a chance, in two digits."""
    return (
        "a chance below one in a million"
        if p_value < 1e-6
        else f"a chance of one in {float(f'{1 / p_value:.2g}'):,.0f}"
    )
