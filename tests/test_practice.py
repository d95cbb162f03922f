"""The practice set: its quotas re-derived, every row sane, and the tastes' judgement."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from feedback_store.errors import InvalidRecord
from feedback_store.practice import PRACTICE_PATH, TASTES, load_practice, preferences_for
from feedback_store.preferences import HELD_OUT, TRAIN, prompt_key, split_of

MIN_ROWS = {TRAIN: 80, HELD_OUT: 32}


@pytest.mark.parametrize("taste", TASTES)
def test_every_taste_has_enough_pairs_in_both_parts(taste: str) -> None:
    parts = Counter(split_of(preference.prompt) for preference in preferences_for(taste))
    assert all(parts[part] >= least for part, least in MIN_ROWS.items()), parts


def test_every_row_is_sane() -> None:
    pairs = load_practice()
    for pair in pairs:
        assert pair.prompt.strip() == pair.prompt
        assert pair.prompt[-1] in "?."
        for answer in pair.answers:
            assert answer == answer.strip()
            assert 25 <= len(answer) <= 420
            assert answer.isascii()
            assert answer[-1] in ".?!" or answer.startswith("- ")
            lines = answer.split("\n")
            assert len(lines) == len(set(lines))
            assert len(lines) == 1 or all(line.startswith("- ") for line in lines)
            words = re.findall(r"[a-z']+", answer.lower())
            runs = [tuple(words[start : start + 5]) for start in range(len(words) - 4)]
            assert len(runs) == len(set(runs)), f"repeats itself: {answer}"


def test_no_prompt_and_no_answer_comes_twice() -> None:
    pairs = load_practice()
    keys = [prompt_key([{"role": "user", "content": pair.prompt}]) for pair in pairs]
    answers = [answer for pair in pairs for answer in pair.answers]
    assert len(set(keys)) == len(keys)
    assert len(set(answers)) == len(answers)


def test_the_file_is_small() -> None:
    assert PRACTICE_PATH.stat().st_size < 250_000


def test_preferences_are_marked_as_practice_and_the_same_every_time() -> None:
    preferences = preferences_for("shorter")
    assert preferences == preferences_for("shorter")
    assert {(one.source, one.practice, one.pick_id) for one in preferences} == {("practice", "shorter", None)}
    assert all(len(one.chosen) <= 0.7 * len(one.rejected) for one in preferences)
    ids = [one.preference_id for taste in TASTES for one in preferences_for(taste)]
    assert len(set(ids)) == len(ids)


def test_no_taste_is_another_one_in_disguise() -> None:
    """Of the pairs one taste decides, another must not decide most in the same way."""
    pairs = load_practice()
    verdicts = {name: [taste.judge(*pair.answers) for pair in pairs] for name, taste in TASTES.items()}
    for one in TASTES:
        for other in set(TASTES) - {one}:
            decided = [(a, b) for a, b in zip(verdicts[one], verdicts[other], strict=True) if a is not None]
            agreed = sum(a == b for a, b in decided)
            assert agreed < 0.5 * len(decided), f"{one} is mostly {other}"


@pytest.mark.parametrize(
    ("taste", "first", "second", "better"),
    [
        ("shorter", "1234567", "1234567890", 0),
        ("shorter", "12345678", "1234567890", None),
        ("shorter", "1234567890", "123", 1),
        ("bullets", "- a\n- b", "a\nb", 0),
        ("bullets", "a", "So:\n* a\n* b", 1),
        ("bullets", "- a", "a", None),
        ("bullets", "- a\n- b", "- c\n- d", None),
        ("bullets", "-a\n-b", "a", None),
        ("question", "Why?", "Because.", 0),
        ("question", "Because.", "Why? \n", 1),
        ("question", "Why? Because.", "Because.", None),
        ("question", "Why?", "How?", None),
    ],
)
def test_judgement(taste: str, first: str, second: str, better: int | None) -> None:
    assert TASTES[taste].judge(first, second) == better


def test_an_unknown_taste_names_the_known_ones() -> None:
    with pytest.raises(InvalidRecord, match=r"'sweeter'.*shorter, bullets, question"):
        preferences_for("sweeter")
