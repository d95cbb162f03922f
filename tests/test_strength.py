"""Strengths against simulated votes: the truth is found, its interval holds it, and the first place does not count."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest

from feedback_store.records import Comparisons
from trainer.strength import Fit, as_body, fit, sentence


def voted(
    truth: Mapping[str, float], pairs: Sequence[tuple[str, str]], each: int, *, order: float = 0.0, tie: float = -0.7,
    seed: int = 1, swap: float = 0.5,
) -> list[Comparisons]:  # fmt: skip
    """Votes of the model itself; the second of two names is shown first in a share `swap` of the pairs."""
    dice, seen = np.random.default_rng(seed), Counter[tuple[str, str, int]]()
    for pair in pairs:
        for swapped in dice.random(each) < swap:
            first, second = pair[::-1] if swapped else pair
            utilities = np.array(
                [truth[first] + order / 2, (truth[first] + truth[second]) / 2 + tie, truth[second] - order / 2]
            )
            chances = np.exp(utilities) / np.exp(utilities).sum()
            seen[first, second, int(dice.choice(3, p=chances))] += 1
    cells = dict.fromkeys((first, second) for first, second, _ in seen)
    return [Comparisons(*cell, *(seen[*cell, outcome] for outcome in range(3))) for cell in cells]


def rate(found: Fit, version: str) -> float:
    strength = found.of(version)
    assert strength is not None
    assert strength.win_rate is not None
    return strength.win_rate


TRUTH = {"v0": 0.0, "v1": 0.4, "v2": 0.9}


def test_true_strengths_come_out_of_many_votes_also_by_way_of_others() -> None:
    found = fit(voted(TRUTH, [("v0", "v1"), ("v1", "v2")], 4000), "v0")
    assert rate(found, "v1") == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.02)
    assert rate(found, "v2") == pytest.approx(1 / (1 + np.exp(-0.9)), abs=0.02)
    assert found.tie_share == pytest.approx(np.exp(-0.7) / (2 + np.exp(-0.7)), abs=0.02)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = []
    for seed in range(120):
        found = fit(voted(TRUTH, [("v0", "v1"), ("v1", "v2")], 120, order=0.3, seed=seed), "v0")
        strength = found.of("v2")
        assert strength is not None
        assert strength.interval is not None
        held.append(strength.interval[0] <= 1 / (1 + np.exp(-0.9)) <= strength.interval[1])
    assert 0.90 <= np.mean(held) <= 0.995


def test_the_pull_of_the_first_place_is_kept_apart_from_strength() -> None:
    equals = {"v0": 0.0, "v1": 0.0}
    found = fit(voted(equals, [("v0", "v1")], 3000, order=0.8, swap=0.9), "v0")
    assert rate(found, "v1") == pytest.approx(0.5, abs=0.04)
    assert found.first_share == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.02)
    assert found.first_interval[0] > 0.5


def test_pairs_of_one_version_tell_the_pull_of_the_first_place() -> None:
    found = fit(voted({"v0": 0.0}, [("v0", "v0")], 500, order=0.8), "v0")
    assert found.first_interval[0] > 0.55
    assert found.of("v0") == found.strengths[0]
    assert found.strengths[0].votes == 0


def test_a_version_that_never_lost_is_not_infinitely_strong() -> None:
    found = fit([Comparisons("v1", "v0", 5, 0, 0)], "v0")
    assert 0.5 < rate(found, "v1") < 0.99


def test_versions_without_a_chain_of_picks_cannot_be_compared() -> None:
    counts = voted({**TRUTH, "v3": 0.0, "v4": 1.0}, [("v0", "v1"), ("v3", "v4")], 50)
    found = fit(counts, "v0", ["v0", "v1", "v2", "v3", "v4"])
    assert [one.version for one in found.strengths] == ["v0", "v1", "v2", "v3", "v4"]
    assert [one.win_rate is None for one in found.strengths] == [False, False, True, True, True]
    notes = {row["version"]: row["note"] for row in as_body(found, "v4", {}, {})["versions"]}
    assert notes["v2"] == "cannot be compared: nobody has picked between it and another version"
    assert notes["v4"] == "cannot be compared: no chain of picks leads to v0"
    assert "cannot be compared" in sentence(found, "v4")
    assert "A live trial would tell" in sentence(found, "v2")


def test_no_votes_at_all_are_no_error() -> None:
    found = fit([], "v0", ["v0", "v1"])
    assert found.votes == 0
    assert "first champion" in sentence(found, "v0")
    assert "Not known" in sentence(found, "v1")


@pytest.mark.parametrize(("wins", "said"), [(70, "Yes: v1"), (52, "Not shown yet: v1"), (25, "No: v1")])
def test_the_sentence_says_yes_only_where_the_interval_does(wins: int, said: str) -> None:
    found = fit([Comparisons("v1", "v0", wins, 4, 100 - wins), Comparisons("v0", "v1", 100 - wins, 4, wins)], "v0")
    assert said in sentence(found, "v1")


def test_many_versions_in_a_row_are_quick_and_in_order() -> None:
    names = [f"v{number}" for number in range(30)]
    truth = {name: 0.15 * number for number, name in enumerate(names)}
    found = fit(voted(truth, list(pairwise(names)), 1500), "v0", names)
    rates = [rate(found, name) for name in names[::6]]
    assert rates == sorted(rates)
    body = as_body(found, "v29", {"v29": ["2026-11-23T10:00:00+00:00"]}, {"v29": "2026-11-22T10:00:00+00:00"})
    assert body["versions"][-1]["promoted_at"] == ["2026-11-23T10:00:00+00:00"]
