"""What a training child tells its parent: progress.json (the heartbeat) and metrics.jsonl (a line a step).

`watch` makes the Trainer's callback: it writes each step's line and stops a training that has gone wrong. Lines of a
validation (`validation.py`) have the keys `eval/…` and no `loss`. Each line goes to the trackers too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from feedback_store.durable import write_json
from feedback_store.records import Preference
from trainer.errors import Diverged, WrongReference
from trainer.recipe import Recipe
from trainer.runs import Run
from trainer.tokens import tokenise
from trainer.trackers import Trackers

FIRST_LOSS = math.log(2)
FIRST_LOSS_TOLERANCE = 1e-3


class Progress:
    """progress.json and metrics.jsonl: what the parent and the pages read while the job runs."""

    def __init__(self, run: Run, *, is_main: bool) -> None:
        self._directory = run.directory
        self._is_main = is_main
        self._facts: dict[str, Any] = {}
        self._trackers = Trackers(run.config.trackers, run.directory, run.metrics)

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
            self._trackers.log(line)
            self.write("training")

    def close(self) -> None:
        """No more steps: close the trackers."""
        self._trackers.close()


def metrics_line(step: int, pairs: int, logs: Mapping[str, float], now: float) -> dict[str, Any]:
    """One line of metrics.jsonl from TRL's log of one step."""
    kept = {key: value for key, value in logs.items() if key.startswith(("rewards/", "logps/", "lengths/"))}
    wanted = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
    return {"step": step, "time": now, "pairs": pairs, **wanted, **kept}


def check_step(step: int, logs: Mapping[str, float]) -> None:
    """Raises WrongReference or Diverged on the log of a step that must not be followed by another one."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(logs[key]):
            raise Diverged(
                f"At step {step} {key} is {logs[key]}: the training diverged. Lower learning_rate in the recipe."
            )
    if step == 1 and abs(logs["loss"] - FIRST_LOSS) > FIRST_LOSS_TOLERANCE:
        raise WrongReference(
            f"The first loss is {logs['loss']:.4f}, it must be ln 2 = {FIRST_LOSS:.4f} ± {FIRST_LOSS_TOLERANCE}: "
            "the reference is not the model that training starts from. Nothing was published."
        )


def watch(
    recipe: Recipe, rows: int, progress: Progress, lengths: Callable[[int, int], Mapping[str, float]] | None = None
) -> Any:
    """The callback of a training on `rows` pairs.

    `lengths(first, last)` gives `lengths/…` of the rows between these counts of pairs, for a trainer that does not.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Writes a line a step and stops a training that has gone wrong."""

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "loss" not in logs:
                return
            step = int(state.global_step)
            check_step(step, logs)
            pairs = pairs_seen(step, recipe.batch_size, rows)
            if lengths is not None and "lengths/chosen" not in logs:
                logs = {**logs, **lengths(pairs_seen(step - 1, recipe.batch_size, rows), pairs)}
            progress.step(metrics_line(step, pairs, logs, time.time()))

    return Watch()


def pairs_seen(step: int, batch_size: int, rows: int) -> int:
    """Pairs gone through after `step` steps; the last step of an epoch may be short."""
    epochs, rest = divmod(step, math.ceil(rows / batch_size))
    return epochs * rows + rest * batch_size


def lengths_of(preferences: Sequence[Preference], tokenizer: Any, max_length: int) -> Callable[[int, int], Any]:
    """For `watch`: mean tokens of chosen and rejected, as they are learned from, of rows seen in the order given."""

    def lengths(first: int, last: int) -> dict[str, float]:
        rows = [preferences[number % len(preferences)] for number in range(first, last)]
        tokens = [tokenise(tokenizer, row, max_length) for row in rows]
        return {
            "lengths/chosen": sum(len(one.chosen) for one in tokens) / len(tokens),
            "lengths/rejected": sum(len(one.rejected) for one in tokens) / len(tokens),
        }

    return lengths
