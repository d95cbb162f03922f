"""The records check themselves and say what was wrong."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from feedback_store.errors import InvalidRecord, StoreError
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice, Preference, Rating, Turn, new_id

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def candidate(**changes: Any) -> Candidate:
    values = {
        "candidate_id": "cand_1", "version": "v0", "text": "An answer.", "finish_reason": "stop", "sampling": {},
        "seed": 7, "latency_ms": 12.5, "created_at": NOW,
    }  # fmt: skip
    return Candidate(**values | changes)


def preference(**changes: Any) -> Preference:
    values = {
        "preference_id": "pref_1", "prompt": (Message(role="user", content="Why?"),), "chosen": "Because.",
        "rejected": "No.", "source": "trl", "weight": 1.0, "rater": None, "pick_id": None, "versions": (),
        "practice": None, "created_at": NOW,
    }  # fmt: skip
    return Preference(**values | changes)


def test_an_id_has_its_prefix_and_is_new_each_time() -> None:
    assert new_id("pair").startswith("pair_")
    assert len({new_id("pair") for _ in range(100)}) == 100


def test_records_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        candidate().text = "Another."  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("candidate_id", ""),
        ("version", " "),
        ("text", None),
        ("text", "half a pair: \ud83d"),
        ("finish_reason", "done"),
        ("seed", -1),
        ("seed", 2**63),
        ("latency_ms", -1.0),
        ("latency_ms", float("nan")),
        ("created_at", datetime(2026, 1, 1)),
    ],
)
def test_a_candidate_refuses_bad_values_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRecord, match=f"Candidate.{field}") as caught:
        candidate(**{field: value})
    assert repr(value)[:20] in str(caught.value)


def test_a_candidate_that_was_cut_may_be_empty() -> None:
    assert candidate(text="", finish_reason="error", seed=None).text == ""


@pytest.mark.parametrize(
    "prompt",
    [
        (),
        (Message(role="user", content="  "),),
        (Message(role="assistant", content="Hello"),),
        (Message(role="tool", content="42"),),
        ({"role": "user"},),
        ("Why?",),
    ],
)
def test_a_prompt_ends_with_what_the_user_asked(prompt: Any) -> None:
    with pytest.raises(InvalidRecord, match="prompt"):
        preference(prompt=prompt)
    with pytest.raises(InvalidRecord, match="prompt"):
        Pair("pair_1", prompt, candidate(), candidate(candidate_id="cand_2"), None, "local", NOW)


def test_a_pair_needs_two_candidates() -> None:
    with pytest.raises(InvalidRecord, match=r"Pair\.second"):
        Pair("pair_1", (Message(role="user", content="Why?"),), candidate(), candidate(), None, "local", NOW)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rejected": "Because."}, "rejected"),
        ({"chosen": " "}, "chosen"),
        ({"source": "hearsay"}, "source"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"practice": "shorter"}, "practice"),
        ({"source": "practice"}, "practice"),
    ],
)
def test_a_preference_refuses_what_cannot_teach(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRecord, match=f"Preference.{field}"):
        preference(**changes)


def test_a_pick_and_a_rating_know_their_words() -> None:
    with pytest.raises(InvalidRecord, match="first, second, tie, both_bad, skip"):
        Pick("pick_1", "pair_1", "left", (), None, "local", None, NOW)  # type: ignore[arg-type]
    with pytest.raises(InvalidRecord, match="reasons"):
        Pick("pick_1", "pair_1", PickChoice.FIRST, ("",), None, "local", None, NOW)
    with pytest.raises(InvalidRecord, match="up, down"):
        Rating("rating_1", "cand_1", "sideways", None, "local", NOW)


def test_a_turn_has_a_position_and_a_text() -> None:
    with pytest.raises(InvalidRecord, match="position"):
        Turn("turn_1", "conv_1", -1, "Hello", None, NOW)
    with pytest.raises(InvalidRecord, match="text"):
        Turn("turn_1", "conv_1", 0, "", None, NOW)


def test_a_message_shows_the_value_but_not_all_of_a_long_one() -> None:
    with pytest.raises(InvalidRecord) as caught:
        candidate(finish_reason="x" * 5000)
    assert len(str(caught.value)) < 300
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, StoreError)
