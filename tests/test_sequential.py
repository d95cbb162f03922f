"""The live trial's test: what it promises is measured, by simulated voters and by the exact law of the bet."""

from functools import cache

import numpy as np
import pytest

from trainer.sequential import (
    EDGES,
    EVEN,
    Rules,
    bets,
    log_capital,
    look,
    lower_bound,
    sentence,
    votes_to_go,
)

VOTES, TRIALS = 800, 1000


def first_crossings(p: float, weights: tuple[float, ...] = EVEN, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """When the bet on "better" and the one on "worse" first reach 20 in simulated trials, VOTES where they never do."""
    wins = np.cumsum(np.random.default_rng(seed).random((TRIALS, VOTES)) < p, axis=1)
    votes = np.arange(1, VOTES + 1)
    least = np.array([least_wins(n, weights) for n in votes])
    at_most = np.array([n - least_wins(n, EVEN) for n in votes])
    crossed = [np.where(over.any(1), over.argmax(1) + 1, VOTES) for over in (wins >= least, wins <= at_most)]
    return crossed[0], crossed[1]


@cache
def least_wins(votes: int, weights: tuple[float, ...]) -> int:
    wins = np.arange(votes + 1)
    reached = log_capital(wins, votes - wins, 0.5, weights) >= np.log(20)
    return int(reached.argmax()) if reached.any() else votes + 1


@pytest.mark.parametrize("chance", [0.3, 0.45, 0.5])
@pytest.mark.parametrize("weights", [EVEN, bets(70, 30)])
def test_a_vote_leaves_the_capital_as_it_was_on_average(chance: float, weights: tuple[float, ...]) -> None:
    for wins, losses in ((0, 0), (7, 2), (30, 41)):
        before = np.exp(log_capital(wins, losses, chance, weights))
        after = chance * np.exp(log_capital(wins + 1, losses, chance, weights)) + (1 - chance) * np.exp(
            log_capital(wins, losses + 1, chance, weights)
        )
        assert after == pytest.approx(before)


def test_equals_are_seldom_called_better_or_worse_and_a_worse_one_never_better() -> None:
    better, worse = first_crossings(0.5)
    assert (better < VOTES).mean() <= 0.05
    assert (worse < VOTES).mean() <= 0.05
    assert (first_crossings(0.4)[0] < VOTES).mean() <= 0.005


def test_a_better_one_is_seen_soon() -> None:
    assert np.median(first_crossings(0.6)[0]) <= 130
    assert np.median(first_crossings(0.65)[0]) <= 65
    assert np.median(first_crossings(0.55)[0]) <= 700


def test_leaning_on_the_evaluation_saves_votes_where_it_is_right_and_never_costs_the_error() -> None:
    leaning, misled = bets(55, 45), bets(20, 80)
    assert np.median(first_crossings(0.55, leaning)[0]) < 0.95 * np.median(first_crossings(0.55)[0])
    for weights in (leaning, misled, bets(95, 5)):
        assert (first_crossings(0.5, weights)[0] < VOTES).mean() <= 0.05
    assert np.median(first_crossings(0.6, misled)[0]) < 1.35 * np.median(first_crossings(0.6)[0])


def test_the_interval_holds_the_truth_at_all_times_at_once() -> None:
    dice, missed, trials = np.random.default_rng(5), 0, 24
    for _ in range(trials):
        wins = np.cumsum(dice.random(300) < 0.57)
        looks = [look(int(wins[n - 1]), 0, n - int(wins[n - 1])) for n in range(5, 301, 15)]
        missed += any(not low <= 0.57 <= high for low, high in (one.interval for one in looks))
    assert missed / trials <= 0.10


def test_nothing_is_known_before_the_first_vote() -> None:
    first = look(0, 0, 0)
    assert (first.interval, first.outcome, first.win_rate) == ((0.0, 1.0), None, None)
    assert first.e_better == pytest.approx(1)


@pytest.mark.parametrize(
    ("wins", "ties", "losses", "outcome"),
    [
        (30, 5, 8, "better"),
        (8, 5, 30, "worse"),
        (0, 0, 40, "worse"),
        (380, 0, 420, "futile"),
        (50, 0, 50, None),
        (60, 900, 50, "max_votes"),
    ],
)
def test_what_ends_a_trial(wins: int, ties: int, losses: int, outcome: str | None) -> None:
    assert look(wins, ties, losses).outcome == outcome


def test_the_bounds_and_the_bets_say_the_same() -> None:
    for wins in range(0, 80, 3):
        for losses in range(0, 80, 7):
            seen = look(wins, 3, losses)
            assert (seen.interval[0] > 0.5) == (seen.e_better > 20)
            assert (seen.interval[1] < 0.5) == (seen.e_worse > 20)
            assert seen.interval[0] <= (seen.win_rate or 0) + 1e-6


def test_ties_move_no_bound_but_count_towards_the_cap() -> None:
    assert look(20, 0, 12).interval == look(20, 300, 12).interval
    assert look(1, 9, 1, Rules(max_votes=11)).outcome == "max_votes"


def test_the_bound_is_where_the_capital_is_one_over_alpha() -> None:
    bound = lower_bound(70, 40, 0.05)
    assert np.exp(log_capital(70, 40, bound)) == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"worth": 0.5}, "worth is 0.5"),
        ({"max_votes": 0}, "max_votes is 0"),
        ({"weights": (1.0,)}, f"{len(EDGES)} shares"),
    ],
)
def test_rules_that_cannot_be_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Rules(**changes)  # type: ignore[arg-type]


def test_a_number_of_votes_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        look(-1, 0, 0)


def test_the_sentence_says_what_the_votes_say_with_numbers() -> None:
    def said(wins: int, ties: int, losses: int, max_votes: int = 1000) -> str:
        rules = Rules(max_votes=max_votes)
        return sentence(look(wins, ties, losses, rules), rules, "v4", "v3")

    assert said(0, 2, 0) == "Nobody has preferred v4 or v3 yet (2 ties so far)."
    assert said(30, 5, 8).endswith("v4 is better than v3.")
    assert "30 wins, 5 ties, 8 losses of v4 against v3: it wins 79% of decided votes" in said(30, 5, 8)
    assert said(8, 1, 30).endswith("v4 is worse than v3: keeping v3.")
    assert said(380, 0, 420).endswith("55%, the least that would be worth it, is ruled out: keeping v3.")
    assert said(5, 1, 4, max_votes=10).endswith("after the most votes asked for, 10: keeping v3.")
    assert said(9, 0, 11).endswith("Not enough evidence so far.")


def test_the_votes_to_go_are_those_it_takes_at_the_same_rate() -> None:
    rules = Rules()
    to_go = votes_to_go(look(24, 6, 16), rules)
    assert to_go is not None
    scale = (46 + to_go) / 46
    assert look(round(24 * scale), round(6 * scale), round(16 * scale), rules).outcome == "better"
    assert look(round(24 * scale * 0.9), 0, round(16 * scale * 0.9), rules).outcome is None
    assert votes_to_go(look(10, 0, 10), rules) is None
    assert votes_to_go(look(0, 0, 0), rules) is None
