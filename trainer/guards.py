"""Guards: what a candidate must not have lost, whatever the picks say. Pure: an evaluation in, sentences out.

    evaluation.json ─► problems(…) ─► verdict.py: one problem or more, and the candidate is rejected, or kept out

DPO can win on held-out pairs and still ruin a model: answers stop making sense, stop ending, run together, or grow. So
the answers and the perplexity of both versions are compared. The limits were reasoned and then held against candidates
that were honest and others spoiled on purpose (docs/benchmarks/candidates.md): that of prose lies well between both,
that of repetition just above the worst honest one. Those of refusals, languages and endless answers were reached by
none, so they remain reasoned. All are wide, for on a few questions no small difference shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORGOTTEN_NATS = 0.25  # a token of plain prose; perplexity × 1.28
MORE_ANSWERS = (
    0.25  # share of the answers that is empty, refuses, changes language, or has no end, above the champion's
)
REPETITION = 0.2  # above the champion's
LONGER = 1.5  # times the words
LONGER_WINS = 0.9  # of the pairs won; of 992 UltraFeedback pairs the longer answer was chosen in 56%
FEWEST_WINS = 6  # fewer promote nobody
ONE_RATER = 0.5  # of the pairs


@dataclass(frozen=True, slots=True)
class Problem:
    """`is_damage`: the candidate is worse, not only unproven. `sentence` has the numbers."""

    is_damage: bool
    sentence: str


def problems(evaluation: Mapping[str, Any], champion: str, candidate: str) -> list[Problem]:
    """All that speaks against the candidate beside the picks. An evaluation without these parts has none."""
    return [
        *_forgotten(evaluation.get("prose"), champion, candidate),
        *_degenerate(evaluation.get("answers"), champion, candidate),
        *_only_length(evaluation, champion, candidate),
        *_only_one_rater(evaluation),
    ]


def _forgotten(prose: Mapping[str, float | None] | None, champion: str, candidate: str) -> list[Problem]:
    if prose is None:
        return []
    old, new = prose["champion_nats"], prose["candidate_nats"]
    if old is None or (new is not None and new - old <= FORGOTTEN_NATS):
        return []
    before, after = _perplexity(old), _perplexity(new)
    said = f"The perplexity on plain prose rose from {before} ({champion}) to {after} ({candidate})"
    return [Problem(True, f"{said}: it forgot how to write.")]


def _degenerate(answers: Mapping[str, Any] | None, champion: str, candidate: str) -> list[Problem]:
    if not answers:
        return []
    new, old = answers["candidate"], answers["champion"]
    found = []
    for key, said in (
        ("empty", "are empty"),
        ("refusals", "refuse"),
        ("other_language", "are in another language than the question"),
        ("unfinished", "find no end"),
    ):
        if new[key] / new["answers"] - old[key] / old["answers"] > MORE_ANSWERS:
            found.append(
                Problem(
                    True,
                    f"{new[key]} of {new['answers']} answers of {candidate} {said} "
                    f"({champion}: {old[key]} of {old['answers']}).",
                )
            )
    if new["repetition"] - old["repetition"] > REPETITION:
        found.append(
            Problem(
                True,
                f"{candidate} repeats itself: {new['repetition']:.0%} of its runs of four words stood there before "
                f"({champion}: {old['repetition']:.0%}).",
            )
        )
    return found


def _only_length(evaluation: Mapping[str, Any], champion: str, candidate: str) -> list[Problem]:
    """Longer answers that win, where nothing shows that they win by anything else.

    Either the candidate writes longer ones, or nearly all that it wins was won by the longer answer. What it writes
    does not tell alone: answers are cut, and a champion that never ends cannot be outdone. A taste for shorter ones is
    a taste: it is towards longer ones that preferences push by themselves (Singhal et al., 2023; Park et al., 2024).
    """
    equal, answers = evaluation.get("at_equal_length"), evaluation.get("answers")
    if equal is not None and equal["interval"][0] > 0.5:
        return []
    said = []
    if answers and answers["candidate"]["words"] > LONGER * max(answers["champion"]["words"], 1):
        new, old = answers["candidate"]["words"], answers["champion"]["words"]
        said.append(f"The answers of {candidate} are longer ({new:.0f} words, {champion} {old:.0f})")
    wins, longer = evaluation.get("wins", 0), evaluation.get("longer_wins", 0)
    if wins >= FEWEST_WINS and longer >= LONGER_WINS * wins:
        said.append(f"In {longer} of the {wins} pairs that {candidate} wins, the longer answer was picked")
    if not said:
        return []
    known = "there are too few losses to say what its win rate is at equal length"
    if equal is not None:
        low, high = equal["interval"]
        known = f"at equal length its win rate is {equal['win_rate']:.0%} ({low:.0%} to {high:.0%})"
    return [Problem(False, f"{'. '.join(said)}, and {known}: it may win by length alone.")]


def _only_one_rater(evaluation: Mapping[str, Any]) -> list[Problem]:
    """A win that is gone without one person, where that person gave most of the pairs and there are others."""
    raters = evaluation.get("raters") or []
    if len(raters) < 2:
        return []
    most = raters[0]
    if most["share"] <= ONE_RATER or (most["wins_without"] > most["losses_without"]):
        return []
    return [
        Problem(
            False,
            f"{most['share']:.0%} of the pairs are one person's; without them it is {most['wins_without']} wins and "
            f"{most['losses_without']} losses.",
        )
    ]


def _perplexity(nats: float | None) -> str:
    return f"{math.exp(nats):,.1f}" if nats is not None and nats < 20 else "something without limit"
