"""Evidence → verdict: silence means keep, and the reasons are sentences with the numbers in them."""

import pytest

from trainer.evaluate import count
from trainer.verdict import Verdict, decide


def judge(wins: int, ties: int, losses: int) -> Verdict:
    differences = [1.0] * wins + [0.0] * ties + [-1.0] * losses
    return decide(count([{"difference": d} for d in differences], beta=0.1), champion="v0", candidate="v1")


def test_not_enough_evidence_keeps_the_champion() -> None:
    verdict = judge(22, 6, 12)
    assert verdict.decision == "keep"
    assert verdict.reasons == (
        "22 wins, 6 ties, 12 losses on 40 held-out pairs.",
        "The 95% interval of the win rate, 46–80%, includes 50%: not enough evidence, keeping v0.",
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


def test_a_decision_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="maybe"):
        Verdict("maybe", ())
