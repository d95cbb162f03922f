"""How far raters can be relied on: against a count by hand, and against simulated raters whose errors are known."""

import random

import pytest

from feedback_store.reliability import (
    GoldAnswers,
    Judgement,
    Reliability,
    agreement_with_others,
    reliabilities,
    weight_of,
)

HONEST = tuple(f"honest {number}" for number in range(6))
RIGHT = {**dict.fromkeys(HONEST, 0.9), "random": 0.5, "inverted": 0.1}


def simulated(seed: int, items: int, per_item: int = 3) -> list[Judgement]:
    """Every item is judged by some of eight raters, each right with a probability of their own."""
    dice = random.Random(seed)
    judgements: list[Judgement] = []
    for item in range(items):
        a_is_better = dice.random() < 0.5
        judgements += [
            Judgement(item, rater, a_is_better == (dice.random() < RIGHT[rater]))
            for rater in dice.sample(sorted(RIGHT), per_item)
        ]
    return judgements


def test_gold_alone_is_counted_by_hand() -> None:
    found = reliabilities([], {"ann": GoldAnswers(9, 10), "bob": GoldAnswers(2, 40)})
    assert found["ann"] == Reliability(0.85, 1.0, 0, 9, 10, False)  # (8 + 9) / (10 + 10)
    assert found["bob"] == Reliability(0.2, 0.0, 0, 2, 40, True)  # (8 + 2) / (10 + 40)


@pytest.mark.parametrize(("accuracy", "weight"), [(0.9, 1.0), (0.8, 1.0), (0.65, 0.5), (0.5, 0.0), (0.1, 0.0)])
def test_a_weight_is_what_is_left_of_the_signal_and_never_negative(accuracy: float, weight: float) -> None:
    assert weight_of(accuracy) == weight


def test_who_shares_nothing_with_anybody_weighs_one() -> None:
    judgements = [Judgement(number, f"rater {number}", number % 2 == 0) for number in range(30)]
    assert {found.weight for found in reliabilities(judgements).values()} == {1.0}


def test_one_disagreement_costs_little_and_both_the_same() -> None:
    found = reliabilities([Judgement("x", "ann", True), Judgement("x", "bob", False)])
    # Whoever is right, each is believed to have been so in half: (8 + 0.5) / 11.
    assert found["ann"] == found["bob"]
    assert found["ann"].accuracy == pytest.approx(8.5 / 11, abs=1e-4)
    assert found["ann"].weight == 0.91


def test_simulated_raters_are_told_apart() -> None:
    """20 simulations of 160 items, three of eight raters each: what the docs say of them holds in every one."""
    randoms = []
    for seed in range(20):
        found = reliabilities(simulated(seed, 160))
        assert min(found[rater].weight for rater in HONEST) >= 0.75
        assert found["inverted"].weight == 0
        assert found["inverted"].is_inverted
        assert not any(found[rater].is_inverted for rater in (*HONEST, "random"))
        randoms.append(found["random"].weight)
    assert sum(randoms) / len(randoms) < 0.3
    found = reliabilities(simulated(0, 2000))
    assert found["random"].weight < 0.15
    assert found["honest 0"].accuracy == pytest.approx(0.9, abs=0.03)
    assert found["inverted"].accuracy == pytest.approx(0.1, abs=0.03)


def test_the_order_of_judgements_changes_no_digit() -> None:
    judgements = simulated(7, 80)
    shuffled = random.Random(1).sample(judgements, len(judgements))
    assert reliabilities(shuffled) == reliabilities(judgements)


def test_a_majority_that_errs_together_wins_and_gold_pairs_say_otherwise() -> None:
    """What this does not stop, and what helps: three who lie alike against two who do not."""
    dice = random.Random(3)
    liars, honest = ("l1", "l2", "l3"), ("h1", "h2")
    judgements = [
        Judgement(item, rater, (rater in honest) == (dice.random() < 0.95))
        for item in range(60)
        for rater in liars + honest
    ]
    fooled = reliabilities(judgements)
    assert {fooled[rater].weight for rater in liars} == {1.0}
    assert {fooled[rater].weight for rater in honest} == {0.0}
    gold = {**dict.fromkeys(liars, GoldAnswers(1, 40)), **dict.fromkeys(honest, GoldAnswers(39, 40))}
    told = reliabilities(judgements, gold)
    assert {told[rater].weight for rater in liars} == {0.0}
    assert {told[rater].weight for rater in honest} == {1.0}


def test_agreement_is_with_the_majority_of_the_others() -> None:
    said = [("x", "ann", True), ("x", "bob", True), ("x", "eve", False), ("y", "ann", True), ("y", "eve", True)]
    found = agreement_with_others([Judgement(*one) for one in said])
    # On x, ann and bob each face one of each: no majority. Eve faces two. On y ann and eve agree.
    assert found == {"ann": (1, 1), "eve": (1, 2)}


def test_who_said_both_sides_of_an_item_says_nothing_of_it() -> None:
    said = [Judgement("x", "ann", True), Judgement("x", "ann", False), Judgement("x", "bob", True)]
    assert agreement_with_others(said) == {}
    assert reliabilities(said)["ann"].shared == 0
