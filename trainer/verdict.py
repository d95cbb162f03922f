"""Evidence → verdict, in plain words. Pure: an evaluation's numbers in, a decision with its reasons out.

Silence means keep: the candidate replaces the champion only when an exact two-sided sign test on wins and losses
(ties left out) says that chance is an unlikely explanation. After `evaluate.py`, before `versions.py`.

Not covered: guards on length, safety or regressions by topic (the full gate is later work).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DECISIONS = ("promote", "keep", "reject")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`decision` is promote, keep (not enough evidence) or reject (worse); `reasons` are sentences to show."""

    decision: str
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.decision not in DECISIONS:
            raise ValueError(f"decision is {self.decision!r}, it must be one of {', '.join(DECISIONS)}")

    def as_dict(self) -> dict[str, Any]:
        """{"decision", "reasons"} as the API shows it."""
        return {"decision": self.decision, "reasons": list(self.reasons)}


def decide(evaluation: Mapping[str, Any], champion: str, candidate: str, *, alpha: float = 0.05) -> Verdict:
    """Judge `candidate` against `champion` on one evaluation (keys as in evaluation.json)."""
    wins, ties, losses = (int(evaluation[key]) for key in ("wins", "ties", "losses"))
    pairs, p_value = wins + ties + losses, float(evaluation["p_value"])
    if pairs == 0:
        return Verdict(
            "keep",
            (
                f"There are no held-out pairs to compare {candidate} with {champion} on: keeping {champion}.",
                "One prompt in ten is held out; collect more picks or import preferences.",
            ),
        )
    counted = f"{_count(wins, 'win')}, {_count(ties, 'tie')}, {_count(losses, 'loss', 'losses')} on {pairs} held-out "
    counted += "pair." if pairs == 1 else "pairs."
    low, high = (float(bound) for bound in evaluation["interval"])
    rate = f"The 95% interval of the win rate, {low * 100:.0f}–{high * 100:.0f}%,"
    if p_value < alpha and wins > losses:
        return Verdict(
            "promote",
            (
                counted,
                f"{rate} lies above 50%: {candidate} is better than {champion} (p = {_p(p_value)}).",
            ),
        )
    if p_value < alpha:
        return Verdict(
            "reject",
            (
                counted,
                f"{rate} lies below 50%: {candidate} is worse than {champion} (p = {_p(p_value)}), keeping {champion}.",
            ),
        )
    return Verdict("keep", (counted, f"{rate} includes 50%: not enough evidence, keeping {champion}."))


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _p(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1g}"
