"""CHILD: candidate against champion → evaluation.json.

* On held-out pairs: a win where the candidate favours `chosen` over `rejected` more than the champion does, the sign of
  the DPO margin with the champion as the reference. Within `TIE_NATS` it is a tie. Counted by source and by rater, and
  at equal length (`sensitivity.py`).
* What the versions write and have kept: greedy answers to a few questions, described and side by side, and the
  perplexity on plain prose and on the held-out chosen answers (`generation.py`, `answer_quality.py`).
* `canaries.py` records how the candidate begins its answers, for whoever will serve it.

The numbers are judged elsewhere (`guards.py`, `verdict.py`). Started by `launch.py`; by hand: `python -m
trainer.evaluate RUN_DIR`, which reads RUN_DIR/comparison.json. Where there is a benchmark.json instead, the answers to
its questions are written (`benchmarks/answering.py`).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json, write_json
from feedback_store.errors import StoreError
from feedback_store.private_files import new_files_private
from feedback_store.records import BASE_VERSION, Preference
from feedback_store.snapshots import load_preferences
from trainer.answer_quality import describe
from trainer.benchmarks.answering import answer_benchmark
from trainer.canaries import record_canaries
from trainer.errors import JobError, TrainerError
from trainer.generation import greedy_answers, prose_nats, questions
from trainer.memory import is_out_of_memory, out_of_memory
from trainer.scorer import CANDIDATE, CHAMPION, SIDES, Scorer
from trainer.sensitivity import at_equal_length, by_rater, interval_by_raters, longer_wins

TIE_NATS = 1e-3


def evaluate(run_dir: Path, comparison: dict[str, Any]) -> dict[str, Any]:
    """Compare both versions. `comparison` is comparison.json, written by `cycle.py`."""
    held_out = load_preferences(Path(comparison["held_out"]))
    rows = pick_pairs(held_out, comparison["held_out_pairs"])
    results: list[dict[str, Any]] = []
    said: dict[str, Any] = {"canaries": []}
    if rows or comparison[CANDIDATE]["adapter"] or comparison[CANDIDATE].get("model"):
        scorer = Scorer(comparison)
        said = written(scorer, held_out, has_weights=comparison[CANDIDATE]["version"] != BASE_VERSION)
        since = time.time()
        for done, preference in enumerate(rows, start=1):
            if (result := _result(scorer, preference)) is not None:
                results.append(result)
            _report(run_dir, since, done, len(rows))
    return {
        **count(results, comparison["beta"]),
        "skipped_over_long": len(rows) - len(results),
        "held_out": len(held_out),
        "candidate": comparison[CANDIDATE]["version"],
        "champion": comparison[CHAMPION]["version"],
        "beta": comparison["beta"],
        "precision": comparison["precision"],
        "judge": comparison.get("judge"),
        "snapshot": comparison["snapshot"],
        "sources": by_source(results, comparison["beta"]),
        "raters": by_rater(results, TIE_NATS),
        "interval_by_raters": interval_by_raters(results, TIE_NATS),
        "at_equal_length": at_equal_length(results, TIE_NATS),
        "longer_wins": longer_wins(results, TIE_NATS),
        "held_out_chosen": chosen_nats(results),
        **said,
        "results": results,
    }


def written(scorer: Scorer, held_out: Sequence[Preference], *, has_weights: bool) -> dict[str, Any]:
    """What both sides write, and how likely they find plain prose; `canaries` where the candidate is not the base."""
    asked = questions(held_out)
    answers, prose = {}, {}
    canaries: list[dict[str, Any]] = []
    for side in SIDES:
        with scorer.model(side) as model:
            if side == CANDIDATE and has_weights:
                canaries = record_canaries(model, scorer.tokenizer)
            answers[side] = greedy_answers(model, scorer.tokenizer, asked)
            prose[f"{side}_nats"] = prose_nats(model, scorer.tokenizer)
    examples = [
        {"question": one.question, CANDIDATE: one.text, CHAMPION: other.text}
        for one, other in zip(answers[CANDIDATE], answers[CHAMPION], strict=True)
    ]
    return {
        "canaries": canaries,
        "prose": {key: nats if math.isfinite(nats) else None for key, nats in prose.items()},
        "answers": {side: describe(answers[side]).as_dict() for side in SIDES} if examples else None,
        "examples": examples,
    }


def _result(scorer: Scorer, preference: Preference) -> dict[str, Any] | None:
    """One pair as both sides find it; None where its prompt is too long."""
    candidate, champion = (scorer.score(side, preference) for side in SIDES)
    if candidate is None or champion is None:
        return None
    return {
        "preference_id": preference.preference_id,
        "difference": candidate.favour - champion.favour,
        "source": preference.source,
        "rater": preference.rater,
        "longer": len(preference.chosen) - len(preference.rejected),
        "chosen_tokens": candidate.chosen_tokens,
        "candidate_chosen": candidate.chosen,
        "champion_chosen": champion.chosen,
    }


def by_source(results: Sequence[dict[str, Any]], beta: float) -> dict[str, dict[str, Any]]:
    """The counts of each source: own picks, and what was imported and must not be forgotten."""
    sources = sorted({result["source"] for result in results})
    return {source: count([one for one in results if one["source"] == source], beta) for source in sources}


def chosen_nats(results: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Mean negative log-likelihood of a token of the held-out chosen answers, in nats; None without any."""
    tokens = sum(result["chosen_tokens"] for result in results)
    if not tokens:
        return None
    return {f"{side}_nats": -sum(result[f"{side}_chosen"] for result in results) / tokens for side in SIDES}


