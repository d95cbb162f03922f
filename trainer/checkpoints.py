"""Checkpoints of a training that are whole or not there, and going on from the last whole one.

    <the Trainer's output_dir>/
      begun.json                 how long metrics.jsonl was when this training began
      checkpoint-<step>/         what the Trainer writes: weights, optimizer, scheduler, random states, its own state
        complete.json            ours, written last: sizes and sha256 of those files, how long metrics.jsonl was

The Trainer's own checkpoints are not atomic, and one without its optimizer is taken up without a word. So a checkpoint
counts only with complete.json, and only while every file in it is the one that is named there; the others are passed
over and removed. The last two are kept. `metrics.jsonl` is cut back to where the checkpoint was made.

`train_from_last` is `Trainer.train` with this around it. It uses the Trainer from outside (a callback, `output_dir`),
so it fits every method; two trainings of one run need two output directories. The same files, processes and threads
give the same weights bit for bit on CPU (`tests/resume`). Not covered: going on with another number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feedback_store.durable import read_json, sha256_of, sync, sync_tree, write_json

FOLDER = "checkpoints"
MANIFEST = "complete.json"
BEGUN = "begun.json"
KEPT = 2
COST_SHARE = 0.05  # without save_every_steps: saving may take this part of the time
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The checkpoints in one directory. `journal` is the file of lines that belongs to them: metrics.jsonl."""

    def __init__(self, directory: Path, journal: Path) -> None:
        self.directory = directory
        self.journal = journal

    def take_up(self, say: Callable[[str], None]) -> Path | None:
        """The last checkpoint that is whole, with everything as it was when that was made; None: as at the beginning.

        Those that are passed over are removed, and `say` gets a line for each.
        """
        for path in self._paths():
            problem = _problem(path)
            if problem is None:
                _cut(self.journal, int((read_json(path / MANIFEST) or {})["journal_bytes"]))
                return path
            say(f"{path.name} is passed over: {problem}.")
            _remove(path)
        begun = read_json(self.directory / BEGUN)
        if begun is not None:
            _cut(self.journal, int(begun["journal_bytes"]))
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / BEGUN, {"journal_bytes": _size(self.journal)})
        return None

    def complete(self, step: int) -> None:
        """The checkpoint of `step` has all its files: from now on it counts, and those before the last two go."""
        path = self.directory / f"checkpoint-{step}"
        sync_tree(path)
        if self.journal.is_file():
            sync(self.journal)
        files = {
            str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        write_json(path / MANIFEST, {"step": step, "journal_bytes": _size(self.journal), "files": files})
        sync(self.directory)
        for older in self._paths()[KEPT:]:
            _remove(older)

    def _paths(self) -> list[Path]:
        """Whole or not, the newest first."""
        found = [(int(name[1]), path) for path in self.directory.glob("*") if (name := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, reverse=True)]


def train_from_last(
    trainer: Any,
    journal: Path,
    save_every_steps: int | None,
    say: Callable[[str], None],
    begins_at: Callable[[int], None] = lambda _step: None,
) -> None:
    """`trainer.train()`, from the last whole checkpoint in its `output_dir` if there is one.

    `begins_at` is told the step of that checkpoint, 0 where there is none, before the first step.
    """
    from accelerate.utils import broadcast_object_list

    checkpoints = Checkpoints(Path(trainer.args.output_dir), journal)
    found: list[str | None] = [None]
    if trainer.accelerator.is_main_process:  # one looks, all go on from the same
        taken = checkpoints.take_up(say)
        found = [str(taken) if taken else None]
    checkpoint = broadcast_object_list(found)[0]
    if checkpoint:
        say(f"Going on from {Path(checkpoint).name}.")
    begins_at(step_of(checkpoint))
    trainer.add_callback(_saving(trainer, checkpoints, save_every_steps))
    trainer.train(resume_from_checkpoint=checkpoint)


def last_step(run_directory: Path) -> int:
    """The step of the newest checkpoint that says it is whole, its files not looked at; 0 where there is none.

    Of a run with several trainings the sum over them: it shows whether the run got further.
    """
    newest: dict[Path, int] = {}
    for folder, _, files in os.walk(run_directory / FOLDER):  # what a living child removes meanwhile is passed over
        if MANIFEST in files:
            training = Path(folder).parent
            newest[training] = max(newest.get(training, 0), step_of(folder))
    return sum(newest.values())


def discard_unfinished(run_directory: Path) -> None:
    """Remove what was written of checkpoints that were not completed."""
    for path in (run_directory / FOLDER).rglob("checkpoint-*"):
        if not (path / MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(run_directory: Path) -> None:
    """All of them: for a training that ended well."""
    shutil.rmtree(run_directory / FOLDER, ignore_errors=True)


def step_of(checkpoint: str | None) -> int:
    """3 for `…/checkpoint-3`, 0 for None."""
    name = _NAME.fullmatch(Path(checkpoint).name) if checkpoint else None
    return int(name[1]) if name else 0


def _saving(trainer: Any, checkpoints: Checkpoints, every_steps: int | None) -> Any:
    """The callback that has the Trainer save, and completes what it saved."""
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    class Saving(TrainerCallback):  # type: ignore[misc]
        """Every so many steps, or as often as costs `COST_SHARE` of the time: the first step shows what it costs."""

        def __init__(self) -> None:
            self.cost_s = 0.0
            self.saved_at = self.stepped_at = time.monotonic()

        def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
            self.stepped_at = time.monotonic()
            # Not after the last step: what is saved then is the result. A Trainer that goes on there does a step more.
            control.should_save = state.global_step < state.max_steps and self.is_due(state.global_step)

        def is_due(self, step: int) -> bool:
            if every_steps is not None:
                return step % every_steps == 0
            due = [self.stepped_at - self.saved_at >= self.cost_s / COST_SHARE]
            return bool(broadcast_object_list(due)[0])  # clocks differ: the first process decides

        def on_save(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            trainer.accelerator.wait_for_everyone()  # each process writes its own random state
            if trainer.accelerator.is_main_process:
                checkpoints.complete(state.global_step)
            self.saved_at = time.monotonic()
            self.cost_s = self.saved_at - self.stepped_at

    return Saving()


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, None when it is as it was completed."""
    try:
        manifest = read_json(path / MANIFEST)
        if manifest is None:
            return "it was not finished"
        named: dict[str, dict[str, Any]] = manifest["files"]
        there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
        if there != set(named):
            return f"{min(there ^ set(named))} is {'missing' if set(named) - there else 'not one of its files'}"
        for name, expected in named.items():
            if (size := (path / name).stat().st_size) != expected["bytes"]:
                return f"{name} has {size} bytes, it had {expected['bytes']}"
            if sha256_of(path / name) != expected["sha256"]:
                return f"{name} is not what was written (its sha256 differs)"
        int(manifest["journal_bytes"])
    except (OSError, json.JSONDecodeError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def _remove(path: Path) -> None:
    """The manifest first: a checkpoint that is half removed does not count."""
    (path / MANIFEST).unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)


def _cut(journal: Path, length: int) -> None:
    if _size(journal) > length:
        os.truncate(journal, length)
        sync(journal)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
