"""What a training child tells its parent: progress.json (the heartbeat) and metrics.jsonl (a line a step).

`watch` makes the Trainer's callback: it writes each step's line and stops a training that has gone wrong.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feedback_store.durable import write_json
from trainer.errors import Diverged, WrongStart
from trainer.runs import Run

if TYPE_CHECKING:
    from trainer.stage import Stage

FIRST_LOSS = math.log(2)
FIRST_LOSS_TOLERANCE = 1e-3
_KEPT = ("loss", "grad_norm", "learning_rate", "kl", "mean_token_accuracy")


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
    """One line of metrics.jsonl from TRL's log of one step. `pairs` counts rows, whatever the method learns from."""
    kept = {key: value for key, value in logs.items() if key.startswith(("rewards/", "logps/", "lengths/"))}
    wanted = {key: logs[key] for key in _KEPT if key in logs}
    return {"step": step, "time": now, "pairs": pairs, **wanted, **kept}


@dataclass(frozen=True, slots=True)
class FirstLoss:
    """Where a method's first loss lies when all is right: `low` to `high`, `wanted` in words; `otherwise` is wrong."""

    low: float
    high: float
    wanted: str
    otherwise: str


def reference_loss(loss: float, wanted: str) -> FirstLoss:
    """The first loss of a method with a reference, which says nothing else at the first step than the model does."""
    tolerance = FIRST_LOSS_TOLERANCE * max(1.0, loss)
    wrong = "the reference is not the model that training starts from"
    return FirstLoss(loss - tolerance, loss + tolerance, f"{wanted} ± {FIRST_LOSS_TOLERANCE}", wrong)


def check_step(step: int, logs: Mapping[str, float], first: FirstLoss | None) -> None:
    """Raises WrongStart or Diverged on the log of a step of a stage that must not be followed by another one."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(logs[key]):
            raise Diverged(
                f"At step {step} {key} is {logs[key]}: the training diverged. Lower learning_rate in the recipe."
            )
    if step == 1 and first is not None and not first.low <= logs["loss"] <= first.high:
        raise WrongStart(
            f"The first loss is {logs['loss']:.4f}, it must be {first.wanted}: {first.otherwise}. "
            "Nothing was published."
        )


def watch(stage: Stage, batch_size: int, progress: Progress, *, steps_before: int = 0, rows_before: int = 0) -> Any:
    """The callback of a stage; `…_before` is what earlier stages of the run have done."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Writes a line a step and stops a training that has gone wrong."""

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "loss" not in logs:
                return
            step = int(state.global_step)
            check_step(step, logs, stage.first_loss(logs))
            rows = rows_before + pairs_seen(step, batch_size, stage.rows)
            progress.step(metrics_line(steps_before + step, rows, logs, time.time()))

    return Watch()


def pairs_seen(step: int, batch_size: int, rows: int) -> int:
    """Pairs gone through after `step` steps; the last step of an epoch may be short."""
    epochs, rest = divmod(step, math.ceil(rows / batch_size))
    return epochs * rows + rest * batch_size
