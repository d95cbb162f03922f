"""Trained against not trained: one row a version, each judged against the base on the same held-out pairs. Pure.

    evaluation.json of each version against v0 ─► table(…) ─► `zloop compare`, POST /v1/comparisons

The columns are the field's: win rate over the base with its interval, rewards and their margin (beta times the
log-ratio to the base, as in DPO), perplexity on held-out chosen answers and on plain prose, length and repetition of
the greedy answers. The first row is the base itself, which has rewards of 0 by definition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def table(evaluations: Sequence[Mapping[str, Any]], recipes: Mapping[str, str]) -> list[Row]:
    """The rows, the base first. `recipes` names the recipe of each version. Raises ValueError for no evaluation."""
    if not evaluations:
        raise ValueError("table() needs at least one evaluation")
    first = evaluations[0]
    base: Row = {
        "version": first["champion"], "recipe": "the base", "pairs": first["pairs"], "wins": None, "ties": None,
        "losses": None, "win_rate": None, "interval": None, "rewards/chosen": 0.0, "rewards/rejected": 0.0,
        "rewards/margins": 0.0, **_kept(first, "champion"),
    }  # fmt: skip
    return [base, *(_row(evaluation, recipes) for evaluation in evaluations)]


def _row(evaluation: Mapping[str, Any], recipes: Mapping[str, str]) -> Row:
    results, beta = evaluation["results"], evaluation["beta"]
    chosen = _mean([beta * (one["candidate_chosen"] - one["champion_chosen"]) for one in results])
    margin = _mean([beta * one["difference"] for one in results])
    return {
        "version": evaluation["candidate"],
        "recipe": recipes[evaluation["candidate"]],
        **{key: evaluation[key] for key in ("pairs", "wins", "ties", "losses", "win_rate", "interval")},
        "rewards/chosen": chosen,
        "rewards/rejected": None if chosen is None or margin is None else chosen - margin,
        "rewards/margins": margin,
        **_kept(evaluation, "candidate"),
    }


def _kept(evaluation: Mapping[str, Any], side: str) -> Row:
    answers = (evaluation.get("answers") or {}).get(side) or {}
    return {
        "perplexity/chosen": _perplexity(evaluation.get("held_out_chosen"), side),
        "perplexity/prose": _perplexity(evaluation.get("prose"), side),
        "words": answers.get("words"),
        "repetition": answers.get("repetition"),
    }


def _perplexity(nats: Mapping[str, float | None] | None, side: str) -> float | None:
    value = (nats or {}).get(f"{side}_nats")
    return None if value is None or value > 700 else math.exp(value)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
