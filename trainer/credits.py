"""Who taught a version, and whether it serves them: their rows in its snapshot, their held-out pairs in its evaluation.

Read from the snapshot's manifest and the version's evaluation.json; `TrainerRoom` asks after each pick, so that people
see that it mattered. A person whose words were erased has no credit any more, nor has a version without a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json
from feedback_store.preferences import TRAIN
from feedback_store.selection import RATED_TRAIN
from trainer.recipe import CONTINUED_PRETRAINING, KTO
from trainer.versions import Versions

_LEARNED_FROM = {KTO: RATED_TRAIN, CONTINUED_PRETRAINING: None}


@dataclass(frozen=True, slots=True)
class Credit:
    """`taught`: rows of the rater that `version` learned from. The rest: their held-out pairs, against `champion`."""

    version: str
    champion: str
    taught: int
    wins: int
    ties: int
    losses: int

    @property
    def sentence(self) -> str:
        """What the rater reads."""
        learned = f"{self.version} learned from {self.taught} judgement{'' if self.taught == 1 else 's'} of yours"
        pairs = self.wins + self.ties + self.losses
        if not pairs:
            return f"{learned}."
        return (
            f"{learned}; on {pairs} held back from it, it agrees with you more than {self.champion} on {self.wins}, "
            f"less on {self.losses}."
        )


def credits_of(version: str, versions: Versions, snapshots: Path) -> dict[str, Credit]:
    """The credits of a version by rater. Raises VersionNotFound."""
    manifest = versions.load(version)
    snapshot: Mapping[str, Any] = read_json(snapshots / manifest.snapshot / "manifest.json") or {}
    part = _LEARNED_FROM.get(manifest.method, TRAIN)
    taught: Mapping[str, int] = snapshot.get("parts", {}).get(part, {}).get("raters", {})
    evaluation = read_json(versions.directory / version / "evaluation.json") or {}
    judged = {one["rater"]: one for one in evaluation.get("raters", [])}
    return {
        rater: Credit(
            version,
            evaluation.get("champion", ""),
            rows,
            **{key: judged.get(rater, {}).get(key, 0) for key in ("wins", "ties", "losses")},
        )
        for rater, rows in taught.items()
    }
