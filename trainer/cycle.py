"""THE PAGE: snapshot → train → evaluate → verdict → publish, one stage a line in `run_cycle`.

`plan_run` freezes the snapshot and makes the run directory, so that a run is (base, snapshot, recipe, seed) from its
first byte. `run_cycle` does the rest, in the supervisor's thread. Each stage looks first whether it is done: a server
that was killed goes on where it was, adopts a child that lives and fails a run whose child is dead.

Promotion is not here: people (or a later policy) promote a published version.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feedback_store.durable import write_json
from feedback_store.records import BASE_VERSION
from feedback_store.snapshots import Snapshot, load_snapshot
from trainer.base_model import BaseModel
from trainer.errors import ChildFailed, TrainerError
from trainer.launch import Child, is_alive, kill_tree, start_evaluation, start_training
from trainer.recipe import Recipe
from trainer.runs import Run, RunConfig, RunState, new_run_id
from trainer.verdict import Verdict, decide
from trainer.versions import Versions

POLL_S = 0.3
EXIT_GRACE_S = 20.0  # after its result is written a child may take this long to leave
LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is asked to be; see `Supervisor.start_run`."""

    recipe: Recipe
    max_steps: int | None
    num_processes: int
    seed: int
    practice: str | None
    device: str
    requested_by: str


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a cycle needs beside its run. `wait(seconds)` returns early or raises when it is to stop."""

    versions: Versions
    champion: Callable[[], str]
    wait: Callable[[float], None]
    cores: int | None = None


def plan_run(
    plan: Plan, snapshot: Snapshot, base: BaseModel, data_dir: Path, preflight: dict[str, Any] | None = None
) -> Run:
    """Make the run directory, state `queued`."""
    now = datetime.now(UTC)
    config = RunConfig(
        run_id=new_run_id(now),
        created_at=now.isoformat(timespec="milliseconds"),
        recipe=plan.recipe.as_dict(),
        recipe_name=plan.recipe.name,
        seed=plan.seed,
        num_processes=plan.num_processes,
        max_steps=plan.max_steps,
        practice=plan.practice,
        base=base.as_dict(),
        models_dir=str((data_dir / "models").absolute()),
        snapshot={
            "hash": snapshot.hash,
            "directory": str(snapshot.directory.absolute()),
            "train_rows": snapshot.train_rows,
            "held_out_rows": snapshot.held_out_rows,
            "counts": dict(snapshot.counts),
            "planned_steps": plan.recipe.total_steps(snapshot.train_rows, plan.max_steps),
        },
        device=plan.device,
        requested_by=plan.requested_by,
        preflight=preflight,
    )
    return Run.create(data_dir / "runs", config)


def run_cycle(run: Run, around: Surroundings) -> None:
    """Bring a run to its end. Raises TrainerError with the reason when a stage fails."""
    snapshot = ensure_prepared(run)
    ensure_trained(run, around)
    evaluation = ensure_evaluated(run, snapshot, around)
    verdict = ensure_verdict(run, evaluation)
    version = around.versions.publish(run, run.record["candidate"], verdict.as_dict())
    run.end(RunState.FINISHED, version=version)


def ensure_prepared(run: Run) -> Snapshot:
    """The frozen snapshot, whole on disk."""
    if run.state is RunState.QUEUED:
        run.move(RunState.PREPARING)
    return load_snapshot(Path(run.config.snapshot["directory"]))


def ensure_trained(run: Run, around: Surroundings) -> None:
    """training.json and the adapter are there afterwards."""
    if run.training is None:
        config = run.config
        child = _ensure_child(
            run,
            "training",
            lambda: start_training(
                run.directory, num_processes=config.num_processes, device=config.device, cores=around.cores
            ),
        )
        _wait_for(run, child, lambda: run.training, around.wait)
    if run.training is None:
        raise ChildFailed(reason_of_death(run, "training"))


def ensure_evaluated(run: Run, snapshot: Snapshot, around: Surroundings) -> dict[str, Any]:
    """evaluation.json: the run's adapter against the champion of this moment, on the held-out part."""
    if run.evaluation is None:
        if run.state is not RunState.EVALUATING:
            champion, candidate = around.champion(), around.versions.next_name(run.config.practice)
            _write_comparison(run, snapshot, candidate, champion, around.versions)
            run.move(RunState.EVALUATING, champion=champion, candidate=candidate)
        child = _ensure_child(
            run,
            "evaluation",
            lambda: start_evaluation(run.directory, device=run.config.device, cores=around.cores),
        )
        _wait_for(run, child, lambda: run.evaluation, around.wait)
    evaluation = run.evaluation
    if evaluation is None:
        raise ChildFailed(reason_of_death(run, "evaluation"))
    return evaluation


def ensure_verdict(run: Run, evaluation: dict[str, Any]) -> Verdict:
    """The verdict, noted in state.json before the version is published."""
    verdict = decide(evaluation, evaluation["champion"], evaluation["candidate"])
    run.note(verdict=verdict.as_dict())
    return verdict


