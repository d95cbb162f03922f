"""The verdict over a new champion: exact, strict, and in words; against scipy where scipy has the same."""

import random
from dataclasses import replace

import pytest

from chat_app.baking import ASSUMED_GOOD, Answered, Measure, answered, decide, fisher_p, is_repetitive

PROSE = (
    "Begin with the smallest part that works, and write down what you know before you guess the rest. Ask one person "
    "who has done it already. Give it a day, then look at it again with fresh eyes, and leave out what nobody misses."
)


def good(number: int = 0, **changes: object) -> Answered:
    one = answered(f"cand_{number}", PROSE, failed=False, first_token_s=0.2)
    return replace(one, **changes)  # type: ignore[arg-type]


BEFORE = [good(number) for number in range(200)]


def test_fishers_test_is_the_one_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with training")
    for bad, of, bad_before, of_before in [
        (3, 3, 0, 200),
        (9, 23, 0, 200),
        (5, 50, 10, 220),
        (0, 5, 3, 20),
        (7, 7, 1, 1),
    ]:
        table = [[bad, of - bad], [bad_before, of_before - bad_before]]
        expected = stats.fisher_exact(table, alternative="greater").pvalue
        assert fisher_p(bad, of, bad_before, of_before) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROSE, False),
        ("Then we go on. " * 12, True),
        ("ha " * 20, False),  # too short to judge
        (
            "我们从最小的部分开始，写下你知道的事情，然后问一个已经做过的人。过一天再看一次，去掉没有人会想念的东西。",
            False,
        ),
        ("我们开始吧。" * 12, True),
        ("", False),
    ],
)
def test_what_goes_round_in_circles(text: str, *, expected: bool) -> None:
    assert is_repetitive(text) is expected


@pytest.mark.parametrize(
    ("change", "measure", "says"),
    [
        ({"failed": True, "characters": 0}, Measure.FAILED, "8 of 8 answers failed (v3: 0 of 200)"),
        ({"characters": 0}, Measure.EMPTY, "8 of 8 answers were empty (v3: 0 of 200)"),
        ({"repetitive": True}, Measure.REPETITIVE, "8 of 8 answers went round in circles (v3: 0 of 200)"),
        ({"first_token_s": 1.5}, Measure.LATE, "8 of 8 answers began late (v3: 0 of 200)"),
        ({"characters": 900}, Measure.LONG, "8 of 8 answers were more than twice as long (v3: 0 of 200)"),
        ({"rating": "down"}, Measure.DISLIKED, "8 of 8 rated answers were rated down (v3: 0 of 40)"),
    ],
)
def test_each_trouble_is_named_with_its_numbers(change: dict[str, object], measure: Measure, says: str) -> None:
    rated = [*(replace(one, rating="up") for one in BEFORE[:40]), *BEFORE[40:]]
    verdict = decide([good(number, **change) for number in range(8)], rated, "v3")
    assert verdict.go_back
    assert says in verdict.reasons
    assert [share.measure for share in verdict.shares if share.is_clearly_worse] == [measure]


def test_the_same_trouble_before_is_no_reason() -> None:
    before = [good(number, failed=number % 3 == 0) for number in range(200)]
    assert not decide([good(number, failed=number % 3 == 0) for number in range(50)], before, "v3").go_back


def test_one_or_two_bad_answers_are_no_reason() -> None:
    seen = [good(number, characters=0 if number in (3, 9) else 200) for number in range(20)]
    assert not decide(seen, BEFORE, "v3").go_back
    assert not decide(seen[:1], BEFORE, "v3").go_back
    assert not decide([], BEFORE, "v3").go_back


def test_a_dead_engine_is_a_reason_at_once() -> None:
    assert decide([good()], BEFORE, "v3", engine_died=True).reasons == ("its engine stopped while it answered",)


def test_a_version_nobody_used_before_is_compared_with_little() -> None:
    nothing = [good(number, characters=0) for number in range(5)]
    assert not decide(nothing[:3], [], "v0").go_back
    verdict = decide(nothing, [], "v0")
    assert verdict.go_back
    assert "5 answers in a row failed or were empty" in verdict.reasons
    slow = [good(number, first_token_s=60.0) for number in range(5)]
    assert not decide(slow, [], "v0").go_back  # nobody knows what is usual
    assert ASSUMED_GOOD == 20


def test_answers_that_never_begin_count_as_late_while_they_wait() -> None:
    assert not decide([], BEFORE, "v3", waiting=[(1.1, 1)] * 20).go_back
    assert decide([], BEFORE, "v3", waiting=[(1.3, 1)] * 5).reasons == ("5 of 5 answers began late (v3: 0 of 200)",)


def test_length_is_not_judged_where_it_was_the_aim() -> None:
    longer = [good(number, characters=900) for number in range(8)]
    assert decide(longer, BEFORE, "v3").go_back
    assert not decide(longer, BEFORE, "v3", judge_length=False).go_back


def test_a_crowd_may_wait_longer() -> None:
    crowd = [good(number, first_token_s=2.7, load=16) for number in range(16)]
    assert not decide(crowd, BEFORE, "v3").go_back
    assert decide([good(number, first_token_s=2.7) for number in range(16)], BEFORE, "v3").go_back
    used_to_it = [good(number, load=16) for number in range(200)]
    assert decide(crowd, used_to_it, "v3").go_back


def test_a_version_that_is_no_worse_is_hardly_ever_taken_back() -> None:
    """Shares as people meet them, a look after each of 50 answers: 4 wrong alarms in 100 would be far too many."""
    dice = random.Random(7)

    def one(number: int) -> Answered:
        return Answered(
            f"cand_{number}",
            failed=dice.random() < 0.02,
            characters=0 if dice.random() < 0.02 else int(dice.lognormvariate(6, 0.8)),
            repetitive=dice.random() < 0.05,
            first_token_s=dice.lognormvariate(-1, 0.6),
            rating=dice.choice(("up", "up", "down")) if dice.random() < 0.2 else None,
        )

    alarms = 0
    for _ in range(60):
        before, after = ([one(number) for number in range(count)] for count in (200, 50))
        alarms += any(decide(after[:seen], before, "v3").go_back for seen in range(1, 51))
    assert alarms <= 1


def test_what_a_request_chose_itself_counts_only_where_it_failed() -> None:
    for change in ({"characters": 0}, {"repetitive": True}, {"first_token_s": 60.0}, {"characters": 900}):
        assert not decide([good(number, on_own_terms=False, **change) for number in range(50)], BEFORE, "v3").go_back
    failed = [good(number, on_own_terms=False, failed=True) for number in range(8)]
    assert "8 of 8 answers failed (v3: 0 of 200)" in decide(failed, BEFORE, "v3").reasons


def test_two_ratings_of_one_origin_count() -> None:
    rated = [*(replace(one, rating="up") for one in BEFORE[:40]), *BEFORE[40:]]
    of_one = [good(number, rating="down", origin="page:1") for number in range(20)]
    assert not decide(of_one, rated, "v3").go_back
    of_many = [good(number, rating="down", origin=f"page:{number // 2}") for number in range(8)]
    assert decide(of_many, rated, "v3").go_back
