"""With DPO against without: the numbers of the table are those of the evaluations."""

import math

import pytest

from trainer.comparison_table import table

RESULTS = [
    {"difference": 4.0, "candidate_chosen": -10.0, "champion_chosen": -12.0},
    {"difference": -1.0, "candidate_chosen": -20.0, "champion_chosen": -17.0},
]
EVALUATION = {
    "candidate": "v2", "champion": "v0", "beta": 0.1, "pairs": 2, "wins": 1, "ties": 0, "losses": 1, "win_rate": 0.5,
    "interval": [0.01, 0.99], "results": RESULTS,
    "held_out_chosen": {"candidate_nats": 1.0, "champion_nats": 2.0},
    "prose": {"candidate_nats": None, "champion_nats": 3.0},
    "answers": {"candidate": {"words": 12.0, "repetition": 0.1}, "champion": {"words": 40.0, "repetition": 0.2}},
}  # fmt: skip


def test_a_row_a_version_and_the_base_first() -> None:
    base, version = table([EVALUATION], {"v2": "dpo-lora"})
    assert (base["version"], base["recipe"], base["win_rate"], base["rewards/margins"]) == ("v0", "the base", None, 0.0)
    assert base["perplexity/chosen"] == pytest.approx(math.e**2)
    assert base["words"] == 40.0
    assert (version["version"], version["recipe"], version["wins"]) == ("v2", "dpo-lora", 1)
    assert version["rewards/chosen"] == pytest.approx(0.1 * (2 - 3) / 2)
    assert version["rewards/margins"] == pytest.approx(0.1 * (4 - 1) / 2)
    assert version["rewards/rejected"] == pytest.approx(version["rewards/chosen"] - version["rewards/margins"])
    assert version["perplexity/chosen"] == pytest.approx(math.e)
    assert version["perplexity/prose"] is None  # without limit
    assert base["perplexity/prose"] == pytest.approx(math.e**3)


def test_without_held_out_pairs_there_are_no_rewards() -> None:
    nothing = {
        **EVALUATION,
        "pairs": 0,
        "wins": 0,
        "losses": 0,
        "win_rate": None,
        "results": [],
        "held_out_chosen": None,
    }
    _, version = table([nothing], {"v2": "sft"})
    assert version["rewards/chosen"] is version["rewards/rejected"] is version["rewards/margins"] is None
    assert version["perplexity/chosen"] is None
    with pytest.raises(ValueError, match="at least one"):
        table([], {})
