"""Each kind of damage is named with its numbers, and an honest evaluation has none."""

import copy
from typing import Any

import pytest

from trainer.guards import problems

LIKE_THE_CHAMPION = {
    "answers": 8, "words": 40.0, "repetition": 0.1, "empty": 0, "unfinished": 3, "refusals": 0, "other_language": 0,
}  # fmt: skip
HONEST: dict[str, Any] = {
    "prose": {"candidate_nats": 3.05, "champion_nats": 3.0},
    "answers": {"candidate": {**LIKE_THE_CHAMPION}, "champion": {**LIKE_THE_CHAMPION}},
    "at_equal_length": {"win_rate": 0.6, "interval": [0.45, 0.75], "length_effect": 0.3},
    "raters": [
        {"rater": "ann", "share": 0.6, "wins_without": 9, "losses_without": 5},
        {"rater": "bob", "share": 0.4, "wins_without": 14, "losses_without": 6},
    ],
}


def sentences(**changes: Any) -> list[tuple[bool, str]]:
    evaluation = copy.deepcopy(HONEST)
    for path, value in changes.items():
        *folders, key = path.split("__")
        part: Any = evaluation
        for folder in folders:
            part = part[folder]
        part[key] = value
    return [(one.is_damage, one.sentence) for one in problems(evaluation, "v3", "v4")]


def test_an_honest_candidate_has_no_problem() -> None:
    assert sentences() == []
    assert problems({"wins": 1}, "v3", "v4") == []  # of an older release
    assert sentences(answers__candidate__words=12.0) == []  # a taste for shorter answers


@pytest.mark.parametrize(
    ("changes", "damage", "said"),
    [
        ({"prose__candidate_nats": 3.5}, True, "rose from 20.1 (v3) to 33.1 (v4)"),
        ({"prose__candidate_nats": None}, True, "to something without limit (v4): it forgot how to write."),
        ({"prose__candidate_nats": 90.0}, True, "to something without limit (v4)"),
        ({"answers__candidate__empty": 3}, True, "3 of 8 answers of v4 are empty (v3: 0 of 8)."),
        ({"answers__candidate__refusals": 4}, True, "4 of 8 answers of v4 refuse (v3: 0 of 8)."),
        ({"answers__candidate__other_language": 3}, True, "another language than the question"),
        ({"answers__candidate__unfinished": 6}, True, "6 of 8 answers of v4 find no end (v3: 3 of 8)."),
        ({"answers__candidate__repetition": 0.5}, True, "50% of its runs of four words stood there before (v3: 10%)"),
        ({"answers__candidate__words": 80.0}, False, "at equal length its win rate is 60% (45% to 75%)"),
        (
            {"raters": [{"rater": "ann", "share": 0.9, "wins_without": 2, "losses_without": 2}, {"rater": "bob"}]},
            False,
            "90% of the pairs are one person's; without them it is 2 wins and 2 losses.",
        ),
    ],
)
def test_each_kind_of_damage_is_named(changes: dict[str, Any], damage: bool, said: str) -> None:
    [(is_damage, sentence)] = sentences(**changes)
    assert is_damage is damage
    assert said in sentence


def test_longer_answers_that_also_win_at_equal_length_are_no_problem() -> None:
    proven = {"win_rate": 0.7, "interval": [0.55, 0.8], "length_effect": 0.3}
    assert sentences(answers__candidate__words=80.0, at_equal_length=proven) == []
    assert sentences(wins=20, longer_wins=20, at_equal_length=proven) == []


def test_wins_that_only_ever_went_to_the_longer_answer_prove_nothing_else() -> None:
    [(is_damage, said)] = sentences(wins=20, longer_wins=18)
    assert not is_damage
    assert said == (
        "In 18 of the 20 pairs that v4 wins, the longer answer was picked, and at equal length its win rate is 60% "
        "(45% to 75%): it may win by length alone."
    )
    assert sentences(wins=20, longer_wins=17) == []
    assert sentences(wins=5, longer_wins=5) == []  # nobody is promoted for so few
    assert sentences(wins=20, longer_wins=0, at_equal_length=None) == []
    [(_, said)] = sentences(wins=20, longer_wins=20, at_equal_length=None)
    assert "there are too few losses to say what its win rate is at equal length" in said
    [(_, said)] = sentences(wins=20, longer_wins=20, answers__candidate__words=80.0)
    assert said.startswith("The answers of v4 are longer (80 words, v3 40). In 20 of the 20 pairs that v4 wins")
