"""Pairs: a fair blind order, the answer that stays, and the sentence after the pick."""

from __future__ import annotations

import random

import pytest

from chat_app.pairs import sentence_after, settle, shuffle
from feedback_store.records import PickChoice


def test_the_order_is_random_fair_and_reproducible() -> None:
    orders = [shuffle(("a", "b"), random.Random(seed)) for seed in range(1000)]
    assert set(orders) == {("a", "b"), ("b", "a")}
    assert 430 < orders.count(("a", "b")) < 570
    assert shuffle((1, 2), random.Random(5)) == shuffle((1, 2), random.Random(5))


@pytest.mark.parametrize(("pick", "index"), [("first", 0), ("second", 1), ("tie", 0), ("both_bad", 0), ("skip", 0)])
def test_the_conversation_goes_on_with(pick: str, index: int) -> None:
    assert settle(PickChoice(pick)) == index


def after(pick: PickChoice, *, preference: bool, collected: int = 14, every: int = 50) -> str:
    return sentence_after(pick, ("v3", "v4"), preference=preference, collected=collected, every=every)


def test_a_pick_that_counts() -> None:
    assert after(PickChoice.SECOND, preference=True) == (
        "Answer 1 came from v3, answer 2 from v4. Saved, thank you: 14 of 50 until the next retrain."
    )


def test_both_answers_from_one_version() -> None:
    sentence = sentence_after(PickChoice.FIRST, ("v0", "v0"), preference=True, collected=1, every=0)
    assert sentence == "Both answers came from v0. Saved, thank you: 1 pick collected for the next retrain."


@pytest.mark.parametrize(
    ("pick", "words"),
    [
        (PickChoice.TIE, "Saved as a tie, which does not count: 14 of 50"),
        (PickChoice.BOTH_BAD, "Saved as both bad, which does not count: 14 of 50"),
        (PickChoice.SKIP, "Skipped, nothing to learn from it: 14 of 50"),
        (PickChoice.FIRST, "Saved, but it does not count, because an answer was cut off"),
    ],
)
def test_a_pick_that_does_not_count_says_why(pick: PickChoice, words: str) -> None:
    assert words in after(pick, preference=False)


def test_enough_picks() -> None:
    assert "50 picks collected, enough for the next retrain." in after(PickChoice.FIRST, preference=True, collected=50)
