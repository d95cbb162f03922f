"""Admission alone, with a clock of its own: seats, turns, the line, budgets, and what a refused person reads."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from chat_app.admission import UNMEASURED_S, WAIT_LIMIT_S, Admission, Place
from chat_app.metrics import Metrics
from chat_app.serving.engine import EngineBusy


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class House:
    """An admission with the people in it; `come` and `go` by name."""

    def __init__(self, **limits: int) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        chosen = {"at_once": 4, "per_user": 2, "max_waiting": 8, "tokens_per_minute": 0, **limits}
        self.admission = Admission(**chosen, metrics=self.metrics, clock=self.clock)
        self._stacks: dict[Place, AsyncExitStack] = {}

    async def come(self, user: str, seats: int = 1) -> Place:
        stack = AsyncExitStack()
        place = await stack.enter_async_context(self.admission.admit(user, seats))
        self._stacks[place] = stack
        return place

    async def go(self, place: Place) -> None:
        await self._stacks.pop(place).aclose()

    async def empty(self) -> None:
        for place in list(self._stacks):
            await self.go(place)
        assert (self.admission.decoding, self.admission.waiting) == (0, 0)


def run(work: Callable[[House], Awaitable[Any]], **limits: int) -> None:
    async def all_of_it() -> None:
        house = House(**limits)
        await work(house)
        await house.empty()

    asyncio.run(all_of_it())


def is_seated(place: Place) -> bool:
    return place.seated_at is not None


def test_no_more_than_the_seats_there_are_and_no_more_than_one_s_own() -> None:
    async def work(house: House) -> None:
        mine = [await house.come("me") for _ in range(3)]
        assert [is_seated(place) for place in mine] == [True, True, False]
        assert await mine[0].seated(0)
        assert not await mine[2].seated(0)
        others = [await house.come(f"other {number}") for number in range(3)]
        assert [is_seated(place) for place in others] == [True, True, False]
        assert (house.admission.decoding, house.admission.waiting, house.admission.is_full) == (4, 2, True)
        await house.go(others[0])
        assert is_seated(others[2])
        assert not is_seated(mine[2])  # a free seat is no use to who has all of theirs
        await house.go(mine[1])
        assert is_seated(mine[2])

    run(work)


def test_free_seats_go_round_the_users_not_the_requests() -> None:
    async def work(house: House) -> None:
        heavy = [await house.come("heavy") for _ in range(12)]
        light = await house.come("light")
        assert not is_seated(light)
        await house.go(heavy[0])
        await house.go(heavy[1])
        assert is_seated(light)
        assert [is_seated(place) for place in heavy[2:]] == [True] + [False] * 9

    run(work, at_once=2, max_waiting=20)


def test_every_user_gets_a_turn_before_anybody_gets_a_second() -> None:
    async def work(house: House) -> None:
        first = [await house.come("zero") for _ in range(2)]
        waiting = [await house.come(user) for user in ("a", "a", "a", "b", "b", "c")]
        order: list[str] = []
        for place in first:
            house.clock.now += 1
            await house.go(place)
        while any(map(is_seated, waiting)):
            place = min((place for place in waiting if is_seated(place)), key=lambda place: place.seated_at or 0)
            waiting.remove(place)
            order.append(place.user)
            house.clock.now += 1
            await house.go(place)
        assert order[:3] == ["a", "b", "c"]
        assert sorted(order) == ["a", "a", "a", "b", "b", "c"]

    run(work, at_once=2)


def test_a_pair_gets_both_seats_together_and_single_requests_cannot_starve_it() -> None:
    async def work(house: House) -> None:
        singles = [await house.come(f"single {number}") for number in range(4)]
        pair = await house.come("pair", seats=2)
        late = await house.come("late")
        await house.go(singles[0])
        assert not is_seated(pair)
        assert not is_seated(late)  # it is the pair's turn
        await house.go(singles[1])
        assert is_seated(pair)
        assert house.admission.decoding == 4
        await house.go(pair)
        assert is_seated(late)

    run(work)


def test_pairs_of_many_never_lock_each_other_out() -> None:
    async def work(house: House) -> None:
        waiting = [await house.come(f"user {number % 5}", seats=2) for number in range(20)]
        while waiting:
            seated = [place for place in waiting if is_seated(place)]
            assert seated, "everybody waits and nobody is served"
            assert house.admission.decoding <= 3
            for place in seated:
                waiting.remove(place)
                await house.go(place)

    run(work, at_once=3, max_waiting=20)


def test_a_full_line_sends_away_whoever_fills_it() -> None:
    async def work(house: House) -> None:
        heavy = [await house.come("heavy") for _ in range(10)]  # two seated, eight in line: it is full
        with pytest.raises(EngineBusy, match=r"9 requests are waiting, 9 of them yours\. Come back in \d+ s") as told:
            await (await house.come("heavy")).seated(0)
        assert told.value.yours
        light = await house.come("light")  # the newest of the heavy one gives way
        with pytest.raises(EngineBusy) as told:
            await heavy[-1].seated(0)
        assert told.value.yours
        assert not await light.seated(0)
        assert house.admission.waiting == 8

    run(work, at_once=2)


def test_a_line_filled_by_many_is_nobody_s_own_fault() -> None:
    async def work(house: House) -> None:
        people = [await house.come(f"user {number}") for number in range(5)]
        with pytest.raises(EngineBusy, match="the limit is 3") as told:
            await (await house.come("one more")).seated(0)
        assert not told.value.yours
        assert sum(map(is_seated, people)) == 2

    run(work, at_once=2, max_waiting=3)


def test_who_leaves_the_line_is_out_of_it_at_once() -> None:
    async def work(house: House) -> None:
        seated = [await house.come(f"user {number}") for number in range(4)]

        async def wait() -> None:
            async with house.admission.admit("leaver") as place:
                await place.seated(60)

        leaver = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert house.admission.waiting == 1
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert house.admission.waiting == 0
        await house.go(seated[0])
        assert house.admission.decoding == 3

    run(work)


def test_a_seat_given_to_somebody_who_is_just_leaving_is_not_lost() -> None:
    async def work(house: House) -> None:
        seated = [await house.come(f"user {number}") for number in range(4)]

        async def wait() -> None:
            async with house.admission.admit("leaver") as place:
                await place.seated(60)
                raise AssertionError("it left")

        leaver = asyncio.create_task(wait())
        await asyncio.sleep(0)
        await house.go(seated[0])  # called …
        leaver.cancel()  # … and gone before it could sit down
        await asyncio.gather(leaver, return_exceptions=True)
        assert house.admission.decoding == 3

    run(work)


def test_waiting_has_an_end() -> None:
    async def work(house: House) -> None:
        for number in range(4):
            await house.come(f"user {number}")
        late = await house.come("late")
        house.clock.now = WAIT_LIMIT_S - 1
        assert not await late.seated(0)
        house.clock.now = WAIT_LIMIT_S
        with pytest.raises(EngineBusy, match="within 120 s: the house is full") as told:
            await late.seated(0)
        assert not told.value.yours
        assert house.admission.waiting == 0

    run(work)


def test_waiting_for_one_s_own_answers_has_an_end_too() -> None:
    async def work(house: House) -> None:
        await house.come("me", seats=2)
        mine = await house.come("me")
        house.clock.now = WAIT_LIMIT_S
        with pytest.raises(EngineBusy, match="your own 2 are still being written") as told:
            await mine.seated(0)
        assert told.value.yours

    run(work)


def test_when_to_come_back_follows_from_how_long_answers_take() -> None:
    async def work(house: House) -> None:
        people = [await house.come(f"user {number}") for number in range(4)]
        late = await house.come("late")
        assert late.sentence == "4 answers are being written; yours begins in about 2 s."
        assert house.admission.expected_wait_s(late) == pytest.approx(UNMEASURED_S / 4)
        house.clock.now = 40
        await house.go(people[0])
        later = await house.come("later")
        assert later.sentence == "4 answers are being written; yours begins in about 10 s."
        assert house.admission.expected_wait_s(await house.come("latest")) == pytest.approx(20)

    run(work)


def test_a_budget_is_charged_with_what_was_used_and_refuses_until_it_has_refilled() -> None:
    async def work(house: House) -> None:
        place = await house.come("me")
        place.charge(50)
        await house.go(place)
        place = await house.come("me")  # ten are left: enough to begin
        place.charge(80)
        await house.go(place)
        with pytest.raises(EngineBusy, match=r"your 60 tokens a minute.*Come back in 71 s") as told:
            await house.come("me")
        assert told.value.yours
        assert told.value.retry_after_s == pytest.approx(71)
        await house.go(await house.come("somebody else"))
        house.clock.now += 71
        await house.come("me")
        house.clock.now += 3_600
        assert house.admission.budget.left("me") == 60  # no bucket holds more than a minute's tokens

    run(work, tokens_per_minute=60)


def test_a_budget_spent_while_waiting_is_spent() -> None:
    async def work(house: House) -> None:
        running = await house.come("me", seats=2)
        waiting = await house.come("me")
        running.charge(1_000)
        await house.go(running)
        with pytest.raises(EngineBusy, match="tokens a minute"):
            await waiting.seated(0)
        assert house.admission.decoding == 0

    run(work, tokens_per_minute=100)


def test_full_buckets_are_forgotten() -> None:
    async def work(house: House) -> None:
        budget = house.admission.budget
        for number in range(2_500):
            house.clock.now += 1
            budget.charge(f"user {number}", 1)
        assert len(budget._spent) <= 1_001

    run(work, tokens_per_minute=60)


def test_a_closed_house_lets_nobody_in_and_waits_for_those_inside() -> None:
    async def work(house: House) -> None:
        seated = [await house.come(f"user {number}") for number in range(4)]
        late = await house.come("late")
        house.admission.close()
        with pytest.raises(EngineBusy, match="stopping"):
            await late.seated(0)
        with pytest.raises(EngineBusy, match="stopping") as told:
            await house.come("newcomer")
        assert not told.value.yours
        assert told.value.retry_after_s > 0
        waiting = asyncio.create_task(house.admission.idle())
        for place in seated:
            await asyncio.sleep(0)
            assert not waiting.done()
            await house.go(place)
        await waiting

    run(work)


def test_refusals_are_counted_by_reason_and_name_nobody() -> None:
    async def work(house: House) -> None:
        for _ in range(3):
            await house.come("secret name")
        await house.come("secret name")
        text = house.metrics.render(None).decode()
        assert 'zloop_refusals_total{reason="line_full"} 1.0' in text
        assert "zloop_waiting_seconds_count 2.0" in text
        assert "secret" not in text

    run(work, max_waiting=1)
