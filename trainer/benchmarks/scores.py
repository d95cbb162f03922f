"""Judgements → numbers. Pure.

* Marks: means by turn and by category, and the paired difference of two versions with a 95% interval (t). One mark says
  little: the same recipe with another seed moves by some tenths of a point.
* Comparisons, each judged in both orders: a win where both orders agree, else a tie. The win rate at equal length is
  that of `sensitivity.py`. Of the judge itself: how often it chose the first place and how often the order decided.
* What could not be read is counted and shown, and is in no mean and no win rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.benchmarks.judge_prompts import FIRST, SECOND, TIE
from trainer.sensitivity import at_equal_length, interval_by_raters

TIE_NATS = 0.5  # between the -1, 0 and 1 of a comparison
BIASED_SHARE = 0.6  # of decided judgements for one place
INCONSISTENT_SHARE = 0.3


def marks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`rows`: {"question_id", "category", "turn", "score" or None} of one version.

    → {"mean", "turns": {"1": …}, "categories": {…}, "judged", "unreadable"}; means are None where nothing was read.
    """
    return {
        "mean": _mean(rows),
        "turns": _means(rows, lambda row: str(row["turn"])),
        "categories": _means(rows, lambda row: str(row["category"])),
        "judged": len(rows),
        "unreadable": sum(row["score"] is None for row in rows),
    }


def marks_apart(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How much higher `one` is marked, question by question: {"mean", "interval", "questions"}; None below two.

    A question counts with the mean of the turns that were read for both. Where all differ by the same there is no
    spread to make an interval of: None.
    """
    from scipy.stats import ttest_1samp

    known = {(row["question_id"], row["turn"]): row["score"] for row in other if row["score"] is not None}
    apart: dict[str, list[float]] = {}
    for row in one:
        against = known.get((row["question_id"], row["turn"]))
        if row["score"] is not None and against is not None:
            apart.setdefault(row["question_id"], []).append(row["score"] - against)
    each = [sum(values) / len(values) for values in apart.values()]
    if len(each) < 2:
        return None
    mean = sum(each) / len(each)
    if len(set(each)) == 1:
        return {"mean": mean, "interval": None, "questions": len(each)}
    bounds = ttest_1samp(each, 0.0).confidence_interval(0.95)
    return {"mean": mean, "interval": [float(bounds.low), float(bounds.high)], "questions": len(each)}


def outcome(candidate_first: str | None, champion_first: str | None) -> str | None:
    """`win`, `tie` or `loss` of the candidate from the choices in both orders; None where one could not be read."""
    if candidate_first is None or champion_first is None:
        return None
    both = (candidate_first, champion_first)
    return {(FIRST, SECOND): "win", (SECOND, FIRST): "loss"}.get(both, "tie")


def comparisons(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`rows`: {"question_id", "category", "turn", "candidate_first", "champion_first", "longer"}.

    The two choices are FIRST, SECOND, TIE or None; `longer` is by how many characters the candidate's answer is longer.
    """
    from trainer.evaluate import count

    results = [
        {
            "preference_id": f"{row['question_id']}/{row['turn']}",
            "rater": str(row["question_id"]),
            "category": row["category"],
            "difference": {"win": 1.0, "tie": 0.0, "loss": -1.0}[said],
            "longer": row["longer"],
        }
        for row in rows
        if (said := outcome(row["candidate_first"], row["champion_first"])) is not None
    ]
    counted = {key: value for key, value in count(results, 1.0).items() if key != "mean_margin"}
    half = counted["wins"] + counted["ties"] / 2
    by_category: dict[str, Any] = {}
    for category in dict.fromkeys(row["category"] for row in rows):
        own = [result["difference"] for result in results if result["category"] == category]
        by_category[category] = {"wins": own.count(1.0), "ties": own.count(0.0), "losses": own.count(-1.0)}
    return {
        **counted,
        "win_rate_ties_half": half / len(results) if results else None,
        "interval_by_questions": interval_by_raters(results, TIE_NATS),
        "at_equal_length": at_equal_length(results, TIE_NATS),
        "categories": by_category,
        "comparisons": len(rows),
        "unreadable": len(rows) - len(results),
    }


def judge_bias(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the choices say of the judge: {"judgements", "unreadable", "ties", "first_share", "inconsistent_share", …}.

    `first_share`: of the judgements that prefer one answer, those that prefer the one in the first place; 50% is what a
    judge without a position bias has over both orders. `inconsistent_share`: of the comparisons read in both orders,
    those whose two orders do not come to the same.
    """
    choices = [row[order] for row in rows for order in ("candidate_first", "champion_first")]
    first, second = choices.count(FIRST), choices.count(SECOND)
    read = [row for row in rows if row["candidate_first"] is not None and row["champion_first"] is not None]
    swapped = {FIRST: SECOND, SECOND: FIRST, TIE: TIE}
    inconsistent = sum(row["champion_first"] != swapped[row["candidate_first"]] for row in read)
    return {
        "judgements": len(choices),
        "unreadable": choices.count(None),
        "ties": choices.count(TIE),
        "first": first,
        "second": second,
        "first_share": first / (first + second) if first + second else None,
        "read_in_both_orders": len(read),
        "inconsistent": inconsistent,
        "inconsistent_share": inconsistent / len(read) if read else None,
    }


def _mean(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the marks that were read."""
    read = [row["score"] for row in rows if row["score"] is not None]
    return sum(read) / len(read) if read else None


def _means(rows: Sequence[Mapping[str, Any]], by: Callable[[Mapping[str, Any]], str]) -> dict[str, float | None]:
    return {name: _mean([row for row in rows if by(row) == name]) for name in dict.fromkeys(map(by, rows))}
