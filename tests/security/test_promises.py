"""What was promised to a person holds: "it does not teach" is true of the sentence, the number, the trigger and the
snapshot alike; no version becomes the champion against its verdict without a person's reason, by whichever way; the
preflight counts every stage of a recipe.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from feedback_store.erasure import Erasure
from feedback_store.errors import NotEnoughPreferences
from feedback_store.gold import GoldPair
from feedback_store.mixing import Mix
from feedback_store.preferences import HELD_OUT, TRAIN
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice, new_id
from feedback_store.selection import select
from feedback_store.store import FeedbackStore

NOW = datetime(2026, 11, 23, tzinfo=UTC)
RATERS = ("local", "ann", "ben", "cleo")


# --- a pick that teaches ---------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb") as opened:
        yield opened


def asked(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def answer(text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(new_id("cand"), "v0", text, finish_reason, {}, None, 1.0, NOW)


def a_pair(
    store: FeedbackStore, text: str, *, conversation: str | None = None, rater: str = "local", kind: str = "whole"
) -> Pair:
    """A pair that waits; `kind`: whole, cut, equal, empty or gold."""
    turn_id = None if conversation is None else store.record_turn(conversation, text).turn_id
    first, second = {
        "whole": (answer(f"{text}: one"), answer(f"{text}: another")),
        "cut": (answer(f"{text}: one"), answer(f"{text}: another", "length")),
        "equal": (answer(f"{text}: one"), answer(f"{text}: one\n")),
        "empty": (answer(f"{text}: one"), answer(" ")),
        "gold": (answer(""), answer("")),
    }[kind]
    if kind == "gold":
        pair = GoldPair(asked(text), f"{text}: right", f"{text}: wrong", "").as_pair(NOW, right_first=True)
    else:
        pair = Pair(new_id("pair"), asked(text), first, second, turn_id, rater, NOW)
    store.record_pair(pair)
    return pair


def snapshot_picks(store: FeedbackStore) -> set[str]:
    """The picks that a snapshot of now is made of, by the code that makes snapshots, with the standing of raters."""
    try:
        parts = select(
            store.training_rows(), None, Mix(), (), store.unpaired(), standing=store.standing(), redact=False
        ).parts
    except NotEnoughPreferences:  # nothing to train on: what is left are held-out rows
        rows = store.training_rows().to_pylist()
        quarantined = store.standing().quarantined
        return {row["pick_id"] for row in rows if row["pick_id"] and row["rater"] not in quarantined}
    return {row for part in (TRAIN, HELD_OUT) for row in parts[part]["pick_id"].to_pylist() if row}


def agreed(store: FeedbackStore, picks: list[Pick]) -> int:
    """The number that all tell of these picks, after making sure that all tell the same."""
    frozen = snapshot_picks(store)
    taught = {pick.pick_id for pick in picks if store.pick_preference(pick) is not None}
    assert taught == frozen
    assert store.picks_since(None) == len(frozen)
    counts = store.counts()
    assert counts.preferences["pick"] == len(frozen)
    assert store.statistics().counts == counts
    rows = {row["preference_id"] for row in store.training_rows().to_pylist() if row["pick_id"] in frozen}
    told = {found.preference_id for pick in picks if (found := store.pick_preference(pick)) is not None}
    assert told == rows
    return len(frozen)


def test_a_conversation_marked_later_lowers_the_counts_and_unmarking_raises_them(store: FeedbackStore) -> None:
    conversation = store.record_conversation("private").conversation_id
    picks = [
        store.record_pick(a_pair(store, f"private {n}", conversation=conversation).pair_id, PickChoice.FIRST)
        for n in range(3)
    ]
    picks.append(store.record_pick(a_pair(store, "public").pair_id, PickChoice.SECOND))
    assert agreed(store, picks) == 4
    store.record_learning("conversation", conversation, False, by="local")
    assert agreed(store, picks) == 1
    store.record_learning("conversation", conversation, True, by="local")
    assert agreed(store, picks) == 4


@pytest.mark.parametrize("kind", ["cut", "equal", "empty", "gold"])
def test_answers_that_cannot_teach_are_counted_nowhere(store: FeedbackStore, kind: str) -> None:
    picks = [store.record_pick(a_pair(store, kind, kind=kind).pair_id, PickChoice.FIRST)]
    assert agreed(store, picks) == 0


@pytest.mark.parametrize("who", ["rater", "asker", "quarantine", "erased"])
def test_a_person_who_must_not_teach_is_counted_nowhere(store: FeedbackStore, tmp_path: Path, who: str) -> None:
    pairs = [a_pair(store, f"question {n}", rater="ann") for n in range(4)]
    picks = [
        store.record_pick(pair.pair_id, PickChoice.FIRST, rater=rater)
        for pair, rater in zip(pairs, ("ben", "ben", "cleo", "cleo"), strict=True)
    ]
    assert agreed(store, picks) == 4
    if who == "rater":
        store.record_learning("rater", "ben", False, by="ben")
    elif who == "asker":
        store.record_learning("rater", "ann", False, by="ann")
    elif who == "quarantine":
        store.record_quarantine("ben", True, reason="picks the first", by="admin")
    else:
        erased: Erasure = store.erase("ben", tmp_path)
        assert erased.counts
        picks = picks[2:]
    assert agreed(store, picks) == (0 if who == "asker" else 2)
    if who == "quarantine":
        store.record_quarantine("ben", False, reason="a misunderstanding", by="admin")
        assert agreed(store, picks) == 4


def test_edits_and_imports_of_who_must_not_teach_are_not_counted_as_rows(store: FeedbackStore, tmp_path: Path) -> None:
    conversation = store.record_conversation("edited").conversation_id
    for n in range(2):
        turn = store.record_turn(conversation, f"edit {n}")
        kept = answer("as it was")
        store.record_candidate(kept, asked(f"edit {n}"), turn_id=turn.turn_id)
        store.record_edit(kept.candidate_id, f"better {n}", rater="ann")
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(
            f'{{"prompt": "import {n}", "chosen": "good {n}", "rejected": "bad {n}", "rater": "ben"}}\n'
            for n in range(3)
        )
    )
    assert store.record_import(str(path)).imported == 3

    def rows() -> tuple[int, int]:
        taken = [row["rater"] for row in store.training_rows().to_pylist()]
        taken = [rater for rater in taken if rater not in store.standing().quarantined]
        counts = store.counts()
        assert counts.train + counts.held_out == len(taken)
        assert sum(counts.preferences.values()) == len(taken)
        return counts.preferences["edit"], len(taken)

    edits, taken = rows()
    assert edits == 2
    named = {row["rater"] for row in store.training_rows().to_pylist()}
    store.record_learning("conversation", conversation, False, by="local")
    assert rows() == (0, taken - 2)
    store.record_learning("conversation", conversation, True, by="local")
    store.record_quarantine("ann", True, reason="odd", by="admin")
    assert rows() == (0, taken - 2)
    if "ben" in named:
        store.record_learning("rater", "ben", False, by="ben")
        assert rows() == (0, taken - 5)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_picked_marked_and_set_aside_every_number_says_the_same(store: FeedbackStore, seed: int) -> None:
    dice = random.Random(seed)
    conversations = [store.record_conversation(f"conversation {n}").conversation_id for n in range(3)]
    kinds = ["whole"] * 6 + ["cut", "equal", "gold"]
    pairs = [
        a_pair(
            store, f"question {seed} {number}", conversation=dice.choice([None, *conversations]),
            rater=dice.choice(RATERS), kind=dice.choice(kinds),
        )
        for number in range(14)
    ]  # fmt: skip
    # One rater a pair: two on the same answers may contradict each other, and that is the mix's matter.
    judge = {pair.pair_id: dice.choice(RATERS) for pair in pairs}
    picks: list[Pick] = []
    numbers = []
    marked: list[tuple[str, str]] = []

    def mark(what: str, whom: str, *, apart: bool) -> None:
        if what == "quarantine":
            store.record_quarantine(whom, apart, reason="a test", by="admin")
        else:
            store.record_learning(what, whom, not apart, by="local")

    for number in range(36):
        step = "pick" if number < 8 else dice.choice(["pick", "pick", "mark"])
        if step == "pick":
            pair_id = dice.choice(pairs).pair_id
            pick = dice.choice([PickChoice.FIRST, PickChoice.SECOND, PickChoice.FIRST, *PickChoice])
            picks.append(store.record_pick(pair_id, pick, rater=judge[pair_id]))
        elif marked and dice.random() < 0.6:
            mark(*marked.pop(dice.randrange(len(marked))), apart=False)
        else:
            what = dice.choice(["conversation", "rater", "quarantine"])
            whom = dice.choice(conversations if what == "conversation" else sorted({pick.rater for pick in picks}))
            if (what, whom) not in marked:
                mark(what, whom, apart=True)
                marked.append((what, whom))
        numbers.append(agreed(store, picks))
    assert len(set(numbers)) > 3, "the test moved nothing"
    assert any(later < earlier for earlier, later in pairwise(numbers)), "nothing was ever taken back"
