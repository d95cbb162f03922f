"""Pairs in rows: nothing is lost, nothing is over the budget, and no answer sees what it must not."""

import random

from trainer.packing import PairLengths, RowLayout, balanced, pack, pair_layout


def test_the_layout_hides_one_answer_from_the_other() -> None:
    layout = pair_layout(prompt=2, chosen=2, rejected=3)
    visible = layout.visible().tolist()
    assert layout.positions == [0, 1, 2, 3, 2, 3, 4]
    assert layout.predicting == [1, 2, 1, 4, 5]
    assert visible[3] == [True, True, True, True, False, False, False]
    assert visible[5] == [True, True, False, False, True, True, False]


def test_pairs_of_a_row_do_not_see_each_other() -> None:
    row = RowLayout((PairLengths(1, 1, 1), PairLengths(2, 2, 0), PairLengths(1, 0, 2)))
    assert row.starts == [0, 3, 7]
    assert row.tokens == 10
    assert row.positions == [0, 1, 1, 0, 1, 2, 3, 0, 1, 2]
    assert row.predicting == [0, 0, 4, 5, 7, 8]
    alone = [pair_layout(pair.prompt, pair.chosen, pair.rejected).visible() for pair in row.pairs]
    together = row.visible()
    assert together.sum() == sum(one.sum() for one in alone)
    for start, one in zip(row.starts, alone, strict=True):
        assert together[start : start + len(one), start : start + len(one)].equal(one)


def test_rows_hold_every_pair_once_within_the_budget() -> None:
    dice = random.Random(0)
    for _ in range(200):
        tokens = [dice.randint(1, 300) for _ in range(dice.randint(1, 40))]
        rows = pack(tokens, 256)
        assert sorted(index for row in rows for index in row) == list(range(len(tokens)))
        assert all(len(row) == 1 or sum(tokens[index] for index in row) <= 256 for row in rows)
        # First fit: no two rows could have been one.
        sums = sorted(sum(tokens[index] for index in row) for row in rows)
        assert len(sums) < 2 or sums[0] + sums[1] > 256
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([], 10) == []


def test_a_step_keeps_its_pairs_and_no_process_waits_long() -> None:
    tokens = [900, 30, 40, 800, 20, 10, 500, 450, 7, 8, 9]
    assert balanced(tokens, 4, 1) == list(range(11))
    order = balanced(tokens, 4, 2)
    assert [sorted(order[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for start in (0, 4):
        shares = [sum(tokens[i] for i in order[at : at + 2]) for at in (start, start + 2)]
        assert max(shares) < 1.15 * min(shares)
    assert balanced(tokens, 4, 2) == order