def pick_pairs(preferences: Sequence[Preference], cap: int) -> list[Preference]:
    """At most `cap` pairs: own picks first, then by preference_id, so that the choice is the same every time."""
    return sorted(preferences, key=lambda p: (p.source != "pick", p.preference_id))[:cap]


def count(results: Sequence[dict[str, Any]], beta: float) -> dict[str, Any]:
    """Wins, ties, losses with the exact two-sided sign test and the 95% Clopper-Pearson interval of the win rate.

    `interval` is [low, high] of wins / (wins + losses); `mean_margin` is beta times the mean difference in nats.
    """
    from scipy.stats import binomtest

    wins = sum(result["difference"] > TIE_NATS for result in results)
    losses = sum(result["difference"] < -TIE_NATS for result in results)
    decided = wins + losses
    p_value, interval = 1.0, [0.0, 1.0]
    if decided:
        test = binomtest(wins, decided)
        bounds = test.proportion_ci(0.95, method="exact")
        p_value, interval = float(test.pvalue), [float(bounds.low), float(bounds.high)]
    return {
        "wins": wins,
        "ties": len(results) - decided,
        "losses": losses,
        "pairs": len(results),
        "p_value": p_value,
        "interval": interval,
        "win_rate": wins / decided if decided else None,
        "mean_margin": beta * sum(result["difference"] for result in results) / len(results) if results else None,
    }


def _report(run_dir: Path, since: float, done: int, total: int) -> None:
    progress = {"stage": "evaluating", "since": since, "evaluation": {"done": done, "total": total}}
    write_json(run_dir / "progress.json", {**progress, "time": time.time()})


def main() -> None:
    """`python -m trainer.evaluate RUN_DIR`."""
    new_files_private()
    run_dir = Path(sys.argv[1])
    try:
        if (benchmark := read_json(run_dir / "benchmark.json")) is not None:
            write_json(run_dir / "answers.json", answer_benchmark(run_dir, benchmark))
            return
        comparison = read_json(run_dir / "comparison.json")
        if comparison is None:
            raise JobError(f"{run_dir} has no comparison.json: nothing says what to compare.")
        write_json(run_dir / "evaluation.json", evaluate(run_dir, comparison))
    except Exception as error:
        told: Exception = error
        if is_out_of_memory(error):
            told = out_of_memory(
                "while it was judging", "Lower max_length in the recipe, or end other programs.", error
            )
        elif not isinstance(error, TrainerError | StoreError):
            raise
        failure = {"stage": "evaluating", "reason": str(told), "kind": type(told).__name__}
        write_json(run_dir / "failure.json", failure)
        raise SystemExit(f"Stopped: {told}") from error


if __name__ == "__main__":
    main()
