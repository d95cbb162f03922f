"""Who and what a result hangs on: one rater, or only the length of answers. Pure, from the pairs of an evaluation.

A result is one held-out pair as `evaluate.py` scores it: `difference` in nats (positive: the candidate favours the
chosen answer more than the champion does), `rater`, and `longer`, the characters of chosen minus those of rejected.

* The interval by raters is a bootstrap over raters, not pairs (Cameron, Gelbach and Miller, 2008): one person's picks
  are alike. From `MIN_RATERS` raters.
* The win rate at equal length is that of a logistic model with a length term (Dubois et al., 2024, "Length-Controlled
  AlpacaEval"): what is left where both answers are equally long. From `MIN_DECIDED` decided pairs of each kind.
* Where nearly every pair that was won has the longer answer chosen, no model can tell length from the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

MIN_RATERS = 5
MIN_DECIDED = 4
RESAMPLES = 2000
_SEED = 0

Result = Mapping[str, Any]


def by_rater(results: Sequence[Result], tie_nats: float) -> list[dict[str, Any]]:
    """Each rater's share and counts, and the win rate of all the others: {"rater", "pairs", "share", "wins", …}.

    Imported pairs without a rater are among the others.
    """
    everybody = _counts(results, tie_nats)
    found = []
    for rater in sorted({result["rater"] for result in results if result["rater"] is not None}):
        own = _counts([result for result in results if result["rater"] == rater], tie_nats)
        wins, losses = everybody["wins"] - own["wins"], everybody["losses"] - own["losses"]
        found.append(
            {
                "rater": rater,
                **own,
                "share": own["pairs"] / everybody["pairs"],
                "win_rate_without": wins / (wins + losses) if wins + losses else None,
                "p_value_without": sign_test(wins, losses),
                "wins_without": wins,
                "losses_without": losses,
            }
        )
    return sorted(found, key=lambda one: (-one["pairs"], one["rater"]))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p value of wins against losses; 1 for none."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def interval_by_raters(results: Sequence[Result], tie_nats: float) -> list[float] | None:
    """The 95% interval [low, high] of the win rate when raters are drawn anew; None for too few raters.

    An imported pair without a rater is drawn as a rater of its own.
    """
    import numpy as np

    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["rater"] or f"\0{result['preference_id']}", []).append(result)
    if len({result["rater"] for result in results} - {None}) < MIN_RATERS:
        return None
    table = []
    for group in groups.values():
        counted = _counts(group, tie_nats)
        table.append([counted["wins"], counted["wins"] + counted["losses"]])
    drawn = np.random.default_rng(_SEED).integers(len(groups), size=(RESAMPLES, len(groups)))
    sums = np.array(table)[drawn].sum(axis=1)
    rates = sums[sums[:, 1] > 0, 0] / sums[sums[:, 1] > 0, 1]
    return [float(bound) for bound in np.quantile(rates, [0.025, 0.975])] if len(rates) else None


def at_equal_length(results: Sequence[Result], tie_nats: float) -> dict[str, Any] | None:
    """{"win_rate", "interval", "length_effect"} of the logistic model; None where there is too little to fit one.

    The length term is tanh(difference in characters / its standard deviation), as in the paper. A candidate that only
    learned "longer" or "shorter" wins half at equal length. Where the length tells wins from losses without an error,
    no model can be fitted and the rate is 50% with nothing known of it: interval 0 to 1.
    """
    import numpy as np

    decided = [result for result in results if abs(result["difference"]) > tie_nats]
    won = np.array([result["difference"] > 0 for result in decided], dtype=float)
    if min(won.sum(), len(won) - won.sum()) < MIN_DECIDED:
        return None
    longer = np.array([result["longer"] for result in decided], dtype=float)
    spread = float(longer.std())
    if spread == 0:
        return None
    return _fit(won, np.tanh(longer / spread))


def longer_wins(results: Sequence[Result], tie_nats: float) -> int:
    """The pairs won whose chosen answer is the longer one."""
    return sum(result["difference"] > tie_nats and result["longer"] > 0 for result in results)


def _fit(won: Any, longer: Any) -> dict[str, Any]:
    import numpy as np
    from statsmodels.discrete.discrete_model import Logit
    from statsmodels.tools.sm_exceptions import ModelWarning, PerfectSeparationError

    unknown = {"win_rate": 0.5, "interval": [0.0, 1.0], "length_effect": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelWarning)  # separation, no convergence, no inverse
        try:
            fitted = Logit(won, np.column_stack([np.ones(len(won)), longer])).fit(disp=0)
        except (ModelWarning, PerfectSeparationError, np.linalg.LinAlgError):
            return unknown
    bounds = fitted.conf_int(alpha=0.05)[0]
    if not np.isfinite(bounds).all():
        return unknown
    return {
        "win_rate": _logistic(fitted.params[0]),
        "interval": [_logistic(bounds[0]), _logistic(bounds[1])],
        "length_effect": float(fitted.params[1]),
    }


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-float(value)))


def _counts(results: Sequence[Result], tie_nats: float) -> dict[str, int]:
    wins = sum(result["difference"] > tie_nats for result in results)
    losses = sum(result["difference"] < -tie_nats for result in results)
    return {"pairs": len(results), "wins": wins, "ties": len(results) - wins - losses, "losses": losses}
