"""Admission: who may be answered now, who waits, and who is asked to come back later.

Where it sits: `answers.py` takes a seat here before it pins an engine, and gives it back when the engine has stopped
writing. A seat is one answer being written; a pair takes two, together or not at all. Free seats go round the users,
not round the requests: fifty requests of one user delay nobody else's first one.

When the line is full, the newest request of whoever has the most in it gives way. A user's tokens are counted when an
answer has ended, by what it really took; the bucket may fall below zero and refills steadily, which no rate limiting
library offers (they all count before the work). Everything here belongs to one event loop and lives in memory only:
the names of users are kept for as long as they have something in line, a seat, or an empty bucket.
"""

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from chat_app.metrics import Metrics
from chat_app.serving.engine import EngineBusy

WAIT_LIMIT_S = 120.0
RESTART_S = 10.0
UNMEASURED_S = 5.0  # how long an answer takes, before one was measured
MEASURED = 32
REMEMBERED_BUCKETS = 1_000

Clock = Callable[[], float]


class TokenBudget:
    """Tokens each user may spend a minute, prompt and answer together; 0 means no limit."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._spent: dict[str, tuple[float, float]] = {}  # user → (tokens left, when that was so)

    def left(self, user: str) -> float:
        """Tokens left now; below zero after an answer that was longer than what was left."""
        left, since = self._spent.get(user, (self.per_minute, 0.0))
        return min(self.per_minute, left + (self._clock() - since) * self.per_minute / 60)

    def retry_after_s(self, user: str) -> float:
        """Seconds until a token is left; 0 where one is."""
        return 0.0 if self.per_minute == 0 else max(0.0, (1 - self.left(user)) * 60 / self.per_minute)

    def charge(self, user: str, tokens: int) -> None:
        """Take what an answer used."""
        if self.per_minute == 0:
            return
        self._spent[user] = (self.left(user) - tokens, self._clock())
        if len(self._spent) > REMEMBERED_BUCKETS:
            self._spent = {one: level for one, level in self._spent.items() if self.left(one) < self.per_minute}


class Place:
    """A place in the line, later the seats themselves. Made by `Admission.admit`."""

    def __init__(self, admission: "Admission", user: str, seats: int, since: float) -> None:
        self.user = user
        self.seats = seats
        self.since = since
        self.seated_at: float | None = None
        self.refusal: EngineBusy | None = None
        self.called = asyncio.Event()
        self._admission = admission

    async def seated(self, tick_s: float) -> bool:
        """Wait for the seats, for at most `tick_s` seconds; True once they are taken. Raises EngineBusy."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.called.wait(), tick_s)
        if self.seated_at is None:
            self._admission.require_patience(self)
        if self.refusal is not None:
            raise self.refusal
        return self.seated_at is not None

    def charge(self, tokens: int) -> None:
        """Count what an answer used against its user's budget."""
        self._admission.budget.charge(self.user, tokens)

    @property
    def sentence(self) -> str:
        """What a person who waits reads."""
        busy, begins_s = self._admission.decoding, math.ceil(self._admission.expected_wait_s(self))
        being_written = "One answer is" if busy == 1 else f"{busy} answers are"
        return f"{being_written} being written; yours begins in about {begins_s} s."


