"""Deadlines with a clock in hand, and waits that closing ends."""

from __future__ import annotations

import asyncio

import pytest

from chat_app.serving.deadlines import LAST_WORDS_S, Closed, Deadlines, Timeouts, Waits

LIMITS = Timeouts(connect_s=1, first_token_s=10, between_s=5, total_s=30)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_deadline_in_its_turn_and_its_name() -> None:
    clock = Clock()
    deadlines = Deadlines(LIMITS, clock)
    clock.now = 4
    assert deadlines.left_s == 6
    assert deadlines.which == "no first token within 10 s"
    deadlines.on_text()
    assert deadlines.left_s == 5
    assert deadlines.which == "nothing new for 5 s"
    clock.now = 27
    assert deadlines.left_s == 0
    deadlines.on_text()
    assert deadlines.left_s == 3  # the whole answer's comes first
    clock.now = 31
    assert deadlines.which == "the answer was not finished within 30 s"


def test_after_the_end_only_the_last_words_are_waited_for() -> None:
    deadlines = Deadlines(LIMITS, Clock())
    deadlines.on_end()
    assert deadlines.left_s == LAST_WORDS_S


def test_a_passed_deadline_is_noticed_even_where_nothing_waits() -> None:
    clock = Clock()
    deadlines = Deadlines(LIMITS, clock)
    clock.now = 11

    async def look() -> None:
        async with Waits().until(deadlines):
            pytest.fail("nothing may be begun")

    with pytest.raises(TimeoutError):
        asyncio.run(look())


def test_closing_ends_waits_that_are_and_waits_that_come() -> None:
    async def work() -> None:
        waits = Waits()
        begun = asyncio.Event()

        async def wait() -> None:
            async with waits.until(Deadlines(LIMITS)):
                begun.set()
                await asyncio.Event().wait()

        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await begun.wait()
        waits.close()
        ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert [type(error) for error in ended] == [Closed] * 3
        with pytest.raises(Closed):
            await wait()

    asyncio.run(work())
