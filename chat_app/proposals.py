"""What becomes of a version that seems better: what the buttons, commands and routes of proposals share, and the watch.

    a run ended, a trial ended, the server started ─► wake ─► look ─► policy.decide ─► kept for ever, or waits
                                                                          └─► promoted by itself, watched as usual

Where it sits: beside `operations.py`, which has one as `operations.proposals`. The decision is `policy.py`'s (pure),
what followed is the store's (`feedback_store/proposals.py`): each run and each trial is considered once, whichever
server saw its end. Deciding and promoting hold the lock of whoever changes what is served, so nothing changes in
between. Where a promotion by itself fails, it becomes a proposal with the error.

Only a server considers; where none runs, what is new waits for the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol

from chat_app.baking_watch import Baking
from chat_app.policy import Evidence, Outcome, Situation, Step, decide
from chat_app.serving.slot import ModelSlot, SlotPaused
from chat_app.settings import Settings
from feedback_store.people import named
from feedback_store.records import FORWARD, Proposal
from feedback_store.store import FeedbackStore

log = logging.getLogger(__name__)

WAIT_S = 1.0
RETRY_S = 15.0


class Verdicts(Protocol):
    """What is asked of the trainer; `chat_app.trainer_room.TrainerRoom` fits it."""

    def verdicts(self) -> Sequence[Mapping[str, Any]]:
        """The runs whose verdict is `promote`, newest first: run_id, version, champion, reasons, ended_at."""
        ...

    def started_by(self, version: str) -> str | None:
        """Who started the run that made a version; None where nobody knows."""
        ...


class Proposals:
    """`changing` is held by whoever changes what is served; `make_champion(version, reason)` is called under it.

    `challenger` names the version on live trial, `is_practised` says of a version whether it practised a taste,
    `against` what speaks against it as the champion.
    """

    def __init__(
        self,
        settings: Settings,
        store: FeedbackStore,
        trainer: Verdicts,
        slot: ModelSlot | None,
        *,
        baking: Baking,
        changing: asyncio.Lock,
        make_champion: Callable[[str, str], Awaitable[None]],
        challenger: Callable[[], str | None],
        is_practised: Callable[[str], bool],
        against: Callable[[str], str | None],
    ) -> None:
        self._policy = settings.policy
        self._approval = settings.approval
        self._store = store
        self._trainer = trainer
        self._slot = slot
        self._baking = baking
        self._changing = changing
        self._make_champion = make_champion
        self._challenger = challenger
        self._is_practised = is_practised
        self._against = against
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    # --- the watch -------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at the start, whenever `wake` was called, and again while something waits; until it is cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            try:
                again_s = WAIT_S if await self.look() else None
            except Exception:
                log.exception("What the verdicts ask for could not be done; it is tried again.")
                again_s = RETRY_S
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), again_s)

    def wake(self) -> None:
        """A run or a trial has ended. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    async def look(self) -> bool:
        """Consider what is new; True where something waits. The newest is promoted first, and is proposed last."""
        something_waits = False
        newest_first = await asyncio.to_thread(self._new)
        for evidence in newest_first if self._policy == "auto" else reversed(newest_first):
            outcome = await self._consider(evidence)
            if outcome.step is Step.WAIT:
                something_waits = True
            else:
                log.info("%s against %s: %s. %s", evidence.version, evidence.champion, outcome.step, outcome.reason)
        return something_waits

    async def _consider(self, evidence: Evidence) -> Outcome:
        async with self._changing:
            now = await asyncio.to_thread(self._situation, evidence)
            outcome = decide(self._policy, self._approval, evidence, now)
            if outcome.step is Step.PROMOTE:
                outcome = await self._promoted(evidence, outcome)
            if outcome.step is not Step.WAIT:
                await asyncio.to_thread(self._keep, evidence, outcome)
        return outcome

    async def _promoted(self, evidence: Evidence, outcome: Outcome) -> Outcome:
        try:
            await self._make_champion(evidence.version, outcome.reason)
        except SlotPaused as error:
            return Outcome(Step.WAIT, f"{evidence.version} waits. {error}")
        except Exception as error:  # whatever it is, a person sees it beside the evidence
            log.warning("%s could not be promoted by itself.", evidence.version, exc_info=True)
            return Outcome(Step.PROPOSE, f"It could not be promoted by itself: {error}")
        return outcome

    def _keep(self, evidence: Evidence, outcome: Outcome) -> None:
        self._store.record_proposal(
            evidence.source_id,
            source=evidence.source,
            version=evidence.version,
            champion=evidence.champion,
            outcome=outcome.step,
            sentence=evidence.sentence,
            reason="" if outcome.step is Step.PROMOTE else outcome.reason,
        )

    def _new(self) -> list[Evidence]:
        """What speaks for a version and was not considered yet, newest first."""
        considered = {one.source_id for one in self._store.load_proposals()}
        found = [
            Evidence(
                "verdict",
                run["run_id"],
                run["version"],
                run["champion"],
                " ".join(run["reasons"]),
                datetime.fromisoformat(run["ended_at"]),
            )
            for run in self._trainer.verdicts()
            if run["run_id"] not in considered
        ]
        for trial in self._store.load_trials():
            if trial.state == "better" and trial.trial_id not in considered:
                assert trial.ended_at is not None
                sentence, at = trial.ended_reason, trial.ended_at
                found.append(Evidence("trial", trial.trial_id, trial.challenger, trial.champion, sentence, at))
        return sorted(found, key=lambda one: one.at, reverse=True)

    def _situation(self, evidence: Evidence) -> Situation:
        version = evidence.version
        return Situation(
            champion=self._store.champion(),
            was_promoted=any(
                one.version == version and one.kind in FORWARD and one.created_at >= evidence.at
                for one in self._store.load_promotions()
            ),
            taken_back=self._baking.taken_back().get(version),
            is_practised=self._is_practised(version),
            watched=self._baking.watched(),
            challenger=self._challenger(),
            is_serving=self._slot is not None and self._slot.is_ready and not self._slot.is_paused,
            against=self._spoken_against(version),
        )

    def _spoken_against(self, version: str) -> str | None:
        """What speaks against a version; that it cannot be read is said by the promotion that fails for it."""
        try:
            return self._against(version)
        except Exception:
            log.warning("What is known of %s cannot be read.", version, exc_info=True)
            return None

    # --- what people see and do ------------------------------------------------------------------------------------

    def open(self) -> list[Proposal]:
        """What is proposed to people now, newest first; each version once."""
        found: dict[str, Proposal] = {}
        for one in self._store.load_proposals():
            if one.is_open:
                found.setdefault(one.version, one)
        return list(found.values())

    def dismiss(self, version: str, *, by: str, reason: str = "") -> None:
        """Propose a version no longer, for good; a new trial may. Raises NotFound where it is not proposed."""
        self._store.dismiss(version, by=by, reason=reason)

    def current(self) -> list[dict[str, Any]]:
        """What waits and what is proposed, newest first; each version once."""
        waiting = []
        for one in self._new():
            outcome = decide(self._policy, self._approval, one, self._situation(one))
            if outcome.step is not Step.LEAVE:
                why = outcome.reason if outcome.step is Step.WAIT else "It is considered as soon as a server runs."
                shown = Proposal(
                    one.source_id, one.source, one.version, one.champion, "proposed", one.sentence, why, one.at
                )
                waiting.append({**self._body(shown), "state": "waiting"})
        return [*waiting, *map(self._body, self.open())]

    def as_body(self) -> dict[str, Any]:
        """The body of GET /v1/proposals: the policy, what waits and is proposed, and what became of the others."""
        ended = [self._body(one) for one in self._store.load_proposals() if one.state not in ("open", "left")]
        return {
            "policy": self._policy,
            "approval": self._approval,
            "proposals": self.current(),
            "ended": ended,
        }

    def _body(self, one: Proposal) -> dict[str, Any]:
        labels = self._store.labels()
        return {
            "version": one.version,
            "champion": one.champion,
            "state": one.state,
            "source": one.source,
            "source_id": one.source_id,
            "sentence": one.sentence,
            "reason": one.reason,
            "at": one.created_at.isoformat(timespec="seconds"),
            "started_by": named(self._trainer.started_by(one.version), labels),
            "dismissed_by": named(one.ended_by, labels),
            "dismissed_reason": one.ended_reason,
        }
