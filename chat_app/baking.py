"""Is a version that was just promoted clearly worse than the one before? Pure: what was seen in, a verdict out.

Each measure is the share of answers with one kind of trouble, among the answers of the new version since its promotion
and among the last ones of the version before. Two shares are compared by Fisher's exact test (one-sided): with few
answers nothing else holds. The verdict is looked at after every answer, so the limit is strict; how often it is wrong
where nothing is stands in docs/benchmarks/baking.md. Who collects the answers and goes back is `baking_watch.py`.

Not covered: trouble that both versions have alike. First-token times are compared with those of minutes before, so only
answers that come very much later count, and where more are written at once they may come later. An outage that begins
in the watch looks like the new version's fault.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

# Going back needs all three: so unlikely by chance, at one look; so much more often; and so many answers with trouble.
UNLIKELY = 1e-4
FEWEST_BAD = 3
# A version that nobody has used says little; it is taken to have written this many good answers more than were seen.
ASSUMED_GOOD = 20
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

    `load`: the most answers that were written at once, this one among them, until its first token came. `characters`
    0: it is empty. `rating` is `up`, `down` or None.
    """

    candidate_id: str
    failed: bool
    characters: int
    repetitive: bool
    first_token_s: float | None = None
    load: int = 1
    rating: str | None = None

    @property
    def is_empty(self) -> bool:
        return not self.failed and not self.characters


def answered(
    candidate_id: str,
    text: str,
    *,
    failed: bool,
    first_token_s: float | None = None,
    load: int = 1,
    rating: str | None = None,
) -> Answered:
    """What is kept of an answer with this text."""
    text = text.strip()
    return Answered(candidate_id, failed, len(text), is_repetitive(text), first_token_s, load, rating)


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
    waiting: Sequence[tuple[float, int]] = (),
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
    last = seen[-IN_A_ROW:]
    if len(last) == IN_A_ROW and all(one.failed or one.is_empty for one in last):
        reasons.append(f"{IN_A_ROW} answers in a row failed or were empty")
    reasons += [share.sentence(previous) for share in shares if share.is_clearly_worse]
    return Verdict(tuple(shares), tuple(reasons))


def _shares(seen: Sequence[Answered], before: Sequence[Answered], waiting: Sequence[tuple[float, int]]) -> list[Share]:
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
            [one.rating == "down" for one in seen if one.rating is not None],
            [one.rating == "down" for one in before if one.rating is not None],
        ),
    ]
    times_before = _first_tokens(before)
    if len(times_before) >= FEWEST_BEFORE:
        is_late = _late_after(times_before)
        late = [is_late(*one) for one in _first_tokens(seen)] + [True for one in waiting if is_late(*one)]
        shares.append(share(Measure.LATE, late, [is_late(*one) for one in times_before]))
    lengths_before = [one.characters for one in whole_before if one.characters]
    if len(lengths_before) >= FEWEST_BEFORE:
        longest = LONGER_TIMES * statistics.median(lengths_before)
        lengths = [one.characters for one in whole if one.characters]
        shares.append(
            share(Measure.LONG, [one > longest for one in lengths], [one > longest for one in lengths_before])
        )
    return shares


def _whole(answers: Sequence[Answered]) -> list[Answered]:
    return [one for one in answers if not one.failed]


def _first_tokens(answers: Sequence[Answered]) -> list[tuple[float, int]]:
    return [(one.first_token_s, one.load) for one in answers if one.first_token_s is not None]


def _late_after(before: Sequence[tuple[float, int]]) -> Callable[[float, int], bool]:
    """Whether a first token is late under a load, by those of the version before.

    Where n times as many answers are written at once, it may come n times as late.
    """
    median_s = statistics.median(first_token_s for first_token_s, _ in before)
    usual_load = statistics.median(load for _, load in before)

    def is_late(first_token_s: float, load: int) -> bool:
        usual_s = median_s * max(1.0, load / usual_load)
        return first_token_s > max(LATER_TIMES * usual_s, usual_s + LATER_S)

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
