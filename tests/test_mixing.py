"""A mix takes what a recipe says, says why it left the rest, and says the same each time."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count

import pytest

from feedback_store.errors import InvalidRecord
from feedback_store.mixing import Choice, Mix, MixRow, choose, near_key

_NUMBERS = count()


SAID: dict[str, tuple[str, str, str]] = {}


def row(
    source: str = "pick",
    rater: str | None = "ada",
    part: str = "train",
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
) -> MixRow:
    number = next(_NUMBERS)
    prompt = f"question {number}" if prompt is None else prompt
    SAID[f"pref_{number:06d}"] = (prompt, chosen or f"good {number}", rejected or f"bad {number}")
    return MixRow(
        preference_id=f"pref_{number:06d}",
        source=source,
        rater=None if source == "trl" and rater == "ada" else rater,
        part=part,
        near_key=near_key(prompt),
        is_identical=chosen is not None and chosen == rejected,
    )


def kept(rows: list[MixRow], mix: Mix | None = None, evaluation_prompts: tuple[str, ...] = ()) -> list[MixRow]:
    return [rows[index] for index in choice(rows, mix, evaluation_prompts).kept]


def choice(rows: list[MixRow], mix: Mix | None = None, evaluation_prompts: tuple[str, ...] = ()) -> Choice:
    made = choose(rows, lambda index: SAID[rows[index].preference_id], mix or Mix(), evaluation_prompts)
    left_out = [identity for ids in made.left_out.values() for identity in ids]
    assert sorted([rows[index].preference_id for index in made.kept] + left_out) == sorted(
        r.preference_id for r in rows
    )
    return made


def test_without_limits_everything_is_taken_in_the_order_given() -> None:
    rows = [row(), row("trl"), row("edit"), row(part="held_out")]
    assert choice(rows) == Choice((0, 1, 2, 3), {})


def test_equal_answers_teach_nothing() -> None:
    rows = [row(chosen="same", rejected="same"), row()]
    assert choice(rows).left_out == {"identical": (rows[0].preference_id,)}


def test_edits_and_retries_are_taken_as_the_mix_says() -> None:
    rows = [row("edit"), row("retry"), row("pick")]
    assert [r.source for r in kept(rows)] == ["edit", "pick"]
    assert [r.source for r in kept(rows, Mix(edits=False, retries=True))] == ["retry", "pick"]
    assert set(choice(rows).left_out) == {"source"}


def test_an_evaluation_prompt_is_never_learned_from_however_it_is_spelled() -> None:
    rows = [row(prompt="What is  ENTROPY?!"), row(prompt="what is entropy", part="held_out"), row()]
    made = choice(rows, evaluation_prompts=(near_key("What is entropy?"),))
    assert made.kept == (1, 2)
    assert made.left_out == {"evaluation_prompt": (rows[0].preference_id,)}


def test_a_train_prompt_that_is_nearly_a_held_out_one_stays_out() -> None:
    rows = [row(prompt="Cook rice, please."), row(prompt="cook rice please", part="held_out"), row()]
    assert choice(rows).left_out == {"near_held_out": (rows[0].preference_id,)}


def test_the_same_word_counts_once_for_a_rater_and_is_kept_for_each_rater() -> None:
    same = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = [
        row(**same), row(**same), row(rater="bob", **same), row("trl", rater=None, **same),
        row("trl", rater=None, **same),
    ]  # fmt: skip
    assert Counter(r.rater for r in kept(rows)) == {"ada": 1, "bob": 1}
    assert len(kept(rows[3:])) == 1
    assert set(choice(rows).left_out) == {"duplicate"}


def test_where_raters_disagree_the_majority_stays_and_an_even_split_teaches_nothing() -> None:
    def said(rater: str, chosen: str, rejected: str) -> MixRow:
        return row(rater=rater, prompt="p", chosen=chosen, rejected=rejected)

    rows = [said("ada", "x", "y"), said("bob", "x", "y"), said("cem", "y", "x")]
    assert [r.rater for r in kept(rows)] == ["ada", "bob"]
    assert kept(rows[1:]) == []
    assert set(choice(rows).left_out) == {"contradicted"}


def test_no_prompt_has_more_than_its_rows_and_our_own_go_first() -> None:
    rows = [row("trl", prompt="Hello!") for _ in range(5)] + [row(prompt="hello") for _ in range(2)]
    taken = kept(rows, Mix(max_per_prompt=3))
    assert Counter(r.source for r in taken) == {"pick": 2, "trl": 1}
    held_out = [row(prompt="Hello!", part="held_out") for _ in range(5)]
    assert kept(held_out, Mix(max_per_prompt=3)) == held_out


@pytest.mark.parametrize(
    ("sizes", "share", "expected"),
    [
        ({"ada": 90, "bob": 10}, 0.5, {"ada": 10, "bob": 10}),
        ({"ada": 100, "bob": 10, "cem": 10}, 0.5, {"ada": 20, "bob": 10, "cem": 10}),
        ({"ada": 100}, 0.1, {"ada": 100}),  # somebody who rates alone has all the say there is
        ({"ada": 10, "bob": 10, "cem": 10}, 0.2, {"ada": 10, "bob": 10, "cem": 10}),  # never below 1/R
        ({"ada": 3, "bob": 2}, 1.0, {"ada": 3, "bob": 2}),
    ],
)
def test_nobody_has_more_than_their_share(sizes: dict[str, int], share: float, expected: dict[str, int]) -> None:
    rows = [row(rater=rater) for rater, size in sizes.items() for _ in range(size)] + [row("trl") for _ in range(50)]
    taken = Counter(r.rater for r in kept(rows, Mix(max_rater_share=share)))
    assert taken.pop(None) == 50  # rows without a rater are no one's say
    assert taken == expected


def test_the_cap_is_the_largest_that_fits() -> None:
    dice = random.Random(3)
    for _ in range(50):
        sizes = {f"r{number}": dice.randint(1, 40) for number in range(dice.randint(1, 6))}
        share = dice.uniform(0.05, 1)
        rows = [row(rater=rater) for rater, size in sizes.items() for _ in range(size)]
        taken = Counter(r.rater for r in kept(rows, Mix(max_rater_share=share)))
        limit = max(share, 1 / len(sizes))
        assert max(taken.values()) <= limit * taken.total() + 1e-9
        larger = {rater: min(size, max(taken.values()) + 1) for rater, size in sizes.items()}
        assert larger == taken or max(larger.values()) > limit * sum(larger.values())


def test_imported_rows_are_replayed_in_proportion_to_our_own() -> None:
    rows = [row() for _ in range(10)] + [row("trl") for _ in range(100)]
    assert Counter(r.source for r in kept(rows, Mix(replay_ratio=2))) == {"pick": 10, "trl": 20}
    assert Counter(r.source for r in kept(rows, Mix(replay_ratio=0))) == {"pick": 10}
    assert len(kept(rows[10:], Mix(replay_ratio=0))) == 100  # nothing of our own: the imported rows are what there is


def test_a_sample_is_the_same_for_a_seed_whatever_the_order_and_a_new_row_hardly_moves_it() -> None:
    rows = [row() for _ in range(20)] + [row("trl") for _ in range(400)]
    mix = Mix(replay_ratio=5, seed=7)
    first = {r.preference_id for r in kept(rows, mix)}
    assert {r.preference_id for r in kept(rows[::-1], mix)} == first
    assert {r.preference_id for r in kept(rows, Mix(replay_ratio=5, seed=8))} != first
    assert len(first - {r.preference_id for r in kept([*rows, row("trl")], mix)}) <= 1


@pytest.mark.parametrize(
    "wrong",
    [{"replay_ratio": -1}, {"max_rater_share": 0}, {"max_rater_share": 1.5}, {"max_per_prompt": 0}],
)
def test_a_mix_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRecord, match=next(iter(wrong))):
        Mix(**wrong)  # type: ignore[arg-type]


def test_nearly_the_same_means_case_punctuation_and_spaces_in_any_script() -> None:
    assert near_key("  How do I cook RICE?\n") == near_key("how do i, cook (rice)") == "howdoicookrice"
    assert near_key("Grüße, ＷＥＬＴ!") == near_key("grüsse welt")
    assert near_key("Question 1") != near_key("Question 2")
