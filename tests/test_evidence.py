"""What people said becomes training rows: picks, rewrites, second tries, thumbs – and nothing of those who said no."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from feedback_store import tables
from feedback_store.preferences import RETRY_WEIGHT
from feedback_store.records import Candidate, Message, Pair, PickChoice, new_id
from feedback_store.store import FeedbackStore

_SECONDS = count()


def clock() -> datetime:
    return datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=next(_SECONDS))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb", clock) as opened:
        yield opened


def prompt(text: str = "Why?") -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def answer(text: str, finish_reason: str = "stop", version: str = "v0") -> Candidate:
    return Candidate(new_id("cand"), version, text, finish_reason, {}, 1, 5.0, clock())


def keep_answer(store: FeedbackStore, text: str, rater: str = "ada", finish_reason: str = "stop") -> str:
    candidate = answer(text, finish_reason)
    store.record_candidate(candidate, prompt(), rater=rater)
    return candidate.candidate_id


def keep_pair(
    store: FeedbackStore, first: str = "good", second: str = "bad", rater: str = "ada", turn_id: str | None = None
) -> str:
    pair = Pair(new_id("pair"), prompt(), answer(first), answer(second, version="v1"), turn_id, rater, clock())
    store.record_pair(pair)
    return pair.pair_id


def rows(store: FeedbackStore) -> list[tuple[str, str, str, str | None]]:
    return [(row.source, row.chosen, row.rejected, row.rater) for row in store.preferences()]


def labels(store: FeedbackStore) -> list[tuple[str, str, bool, str | None]]:
    return [(one.source, one.completion, one.label, one.rater) for one in store.unpaired()]


def test_a_pick_is_a_row_with_its_provenance(store: FeedbackStore) -> None:
    pick = store.record_pick(keep_pair(store), PickChoice.SECOND, rater="ada")
    (row,) = store.preferences()
    assert (row.chosen, row.rejected, row.weight, row.versions) == ("bad", "good", 1.0, ("v1", "v0"))
    assert (row.source, row.rater, row.pick_id, row.practice) == ("pick", "ada", pick.pick_id, None)
    assert row == store.pick_preference(pick)
    assert store.training_rows().schema == tables.ROWS


def test_the_later_word_of_a_rater_counts_and_each_rater_has_one(store: FeedbackStore) -> None:
    pair_id = keep_pair(store)
    store.record_pick(pair_id, PickChoice.FIRST, rater="ada")
    store.record_pick(pair_id, PickChoice.SECOND, rater="bob")
    store.record_pick(pair_id, PickChoice.SECOND, rater="ada")
    assert sorted(rows(store)) == [("pick", "bad", "good", "ada"), ("pick", "bad", "good", "bob")]
    store.record_pick(pair_id, PickChoice.TIE, rater="ada")
    assert rows(store) == [("pick", "bad", "good", "bob")]


def test_a_rewrite_is_better_than_what_it_rewrites(store: FeedbackStore) -> None:
    candidate_id = keep_answer(store, "so-so")
    store.record_edit(candidate_id, "first try", rater="ada")
    store.record_edit(candidate_id, "much better", rater="ada")
    store.record_edit(candidate_id, "so-so", rater="bob")  # changes nothing
    store.record_edit(keep_answer(store, "cut o", finish_reason="length"), "cut off no more")
    store.record_edit(keep_answer(store, "an old answer"), "newer")
    assert rows(store) == [
        ("edit", "much better", "so-so", "ada"),
        ("edit", "newer", "an old answer", store.person_id("local")),
    ]


def test_an_answer_kept_without_its_prompt_teaches_nothing(store: FeedbackStore) -> None:
    candidate = answer("whatever")
    store.record_candidate(candidate)
    store.record_edit(candidate.candidate_id, "better")
    store.record_rating(candidate.candidate_id, "up")
    assert rows(store) == labels(store) == []


def test_a_second_try_counts_weakly_once_the_conversation_went_on_with_it(store: FeedbackStore) -> None:
    conversation = store.record_conversation(rater="ada").conversation_id
    turn = store.record_turn(conversation, "Why?")
    for text in ("first", "second", "third"):
        candidate = answer(text)
        store.record_candidate(candidate, prompt(), turn_id=turn.turn_id, rater="ada")
        store.record_answer(turn.turn_id, candidate.candidate_id)
    assert rows(store) == []
    store.record_turn(conversation, "And then?")
    (row,) = store.preferences()
    assert (row.source, row.chosen, row.rejected, row.weight) == ("retry", "third", "second", RETRY_WEIGHT)


def test_what_a_pick_settled_is_no_second_try(store: FeedbackStore) -> None:
    conversation = store.record_conversation(rater="ada").conversation_id
    turn = store.record_turn(conversation, "Why?")
    for text in ("first", "second"):
        candidate = answer(text)
        store.record_candidate(candidate, prompt(), turn_id=turn.turn_id, rater="ada")
        store.record_answer(turn.turn_id, candidate.candidate_id)
    keep_pair(store, turn_id=turn.turn_id)
    store.record_turn(conversation, "And then?")
    assert rows(store) == []


def test_thumbs_and_both_bad_are_labels_and_no_rows(store: FeedbackStore) -> None:
    good, poor = keep_answer(store, "fine"), keep_answer(store, "poor")
    store.record_rating(good, "down", rater="ada")
    store.record_rating(good, "up", rater="ada")
    store.record_rating(good, "down", rater="bob")
    store.record_rating(poor, "down", rater="ada")
    store.record_rating(keep_answer(store, "half", finish_reason="cancelled"), "up")
    store.record_pick(keep_pair(store, "bad one", "bad two"), PickChoice.BOTH_BAD, rater="cem")
    assert labels(store)[:3] == [
        ("rating", "fine", True, "ada"), ("rating", "fine", False, "bob"), ("rating", "poor", False, "ada"),
    ]  # fmt: skip
    assert sorted(labels(store)[3:]) == [("pick", "bad one", False, "cem"), ("pick", "bad two", False, "cem")]
    assert rows(store) == []


def test_who_asked_not_to_be_learned_from_is_left_out_until_they_change_their_mind(store: FeedbackStore) -> None:
    store.record_pick(keep_pair(store), PickChoice.FIRST, rater="ada")
    store.record_pick(keep_pair(store, "x", "y", rater="bob"), PickChoice.FIRST, rater="bob")
    store.record_edit(keep_answer(store, "plain", rater="ada"), "rewritten", rater="ada")
    store.record_rating(keep_answer(store, "plain", rater="ada"), "up", rater="ada")
    store.record_learning("rater", "ada", False, by="ada")
    assert rows(store) == [("pick", "x", "y", "bob")]
    assert labels(store) == []
    store.record_learning("rater", "ada", True, by="ada")
    assert len(rows(store)) == 3
    assert len(labels(store)) == 1


def test_what_others_said_of_the_words_of_somebody_who_refuses_is_left_out_too(store: FeedbackStore) -> None:
    store.record_pick(keep_pair(store, rater="ada"), PickChoice.FIRST, rater="bob")
    store.record_edit(keep_answer(store, "plain", rater="ada"), "rewritten", rater="bob")
    assert len(rows(store)) == 2
    store.record_learning("rater", "ada", False, by="ada")
    assert rows(store) == []


def test_a_conversation_that_must_not_teach_does_not(store: FeedbackStore) -> None:
    conversations = [store.record_conversation(rater="ada").conversation_id for _ in range(2)]
    for conversation, text in zip(conversations, ("private", "open"), strict=True):
        turn = store.record_turn(conversation, "Why?")
        pair_id = keep_pair(store, f"{text} one", f"{text} two", turn_id=turn.turn_id)
        store.record_pick(pair_id, PickChoice.FIRST, rater="ada")
        candidate = answer(f"{text} answer")
        store.record_candidate(candidate, prompt(), turn_id=turn.turn_id, rater="ada")
        store.record_edit(candidate.candidate_id, f"{text} rewrite", rater="ada")
        store.record_rating(candidate.candidate_id, "up", rater="ada")
    assert store.learns_from("conversation", conversations[0])
    store.record_learning("conversation", conversations[0], False, by="ada")
    assert not store.learns_from("conversation", conversations[0])
    assert [chosen for _, chosen, _, _ in rows(store)] == ["open one", "open rewrite"]
    assert [completion for _, completion, _, _ in labels(store)] == ["open answer"]


def test_votes_name_the_two_answers_without_their_order(store: FeedbackStore) -> None:
    for first, second, pick, rater in (
        ("x", "y", PickChoice.FIRST, "ada"),
        ("y", "x", PickChoice.FIRST, "bob"),
        ("y", "x", PickChoice.BOTH_BAD, "cem"),
        ("x", "z", PickChoice.TIE, "ada"),
        ("x", "y", PickChoice.SKIP, "dia"),
        ("same", "same", PickChoice.FIRST, "ada"),
    ):
        store.record_pick(keep_pair(store, first, second), pick, rater=rater)
    votes = store.votes()
    assert [(vote.rater, vote.choice) for vote in votes] == [
        ("ada", "a"), ("bob", "b"), ("cem", "both_bad"), ("ada", "tie"),
    ]  # fmt: skip
    assert len({vote.item for vote in votes[:3]}) == 1
    assert votes[3].item != votes[0].item