class Admission:
    """The seats and the line before them.

    `at_once` answers are written at the same time, `per_user` of them for one user (both at least 2: a pair needs two
    seats), and `max_waiting` requests wait, each for at most `WAIT_LIMIT_S`.
    """

    def __init__(
        self,
        *,
        at_once: int,
        per_user: int,
        max_waiting: int,
        tokens_per_minute: int,
        metrics: Metrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self.budget = TokenBudget(tokens_per_minute, clock)
        self.is_closed = False
        self._at_once = at_once
        self._per_user = min(per_user, at_once)
        self._max_waiting = max_waiting
        self._metrics = metrics
        self._clock = clock
        self._lines: OrderedDict[str, deque[Place]] = OrderedDict()  # user → their requests; the next user comes first
        self._seats: Counter[str] = Counter()  # user → seats taken
        self._held_s: deque[float] = deque(maxlen=MEASURED)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def decoding(self) -> int:
        """Seats taken: answers being written."""
        return self._seats.total()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return sum(map(len, self._lines.values()))

    @property
    def is_full(self) -> bool:
        """True where no seat is free."""
        return self.decoding >= self._at_once

    @asynccontextmanager
    async def admit(self, user: str, seats: int = 1) -> AsyncIterator[Place]:
        """A place for `user`, until the block ends; await `seated` until it is True, then write `seats` answers.

        However the block is left, the place in line is given up and the seats are free at once. Raises EngineBusy:
        with `yours` where the user's own requests or tokens are the reason, without where the house is full.
        """
        assert seats <= self._per_user
        self._require_open()
        self._require_budget(user)
        place = Place(self, user, seats, self._clock())
        self._lines.setdefault(user, deque()).append(place)
        self._seat_waiting()
        try:
            if self.waiting > self._max_waiting:
                self._turn_somebody_away(place)
            yield place
        finally:
            self._leave(place)

    def close(self) -> None:
        """Admit nobody any more, and send away those in line; who has a seat keeps it."""
        self.is_closed = True
        for place in [place for line in self._lines.values() for place in line]:
            self._refuse(place, self._stopping())

    async def idle(self) -> None:
        """Wait until no answer is being written."""
        await self._idle.wait()

    def expected_wait_s(self, place: Place) -> float:
        """Seconds until `place` is seated, from how long the last answers took."""
        held_s = sum(self._held_s) / len(self._held_s) if self._held_s else UNMEASURED_S
        own = next((rank for rank, one in enumerate(self._lines.get(place.user, ())) if one is place), 0)
        before = own + sum(min(len(line), own + 1) for user, line in self._lines.items() if user != place.user)
        house_s = held_s * (before + 1) / self._at_once
        own_s = held_s * (own + 1) / self._per_user if self._seats[place.user] + place.seats > self._per_user else 0
        return max(1.0, house_s, own_s)

    def require_patience(self, place: Place) -> None:
        """Send `place` away where it has waited for too long."""
        if place.refusal is None and self._clock() - place.since >= WAIT_LIMIT_S:
            yours = self._seats[place.user] + place.seats > self._per_user
            why = f"your own {self._seats[place.user]} are still being written" if yours else "the house is full"
            said = f"No answer could be begun within {WAIT_LIMIT_S:g} s: {why}."
            self._refuse(place, self._busy("waited", said, self.expected_wait_s(place), yours=yours))

    def _seat_waiting(self) -> None:
        """Give the free seats to those whose turn it is."""
        while (place := self._next()) is not None:
            self._remove(place)
            if place.user in self._lines:
                self._lines.move_to_end(place.user)
            over_s = self.budget.retry_after_s(place.user)
            if over_s > 0:  # spent while this one waited
                self._refuse(place, self._over_budget(over_s))
                continue
            place.seated_at = self._clock()
            self._seats[place.user] += place.seats
            self._idle.clear()
            self._metrics.seated(place.seated_at - place.since)
            place.called.set()

    def _next(self) -> Place | None:
        """The oldest request of the user whose turn it is. Who has all the seats one may have lets others go first."""
        for user, line in self._lines.items():
            if self._seats[user] + line[0].seats <= self._per_user:
                # A pair whose turn it is waits for its second seat; nobody takes the first one meanwhile.
                return line[0] if self.decoding + line[0].seats <= self._at_once else None
        return None

    def _turn_somebody_away(self, newcomer: Place) -> None:
        longest = max(self._lines, key=lambda user: (len(self._lines[user]), user == newcomer.user))
        place = self._lines[longest][-1]
        yours = len(self._lines[longest]) > 1
        whose = f"{len(self._lines[longest])} of them yours" if yours else f"the limit is {self._max_waiting}"
        said = f"{self.waiting} requests are waiting, {whose}."
        self._refuse(place, self._busy("line_full", said, self.expected_wait_s(place), yours=yours))

    def _leave(self, place: Place) -> None:
        if place.seated_at is None:
            self._remove(place)
        else:
            self._held_s.append(self._clock() - place.seated_at)
            self._seats[place.user] -= place.seats
            if not self._seats[place.user]:
                del self._seats[place.user]
            if not self._seats:
                self._idle.set()
        self._seat_waiting()

    def _remove(self, place: Place) -> None:
        line = self._lines.get(place.user, deque())
        with suppress(ValueError):
            line.remove(place)
        if not line:
            self._lines.pop(place.user, None)

    def _refuse(self, place: Place, refusal: EngineBusy) -> None:
        self._remove(place)
        place.refusal = refusal
        place.called.set()

    def _require_open(self) -> None:
        if self.is_closed:
            raise self._stopping()

    def _require_budget(self, user: str) -> None:
        over_s = self.budget.retry_after_s(user)
        if over_s > 0:
            raise self._over_budget(over_s)

    def _stopping(self) -> EngineBusy:
        return self._busy("stopping", "The server is stopping and begins no more answers.", RESTART_S)

    def _over_budget(self, over_s: float) -> EngineBusy:
        said = f"You have used up your {self.budget.per_minute} tokens a minute (prompts and answers together)."
        return self._busy("tokens", said, over_s, yours=True)

    def _busy(self, reason: str, said: str, retry_after_s: float, *, yours: bool = False) -> EngineBusy:
        self._metrics.refused(reason)
        return EngineBusy(f"{said} Come back in {math.ceil(retry_after_s)} s.", retry_after_s, yours=yours)