def comparison(
    *,
    recipe: Recipe,
    base: dict[str, str | None],
    models_dir: str,
    device: str,
    snapshot: Snapshot,
    candidate: tuple[str, Path | None],
    champion: tuple[str, Path | None],
) -> dict[str, Any]:
    """comparison.json, all that `evaluate.py` needs; a version's adapter is None for the base."""
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device == "gpu")
    return {
        "candidate": _version(*candidate),
        "champion": _version(*champion),
        "snapshot": snapshot.hash,
        "held_out": str(snapshot.held_out_path.absolute()),
        "held_out_pairs": recipe.held_out_pairs,
        "max_length": recipe.max_length,
        "beta": recipe.beta,
        "precision": "bf16" if bf16 else "fp32",
        "base": base,
        "models_dir": models_dir,
        "device": device,
    }


def adapter_of(version: str, base: str, versions: Versions) -> Path | None:
    """The adapter directory of a version, None for the base. Raises when it belongs to another base."""
    if version == BASE_VERSION:
        return None
    manifest = versions.load(version)
    if manifest.base != base:
        raise TrainerError(
            f"Version {version} is an adapter on {manifest.base}, the model in use is {base}: they cannot be compared. "
            f"Roll back to a version on {base}, or name {manifest.base} with ZLOOP_MODEL."
        )
    return versions.adapter_directory(version)


def reason_of_death(run: Run, stage: str) -> str:
    """A sentence a person can read, then the last lines of the log."""
    tail = _without_noise(run.log_tail(200))
    return "\n".join([f"The {stage} failed: {_sentence(run, tail)}", "Last lines of its log:", *tail[-LOG_LINES:]])


def _write_comparison(run: Run, snapshot: Snapshot, candidate: str, champion: str, versions: Versions) -> None:
    from trainer.recipe import from_mapping

    config = run.config
    write_json(
        run.directory / "comparison.json",
        comparison(
            recipe=from_mapping(config.recipe_name, config.recipe),
            base=config.base,
            models_dir=config.models_dir,
            device=config.device,
            snapshot=snapshot,
            candidate=(candidate, run.directory / "adapter"),
            champion=(champion, adapter_of(champion, str(config.base["name"]), versions)),
        ),
    )


def _version(version: str, adapter: Path | None) -> dict[str, str | None]:
    return {"version": version, "adapter": str(adapter.absolute()) if adapter else None}


def _ensure_child(run: Run, stage: str, start: Callable[[], Child]) -> Child:
    """The child of this stage: the one that was started before, dead or alive, or a fresh one."""
    record = run.record
    if record.get("child") == stage:
        return Child(record["pid"], record["process_start_time"])
    kill_tree(None, None, run.directory)  # one that an earlier server started but had no time to note
    child = start()
    run.note(child=stage, pid=child.pid, process_start_time=child.start_time)
    return child


def _wait_for(run: Run, child: Child, result: Callable[[], Any], wait: Callable[[float], None]) -> None:
    """Until the child is gone; afterwards no process of the run is left. What `wait` raises passes through."""
    leave_by: float | None = None
    while is_alive(child.pid, child.start_time):
        if run.state is RunState.PREPARING and run.progress.get("stage") == "training":
            run.move(RunState.TRAINING)
        if leave_by is None and result() is not None:
            leave_by = time.monotonic() + EXIT_GRACE_S
        if leave_by is not None and time.monotonic() > leave_by:
            break
        wait(POLL_S)
    kill_tree(child.pid, child.start_time, run.directory)
    if run.state is RunState.PREPARING and run.metrics():
        run.move(RunState.TRAINING)


_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?([A-Za-z_.]*(?:Error|Exception|Interrupt|Warning))\b:? ?(.*)")
_LAUNCHERS = ("CalledProcessError", "ChildFailedError")
_NOISE = re.compile(
    r"^(\[rank\d+\]: )?(\s|Traceback \(|[-=~^]{4,}|Root Cause|Failures:|<NO_OTHER|The above exception|During handling)"
    r"|^[EWI]\d{4} |^\[[EWI]\d{3}"
)


def _without_noise(lines: list[str]) -> list[str]:
    """Log lines without traceback frames and the launcher's banners."""
    return [line for line in lines if not _NOISE.match(line)]


def _sentence(run: Run, tail: list[str]) -> str:
    if run.failure:
        return run.failure
    for line in reversed(tail):
        match = _EXCEPTION.match(line)
        if match and not match[1].endswith((*_LAUNCHERS, "Warning")):
            return f"{match[1]}: {match[2]}".rstrip(": ")
    if any("SIGKILL" in line or "Signal 9" in line for line in tail):
        return "its process was killed (signal 9). Often the machine ran out of memory: close programs or use less."
    return "its process was killed or crashed before it was done. Start the run again."
