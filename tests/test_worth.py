"""The estimate before a retrain: its interval holds what it promises on simulated histories, whatever their curve."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_run import evaluation_of, made_run
from scipy.stats import binomtest

from feedback_store.durable import write_json
from trainer.judged import judged_runs
from trainer.worth import JudgedRun, Worth, expect, quality

Curve = Callable[[float], float]


def power(rng: np.random.Generator, top: float, scale: float) -> Curve:
    exponent = rng.uniform(0.2, 0.9)
    return lambda n: top * (1 - (1 + n / scale) ** -exponent)


def exponential(_: np.random.Generator, top: float, scale: float) -> Curve:
    return lambda n: top * (1 - math.exp(-n / scale))


def logarithmic(_: np.random.Generator, top: float, scale: float) -> Curve:
    return lambda n: 0.25 * top * math.log1p(3 * n / scale)


def flat(*_: object) -> Curve:
    return lambda _: 0.0


def win_rate(difference: float) -> float:
    return 1 / (1 + math.exp(-difference))


def simulated(rng: np.random.Generator, kind: Callable[..., Curve], runs: int) -> tuple[Worth, float]:
    """A history of `runs` retrains with a gate, the estimate of the next one, and its true gain in points."""
    curve = kind(rng, rng.lognormal(math.log(0.9), 0.6), rng.lognormal(math.log(250), 0.9))
    luck, pairs, preferences = rng.uniform(0.05, 0.3), int(rng.integers(40, 150)), int(rng.integers(50, 300))
    strength, champion, history = {"v0": 0.0}, "v0", []
    for number in range(1, runs + 1):
        version = f"v{number}"
        strength[version] = curve(preferences) + luck * rng.standard_normal()
        wins = int(rng.binomial(pairs, win_rate(strength[version] - strength[champion])))
        history.append(JudgedRun(version, preferences, champion, wins, pairs - wins))
        if wins > pairs / 2 and binomtest(wins, pairs).pvalue < 0.05:
            champion = version
        preferences += int(rng.integers(30, 300))
    new = curve(preferences) + luck * rng.standard_normal()
    return expect(history, champion, preferences, 40), 100 * (win_rate(new - strength[champion]) - 0.5)


def test_the_80_percent_interval_covers_about_80_percent() -> None:
    rng = np.random.default_rng(20261123)
    inside, widths = [], []
    for runs in (0, 3, 12):
        found = [simulated(rng, kind, runs) for kind in (power, exponential, logarithmic, flat) for _ in range(20)]
        inside += [worth.low <= truth <= worth.high for worth, truth in found]
        widths.append(np.mean([worth.high - worth.low for worth, _ in found]))
    assert len(inside) == 240
    assert 0.7 <= np.mean(inside) <= 0.9
    assert widths[0] > widths[1] > widths[2]


def test_without_runs_it_says_that_it_is_a_guess() -> None:
    worth = expect([], "v0", 100, 100)
    assert worth.judged == 0
    assert worth.low < 0 < worth.gain < worth.high
    assert "a guess from learning curves of other models" in worth.sentence
    assert "100 new preferences from picks since the last retrain: expect +" in worth.sentence


def test_nothing_new_is_not_worth_it() -> None:
    history = [JudgedRun("v1", 500, "v0", 70, 30)]
    worth = expect(history, "v1", 500, 0)
    assert not worth.worth_it
    assert worth.gain <= 0, "a champion that won was also lucky"
    assert worth.needed is None or worth.needed > 100
    assert "not yet" in worth.sentence


def test_a_steep_curve_makes_it_worth_it() -> None:
    history = [JudgedRun("v1", 100, "v0", 60, 40), JudgedRun("v2", 300, "v1", 70, 30)]
    worth = expect(history, "v2", 1500, 1200)
    assert worth.worth_it
    assert worth.needed == 0
    assert "worth it; +5 or more is likely. Estimated from 2 judged runs." in worth.sentence


def test_more_preferences_never_lower_it_and_what_is_needed_is_enough() -> None:
    history = [JudgedRun("v1", 100, "v0", 55, 45)]
    gains = [expect(history, "v1", count, 10).gain for count in (100, 200, 400, 800, 1600)]
    assert gains == sorted(gains)
    needed = expect(history, "v1", 200, 10).needed
    assert needed is not None
    assert expect(history, "v1", 200 + needed, 10).needed == 0
    assert expect(history, "v1", 200 + needed // 2, 10).needed != 0


def test_raters_who_disagree_make_less_of_a_preference() -> None:
    assert [quality(percent) for percent in (None, 100.0, 75.0, 50.0, 20.0)] == [1.0, 1.0, 0.5, 0.1, 0.1]
    agreed, torn = (expect([], "v0", 300, 300, percent_agreement=percent) for percent in (95.0, 60.0))
    assert torn.gain < agreed.gain


def test_the_same_history_gives_the_same_estimate() -> None:
    history = [JudgedRun("v1", 100, "v0", 25, 15)]
    assert expect(history, "v1", 140, 40) == expect(history, "v1", 140, 40)
    assert json.loads(json.dumps(expect(history, "v1", 140, 40).as_dict()))["new"] == 40


def test_runs_that_judged_nothing_do_not_count() -> None:
    assert expect([JudgedRun("v1", 100, "v0", 0, 0)], "v0", 140, 40) == expect([], "v0", 140, 40)


@pytest.mark.parametrize(("preferences", "new"), [(-1, 0), (0, -1)])
def test_negative_counts_are_ours(preferences: int, new: int) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        expect([], "v0", preferences, new)


def test_judged_runs_are_real_ones_on_the_same_base(tmp_path: Path) -> None:
    runs = [
        made_run(tmp_path, "run_20261123-000000_bbbb"),
        made_run(tmp_path, "run_20261122-000000_aaaa"),
        made_run(tmp_path, "run_20261124-000000_cccc", practice="shorter"),
        made_run(tmp_path, "run_20261125-000000_dddd", state="failed"),
        made_run(tmp_path, "run_20261126-000000_eeee", base={"name": "other"}),
    ]
    write_json(runs[1].directory / "evaluation.json", evaluation_of(3, 0, 1, "v3", "v0"))
    assert judged_runs(runs, "tiny") == [JudgedRun("v3", 182, "v0", 3, 1), JudgedRun("v4", 182, "v3", 64, 44)]
