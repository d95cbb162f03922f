"""Evidence → verdict: silence means keep, and the reasons are sentences with the numbers in them."""

import random

import pytest

from trainer.evaluate import count
from trainer.verdict import Verdict, decide, pairs_needed


def judge(wins: int, ties: int, losses: int) -> Verdict:
    differences = [1.0] * wins + [0.0] * ties + [-1.0] * losses
    return decide(count([{"difference": d} for d in differences], beta=0.1), champion="v0", candidate="v1")


def test_not_enough_evidence_keeps_the_champion() -> None:
    verdict = judge(22, 6, 12)
    assert verdict.decision == "keep"
    assert verdict.reasons == (
        "22 wins, 6 ties, 12 losses on 40 held-out pairs.",
        "The 95% interval of the win rate, 46–80%, includes 50%: not enough evidence, keeping v0.",
        "At this rate about 64 more held-out pairs would settle it: some 640 picks on new prompts, of which one in ten "
        "is held out.",
    )


def test_clear_wins_promote() -> None:
    verdict = judge(35, 0, 5)
    assert verdict.decision == "promote"
    assert verdict.reasons[1].endswith("lies above 50%: v1 is better than v0 (p = 1e-06).")


def test_clear_losses_reject() -> None:
    verdict = judge(5, 1, 35)
    assert verdict.decision == "reject"
    assert "v1 is worse than v0" in verdict.reasons[1]
    assert "1 tie," in verdict.reasons[0]


def test_few_pairs_never_promote_however_one_sided() -> None:
    assert judge(5, 0, 0).decision == "keep"
    assert judge(6, 0, 0).decision == "promote"


def test_no_held_out_pairs_say_what_to_do() -> None:
    verdict = judge(0, 0, 0)
    assert verdict.decision == "keep"
    assert "no held-out pairs" in verdict.reasons[0]


@pytest.mark.parametrize("wins", range(21))
def test_the_decision_agrees_with_the_interval_it_names(wins: int) -> None:
    evaluation = count([{"difference": 1.0}] * wins + [{"difference": -1.0}] * (20 - wins), beta=0.1)
    low, high = evaluation["interval"]
    expected = "promote" if low > 0.5 else "reject" if high < 0.5 else "keep"
    assert decide(evaluation, "v0", "v1").decision == expected


def test_the_pairs_needed_are_those_that_find_the_difference_four_times_in_five() -> None:
    assert pairs_needed(60, 0, 40) == pairs_needed(40, 0, 60) == 194  # the usual figure for 60% against 50%
    assert pairs_needed(60, 100, 40) == 388  # every other pair a tie
    assert pairs_needed(5500, 0, 4500) == 783
    assert pairs_needed(1, 0, 0) == pairs_needed(0, 0, 3) == 6  # 5 of 5 has p = 0.0625, 6 of 6 has 0.03125
    dice = random.Random(1)
    found = 0
    for _ in range(500):
        wins = sum(dice.random() < 0.6 for _ in range(194))
        found += judge(wins, 0, 194 - wins).decision == "promote"
    assert 0.74 < found / 500 < 0.85


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        (500, "would settle it, and 460 are there: raise held_out_pairs in the recipe."),
        (60, "would settle it: 20 are there (raise held_out_pairs in the recipe); the rest are some 440 picks"),
    ],
)
def test_held_out_pairs_that_were_not_looked_at_are_named_first(held_out: int, said: str) -> None:
    evaluation = {"wins": 22, "ties": 6, "losses": 12, "p_value": 0.12, "interval": [0.46, 0.8], "held_out": held_out}
    assert said in decide(evaluation, "v0", "v1").reasons[2]


def test_what_is_too_close_says_so() -> None:
    assert pairs_needed(20, 3, 20) is None
    assert pairs_needed(0, 5, 0) is None
    assert pairs_needed(5040, 0, 4960) is None
    assert judge(20, 3, 20).reasons[2] == "They are too close for a number of picks to settle it soon."


def test_a_decision_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="maybe"):
        Verdict("maybe", ())


def test_damage_rejects_whoever_wins_and_is_named_before_the_interval() -> None:
    evaluation = count([{"difference": 1.0}] * 30, beta=0.1)
    ruined = decide(evaluation | {"prose": {"champion_nats": 3.0, "candidate_nats": 4.0}}, "v0", "v1")
    assert ruined.decision == "reject"
    assert ruined.reasons[0].startswith("30 wins")
    assert "The perplexity on plain prose rose from 20.1 (v0) to 54.6 (v1)" in ruined.reasons[1]
    assert ruined.reasons[-1] == "Keeping v0."


def test_a_doubt_keeps_the_champion_and_does_not_save_who_lost() -> None:
    one_person = [{"rater": "ann", "share": 0.9, "wins_without": 1, "losses_without": 2}, {"rater": "bob"}]
    won = decide(count([{"difference": 1.0}] * 30, beta=0.1) | {"raters": one_person}, "v0", "v1")
    assert won.decision == "keep"
    assert "90% of the pairs are one person's" in won.reasons[1]
    assert "lies above 50%: by the picks alone v1 is better than v0 (p = " in won.reasons[2]
    lost = decide(count([{"difference": -1.0}] * 30, beta=0.1) | {"raters": one_person}, "v0", "v1")
    assert lost.decision == "reject"
