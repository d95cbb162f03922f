"""Who looks suspicious: exact numbers against SciPy's by hand, and how often honest raters are accused."""

import random

import pytest
from scipy.stats import binom

from trainer.suspicion import LIMIT, Evidence, share_of, suspicions


def test_a_share_has_wilsons_interval() -> None:
    found = share_of(7, 9)
    # (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) for p = 7/9, n = 9, z = 1.96
    assert found["interval"] == pytest.approx([0.4526, 0.9368], abs=1e-4)
    assert share_of(0, 0) == {"count": 0, "of": 0, "share": None, "interval": None}


def test_each_kind_is_said_with_its_numbers() -> None:
    found = suspicions(
        {
            "wrong": Evidence(gold_right=2, gold_answered=9),
            "contrary": Evidence(agreed=5, compared=60),
            "first": Evidence(first=61, second=3),
            "fast": Evidence(fast=30, timed=40, median_s=0.8),
            "fine": Evidence(9, 10, 45, 60, 30, 34, 1, 40, 9.0),
            "new": Evidence(gold_right=0, gold_answered=1, first=2, second=0),
        }
    )
    assert found["wrong"][0].startswith("7 of 9 gold pairs wrong")
    p_value = float(binom.sf(6, 9, 0.2))  # 7, 8 or 9 wrong for somebody who is wrong in a fifth
    assert 3000 < 1 / p_value < 3500
    assert "a chance of one in 3,200 for somebody right in 80%" in found["wrong"][0]
    assert "55 of 60" in found["contrary"][0]
    assert "turned round on purpose" in found["contrary"][0]
    assert found["first"][0].startswith("61 of 64 picks took the first answer")
    assert found["fast"][0].startswith("30 of 40 picks came within 2 s")
    assert found["fine"] == found["new"] == []


def test_guessing_looks_like_guessing() -> None:
    (sentence,) = suspicions({"eve": Evidence(gold_right=30, gold_answered=60)})["eve"]
    assert "as by guessing" in sentence


def test_honest_raters_are_hardly_ever_accused() -> None:
    """200 lists of ten raters just within what is usual: at most one list in a hundred may accuse anybody."""
    dice = random.Random(0)

    def drawn(of: int, share: float) -> int:
        return sum(dice.random() < share for _ in range(of))

    accused = 0
    for _ in range(200):
        evidence = {}
        for rater in range(10):
            first = drawn(40, 0.7)
            evidence[str(rater)] = Evidence(
                drawn(20, 0.8), 20, drawn(40, 0.63), 40, first, 40 - first, drawn(30, 0.1), 30
            )
        accused += any(suspicions(evidence).values())
    assert accused / 200 <= LIMIT
