"""Agreement against worked examples, and who contradicts whom."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable

import pytest

from feedback_store.agreement import CHOICES, Agreement, Vote, agreement, contradictions
from feedback_store.errors import InvalidRecord
from feedback_store.records import Message

COUNT = (Message(role="user", content="Count."),)


def votes(rows: Iterable[tuple[str, str, str]]) -> list[Vote]:
    """Votes from (item, rater, choice), each an event later than the one before."""
    return [Vote(item, rater, choice, event) for event, (item, rater, choice) in enumerate(rows)]


def table(**raters: str) -> list[Vote]:
    """Votes from one string a rater: a, b, t for a tie, x for both bad, a dot for none; the position is the item."""
    names = {"a": "a", "b": "b", "t": "tie", "x": "both_bad"}
    rows = [
        (str(at), rater, names[mark]) for rater, row in raters.items() for at, mark in enumerate(row) if mark != "."
    ]
    return votes(rows)


def test_alpha_is_that_of_two_observers_without_gaps() -> None:
    """Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section A: binary data, 0.095."""
    told = agreement(table(ana="abaaaaaaba", ben="bbbaabaaaa"))
    assert told.alpha == pytest.approx(0.095, abs=0.0005)
    assert (told.items, told.votes, told.percent) == (10, 20, 60.0)


def test_alpha_is_that_of_many_observers_with_gaps() -> None:
    """The example of the article "Krippendorff's alpha" in Wikipedia: three coders, four values, nominal 0.691."""
    told = agreement(table(ana=".....txabaatt.t", ben="a.battxt.......", cem="..batxx.baatt.x"))
    assert told.alpha == pytest.approx(0.691, abs=0.0005)
    assert (told.items, told.votes, told.kappa) == (12, 26, None)


def test_the_library_gives_krippendorffs_canonical_example() -> None:
    """Krippendorff (2011), section C: four observers, five nominal values, gaps, 0.743."""
    from nltk.metrics.agreement import AnnotationTask

    rows = {"A": "123321412...", "B": "1233224125.3", "C": ".3332342251.", "D": "12332441251."}
    data = [(rater, str(at), value) for rater, row in rows.items() for at, value in enumerate(row) if value != "."]
    assert AnnotationTask(data=data).alpha() == pytest.approx(0.743, abs=0.0005)


def test_alpha_takes_the_choices_as_names_without_an_order() -> None:
    """By hand: 16 values, 4 of each choice but 5 ties and 3 both bad; one of 8 items apart."""
    told = agreement(table(ana="abtxabtx", ben="abtxabtt"))
    apart, expected = 2 / 16, 1 - (4 * 3 + 4 * 3 + 5 * 4 + 3 * 2) / (16 * 15)
    assert told.alpha == pytest.approx(1 - apart / expected)


def test_kappa_is_cohens_of_two_raters() -> None:
    """20 both a, 15 both b, 5 and 10 apart: observed 0.7, expected 0.5·0.6 + 0.5·0.4 = 0.5, kappa 0.4."""
    told = agreement(table(ana="a" * 20 + "a" * 5 + "b" * 10 + "b" * 15, ben="a" * 20 + "b" * 5 + "a" * 10 + "b" * 15))
    assert told.kappa == pytest.approx(0.4)
    assert told.percent == pytest.approx(70.0)


def test_kappa_is_not_told_of_three_raters() -> None:
    told = agreement(table(ana="aabb", ben="aabb", cem="ab.."))
    assert told.kappa is None
    assert told.alpha is not None


def test_percent_counts_the_comparisons_within_an_item() -> None:
    assert agreement(table(ana="a", ben="a", cem="b")).percent == pytest.approx(100 / 3)


@pytest.mark.parametrize("cast", [[], table(ana="abba"), table(ana="ab..", ben="..ba")])
def test_without_a_shared_item_nothing_is_told(cast: list[Vote]) -> None:
    assert agreement(cast) == Agreement(
        0, 0, None, None, None, "No pair was rated by two people yet: agreement cannot be told."
    )


def test_one_choice_only_leaves_the_coefficients_undefined() -> None:
    told = agreement(table(ana="ttt.", ben="ttta"))
    assert (told.items, told.votes, told.percent, told.kappa, told.alpha) == (3, 6, 100.0, None, None)
    assert told.sentence == (
        "2 people judged 3 pairs in common and always chose 'tie': without another choice alpha and kappa say nothing."
    )


@pytest.mark.parametrize(
    ("ana", "ben", "meaning"),
    [
        ("abababababab", "abababababab", "alpha 1.000: reliable (0.8 or more)."),
        ("aaaaaaabbbbbbb", "aaaaaabbbbbbbb", "alpha 0.862: reliable (0.8 or more)."),
        ("aaaaaabbbbbb", "aaaaabbbbbba", "alpha 0.681: good for tentative conclusions only (0.667 to 0.8)."),
        ("aaaabbbb", "aaabbbba", "alpha 0.531: too little to rely on (below 0.667); agree first on what makes"),
        ("aabb", "bbaa", "alpha -0.750: no better than chance (0 or less); agree first on what makes"),
    ],
)
def test_the_sentence_reads_alpha_with_krippendorffs_thresholds(ana: str, ben: str, meaning: str) -> None:
    assert meaning in agreement(table(ana=ana, ben=ben)).sentence


def test_the_sentence_counts_people_and_pairs() -> None:
    sentence = agreement(table(ana="ab", ben="a.", cem=".a")).sentence
    assert sentence.startswith("3 people judged 2 pairs in common and agree in 50.0% of the comparisons, alpha ")
    assert agreement(table(ana="a", ben="b")).sentence.startswith("2 people judged 1 pair in common and agree in 0.0%")


def test_the_last_vote_of_a_rater_on_an_item_counts() -> None:
    changed = [*table(ana="aab", ben="aab"), Vote("0", "ana", "b", 90), Vote("1", "ana", "b", -1)]
    assert agreement(changed).percent == pytest.approx(200 / 3)
    assert agreement(reversed(changed)) == agreement(changed)


def test_no_order_of_the_votes_changes_the_result() -> None:
    draw = random.Random(7)
    cast = votes((str(draw.randrange(40)), f"rater {draw.randrange(6)}", draw.choice(CHOICES)) for _ in range(300))
    told = agreement(cast)
    draw.shuffle(cast)
    assert agreement(cast) == told
    assert told.items > 30


def test_opposite_sides_are_a_contradiction() -> None:
    cast = votes(
        [
            ("one", "ana", "a"), ("one", "ben", "b"), ("one", "cem", "tie"), ("one", "dan", "b"),
            ("two", "ana", "a"), ("two", "ben", "a"), ("three", "ana", "a"), ("three", "ben", "both_bad"),
            ("four", "eva", "b"), ("four", "eva", "a"),
        ]
    )  # fmt: skip
    one, four = contradictions(cast)
    assert (one.item, one.votes, one.themselves) == ("one", 4, ())
    assert one.by_choice == {"a": ("ana",), "b": ("ben", "dan"), "tie": ("cem",)}
    assert (four.item, four.votes, four.themselves) == ("four", 2, ("eva",))
    assert four.by_choice == {"a": ("eva",), "b": ("eva",)}
    assert contradictions(reversed(cast)) == [one, four]
    assert contradictions([]) == []


def test_a_vote_checks_its_choice() -> None:
    with pytest.raises(InvalidRecord, match=r"Vote.choice is 'first'; it must be one of a, b, tie, both_bad."):
        Vote("one", "ana", "first", 1)


def test_the_library_is_loaded_on_first_use() -> None:
    code = (
        "import sys; from feedback_store.agreement import Vote, agreement; "
        "agreement([Vote('one', 'ana', 'a', 1)]); print('nltk' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
