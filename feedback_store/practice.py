"""Practice: a small committed set of prompts with two answers each, to be labelled by a taste the person chooses.

    practice.jsonl + a taste --preferences_for--> preferences --> a practice run, kept apart from real preferences

So a newcomer without data or network sees the whole loop work. The set is made by `scripts/make_practice.py`: the
prompts are ours and the answers are the embedded model's own. The labels are about form only; whether an answer is
true plays no part. A pair the taste cannot decide gives no preference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from feedback_store.errors import InvalidRecord
from feedback_store.preferences import preference_id
from feedback_store.records import Message, Preference

PRACTICE_PATH = Path(__file__).with_name("practice.jsonl")
SHORTER_SHARE = 0.7
MIN_BULLETS = 2
MADE_AT = datetime(2026, 11, 22, tzinfo=UTC)  # fixed, so that the same set gives the same preferences


@dataclass(frozen=True, slots=True)
class Taste:
    """A taste to teach. `judge` gives the index of the better of two answers, None where the taste cannot tell."""

    name: str
    label: str
    sentence: str
    judge: Callable[[str, str], int | None]


@dataclass(frozen=True, slots=True)
class PracticePair:
    """One line of the practice set."""

    prompt: str
    answers: tuple[str, str]


def _shorter(first: str, second: str) -> int | None:
    """The one with at most 70% of the other's characters."""
    if len(first) <= SHORTER_SHARE * len(second):
        return 0
    return 1 if len(second) <= SHORTER_SHARE * len(first) else None


def _bullets(first: str, second: str) -> int | None:
    """The only one with two bullet lines or more."""
    return _only_one(has_bullets(first), has_bullets(second))


def _question(first: str, second: str) -> int | None:
    """The only one that ends with a question mark."""
    return _only_one(ends_with_question(first), ends_with_question(second))


def _only_one(first: bool, second: bool) -> int | None:
    return None if first == second else int(second)


def has_bullets(text: str) -> bool:
    """Whether at least two lines begin with a bullet."""
    return sum(line.lstrip().startswith(("- ", "* ", "• ")) for line in text.splitlines()) >= MIN_BULLETS


def ends_with_question(text: str) -> bool:
    """Whether the last character that is no white space is a question mark."""
    return text.rstrip().endswith("?")


TASTES: Mapping[str, Taste] = MappingProxyType(
    {
        taste.name: taste
        for taste in (
            Taste("shorter", "Shorter", "The clearly shorter answer is better.", _shorter),
            Taste("bullets", "Bullet points", "The answer with bullet points is better.", _bullets),
            Taste("question", "Ends with a question", "The answer that ends with a question is better.", _question),
        )
    }
)


def load_practice(path: Path = PRACTICE_PATH) -> list[PracticePair]:
    """The practice set as it is committed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [PracticePair(row["prompt"], (row["answers"][0], row["answers"][1])) for row in rows]


def preferences_for(taste: str) -> list[Preference]:
    """The practice preferences of a taste (source `practice`), in the set's order.

    Raises InvalidRecord for a taste that is not in TASTES.
    """
    if taste not in TASTES:
        raise InvalidRecord("Preference", "practice", taste, "one of the tastes " + ", ".join(TASTES))
    judge = TASTES[taste].judge
    judged = [(pair, judge(*pair.answers)) for pair in load_practice()]
    return [_preference(pair, better, taste) for pair, better in judged if better is not None]


def _preference(pair: PracticePair, better: int, taste: str) -> Preference:
    prompt: tuple[Message, ...] = ({"role": "user", "content": pair.prompt},)
    chosen, rejected = pair.answers[better], pair.answers[1 - better]
    return Preference(
        preference_id=preference_id(prompt, chosen, rejected, taste),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source="practice",
        weight=1.0,
        rater=None,
        pick_id=None,
        versions=(),
        practice=taste,
        created_at=MADE_AT,
    )
