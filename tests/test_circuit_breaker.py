"""The circuit breaker with a clock in hand: closed, open, one trial, closed or open again."""

from __future__ import annotations

import pytest

from chat_app.serving.circuit_breaker import CircuitBreaker
from chat_app.serving.engine import EngineBusy


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker("the model server", limit=3, cool_down_s=15, clock=clock)


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        breaker.enter()
        breaker.failed()


def refused(breaker: CircuitBreaker) -> EngineBusy:
    with pytest.raises(EngineBusy) as caught:
        breaker.enter()
    return caught.value


def test_only_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    breaker.enter()
    breaker.succeeded()
    fail(breaker, 2)
    breaker.enter()
    assert not breaker.is_open


def test_open_it_says_how_often_and_until_when(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 3
    error = refused(breaker)
    assert str(error) == "the model server failed 3 times in a row; next try in 12 s"
    assert error.retry_after_s == 12


def test_after_the_cool_down_exactly_one_request_tries(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 15
    breaker.enter()
    assert refused(breaker).retry_after_s == 1
    breaker.answered()
    breaker.enter()
    assert not breaker.is_open


def test_a_failed_trial_opens_it_again(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 15
    fail(breaker, 1)
    assert refused(breaker).retry_after_s == 15


def test_a_trial_whose_client_left_makes_room_for_the_next(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 15
    breaker.enter()
    breaker.left()
    breaker.enter()
    breaker.succeeded()
    assert not breaker.is_open


def test_streams_that_begin_and_break_off_open_it_too(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        breaker.enter()
        breaker.answered()
        breaker.failed()
    assert breaker.is_open


def test_a_request_that_began_before_it_opened_does_not_open_it_longer_by_leaving(breaker: CircuitBreaker) -> None:
    breaker.enter()
    fail(breaker, 3)
    breaker.left()
    assert breaker.is_open
