"""Evidence → verdict, in plain words. Pure: an evaluation's numbers in, a decision with its reasons out.

Silence means keep: the candidate replaces the champion only when an exact two-sided sign test on wins and losses
(ties left out) says that chance is an unlikely explanation, and nothing else was lost (`guards.py`): damage rejects it,
a doubt keeps the champion. After `evaluate.py`, before `versions.py`. Not covered: safety, regressions by topic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from feedback_store.preferences import HELD_OUT_SHARE
from trainer.guards import problems

LIMIT = 10_000  # held-out pairs
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
    against = problems(evaluation, champion, candidate)
    picked = _by_picks(evaluation, champion, candidate, alpha, "by the picks alone " if against else "")
    if not against:
        return picked
    damaged = any(problem.is_damage for problem in against)
    decision = "reject" if damaged or picked.decision == "reject" else "keep"
    counted = picked.reasons[:2]
    said = tuple(problem.sentence for problem in against)
    kept = () if picked.decision != "promote" else (f"Keeping {champion}.",)  # else the count has said it
    return Verdict(decision, (counted[0], *said, *counted[1:], *kept))


def _by_picks(evaluation: Mapping[str, Any], champion: str, candidate: str, alpha: float, how: str) -> Verdict:
    """What the held-out pairs say; `how` it is better, where they are not all that counts."""
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
                f"{rate} lies above 50%: {how}{candidate} is better than {champion} (p = {_p(p_value)}).",
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
    reasons = (counted, f"{rate} includes 50%: not enough evidence, keeping {champion}.")
    unused = max(0, int(evaluation.get("held_out", pairs)) - pairs)
    return Verdict("keep", (*reasons, _what_would_settle(wins, ties, losses, unused, alpha)))


def pairs_needed(wins: int, ties: int, losses: int, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Held-out pairs, ties included, on which a win rate like the one seen is found with `power`; None above `LIMIT`.

    The sample size of a two-sided test of one proportion against 50% in the normal approximation (Fleiss, Levin and
    Paik, 2003, section 2.5), and at least as many as the exact test needs where every pair is won. What was seen is
    taken for the truth, so it is a guide and no promise.
    """
    decided = wins + losses
    distance = abs(wins - losses) / (2 * decided) if decided else 0.0
    if distance == 0:
        return None
    z_alpha, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    decisive = ((z_alpha / 2 + z_power * math.sqrt(0.25 - distance**2)) / distance) ** 2
    decisive = max(decisive, math.ceil(math.log2(2 / alpha)))  # all won: p = 2 · 0.5ⁿ
    needed = math.ceil(decisive * (decided + ties) / decided)
    return needed if needed <= LIMIT else None


def _what_would_settle(wins: int, ties: int, losses: int, unused: int, alpha: float) -> str:
    needed = pairs_needed(wins, ties, losses, alpha=alpha)
    if needed is None:
        return "They are too close for a number of picks to settle it soon."
    more = max(1, needed - wins - ties - losses)
    rate = f"At this rate about {_count(more, 'more held-out pair')} would settle it"
    if unused >= more:
        return f"{rate}, and {unused:,} are there: raise held_out_pairs in the recipe."
    to_pick = round((more - unused) / HELD_OUT_SHARE, -1)
    there = f" {unused:,} are there (raise held_out_pairs in the recipe); the rest are" if unused else ""
    return f"{rate}:{there} some {to_pick:,.0f} picks on new prompts, of which one in ten is held out."


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _p(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1g}"
