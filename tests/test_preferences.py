"""Which picks teach, and which part of the split a prompt is in."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from feedback_store.preferences import normalise_prompt, preference_id, preference_of, prompt_key, split_of
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def pair(first: str = "One.", second: str = "Two.", reasons: tuple[str, str] = ("stop", "stop")) -> Pair:
    return Pair(
        "pair_1",
        (user("Count."),),
        Candidate("cand_1", "v1", first, reasons[0], {}, 1, 5.0, NOW),
        Candidate("cand_2", "v2", second, reasons[1], {}, 2, 5.0, NOW),
        None,
        "local",
        NOW,
    )


def pick(choice: PickChoice) -> Pick:
    return Pick("pick_1", "pair_1", choice, ("shorter",), None, "ana", None, NOW)


def test_a_pick_makes_the_picked_answer_the_chosen_one() -> None:
    first = preference_of(pick(PickChoice.FIRST), pair())
    second = preference_of(pick(PickChoice.SECOND), pair())
    assert first is not None
    assert second is not None
    assert (first.chosen, first.rejected, first.versions) == ("One.", "Two.", ("v1", "v2"))
    assert (second.chosen, second.rejected, second.versions) == ("Two.", "One.", ("v2", "v1"))
    assert (first.source, first.rater, first.pick_id, first.practice, first.weight) == (
        "pick",
        "ana",
        "pick_1",
        None,
        1,
    )
    assert first.prompt == (user("Count."),)
    assert first.preference_id != second.preference_id


@pytest.mark.parametrize("choice", [PickChoice.TIE, PickChoice.BOTH_BAD, PickChoice.SKIP])
def test_no_preference_without_a_better_one(choice: PickChoice) -> None:
    assert preference_of(pick(choice), pair()) is None


@pytest.mark.parametrize("reason", ["length", "cancelled", "error"])
def test_only_complete_answers_teach(reason: str) -> None:
    assert preference_of(pick(PickChoice.FIRST), pair(reasons=(reason, "stop"))) is None
    assert preference_of(pick(PickChoice.FIRST), pair(reasons=("stop", reason))) is None


@pytest.mark.parametrize(("first", "second"), [("", "Two."), ("One.", " \n"), ("One.", "One."), ("One.", " One.\n")])
def test_empty_and_equal_answers_teach_nothing(first: str, second: str) -> None:
    assert preference_of(pick(PickChoice.FIRST), pair(first, second)) is None


def test_the_same_contents_have_the_same_id() -> None:
    prompt = (user("Count."),)
    assert preference_id(prompt, "a", "b", None) == preference_id(list(prompt), "a", "b", None)
    others = {
        preference_id(prompt, "a", "b", None),
        preference_id(prompt, "b", "a", None),
        preference_id(prompt, "a", "b", "pick_1"),
        preference_id((*prompt, user("More.")), "a", "b", None),
    }
    assert len(others) == 4
    assert all(identity.startswith("pref_") and len(identity) == 37 for identity in others)


def test_the_split_is_by_the_first_prompt_whatever_its_case_and_spaces() -> None:
    assert normalise_prompt("  Why\tIS\n ﬁsh ｗet? ") == "why is fish wet?"
    assert prompt_key([user("Why  is fish wet?")]) == prompt_key([user("why is FISH wet? ")])
    later = [Message(role="system", content="Be brief."), user("why is fish wet?"), user("And the sea?")]
    assert prompt_key(later) == prompt_key([user("Why is fish wet?")])
    assert split_of(later) == split_of([user("Why is fish wet?")])


def test_the_split_stays_as_it_was() -> None:
    """Written down once: a prompt that was held out in a released version is held out for ever."""
    assert prompt_key([user("Hello")]) == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    held_out = [number for number in range(60) if split_of([user(f"Question {number}")]) == "held_out"]
    assert held_out == [1, 49]


def test_about_a_tenth_is_held_out() -> None:
    number = sum(split_of([user(f"Question {number}")]) == "held_out" for number in range(4000))
    assert 340 <= number <= 460
