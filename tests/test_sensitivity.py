"""Who and what a result hangs on: known answers, and simulated raters and lengths."""

import random

import pytest

from trainer.sensitivity import at_equal_length, by_rater, interval_by_raters, longer_wins, sign_test

TIE = 1e-3


def result(difference: float, rater: str | None = "a", longer: float = 0) -> dict[str, object]:
    return {"difference": difference, "rater": rater, "longer": longer, "preference_id": "pref_1"}


def test_each_rater_s_share_and_what_is_left_without_them() -> None:
    results = [*[result(1.0, "ann")] * 6, *[result(-1.0, "bob")] * 3, result(0.0, "bob")]
    ann, bob = by_rater(results, TIE)
    assert (ann["rater"], ann["pairs"], ann["share"], ann["wins"]) == ("ann", 6, 0.6, 6)
    assert (ann["wins_without"], ann["losses_without"], ann["win_rate_without"]) == (0, 3, 0.0)
    assert ann["p_value_without"] == pytest.approx(0.25)
    assert (bob["ties"], bob["losses"], bob["win_rate_without"]) == (1, 3, 1.0)
    alone = by_rater([result(1.0)], TIE)[0]
    assert (alone["win_rate_without"], alone["p_value_without"]) == (None, 1.0)
    with_imports = by_rater([*results, *[result(-1.0, None)] * 10], TIE)
    assert [one["rater"] for one in with_imports] == ["ann", "bob"]
    assert (with_imports[0]["share"], with_imports[0]["losses_without"]) == (0.3, 13)
    assert by_rater([], TIE) == []
    assert sign_test(0, 0) == 1.0


def test_raters_who_are_each_of_one_mind_widen_the_interval() -> None:
    of_one_mind = [result(1.0 if rater % 3 else -1.0, f"r{rater}") for rater in range(12) for _ in range(20)]
    mixed = [result(1.0 if n % 3 else -1.0, f"r{n % 12}") for n in range(240)]
    shuffled = [{**one, "rater": f"r{random.Random(n).randrange(12)}"} for n, one in enumerate(mixed)]
    wide, narrow = interval_by_raters(of_one_mind, TIE), interval_by_raters(shuffled, TIE)
    assert wide is not None
    assert narrow is not None
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert wide[0] < 2 / 3 < wide[1]
    assert interval_by_raters(of_one_mind, TIE) == wide
    assert interval_by_raters(of_one_mind[:80], TIE) is None  # four raters
    imported = [{**result(1.0, None), "preference_id": f"pref_{n}"} for n in range(240)]
    assert interval_by_raters(imported, TIE) is None
    both = interval_by_raters([*of_one_mind, *imported], TIE)
    assert both is not None
    assert both[0] < 5 / 6 < both[1]


def test_who_only_learned_length_wins_half_at_equal_length() -> None:
    dice = random.Random(3)
    by_length, by_taste = [], []
    for _ in range(400):
        longer = dice.gauss(100, 300)  # chosen answers are longer on the whole
        by_length.append(result(1.0 if dice.random() < 1 / (1 + 2.718 ** (-longer / 150)) else -1.0, longer=longer))
        by_taste.append(result(1.0 if dice.random() < 0.7 else -1.0, longer=longer))
    length, taste = at_equal_length(by_length, TIE), at_equal_length(by_taste, TIE)
    assert length is not None
    assert taste is not None
    assert sum(one["difference"] > 0 for one in by_length) > 220
    assert length["interval"][0] < 0.5 < length["interval"][1]
    assert length["length_effect"] > 1
    assert taste["interval"][0] > 0.5
    assert taste["win_rate"] == pytest.approx(0.7, abs=0.08)


def test_where_length_decides_without_an_error_nothing_is_known_beside_it() -> None:
    results = [result(1.0 if longer > 0 else -1.0, longer=longer) for longer in range(-20, 21) if longer]
    fitted = at_equal_length(results, TIE)
    assert fitted is not None
    assert (fitted["win_rate"], fitted["interval"]) == (0.5, [0.0, 1.0])


def test_only_wins_whose_chosen_answer_is_the_longer_are_counted() -> None:
    won = [result(1.0, longer=9), result(1.0, longer=-9), result(1.0)]
    assert longer_wins([*won, result(-1.0, longer=9), result(0.0, longer=9)], TIE) == 1


def test_too_little_to_fit() -> None:
    assert at_equal_length([], TIE) is None
    assert at_equal_length([result(1.0, longer=n) for n in range(50)], TIE) is None  # no losses
    assert at_equal_length([result((-1.0) ** n, longer=5) for n in range(50)], TIE) is None  # all equally long
