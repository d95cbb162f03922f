"""Is a version that was just promoted clearly worse than the one before? Pure: what was seen in, a verdict out.

Each measure is the share of answers with one kind of trouble, among the answers of the new version since its promotion
and among the last ones of the version before. Two shares are compared by Fisher's exact test (one-sided): with few
answers nothing else holds. The verdict is looked at after every answer, so the limit is strict; how often it is wrong
where nothing is stands in docs/benchmarks/baking.md. Who collects the answers and goes back is `baking_watch.py`.

An answer is judged by its text, its first token and its ratings only where it was drawn on the product's own terms:
what a request chose itself (a stop text, a limit, a seed, a system prompt) is no evidence. That it failed counts on any
terms, unless the request is to blame (`serving.engine.NOT_ITS_FAULT`).

Not covered: trouble that both versions have alike. First-token times are compared with those of minutes before, so only
answers that come very much later count, and where more are written at once they may come later. An outage that begins
in the watch looks like the new version's fault.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

# Going back needs all three: so unlikely by chance, at one look; so much more often; and so many answers with trouble.
UNLIKELY = 1e-4
FEWEST_BAD = 3
# A version that nobody has used says little; it is taken to have written this many good answers more than were seen.
ASSUMED_GOOD = 20
MOST_RATINGS = 2  # of one origin that count: nobody alone takes a version back by rating it down
IN_A_ROW = 5  # answers that failed or were empty, whatever the version before did

# An answer is late, long or repetitive by these limits.
LATER_TIMES, LATER_S = 3.0, 1.0  # than the median of the version before under that load: both
LONGER_TIMES = 2.0
REPEATED_SHARE = 0.5
N_GRAM = 4
FEWEST_WORDS = 32
FEWEST_BEFORE = 10  # answers of the version before, for a median to mean something
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+")  # scripts without spaces: a character is a word


class Measure(StrEnum):
    """What can be wrong with an answer. The value finishes the sentence "9 of 23 answers …"."""

    FAILED = "failed"
    EMPTY = "were empty"
    REPETITIVE = "went round in circles"
    LATE = "began late"
    LONG = "were more than twice as long"
    DISLIKED = "were rated down"


EXCESS = {
    Measure.FAILED: 0.1,
    Measure.EMPTY: 0.1,
    Measure.REPETITIVE: 0.1,
    Measure.LATE: 0.5,  # half of them: load alone makes some late
    Measure.LONG: 0.4,  # nearly half: a taste for longer answers may have been what people asked for
    Measure.DISLIKED: 0.3,
}
"""How much larger the new version's share must be."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What is kept of one answer; its text is not. `first_token_s` None: nothing came, or it is not known any more.

    `load`: the most answers that were written at once, this one among them, until its first token came; one with a long
    prompt to read counts as several. `characters`
    0: it is empty. `rating` is `up`, `down` or None. `on_own_terms`: the request left to the product how it is drawn.
    `origin`: who asked for it, as far as ratings are told apart by that; empty where it is not known.
    """

    candidate_id: str
    failed: bool
    characters: int
    repetitive: bool
    first_token_s: float | None = None
    load: float = 1
    rating: str | None = None
    on_own_terms: bool = True
    origin: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether its text says something about the version."""
        return self.on_own_terms and not self.failed

    @property
    def is_empty(self) -> bool:
        return self.is_whole and not self.characters


def answered(
    candidate_id: str,
    text: str,
    *,
    failed: bool,
    first_token_s: float | None = None,
    load: float = 1,
    rating: str | None = None,
    on_own_terms: bool = True,
    origin: str = "",
) -> Answered:
    """What is kept of an answer with this text."""
    text = text.strip()
    repetitive = is_repetitive(text)
    return Answered(candidate_id, failed, len(text), repetitive, first_token_s, load, rating, on_own_terms, origin)


@dataclass(frozen=True, slots=True)
class Share:
    """One measure: how many of how many, of the new version and of the one before; `p` by Fisher's exact test."""

    measure: Measure
    bad: int
    of: int
    bad_before: int
    of_before: int

    @property
    def p(self) -> float:
        return fisher_p(self.bad, self.of, self.bad_before, self.of_before + ASSUMED_GOOD)

    @property
    def is_clearly_worse(self) -> bool:
        if self.bad < FEWEST_BAD:
            return False
        before = self.bad_before / max(1, self.of_before)
        return self.bad / self.of - before >= EXCESS[self.measure] and self.p <= UNLIKELY

    def sentence(self, before: str) -> str:
        """9 of 23 answers were empty (v3: 0 of 200)."""
        what = "rated answers" if self.measure is Measure.DISLIKED else "answers"
        return f"{self.bad} of {self.of} {what} {self.measure} ({before}: {self.bad_before} of {self.of_before})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reasons` to go back, in words and numbers; none: no trouble so far."""

    shares: tuple[Share, ...]
    reasons: tuple[str, ...]

    @property
    def go_back(self) -> bool:
        return bool(self.reasons)


