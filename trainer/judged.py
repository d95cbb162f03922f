"""The runs that tell how much preferences have taught so far: from run directories to `worth.py`'s records."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.runs import Run
from trainer.worth import JudgedRun


def judged_runs(runs: Iterable[Run], base: str) -> list[JudgedRun]:
    """Those of `runs` that were judged on real preferences, on the base called `base`, oldest first.

    Practice runs are left out: a taste is learned from few pairs and says nothing of what people want.
    """
    found = []
    for run in sorted(runs, key=lambda run: run.run_id):  # an id begins with its time
        config, training, evaluation = run.config, run.training, run.evaluation
        if config.practice or config.base["name"] != base or not training or not evaluation:
            continue
        found.append(
            JudgedRun(
                version=evaluation["candidate"],
                preferences=training["pairs"],
                champion=evaluation["champion"],
                wins=evaluation["wins"],
                losses=evaluation["losses"],
            )
        )
    return found
