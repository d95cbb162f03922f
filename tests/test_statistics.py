"""The numbers of the admin page are those that counting everything by hand would give."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from feedback_store.preferences import preference_of, split_of
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice, new_id
from feedback_store.store import FeedbackStore

START = datetime(2026, 11, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.moment = START

    def __call__(self) -> datetime:
        self.moment += timedelta(hours=1)
        return self.moment


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb", Clock()) as opened:
        yield opened


def answer(text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(new_id("cand"), "v0", text, finish_reason, {}, None, 1.0, START)


def test_an_empty_store_counts_to_zero(store: FeedbackStore) -> None:
    found = store.statistics()
    assert sum(found.picks.values()) == found.edits == found.counts.picks == 0
    assert found.first_share is None
    assert (found.days, found.raters, found.ratings) == ({}, {}, {})
    assert json.loads(json.dumps(found.as_dict()))["counts"]["train"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_people_do_the_counts_are_those_of_the_words_that_stand(store: FeedbackStore, seed: int) -> None:
    dice = random.Random(seed)
    pairs = [
        Pair(
            new_id("pair"),
            (Message(role="user", content=f"Question {number}"),),
            answer("one"),
            answer("two", dice.choice(("stop", "stop", "length"))),
            None,
            "ada",
            START,
        )
        for number in range(12)
    ]
    for pair in pairs:
        store.record_pair(pair)
    standing: dict[tuple[str, str], tuple[Pick, Pair]] = {}
    made: list[Pick] = []
    for _ in range(80):
        pair = dice.choice(pairs)
        pick = store.record_pick(pair.pair_id, dice.choice(list(PickChoice)), rater=dice.choice(("ada", "bob", "cem")))
        standing[pick.pair_id, pick.rater] = (pick, pair)
        made.append(pick)
    store.record_rating(pairs[0].first.candidate_id, "up")
    for text in ("better", "one", "best"):  # the second is what the answer says already
        store.record_edit(pairs[0].first.candidate_id, text)
    store.record_edit(pairs[1].first.candidate_id, "one")

    found = store.statistics()
    words = Counter(pick.pick for pick, _ in standing.values())
    assert found.picks == {choice.value: words[choice] for choice in PickChoice}
    teaching = [pair for pick, pair in standing.values() if preference_of(pick, pair) is not None]
    assert found.counts.preferences["pick"] == len(teaching) == len(store.preferences()) - 1
    assert found.counts.preferences["edit"] == 1
    parts = Counter(split_of(pair.prompt) for pair in [*teaching, pairs[0]])
    assert (found.counts.train, found.counts.held_out) == (parts["train"], parts["held_out"])
    assert found.counts.picks == len(standing)
    assert found.raters == Counter(pick.rater for pick in made)
    assert found.days == Counter(pick.created_at.date() for pick in made)
    assert found.first_share == words["first"] / (words["first"] + words["second"])
    assert (found.ratings, found.edits) == ({"up": 1}, 4)
    assert store.counts() == found.counts


def test_only_the_last_thirty_days_are_listed(store: FeedbackStore) -> None:
    pair = Pair(new_id("pair"), (Message(role="user", content="Why?"),), answer("a"), answer("b"), None, "ada", START)
    store.record_pair(pair)
    for number in range(24 * 33):
        store.record_pick(pair.pair_id, PickChoice.FIRST, rater=f"rater {number % 40}")
    found = store.statistics()
    assert len(found.days) == 30
    assert min(found.days) > START.date()
    assert len(found.raters) == 20
