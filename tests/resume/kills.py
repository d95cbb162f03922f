"""Train a tiny model, kill it, let it go on, and compare every byte of what it made with an undisturbed training."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import tiny_model
from faults import disk

from feedback_store.snapshots import freeze
from trainer.base_model import BaseModel, ensure_base
from trainer.checkpoints import FOLDER, MANIFEST
from trainer.cycle import Plan, plan_run
from trainer.launch import Child
from trainer.recipe import Recipe, from_mapping
from trainer.runs import Run

STEPS = 8
TIMEOUT_S = 300
LAST = 0.1  # the part of the changes of files that comes after the last step
FACTS = ("steps", "pairs", "dropped_over_long", "first_loss", "last_loss")  # of training.json: it has times too
RECIPE = from_mapping(
    "resume",
    {"learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "max_length": 256, "save_every_steps": 2},
)


@dataclass
class Outcome:
    """What came of the kills: where they met the training, and what was not as in the undisturbed one."""

    kills: int = 0
    runs: int = 0
    met: Counter[str] = field(default_factory=Counter)
    went_on_from: Counter[int] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


class Nursery:
    """Starts trainings in a second: see ``nursery.py``. On two cores a training has one thread."""

    def __init__(self, library: Path | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(disk.ROOT), str(disk.ROOT / "tests")])}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONUNBUFFERED": "1"}
        if library is not None:
            environment |= {"LD_PRELOAD": str(library), "FAULT_DIR": "/nowhere"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "resume.nursery"],
            env=environment, cwd=disk.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, run: Run, **how: Any) -> int:
        """The process id of a training of `run`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"run": str(run.directory), **how}) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def stand_in(self, run: Run, **how: Any) -> Callable[..., Child]:
        """What can stand for `launch.start_training`: each start waits for the end of the one before."""
        started: list[Child] = []

        def start(_run_dir: Path, **_request: object) -> Child:
            if started:
                self.wait()
            pid = self.start(run, **how)
            started.append(Child(pid, psutil.Process(pid).create_time()))
            return started[-1]

        return start

    def wait(self) -> tuple[int, int]:
        """Its exit status, and how often it changed a file."""
        answer = self._answer()
        return int(answer["status"]), int(answer["steps"])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)
        self._process.stdout.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery died"
        answer: dict[str, Any] = json.loads(line)
        return answer


class Bench:
    """One run, planned again and again, each in a data directory of its own: nothing that another left is found."""

    def __init__(
        self,
        directory: Path,
        base: BaseModel,
        recipe: Recipe = RECIPE,
        steps: int = STEPS,
        words: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.num_processes = num_processes
        self.directory, self.base, self.recipe, self.steps = directory, base, recipe, steps
        rows = tiny_model.made_up_preferences(2 * steps * recipe.batch_size)
        rows = [replace(row, chosen=f"{row.chosen} {'red' * words}") for row in rows] if words else rows
        self.snapshot = freeze(rows, directory / "snapshots", None)
        self._weights = ensure_base(base, tiny_model.session_directory() / "models")
        self._runs = 0

    def run(self) -> Run:
        self._runs += 1
        data_dir = self.directory / str(self._runs)
        (data_dir / "models").mkdir(parents=True)
        (data_dir / "models" / self._weights.name).symlink_to(self._weights)
        plan = Plan(
            self.recipe, self.steps, self.num_processes, seed=7, practice=None, device="cpu", requested_by="test"
        )
        return plan_run(plan, self.snapshot, self.base, data_dir)


def undisturbed(bench: Bench, nursery: Nursery) -> tuple[Run, float, int]:
    """A run that nobody killed, its seconds, and how often it changed a file."""
    run, began = bench.run(), time.monotonic()
    nursery.start(run)
    status, steps = nursery.wait()
    assert status == 0, run.log_tail(30)
    return run, time.monotonic() - began, steps


def at_random(bench: Bench, nursery: Nursery, kills: int, seed: int) -> Outcome:
    """Kill up to three times in one training, then let it come to its end.

    The moments are spread evenly over a training, every second one over its second half, after the model is loaded.
    """
    dice, outcome = random.Random(seed), Outcome()
    undisturbed(bench, nursery)  # the first one also imports what is imported late
    whole, lasts_s, _ = undisturbed(bench, nursery)
    while outcome.kills < kills:
        run, wanted = bench.run(), dice.randint(1, 3)
        while wanted and outcome.kills < kills:
            pid = nursery.start(run)
            time.sleep(dice.uniform(lasts_s / 2 * (outcome.kills % 2), lasts_s))
            os.kill(pid, signal.SIGKILL)
            status, _ = nursery.wait()
            if status != -signal.SIGKILL:
                break  # it was done before
            wanted -= 1
            _count(outcome, run)
        else:
            nursery.start(run)
            status, _ = nursery.wait()
        _compare(run, status, whole, outcome)
    return outcome


def at_places(bench: Bench, nursery: Nursery, places: int) -> Outcome:
    """Kill before, and in the middle of, changes of files.

    Half of the places are spread evenly over all those of a training, half over the last ones: the result is saved.
    """
    outcome = Outcome()
    whole, _, steps = undisturbed(bench, nursery)
    for number in range(places):
        run, behind = bench.run(), number * steps // places
        place = behind if number % 2 else int(steps - behind * LAST)
        nursery.start(run, place=max(1, place), torn=number % 3)
        status, _ = nursery.wait()
        if status == -signal.SIGKILL:
            _count(outcome, run)
            nursery.start(run)
            status, _ = nursery.wait()
        _compare(run, status, whole, outcome)
    return outcome


def differences(run: Run, whole: Run) -> list[str]:
    """What is not as in `whole`: every byte of the adapter's tensors in both forms, every step's numbers."""
    found = []
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter.gguf"):
        there = (run.directory / name).is_file() and (whole.directory / name).is_file()
        if not there or (run.directory / name).read_bytes() != (whole.directory / name).read_bytes():
            found.append(name)
    facts = [[(one.training or {}).get(key) for key in FACTS] for one in (run, whole)]
    found += [] if facts[0] == facts[1] else ["training.json"]
    numbers = [
        [{key: value for key, value in line.items() if key != "time"} for line in one.metrics()] for one in (run, whole)
    ]
    return found if numbers[0] == numbers[1] else [*found, "metrics.jsonl"]


def _compare(run: Run, status: int, whole: Run, outcome: Outcome) -> None:
    found = differences(run, whole) if status == 0 else [f"it ended with {status}: {run.log_tail(3)}"]
    outcome.differences += [f"{run.run_id}: {one}" for one in found]
    outcome.went_on_from[int(run.progress.get("from_step", 0))] += 1
    outcome.runs += 1
    shutil.rmtree(run.directory.parents[1])


def _count(outcome: Outcome, run: Run) -> None:
    outcome.kills += 1
    outcome.met[_moment(run.directory)] += 1


def _moment(run: Path) -> str:
    """Where a kill met the training, by what it left."""
    checkpoints = sorted((run / FOLDER).glob("checkpoint-*"))
    unfinished = [path for path in checkpoints if not (path / MANIFEST).is_file()]
    if (run / "training.json").is_file():
        return "after everything was written"
    if list(run.glob(".training.json.*")):
        return "while training.json was written"
    if (run / "adapter.gguf").exists() or (run / "adapter").exists():
        return "while the adapter was saved"
    if any(list(path.glob(f".{MANIFEST}.*")) for path in unfinished):
        return "while a checkpoint's manifest was written"
    if unfinished:
        return "while a checkpoint was saved"
    return "in a step, after a checkpoint" if checkpoints else "before the first checkpoint"
