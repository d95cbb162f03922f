"""A batch of picks is what the same picks are one after the other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from feedback_store.errors import Conflict, NotFound, StoreError
from feedback_store.picks import record_picks
from feedback_store.preferences import preference_of, split_of
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice, new_id
from feedback_store.store import FeedbackStore

MOMENT = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb") as opened:
        yield opened


def answer(text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(new_id("cand"), "v0", text, finish_reason, {"top_p": 0.9}, 7, 12.5, MOMENT)


def recorded(store: FeedbackStore, first: str = "One.", prompt: str = "Count.", finish_reason: str = "stop") -> Pair:
    messages = (Message(role="user", content=prompt),)
    pair = Pair(new_id("pair"), messages, answer(first), answer("Two.", finish_reason), None, "local", MOMENT)
    store.record_pair(pair)
    return pair


def word(
    pair: Pair | str, pick: str = "first", rater: str = "ana", key: str | None = None, reasons: Sequence[str] = ()
) -> Pick:
    pair_id = pair if isinstance(pair, str) else pair.pair_id
    return Pick(new_id("pick"), pair_id, PickChoice(pick), tuple(reasons), None, rater, key, MOMENT)


def recorded_together(store: FeedbackStore, words: Sequence[Pick]) -> list[Pick | StoreError]:
    with store._database.write() as cursor:
        return record_picks(cursor, words)


def stored(store: FeedbackStore) -> dict[str, tuple[object, ...]]:
    """What stands in ``picks`` of each pick, by its id; event numbers may have gaps."""
    with store._database.read() as cursor:
        found = cursor.execute("SELECT * EXCLUDE (event) FROM picks ORDER BY event").fetchall()
    return {row[0]: row for row in found}


def supersessions(store: FeedbackStore) -> list[tuple[object, ...]]:
    with store._database.read() as cursor:
        return cursor.execute(
            "SELECT pick, part, superseded_pick, superseded_part, number FROM picks JOIN pick_words USING (pick_id) "
            "ORDER BY event"
        ).fetchall()


def test_a_batch_keeps_every_word_with_what_it_teaches(store: FeedbackStore) -> None:
    held_out = next(text for text in map(str, range(1000)) if split_of([Message(role="user", content=text)]) != "train")
    learned, judged = recorded(store), recorded(store, prompt=held_out)
    cut, equal = recorded(store, finish_reason="length"), recorded(store, first="Two.")
    words = [word(pair) for pair in (learned, judged, cut, equal)]
    words += [word(learned, "tie", "ben"), word(judged, "second", "ben", reasons=["tone", "safer"])]
    assert recorded_together(store, words) == words
    found = stored(store)
    assert list(found) == [kept.pick_id for kept in words]
    with store._database.read() as cursor:
        parts = dict(cursor.execute("SELECT pick_id, part FROM picks").fetchall())
        taught = dict(cursor.execute("SELECT pick_id, preference_id FROM picks").fetchall())
        reasons = dict(cursor.execute("SELECT pick_id, reasons FROM picks").fetchall())
    assert [parts[kept.pick_id] for kept in words] == ["train", "held_out", None, None, None, "held_out"]
    for kept, pair in zip(words, [learned, judged, cut, equal, learned, judged], strict=True):
        preference = preference_of(kept, pair)
        assert taught[kept.pick_id] == (preference.preference_id if preference else None)
        assert tuple(reasons[kept.pick_id]) == kept.reasons


def test_a_key_is_one_pick_within_a_batch_too(store: FeedbackStore) -> None:
    pair, other = recorded(store), recorded(store)
    first, again = word(pair, key="k"), word(pair, key="k")
    outcomes = recorded_together(store, [first, again, word(other, key="k"), word(pair, "tie", key="k")])
    assert outcomes[:2] == [first, first]
    assert all(isinstance(outcome, Conflict) for outcome in outcomes[2:])
    assert recorded_together(store, [word(pair, key="k"), word(pair, key="new")])[0] == first
    assert len(stored(store)) == 2


def test_a_key_of_a_refused_word_is_free(store: FeedbackStore) -> None:
    pair = recorded(store)
    refused, kept = recorded_together(store, [word("nowhere", key="k"), word(pair, key="k")])
    assert isinstance(refused, NotFound)
    assert isinstance(kept, Pick)
    assert len(stored(store)) == 1


def test_a_changed_mind_supersedes_across_batches_and_within_one(store: FeedbackStore) -> None:
    pair, other = recorded(store), recorded(store)
    first = word(pair)
    recorded_together(store, [first, word(other)])
    second, third, fresh = word(pair, "second"), word(pair, "skip"), word(other, rater="ben")
    assert recorded_together(store, [second, fresh, third]) == [second, fresh, third]
    part = split_of(pair.prompt)
    assert supersessions(store) == [
        ("first", part, None, None, 0),
        ("first", part, None, None, 0),
        ("second", part, "first", part, 1),
        ("first", part, None, None, 0),
        ("skip", None, "second", part, 2),
    ]
    with store._database.read() as cursor:
        links = cursor.execute("SELECT pick_id, supersedes FROM picks WHERE supersedes IS NOT NULL ORDER BY event")
        assert links.fetchall() == [(second.pick_id, first.pick_id), (third.pick_id, second.pick_id)]
        standing = cursor.execute("SELECT pick_id FROM standing_picks").fetchall()
    assert {pick_id for (pick_id,) in standing} & {first.pick_id, second.pick_id} == set()
    assert len(standing) == 3


def test_random_words_in_batches_are_what_they_are_one_by_one(tmp_path: Path) -> None:
    chance = random.Random(0)
    with FeedbackStore.open(tmp_path / "a.duckdb") as batched, FeedbackStore.open(tmp_path / "b.duckdb") as single:
        pairs = [recorded(batched, first=f"One {number}.") for number in range(6)]
        for pair in pairs:
            single.record_pair(pair)
        for _ in range(12):
            words = [
                word(
                    chance.choice([*(pair.pair_id for pair in pairs), "nowhere"]),
                    chance.choice(list(PickChoice)),
                    chance.choice(["ana", "ben", "cy"]),
                    chance.choice([None, *(f"key {number}" for number in range(40))]),
                )
                for _ in range(chance.randint(1, 20))
            ]
            together = recorded_together(batched, words)
            alone = [outcome for one in words for outcome in recorded_together(single, [one])]
            assert list(map(str, together)) == list(map(str, alone))
        assert stored(batched) == stored(single)
        assert supersessions(batched) == supersessions(single)
        for table in ("pick_keys", "pick_words"):
            tables = []
            for store in (batched, single):
                with store._database.read() as cursor:
                    tables.append(cursor.execute(f"FROM {table} ORDER BY ALL").fetchall())
            assert tables[0] == tables[1]


def test_a_word_that_cannot_be_stored_fails_alone(store: FeedbackStore) -> None:
    pair = recorded(store)
    with pytest.raises(duckdb.InvalidInputException):
        store.record_pick(pair.pair_id, PickChoice.FIRST, reasons=["half a surrogate \ud800"])
    assert store.record_pick(pair.pair_id, PickChoice.FIRST).pair_id == pair.pair_id
    assert len(stored(store)) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 256])
def test_batches_of_every_size_find_what_is_there(store: FeedbackStore, size: int) -> None:
    pairs = [recorded(store, first=f"One {number}.") for number in range(3)]
    words = [word(pairs[number % 3], rater=f"rater {number}", key=f"key {number}") for number in range(size)]
    assert recorded_together(store, words) == words
    assert (
        recorded_together(store, [word(one.pair_id, "first", one.rater, one.idempotency_key) for one in words]) == words
    )
    assert len(stored(store)) == size