def decide(
    seen: Sequence[Answered],
    before: Sequence[Answered],
    previous: str,
    *,
    engine_died: bool = False,
    waiting: Sequence[tuple[float, float]] = (),
    judge_length: bool = True,
) -> Verdict:
    """Whether the answers `seen` of a new version are clearly worse than those of `previous`, oldest first in both.

    `engine_died`: its engine stopped while it answered. `waiting`: seconds and load of those that still have no first
    token; one that waits for longer than the limit is late already. `judge_length` False: one of the two is meant to
    write longer or shorter answers.
    """
    shares = _shares(seen, before, waiting)
    if not judge_length:
        shares = [share for share in shares if share.measure is not Measure.LONG]
    reasons = ["its engine stopped while it answered"] if engine_died else []
    last = [one for one in seen if one.failed or one.on_own_terms][-IN_A_ROW:]
    if len(last) == IN_A_ROW and all(one.failed or one.is_empty for one in last):
        reasons.append(f"{IN_A_ROW} answers in a row failed or were empty")
    reasons += [share.sentence(previous) for share in shares if share.is_clearly_worse]
    return Verdict(tuple(shares), tuple(reasons))


def text_troubles(one: Answered, before: Sequence[Answered]) -> frozenset[Measure]:
    """What is wrong with the text of an answer, by those of the version before."""
    longest = _longest(before)
    found = {
        Measure.EMPTY: one.is_empty,
        Measure.REPETITIVE: one.is_whole and one.repetitive,
        Measure.LONG: longest is not None and one.is_whole and one.characters > longest,
    }
    return frozenset(measure for measure, is_so in found.items() if is_so)


def _shares(
    seen: Sequence[Answered], before: Sequence[Answered], waiting: Sequence[tuple[float, float]]
) -> list[Share]:
    def share(measure: Measure, new: Sequence[bool], old: Sequence[bool]) -> Share:
        return Share(measure, sum(new), len(new), sum(old), len(old))

    whole, whole_before = _whole(seen), _whole(before)
    shares = [
        share(Measure.FAILED, [one.failed for one in seen], [one.failed for one in before]),
        share(Measure.EMPTY, [one.is_empty for one in whole], [one.is_empty for one in whole_before]),
        share(
            Measure.REPETITIVE,
            [one.repetitive for one in whole],
            [one.repetitive for one in whole_before],
        ),
        share(
            Measure.DISLIKED,
            [rating == "down" for rating in _ratings(seen)],
            [rating == "down" for rating in _ratings(before)],
        ),
    ]
    times_before = _first_tokens(before)
    if len(times_before) >= FEWEST_BEFORE:
        is_late = _late_after(times_before)
        late = [is_late(*one) for one in _first_tokens(seen)] + [True for one in waiting if is_late(*one)]
        shares.append(share(Measure.LATE, late, [is_late(*one) for one in times_before]))
    longest = _longest(before)
    if longest is not None:
        shares.append(
            share(Measure.LONG, *([one > longest for one in _lengths(answers)] for answers in (seen, before)))
        )
    return shares


def _whole(answers: Sequence[Answered]) -> list[Answered]:
    return [one for one in answers if one.is_whole]


def _lengths(answers: Sequence[Answered]) -> list[int]:
    return [one.characters for one in answers if one.is_whole and one.characters]


def _longest(before: Sequence[Answered]) -> float | None:
    """More characters than this are long; None where there are too few answers to say."""
    lengths = _lengths(before)
    return None if len(lengths) < FEWEST_BEFORE else LONGER_TIMES * statistics.median(lengths)


def _ratings(answers: Sequence[Answered]) -> list[str]:
    """The ratings that count: a few of each origin."""
    counted: list[str] = []
    given: Counter[str] = Counter()
    for one in answers:
        if one.rating is not None and one.on_own_terms and given[one.origin] < MOST_RATINGS:
            counted.append(one.rating)
            given[one.origin] += bool(one.origin)
    return counted


def _first_tokens(answers: Sequence[Answered]) -> list[tuple[float, float]]:
    return [(one.first_token_s, one.load) for one in answers if one.first_token_s is not None and one.on_own_terms]


def _late_after(before: Sequence[tuple[float, float]]) -> Callable[[float, float], bool]:
    """Whether a first token is late under a load, by those of the version before.

    Where n times as much is read and written at once, it may come n times as late.
    """
    median_s = statistics.median(first_token_s for first_token_s, _ in before)
    usual_load = statistics.median(load for _, load in before)

    def is_late(first_token_s: float, load: float) -> bool:
        times = max(1.0, load / usual_load)
        return first_token_s > times * max(LATER_TIMES * median_s, median_s + LATER_S)

    return is_late


def is_repetitive(text: str) -> bool:
    """Whether more than half of the 4-grams of words stood in the text before.

    The measure is seq-rep-4 of Welleck et al. (2020), Neural Text Generation with Unlikelihood Training. A text of
    fewer than 32 words is not judged.
    """
    words = _WORD.findall(text.lower())
    if len(words) < FEWEST_WORDS:
        return False
    grams = [tuple(words[at : at + N_GRAM]) for at in range(len(words) - N_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) > REPEATED_SHARE


def fisher_p(bad: int, of: int, bad_before: int, of_before: int) -> float:
    """Fisher's exact test, one-sided: how likely so many of the bad ones, or more, are among the `of` by chance alone.

    Whole numbers all the way, so it is exact. (scipy has the test too, but a server that only chats goes without it.)
    """
    all_bad, everything = bad + bad_before, of + of_before
    ways = sum(
        math.comb(all_bad, here) * math.comb(everything - all_bad, of - here)
        for here in range(bad, min(all_bad, of) + 1)
    )
    return ways / math.comb(everything, of)
