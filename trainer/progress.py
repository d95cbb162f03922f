"""What a training child tells its parent: progress.json (the heartbeat) and metrics.jsonl (a line a step).

`watch` makes the Trainer's callback: it writes each step's line and stops a training that has gone wrong.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from feedback_store.durable import write_json
from trainer.errors import Diverged, WrongReference
from trainer.recipe import Recipe
from trainer.runs import Run

FIRST_LOSS = math.log(2)
FIRST_LOSS_TOLERANCE = 1e-3


class Progress:
    """progress.json and metrics.jsonl: what the parent and the pages read while the job runs."""

    def __init__(self, run: Run, *, is_main: bool) -> None:
        self._directory = run.directory
        self._is_main = is_main
        self._facts: dict[str, Any] = {}

    def start(self, stage: str, **facts: Any) -> None:
        """A new stage begins now."""
        self._facts = {"since": time.time(), **facts}
        self.write(stage)

    def write(self, stage: str, **facts: Any) -> None:
        """The heartbeat."""
        if self._is_main:
            self._facts |= facts
            write_json(self._directory / "progress.json", {"stage": stage, **self._facts, "time": time.time()})

    def step(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, readable at once."""
        if self._is_main:
            with (self._directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.write("training")


def metrics_line(step: int, pairs: int, logs: Mapping[str, float], now: float) -> dict[str, Any]:
    """One line of metrics.jsonl from TRL's log of one step."""
    kept = {key: value for key, value in logs.items() if key.startswith(("rewards/", "logps/", "lengths/"))}
    wanted = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
    return {"step": step, "time": now, "pairs": pairs, **wanted, **kept}


def first_loss(recipe: Recipe, logs: Mapping[str, float]) -> float | None:
    """The loss before anything was learned, given the weights of the step; None where it hangs on the data."""
    known = {"sigmoid": FIRST_LOSS, "robust": FIRST_LOSS, "apo_zero": 1.0, "ipo": 1 / (2 * recipe.beta) ** 2}
    return known[recipe.loss] * logs.get("weights", 1.0) if recipe.loss in known else None


def check_step(step: int, logs: Mapping[str, float], first: float | None = FIRST_LOSS) -> None:
    """Raises WrongReference or Diverged on the log of a step that must not be followed by another one."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(logs[key]):
            raise Diverged(
                f"At step {step} {key} is {logs[key]}: the training diverged. Lower learning_rate in the recipe."
            )
    if step == 1 and first is not None and abs(logs["loss"] - first) > FIRST_LOSS_TOLERANCE * max(1.0, first):
        name = "ln 2 = " if first == FIRST_LOSS else ""
        raise WrongReference(
            f"The first loss is {logs['loss']:.4f}, it must be {name}{first:.4f} ± {FIRST_LOSS_TOLERANCE}: "
            "the reference is not the model that training starts from. Nothing was published."
        )


def watch(recipe: Recipe, rows: int, progress: Progress) -> Any:
    """The callback of a training on `rows` pairs."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Writes a line a step and stops a training that has gone wrong."""

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "loss" not in logs:
                return
            step = int(state.global_step)
            check_step(step, logs, first_loss(recipe, logs))
            progress.step(metrics_line(step, pairs_seen(step, recipe.batch_size, rows), logs, time.time()))

    return Watch()


def pairs_seen(step: int, batch_size: int, rows: int) -> int:
    """Pairs gone through after `step` steps; the last step of an epoch may be short."""
    epochs, rest = divmod(step, math.ceil(rows / batch_size))
    return epochs * rows + rest * batch_size
