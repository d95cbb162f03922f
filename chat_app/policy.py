"""What follows from a verdict or a won trial: nothing, a proposal, a promotion by itself, or waiting. Pure.

    evidence (a run's verdict `promote`, a live trial that ended better) + settings + situation → decide → Outcome

Where it sits: `proposals.py` collects the evidence, asks here, and acts. Who may promote is here too (`objection`).

**Why each case is as it is.** A practised version is never promoted by itself: a practice shows the loop, nobody asked
that everybody's answers change. One that was taken back answered worse than its evidence said: a person has to look,
as at one that won a trial against its own verdict.
A verdict that compares with another champion than today's says nothing about today's. A promotion would end a live
trial that people are voting in. A champion that is being watched may be gone in a minute: until then it waits.

Not covered: accounts. A name is what a request says, so approval by another is a habit that is kept, not a lock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Literal

Policy = Literal["manual", "propose", "auto"]
Approval = Literal["off", "other"]
Source = Literal["verdict", "trial"]

SCHEDULE, POLICY, NOBODY = "schedule", "policy", "local"
OWN_NAMES = frozenset({SCHEDULE, POLICY, "baking", NOBODY})
"""What the program itself is called where a name stands; `local` is whoever gave none."""


class Step(StrEnum):
    """What is done about evidence. The value is what the store keeps; `wait` is kept nowhere."""

    LEAVE = "left"
    PROPOSE = "proposed"
    PROMOTE = "promoted"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a version: a verdict or a trial (`source_id`: the run or the trial) against `champion`."""

    source: Source
    source_id: str
    version: str
    champion: str
    sentence: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Situation:
    """How things stand for one version. `taken_back`: why it was; `watched`, `challenger`: a version, if there is one.

    `against`: what speaks against it as the champion (`against.py`): the policy promotes no version in spite of it.
    `was_promoted`: somebody has promoted it since the evidence, whatever came then.
    """

    champion: str
    was_promoted: bool = False
    taken_back: str | None = None
    is_practised: bool = False
    watched: str | None = None
    challenger: str | None = None
    is_serving: bool = True
    against: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The step, and why, in a sentence; empty where the evidence says it all."""

    step: Step
    reason: str = ""


def decide(policy: Policy, approval: Approval, evidence: Evidence, now: Situation) -> Outcome:
    """What follows from the evidence. A person who started a trial wanted to know: it proposes under `manual` too."""
    settled = _settled(policy, evidence, now)
    if settled:
        return Outcome(Step.LEAVE, settled)
    doubt = _doubt(evidence, now)
    return _by_itself(approval, evidence, now, doubt) if policy == "auto" else Outcome(Step.PROPOSE, doubt)


def _settled(policy: Policy, evidence: Evidence, now: Situation) -> str:
    """Why there is nothing to do or to say."""
    version = evidence.version
    if version == now.champion:
        return f"{version} is the champion already."
    if now.was_promoted:
        return f"{version} was promoted since, and is not the champion any more."
    return "ZLOOP_POLICY=manual: a person promotes." if policy == "manual" and evidence.source == "verdict" else ""


def _by_itself(approval: Approval, evidence: Evidence, now: Situation, doubt: str) -> Outcome:
    if now.watched is not None:
        return Outcome(Step.WAIT, f"{now.watched} is being watched: {evidence.version} waits until that is over.")
    if not now.is_serving:
        return Outcome(Step.WAIT, f"No model is being served just now: {evidence.version} waits.")
    if doubt:
        return Outcome(Step.PROPOSE, f"It is not promoted by itself: {doubt}")
    if approval == "other":
        return Outcome(Step.PROPOSE, "ZLOOP_APPROVAL=other: a person must promote it.")
    return Outcome(Step.PROMOTE, evidence.sentence)


def _doubt(evidence: Evidence, now: Situation) -> str:
    """Why a person should look at this evidence twice."""
    version = evidence.version
    if now.taken_back is not None:
        return f"{version} answered once and was taken back. {now.taken_back}".strip()
    if now.against is not None:
        return now.against
    if evidence.champion != now.champion:
        return f"{version} was compared with {evidence.champion}, and {now.champion} is the champion now."
    if now.is_practised:
        return f"{version} practised a taste on prepared pairs."
    if now.challenger is not None and (evidence.source, version) != ("trial", now.challenger):  # its own is over
        return f"{now.challenger} is on live trial, which a promotion of {version} would end."
    return ""


def person(by: str | None) -> str | None:
    """The name a request gives, None for none. Raises ValueError for one of the program's own."""
    name = (by or "").strip()
    if name.casefold() in OWN_NAMES:
        raise ValueError(f"{name!r} is a name of the program's own: say who you are with another one.")
    return name or None


def objection(version: str, started_by: str | None, by: str | None) -> tuple[int, str] | None:
    """Why `by` may not promote where another person must (HTTP status, sentence); None: they may.

    `started_by`: who started the run that made the version. Where that was the schedule, or nobody knows, anybody may.
    """
    if by is None:
        return 400, (
            f'ZLOOP_APPROVAL=other: to promote {version}, say who you are: {{"by": "NAME"}} (zloop promote --by NAME).'
        )
    if started_by is None or started_by in OWN_NAMES or started_by.strip().casefold() != by.casefold():
        return None
    return 403, (
        f"{started_by} started the run that made {version}, so {by} cannot promote it: with ZLOOP_APPROVAL=other "
        f"somebody else than {started_by} must. A rollback needs nobody's approval."
    )
