"""Judgements → numbers: all expectations are worked out by hand; what cannot be read is counted and in no mean."""

from typing import Any

import pytest
from scipy.stats import binomtest

from trainer.benchmarks.judge_prompts import FIRST, SECOND, TIE
from trainer.benchmarks.scores import comparisons, judge_bias, marks, marks_apart, outcome
from trainer.benchmarks.words import sentences, tables


def mark(question: int, turn: int, score: float | None, category: str = "writing") -> dict[str, Any]:
    return {"question_id": str(question), "category": category, "turn": turn, "score": score}


def said(question: int, candidate_first: str | None, champion_first: str | None, longer: int = 0) -> dict[str, Any]:
    row = {"question_id": str(question), "category": "math" if question % 2 else "writing", "turn": 1}
    return {**row, "candidate_first": candidate_first, "champion_first": champion_first, "longer": longer}


WON, LOST = (FIRST, SECOND), (SECOND, FIRST)


def test_marks_by_turn_and_category() -> None:
    found = marks([mark(1, 1, 8), mark(1, 2, 4), mark(2, 1, 6, "math"), mark(2, 2, None, "math")])
    assert found == {
        "mean": 6.0,
        "turns": {"1": 7.0, "2": 4.0},
        "categories": {"writing": 6.0, "math": 6.0},
        "judged": 4,
        "unreadable": 1,
    }
    nothing = marks([mark(1, 1, None)])
    assert (nothing["mean"], nothing["turns"], nothing["unreadable"]) == (None, {"1": None}, 1)


def test_the_paired_difference_is_by_question_with_a_t_interval() -> None:
    one = [mark(1, 1, 5), mark(1, 2, 7), mark(2, 1, 6), mark(3, 1, 4), mark(4, 1, None)]
    other = [mark(1, 1, 4), mark(1, 2, 4), mark(2, 1, 5), mark(3, 1, 4), mark(4, 1, 3)]
    found = marks_apart(one, other)  # per question: (1+3)/2 = 2, 1, 0: mean 1, s = 1, t(2; 0.975) = 4.3027
    assert found is not None
    assert (found["mean"], found["questions"]) == (1.0, 3)
    assert found["interval"] == pytest.approx([1 - 4.3027 / 3**0.5, 1 + 4.3027 / 3**0.5], abs=1e-3)
    assert marks_apart(one[:2], other[:2]) is None
    assert marks_apart(other, other) == {"mean": 0.0, "interval": None, "questions": 4}


@pytest.mark.parametrize(
    ("choices", "came_out"),
    [
        (WON, "win"),
        (LOST, "loss"),
        ((FIRST, FIRST), "tie"),
        ((SECOND, SECOND), "tie"),
        ((TIE, TIE), "tie"),
        ((FIRST, TIE), "tie"),
        ((None, SECOND), None),
    ],
)
def test_a_win_only_where_both_orders_agree(choices: tuple[str | None, str | None], came_out: str | None) -> None:
    assert outcome(*choices) == came_out


def test_comparisons_and_what_they_say_of_the_judge() -> None:
    rows = [said(n, *WON) for n in range(5)] + [said(5, *LOST), said(6, FIRST, FIRST), said(7, TIE, TIE)]
    rows += [said(8, None, FIRST)]
    counted = comparisons(rows)
    assert (counted["wins"], counted["ties"], counted["losses"]) == (5, 2, 1)
    assert (counted["comparisons"], counted["pairs"], counted["unreadable"]) == (9, 8, 1)
    assert counted["win_rate"] == pytest.approx(5 / 6)
    assert counted["win_rate_ties_half"] == pytest.approx(6 / 8)
    assert counted["p_value"] == pytest.approx(binomtest(5, 6).pvalue)
    assert counted["categories"] == {
        "writing": {"wins": 3, "ties": 1, "losses": 0},
        "math": {"wins": 2, "ties": 1, "losses": 1},
    }
    bias = judge_bias(rows)  # first: 5 wins + 1 loss + 2 + 1; second: 5 wins + 1 loss; ties 2; one unread
    assert (bias["first"], bias["second"], bias["ties"], bias["unreadable"]) == (9, 6, 2, 1)
    assert bias["first_share"] == pytest.approx(9 / 15)
    assert (bias["inconsistent"], bias["read_in_both_orders"]) == (1, 8)


def test_at_equal_length_a_judge_that_counts_characters_says_nothing() -> None:
    """Longer wins always: the length tells all, so nothing is known at equal length."""
    rows = [said(n, *(WON if n % 3 else LOST), longer=10 + n if n % 3 else -10 - n) for n in range(30)]
    equal = comparisons(rows)["at_equal_length"]
    assert (equal["win_rate"], equal["interval"]) == (0.5, [0.0, 1.0])
    assert "what it wins at equal length cannot be known" in " ".join(sentences(result(rows)))


def test_at_equal_length_a_judge_that_looks_elsewhere_keeps_its_word() -> None:
    rows = [said(n, *(WON if n % 4 else LOST), longer=(-1) ** (n // 4) * (10 + n)) for n in range(80)]
    equal = comparisons(rows)["at_equal_length"]
    assert equal["win_rate"] == pytest.approx(0.75, abs=0.03)
    assert equal["interval"][0] > 0.5


def result(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "version": "v1", "against": "v0", "judge": {"model": "big", "url": "http://x"}, "ifeval": None, "marks": None,
        "marks_apart": None, "unanswered": {"candidate": 0, "champion": 0}, "comparison": comparisons(rows),
        "judge_bias": judge_bias(rows), **more,
    }  # fmt: skip


def test_the_sentences_hold_the_numbers_and_warn_of_a_judge_that_looks_at_places() -> None:
    text = " ".join(sentences(result([said(n, FIRST, FIRST) for n in range(10)])))
    assert "0 wins, 10 ties, 0 losses on 10 comparisons" in text
    assert "chose the first place in 100% of the 20 judgements" in text
    assert "10 of 10 comparisons (100%) came out otherwise" in text
    assert "take a stronger one" in text
    fair = " ".join(sentences(result([said(n, *(WON if n % 2 else LOST)) for n in range(10)])))
    assert "50% of the 20 judgements" in fair
    assert "stronger" not in fair


def test_one_decided_comparison_shows_nothing() -> None:
    """The bootstrap over questions knows only wins then; the exact interval is the wider one and is shown."""
    rows = [said(0, *WON)] + [said(n, TIE, TIE) for n in range(1, 20)]
    assert comparisons(rows)["interval_by_questions"] == [1.0, 1.0]
    text = " ".join(sentences(result(rows)))
    assert "no difference is shown" in text
    assert "better by this judge" not in text


def test_what_was_not_read_is_said_and_shown() -> None:
    unread = marks([mark(1, 1, None), mark(2, 1, None)])
    all_of_it = result([said(1, None, None)], marks={"candidate": unread, "champion": unread})
    text = " ".join(sentences(all_of_it))
    assert "None of the 2 marks of v1 could be read." in text
    assert "6 of 6 judgements could not be read and are in no number." in text
    assert tables(all_of_it)[0]["rows"][0] == ["all", None, None]
