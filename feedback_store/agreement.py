"""Do people agree, and who contradicts whom: rater agreement and contradictions from votes. Pure: no store.

    standing picks --evidence.votes--> Vote ──agreement────> Agreement (percent, kappa, alpha, a sentence)
                                            └─contradictions> items with opposite votes

An item is a prompt with two answers, whatever order they were shown in; a vote says which of the two (``a`` is the one
that sorts first), a tie or both bad. The coefficients are those of ``nltk.metrics.agreement`` (Artstein and Poesio,
2008, survey them), loaded on first use: importing it runs all of NLTK's ``__init__``, a second or two and 60 MB.

Not here: which votes count (superseded and practice ones stay out before), weighting raters, intervals for alpha.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feedback_store.errors import InvalidRecord
from feedback_store.reliability import Judgement

A = "a"
B = "b"
CHOICES = (A, B, "tie", "both_bad")

# Krippendorff (2004), Content Analysis, 2nd ed., p. 241: rely on variables with alpha from .800, draw no more than
# tentative conclusions between .667 and .800.
RELIABLE_ALPHA = 0.800
TENTATIVE_ALPHA = 0.667


@dataclass(frozen=True, slots=True)
class Vote:
    """What a rater said of an item; ``event`` counts up, so that of two votes the later one is known."""

    item: str
    rater: str
    choice: str
    event: int

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise InvalidRecord("Vote", "choice", self.choice, "one of " + ", ".join(CHOICES))


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree on the items that two or more of them judged.

    ``items`` and ``votes`` count those items and the votes on them, one a rater. ``percent`` is the share of the pairs
    of votes on one item that are equal, from 0 to 100. ``kappa`` is Cohen's, which is of two raters: None where three
    or more share items. ``alpha`` is Krippendorff's for nominal data, of any number of raters and with gaps. Each is
    None where it is not defined, and ``sentence`` says why, or what the numbers mean.
    """

    items: int
    votes: int
    percent: float | None
    kappa: float | None
    alpha: float | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Contradiction:
    """An item on which opposite sides were taken.

    ``by_choice`` has the raters of each choice that was made, ``themselves`` the raters who took both sides at
    different showings, ``votes`` the number of votes.
    """

    item: str
    by_choice: Mapping[str, tuple[str, ...]]
    themselves: tuple[str, ...]
    votes: int


def agreement(votes: Iterable[Vote]) -> Agreement:
    """How far raters agree, from each rater's last vote on each item. No order of the votes changes the result."""
    shared = _shared(votes)
    if not shared:
        return Agreement(0, 0, None, None, None, "No pair was rated by two people yet: agreement cannot be told.")
    raters = {rater for choices in shared.values() for rater in choices}
    made = Counter(choice for choices in shared.values() for choice in choices.values())
    people = f"{len(raters)} people judged {_counted(len(shared), 'pair')} in common"
    if len(made) == 1:
        # NLTK says 1.0 here; without variation it is 0 / 0, and nothing tells agreement from habit.
        sentence = (
            f"{people} and always chose {next(iter(made))!r}: without another choice alpha and kappa say nothing."
        )
        return Agreement(len(shared), made.total(), 100.0, None, None, sentence)
    percent = _percent(shared)
    task = _task(shared)
    alpha = float(task.alpha())
    kappa = float(task.kappa()) if len(raters) == 2 else None
    sentence = f"{people} and agree in {percent:.1f}% of the comparisons, alpha {alpha:z.3f}: {_meaning(alpha)}."
    return Agreement(len(shared), made.total(), percent, kappa, alpha, sentence)


def contradictions(votes: Iterable[Vote]) -> list[Contradiction]:
    """The items on which both sides were taken, by two raters or by one at two showings; most votes first."""
    by_item: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        by_item[vote.item].append(vote)
    found = [_contradiction(item, of_item) for item, of_item in by_item.items() if _is_contradicted(of_item)]
    return sorted(found, key=lambda contradiction: (-contradiction.votes, contradiction.item))


def decided(votes: Iterable[Vote]) -> list[Judgement]:
    """Who called which answer better, by each rater's last vote on each item; a tie calls neither so."""
    return [
        Judgement(vote.item, vote.rater, vote.choice == A) for vote in _last(votes).values() if vote.choice in (A, B)
    ]


def _is_contradicted(votes: Sequence[Vote]) -> bool:
    return {A, B} <= {vote.choice for vote in votes}


def _contradiction(item: str, votes: Sequence[Vote]) -> Contradiction:
    raters = {choice: {vote.rater for vote in votes if vote.choice == choice} for choice in CHOICES}
    return Contradiction(
        item=item,
        by_choice={choice: tuple(sorted(of_choice)) for choice, of_choice in raters.items() if of_choice},
        themselves=tuple(sorted(raters[A] & raters[B])),
        votes=len(votes),
    )


def _shared(votes: Iterable[Vote]) -> dict[str, dict[str, str]]:
    """Item → rater → last choice, for the items of two or more raters."""
    by_item: dict[str, dict[str, str]] = defaultdict(dict)
    for (item, rater), vote in sorted(_last(votes).items()):
        by_item[item][rater] = vote.choice
    return {item: choices for item, choices in by_item.items() if len(choices) > 1}


def _last(votes: Iterable[Vote]) -> dict[tuple[str, str], Vote]:
    """Each rater's last vote on each item."""
    last: dict[tuple[str, str], Vote] = {}
    for vote in votes:
        before = last.get((vote.item, vote.rater))
        if before is None or (vote.event, vote.choice) > (before.event, before.choice):
            last[vote.item, vote.rater] = vote
    return last


def _meaning(alpha: float) -> str:
    if alpha >= RELIABLE_ALPHA:
        return f"reliable ({RELIABLE_ALPHA:g} or more)"
    if alpha >= TENTATIVE_ALPHA:
        return f"good for tentative conclusions only ({TENTATIVE_ALPHA:g} to {RELIABLE_ALPHA:g})"
    if alpha > 0:
        return f"too little to rely on (below {TENTATIVE_ALPHA:g}); agree first on what makes an answer better"
    return "no better than chance (0 or less); agree first on what makes an answer better"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(shared: Mapping[str, Mapping[str, str]]) -> float:
    equal = pairs = 0
    for choices in shared.values():
        equal += sum(count * (count - 1) // 2 for count in Counter(choices.values()).values())
        pairs += len(choices) * (len(choices) - 1) // 2
    return 100 * equal / pairs


def _task(shared: Mapping[str, Mapping[str, str]]) -> Any:
    from nltk.metrics.agreement import AnnotationTask

    votes = [(rater, item, choice) for item, choices in shared.items() for rater, choice in choices.items()]
    return AnnotationTask(data=votes)
