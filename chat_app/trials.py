"""The live trial: a challenger is shown in a share of the pairs, blind, against the champion, until its votes decide.

    start → serve the challenger beside → drawn into pairs → a vote → look → … → end → release it

Where it sits: beside `operations.py`, behind `/v1/trials`, `zloop trial` and the admin page. The events are the
store's, the votes are derived from pairs and picks there (`feedback_store/trials.py`), the test is the trainer's
(`trainer/sequential.py`), reached through the `Judge` port. So a server that is started again goes on where it was.
At most one trial runs. It ends by its votes, by a person, by any other champion, and where the challenger cannot be
served. It never promotes: whoever decides that listens to `on_end`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol

from chat_app.answers import Answers
from chat_app.serving.engine import (
    NOT_ITS_FAULT,
    EngineBusy,
    EngineError,
    EngineStartFailed,
    ServedVersion,
    VersionNotServed,
)
from feedback_store.errors import Conflict, StoreError
from feedback_store.records import Comparisons, Pair, Trial, TrialVote
from feedback_store.store import FeedbackStore

log = logging.getLogger(__name__)

FAILURES = 3
"""As many broken answers in a row end a trial; a challenger that cannot be started ends it at once."""


class Judge(Protocol):
    """What a trial asks of the trainer; `chat_app.trainer_room.TrainerRoom` fits it."""

    def served(self, version: str) -> ServedVersion: ...
    def raters(self, version: str) -> Collection[str] | None:
        """Whose preferences a version was trained on; None where that is no longer known."""
        ...

    def trial_rules(self, challenger: str, champion: str, max_votes: int) -> Mapping[str, Any]:
        """What a trial will be decided by, fixed before its first vote."""
        ...

    def look(
        self, wins: int, ties: int, losses: int, rules: Mapping[str, Any], versions: tuple[str, str]
    ) -> Mapping[str, Any]:
        """What its votes say: interval, e_better, e_worse, outcome (None while it goes on), sentence."""
        ...

    def strength(
        self, comparisons: Sequence[Comparisons], champion: str, promotions: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """The body of GET /v1/strength, but for what happened when."""
        ...


class TrialOperations:
    """What a button, a command and a route do with live trials.

    `answers` draws the challenger into pairs. `changing` is held by whoever changes what is served. `on_end` hears of
    every trial that ended, in the thread or task that ended it.
    """

    def __init__(
        self,
        store: FeedbackStore,
        judge: Judge,
        answers: Answers,
        changing: asyncio.Lock,
        *,
        share: float,
        max_votes: int,
        rater: str,
        on_end: Callable[[Trial], None] | None = None,
    ) -> None:
        self.on_end = on_end
        self._store = store
        self._judge = judge
        self._answers = answers
        self._changing = changing
        self._share = share
        self._max_votes = max_votes
        self._rater = rater
        self._dice = random.SystemRandom()
        self._running: Trial | None = store.running_trial()
        self._failures = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        answers.contest = self

    # --- starting, going on, stopping ------------------------------------------------------------------------------

    async def start(
        self, version: str, *, share: float | None = None, max_votes: int | None = None, reason: str = ""
    ) -> dict[str, Any]:
        """Show `version` against the champion in a share of the pairs from now on; returns the trial.

        Raises Conflict while another one runs and for the champion itself, and what serving the version raises.
        """
        slot = self._answers.slot
        async with self._changing:
            running = await asyncio.to_thread(self._store.running_trial)
            if running is not None:
                raise Conflict(
                    f"{running.challenger} is on live trial against {running.champion} ({running.trial_id}): "
                    "one at a time. Stop it, or wait for its end."
                )
            champion = self._store.champion()
            if version == champion:
                raise Conflict(f"{version} is the champion: a trial needs another version to show against it.")
            if slot.version != champion:
                raise Conflict(f"{slot.version} answers in place of the champion {champion}: mend that first.")
            served = await asyncio.to_thread(self._judge.served, version)
            rules = self._judge.trial_rules(version, champion, self._max_votes if max_votes is None else max_votes)
            there = version in slot.versions
            await slot.serve_beside(served)
            try:
                trial = await asyncio.to_thread(
                    lambda: self._store.record_trial(
                        version,
                        share=self._share if share is None else share,
                        rules=rules,
                        by=self._rater,
                        reason=reason,
                    )
                )
            except StoreError:
                if not there:
                    await self._release(version)
                raise
            self._running, self._loop, self._failures = trial, asyncio.get_running_loop(), 0
        return await asyncio.to_thread(self._body, trial)

    async def go_on(self) -> None:
        """After a start of the server: serve the challenger of the running trial beside again, or say why it ended."""
        self._loop = asyncio.get_running_loop()
        await self.champion_changed()
        trial = self._running = await asyncio.to_thread(self._store.running_trial)
        if trial is not None:
            await self._serve(trial)

    async def stop(self, trial_id: str) -> dict[str, Any]:
        """End a trial by a person's word. Raises NotFound, Conflict where it has ended."""
        trial = await asyncio.to_thread(self._store.trial, trial_id)
        if not trial.is_running:
            raise Conflict(f"The trial {trial_id} has ended already: {trial.state}. There is nothing to stop.")
        await asyncio.to_thread(self._end, trial, "stopped", "Stopped by a person.")
        return await asyncio.to_thread(self.trial, trial_id)

    async def champion_changed(self) -> None:
        """After a promotion or a rollback, which is done whatever happens here: a trial against another is over."""
        try:
            await asyncio.to_thread(self._end_if_overtaken)
        except Exception:  # nothing is drawn against another champion, and the next start of the server looks again
            log.exception("A trial could not be ended after a promotion.")

    # --- what the answers ask --------------------------------------------------------------------------------------

    def drawn(self, champion: str) -> str | None:
        """The challenger, in its share of the pairs; None for the champion against itself."""
        trial = self._running
        if trial is None or trial.champion != champion or self._dice.random() >= trial.share:
            return None
        return trial.challenger

    async def answered(self, version: str, error: EngineError | None) -> None:
        """Count the challenger's failures; too many in a row end the trial. What its client or nobody is to
        blame for is none."""
        trial = self._running
        if trial is None or trial.challenger != version or isinstance(error, NOT_ITS_FAULT):
            return
        if isinstance(error, VersionNotServed):  # as after a pause of all engines; the next pair may have it again
            await self._serve(trial)
            return
        self._failures = 0 if error is None else self._failures + 1
        if isinstance(error, EngineStartFailed) or self._failures >= FAILURES:
            times = f"{FAILURES} times in a row, at last: " if self._failures >= FAILURES else ""
            await asyncio.to_thread(self._end, trial, "failed", f"{version} could not answer: {times}{error}")

    def voted(self, pair: Pair) -> None:
        """After a pick: look at the votes, if it may be one of the running trial; end the trial where they decide."""
        trial = self._running
        if trial is None or {pair.first.version, pair.second.version} != {trial.challenger, trial.champion}:
            return
        try:
            evidence = self._evidence(trial)
            if evidence["outcome"] is not None:
                self._end(trial, str(evidence["outcome"]), str(evidence["sentence"]), evidence)
        except Exception:  # the pick is stored; a look that fails must not hide that, and comes again at the next one
            log.exception("The votes of %s could not be judged.", trial.trial_id)

    # --- what people look at ---------------------------------------------------------------------------------------

    def challenger(self) -> str | None:
        """The version on trial now."""
        return None if self._running is None else self._running.challenger

    def latest(self) -> tuple[str, str] | None:
        """The newest trial and its state, for who wants to know whether anything changed."""
        trials = self._store.load_trials()
        return (trials[0].trial_id, trials[0].state) if trials else None

    def trials(self) -> list[dict[str, Any]]:
        """Every trial, the newest first."""
        return [self._body(trial) for trial in self._store.load_trials()]

    def trial(self, trial_id: str) -> dict[str, Any]:
        """One trial. Raises NotFound."""
        return self._body(self._store.trial(trial_id))

    def strength(self) -> dict[str, Any]:
        """The strength of every version from all blind picks, and whether it is getting better."""
        promotions: dict[str, list[str]] = {}
        for event in self._store.load_promotions():
            promotions.setdefault(event.version, []).append(event.created_at.isoformat(timespec="seconds"))
        found = self._judge.strength(self._store.comparisons(), self._store.champion(), promotions)
        events = [
            {
                "at": event.created_at.isoformat(timespec="seconds"),
                "version": event.version,
                "previous": event.previous,
                "kind": event.kind,
                "reason": event.reason,
            }
            for event in self._store.load_promotions()
        ]
        return {**found, "events": events, "until": datetime.now(UTC).isoformat(timespec="seconds")}

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _serve(self, trial: Trial) -> None:
        """Serve the challenger beside the champion; end the trial where that cannot be. Being busy is no reason."""
        try:
            await self._answers.slot.serve_beside(await asyncio.to_thread(self._judge.served, trial.challenger))
            if self.challenger() != trial.challenger:  # it ended meanwhile
                await self._release(trial.challenger)
        except EngineBusy as error:
            log.warning("%s is not served yet: %s", trial.challenger, error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a version, the champion answers on
            await asyncio.to_thread(self._end, trial, "failed", f"{trial.challenger} could not be served: {error}")

    def _end_if_overtaken(self) -> None:
        trial, champion = self._store.running_trial(), self._store.champion()
        if trial is None or trial.champion == champion:
            return
        if champion == trial.challenger:
            self._end(trial, "promoted", f"{champion} was promoted.")
        else:
            self._end(trial, "overtaken", f"{champion} became the champion instead of {trial.champion}.")

    def _end(self, trial: Trial, state: str, reason: str, evidence: Mapping[str, Any] | None = None) -> Trial | None:
        """Record the end, tell who listens, release the challenger; None where another thread was first."""
        try:
            ended = self._store.record_trial_end(
                trial.trial_id, state, reason=reason, evidence=evidence or self._evidence(trial), by=self._rater
            )
        except Conflict:
            return None
        if self._running is not None and self._running.trial_id == trial.trial_id:
            self._running = None
        log.info("The trial of %s against %s ended: %s. %s", trial.challenger, trial.champion, state, reason)
        if self.on_end is not None:
            self.on_end(ended)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._release_soon, trial.challenger)
        return ended

    def _release_soon(self, version: str) -> None:
        task = asyncio.get_running_loop().create_task(self._release(version))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release(self, version: str) -> None:
        """No longer serve it beside the champion; its answers end first. The champion stays."""
        with suppress(EngineError):
            if version != self._answers.slot.version and version != self.challenger():
                await self._answers.slot.release(version)

    def _evidence(self, trial: Trial) -> dict[str, Any]:
        """What the votes so far are and say, as it is kept at the end; those cast in quarantine do not count."""
        cast = self._store.trial_votes(trial.trial_id)
        votes = [vote for vote in cast if not vote.is_apart]
        counted = _counted(votes)
        look = self._judge.look(
            counted["wins"], counted["ties"], counted["losses"], trial.rules, (trial.challenger, trial.champion)
        )
        trained = self._judge.raters(trial.challenger)
        return {
            "votes": counted,
            **look,
            "shown_first": _counted([vote for vote in votes if vote.challenger_first]),
            "shown_second": _counted([vote for vote in votes if not vote.challenger_first]),
            "by_who_trained_it": None if trained is None else _counted([one for one in votes if one.rater in trained]),
            "by_quarantined": _counted([vote for vote in cast if vote.is_apart]),
            "by_others": None if trained is None else _counted([one for one in votes if one.rater not in trained]),
        }

    def _body(self, trial: Trial) -> dict[str, Any]:
        evidence = self._evidence(trial) if trial.is_running else dict(trial.evidence or {})
        return {
            "trial_id": trial.trial_id,
            "state": trial.state,
            "challenger": trial.challenger,
            "champion": trial.champion,
            "share": trial.share,
            "rules": dict(trial.rules),
            "by": trial.by,
            "reason": trial.reason,
            "started_at": trial.created_at.isoformat(timespec="seconds"),
            "ended_at": None if trial.ended_at is None else trial.ended_at.isoformat(timespec="seconds"),
            "ended_by": trial.ended_by,
            "ended_reason": trial.ended_reason,
            **evidence,
        }


def _counted(votes: Sequence[TrialVote]) -> dict[str, int]:
    found = Counter(vote.result for vote in votes)
    return {"wins": found["win"], "ties": found["tie"], "losses": found["loss"]}
