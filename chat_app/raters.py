"""On whom one can rely: gold pairs, quarantine, the list of raters. What the buttons, commands and routes share.

Where it sits: beside `operations.py`, which has one as `operations.raters`; behind it the store and, through the
`RaterJudge` port, the trainer. Nothing is done to a rater by itself: the list says what looks suspicious, a person puts
somebody into quarantine or retrains without them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from chat_app.gates import Gates
from chat_app.settings import Settings
from feedback_store.agreement import agreement, decided
from feedback_store.errors import NotFound
from feedback_store.gold import FILE, GoldPair, load_gold
from feedback_store.people import named
from feedback_store.rater_tallies import RaterTally
from feedback_store.records import Pair, now
from feedback_store.reliability import GoldAnswers, agreement_with_others, reliabilities
from feedback_store.store import FeedbackStore

NAMED = 20


class RaterJudge(Protocol):
    """What the list of raters asks of the trainer; `chat_app.trainer_room.TrainerRoom` fits it."""

    def next_rows(self) -> Mapping[str | None, int]:
        """How many train rows of whom the next snapshot has; None for rows of nobody."""
        ...

    def last_effects(self) -> Mapping[str, Any] | None:
        """The leave-one-rater-out of the newest evaluation: {"run_id", "version", "raters": [...]}; None before one."""
        ...

    def suspect(self, evidence: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """Rater → {"gold", "agreement", "first": shares with intervals, "suspicions": sentences}."""
        ...


class RaterOperations:
    """What a button, a command and a route do about raters. `rater`: who asks, until accounts exist."""

    def __init__(self, settings: Settings, store: FeedbackStore, judge: RaterJudge, rater: str, gates: Gates) -> None:
        self._gates = gates
        self._settings = settings
        self._store = store
        self._judge = judge
        self._rater = rater
        self._dice = random.SystemRandom()

    # --- rating a pair ---------------------------------------------------------------------------------------------

    def next_pair(self) -> Pair | None:
        """A pair for the rater to judge, blind: one that others judged or nobody did, or now and then a gold one.

        None where none is left. Raises BadGoldPairs where the file cannot be used.
        """
        seen = self._store.gold_seen_by(self._rater)
        gold = [pair for pair in self._gold() if pair.gold_id not in seen]
        others = self._store.load_pairs_to_rate(self._rater)
        if gold and (not others or self._dice.random() < self._settings.gold_share):
            shown = self._dice.choice(gold).as_pair(now(), right_first=self._dice.random() < 0.5)
            self._store.record_pair(shown)
            return shown
        return self._dice.choice(others) if others else None

    def gold(self) -> dict[str, Any]:
        """The gold pairs there are, and how raters did on each."""
        results = self._store.gold_results()
        nobody = GoldAnswers(0, 0)
        return {
            "file": str(self._settings.data_dir / FILE),
            "pairs": [
                {
                    "prompt": pair.prompt[-1]["content"],
                    "chosen": pair.chosen,
                    "rejected": pair.rejected,
                    "note": pair.note,
                    **results.get(pair.gold_id, nobody)._asdict(),
                }
                for pair in self._gold()
            ],
        }

    def _gold(self) -> Sequence[GoldPair]:
        return load_gold(self._settings.data_dir / FILE)

    # --- quarantine ------------------------------------------------------------------------------------------------

    def quarantine(self, rater: str, *, lift: bool = False, reason: str = "") -> dict[str, Any]:
        """Keep a rater's words and learn nothing from them from now on, or lift that. Raises NotFound, Conflict."""
        self._store.record_quarantine(rater, not lift, reason=reason, by=self._rater)
        label = named(self._store.person_id(rater), self._store.labels())
        return {"rater": label, "state": "active" if lift else "quarantined", "reason": reason}

    def resolved(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request of a run, `without` by id. Raises NotFound for somebody without a word."""
        without = request.get("without")
        if not without:
            return dict(request)
        known = self._store.raters()
        ids = {name: self._store.person_id(name) for name in without}
        for name, person_id in ids.items():
            if person_id not in known:
                raise NotFound("rater", name)
        return {**request, "without": list(ids.values())}

    # --- the list --------------------------------------------------------------------------------------------------

    def raters(self) -> dict[str, Any]:
        """Everybody: what they did, how far one can rely on them, what looks suspicious; those who do, first.

        `agreement` is what `DataOperations.agreement` says, of the same words.
        """
        with self._gates.counting:
            return self._counted()

    def _counted(self) -> dict[str, Any]:
        tallies, standing = self._store.rater_tallies(), self._store.standing()
        votes, labels = self._store.votes(), self._store.labels()
        judgements = decided(votes)
        agreed, found = agreement_with_others(judgements), reliabilities(judgements, standing.gold)
        quarantined = {one.rater: one for one in self._store.quarantines()}
        names = self._store.raters()
        evidence = {
            rater: _evidence(tallies.get(rater), standing.gold.get(rater), agreed.get(rater)) for rater in names
        }
        told, rows, effects = self._judge.suspect(evidence), self._judge.next_rows(), self._judge.last_effects()
        total = sum(rows.values())
        effect = {} if effects is None else {one["rater"]: one for one in effects["raters"]}
        body = [
            {
                "rater": labels.get(rater, rater),
                "person_id": rater,
                "state": "quarantined" if rater in quarantined else "active",
                "reason": quarantined[rater].reason if rater in quarantined else None,
                "since": quarantined[rater].since.isoformat(timespec="seconds") if rater in quarantined else None,
                "picks": tallies[rater].picks if rater in tallies else 0,
                "median_s": tallies[rater].median_s if rater in tallies else None,
                **told[rater],
                "accuracy": found[rater].accuracy if rater in found else None,
                "weight": found[rater].weight if rater in found else 1.0,
                "is_inverted": rater in found and found[rater].is_inverted,
                "next_rows": rows.get(rater, 0),
                "next_share": rows.get(rater, 0) / total if total else 0.0,
                "effect": effect.get(rater),
            }
            for rater in names
        ]
        body.sort(key=lambda one: (-len(one["suspicions"]), -one["next_rows"], one["rater"]))
        last = None if effects is None else {key: effects[key] for key in ("run_id", "version", "champion")}
        return {
            "sentence": _sentence(body),
            "agreement": asdict(agreement(votes)),
            "last_evaluation": last,
            "raters": body,
        }


def _evidence(tally: RaterTally | None, gold: GoldAnswers | None, agreed: tuple[int, int] | None) -> dict[str, Any]:
    """The numbers that `trainer.suspicion.Evidence` takes."""
    counted = {} if tally is None else {
        name: getattr(tally, name) for name in ("first", "second", "fast", "timed", "median_s")
    }  # fmt: skip
    right, answered = gold or (0, 0)
    same, compared = agreed or (0, 0)
    return {**counted, "gold_right": right, "gold_answered": answered, "agreed": same, "compared": compared}


def _sentence(raters: Sequence[Mapping[str, Any]]) -> str:
    suspected = [one["rater"] for one in raters if one["suspicions"] and one["state"] == "active"]
    kept = [one["rater"] for one in raters if one["state"] == "quarantined"]
    people = f"{len(raters)} rater{'' if len(raters) == 1 else 's'}"
    said = f"{people}; suspicious: {_named(suspected)}; in quarantine: {_named(kept)}."
    return said + (" Nothing is done by itself." if suspected else "")


def _named(raters: Sequence[str]) -> str:
    more = len(raters) - NAMED
    return (", ".join(raters[:NAMED]) or "nobody") + (f" and {more} more" if more > 0 else "")
