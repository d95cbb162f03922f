"""THE PAGE: snapshot → train → evaluate → verdict → publish, one stage a line in `run_cycle`.

`plan_run` freezes the snapshot and makes the run directory, so that a run is (base, snapshot, recipe, seed) from its
first byte. `run_cycle` does the rest, in the supervisor's thread. Each stage looks first whether it is done: a server
that was killed goes on where it was and adopts a child that lives; a dead child is started again (`restarts.py`).

Promotion is not here: people, or the server by its policy, promote a published version.
"""

from __future__ import annotations

import re
import shutil
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
from trainer.checkpoints import last_step, remove_checkpoints
from trainer.command import LOCAL, Launch
from trainer.disk import full_disk
from trainer.errors import DeadlinePassed, LaunchFailed, TrainerError
from trainer.launch import available_cores
from trainer.launchers import EVALUATION, TRAINING, Job, Launcher, Work, job_of, launcher_for
from trainer.memory import MemoryWatch, training_advice
from trainer.recipe import Recipe, from_mapping
from trainer.restarts import fingerprint, prepare_restart
from trainer.runs import BEST, Run, RunConfig, RunState, new_run_id
from trainer.tuning import uses_bf16
from trainer.verdict import Verdict, decide
from trainer.versions import Versions

POLL_S = 0.3
EXIT_GRACE_S = 20.0  # after its result is written a child may take this long to leave
LOG_LINES = 12
BYTES_A_TOKEN = 4  # of text in a European language, about


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
    texts: dict[str, Any] | None = None
    dialogues: dict[str, Any] | None = None
    trackers: tuple[str, ...] = ()
    launch: Launch = LOCAL
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a cycle needs beside its run. `wait(seconds)` returns early or raises when it is to stop.

    `judge`: the model that could judge answers, for the report.
    """

    versions: Versions
    champion: Callable[[], str]
    wait: Callable[[float], None]
    cores: int | None = None
    judge: str | None = None


def plan_run(  # noqa: PLR0917 - the last two are named by callers
    plan: Plan,
    snapshot: Snapshot,
    base: BaseModel,
    data_dir: Path,
    folder: str = "runs",
    preflight: dict[str, Any] | None = None,
) -> Run:
    """Make the run directory in `folder` of the data directory, state `queued`."""
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
        base={**base.as_dict(), "fingerprint": fingerprint(base, data_dir / "models")},
        models_dir=str((data_dir / "models").absolute()),
        snapshot={
            "hash": snapshot.hash,
            "directory": str(snapshot.directory.absolute()),
            "train_rows": snapshot.train_rows,
            "held_out_rows": snapshot.held_out_rows,
            "rated_rows": snapshot.rated_rows,
            "counts": dict(snapshot.counts),
            "texts": plan.texts,
            "dialogues": plan.dialogues,
            "planned_steps": plan.recipe.planned_steps(_rows(plan, snapshot), plan.max_steps),
        },
        device=plan.device,
        requested_by=plan.requested_by,
        trackers=list(plan.trackers),
        launch=plan.launch.kept(),
        preflight=preflight,
        without=list(plan.without),
    )
    return Run.create(data_dir / folder, config)


def _rows(plan: Plan, snapshot: Snapshot) -> int:
    """How many rows there are to learn from; for texts a guess, until they are cut into tokens."""
    if plan.texts is not None:
        return max(1, int(plan.texts["bytes"]) // (BYTES_A_TOKEN * plan.recipe.max_length))
    return snapshot.train_rows if snapshot.rated_rows is None else snapshot.rated_rows


def run_cycle(run: Run, around: Surroundings) -> None:
    """Bring a run to its end. Raises TrainerError with the reason when a stage fails."""
    snapshot = ensure_prepared(run, around.cores)
    ensure_trained(run, around)
    evaluation = ensure_evaluated(run, snapshot, around)
    verdict = ensure_verdict(run, evaluation)
    version = around.versions.publish(run, run.record["candidate"], verdict.as_dict())
    remove_checkpoints(run.directory)
    shutil.rmtree(run.directory / BEST, ignore_errors=True)  # what validation kept; the version has its own
    run.end(RunState.FINISHED, version=version)


def ensure_prepared(run: Run, cores: int | None = None) -> Snapshot:
    """The frozen snapshot, whole on disk. The cores of the run are settled: another number would round otherwise."""
    if run.state is RunState.QUEUED:
        cores = run.record.get("cores") or cores or available_cores()
        run.move(RunState.PREPARING, started_at=time.time(), cores=cores)
    return load_snapshot(Path(run.config.snapshot["directory"]))


def ensure_trained(run: Run, around: Surroundings) -> None:
    """training.json and the adapter, or the whole model, are there afterwards."""
    _ensure_result(run, TRAINING, lambda: run.training, run.record.get("cores") or around.cores, around.wait)


def ensure_evaluated(run: Run, snapshot: Snapshot, around: Surroundings) -> dict[str, Any]:
    """evaluation.json: what the run made against the champion of this moment, on the held-out part."""
    if run.evaluation is None and run.state is not RunState.EVALUATING:
        champion, candidate = around.champion(), around.versions.next_name(run.config.practice)
        _write_comparison(run, snapshot, candidate, champion, around)
        run.move(RunState.EVALUATING, champion=champion, candidate=candidate)
    return _ensure_result(run, EVALUATION, lambda: run.evaluation, around.cores, around.wait)


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
    judge: str | None = None,
) -> dict[str, Any]:
    """comparison.json, all that `evaluate.py` needs. A version's path: its adapter or whole model; None: the base.

    `judge`: the model that could judge answers, for the report; it is not asked here.
    """
    return {
        "candidate": side_of(*candidate),
        "champion": side_of(*champion),
        "snapshot": snapshot.hash,
        "held_out": str(snapshot.held_out_path.absolute()),
        "held_out_pairs": recipe.held_out_pairs,
        "max_length": recipe.max_length,
        "beta": recipe.beta,
        "precision": "bf16" if uses_bf16(recipe, device) else "fp32",
        "base": base,
        "models_dir": models_dir,
        "device": device,
        "judge": judge,
    }


def weights_of(version: str, base: str, versions: Versions) -> Path | None:
    """The adapter or whole model of a version, None for the base. Raises when it belongs to another base."""
    if version == BASE_VERSION:
        return None
    manifest = versions.load(version)
    if manifest.base != base:
        raise TrainerError(
            f"Version {version} was made from {manifest.base}, the model in use is {base}: they cannot be compared. "
            f"Roll back to a version on {base}, or name {manifest.base} with ZLOOP_MODEL."
        )
    return versions.model_directory(version) or versions.adapter_directory(version)


def reason_of_death(run: Run, stage: str, known: str | None = None) -> str:
    """A sentence a person can read (`known`, where it was seen from outside), then the last lines of the log."""
    tail = _without_noise(run.log_tail(200))
    sentence = run.failure or known or full_disk(run.directory) or _sentence(tail)
    return "\n".join([f"The {stage} failed: {sentence}", "Last lines of its log:", *tail[-LOG_LINES:]])


def _write_comparison(run: Run, snapshot: Snapshot, candidate: str, champion: str, around: Surroundings) -> None:
    config = run.config
    write_json(
        run.directory / "comparison.json",
        comparison(
            recipe=from_mapping(config.recipe_name, config.recipe),
            base=config.base,
            models_dir=config.models_dir,
            device=config.device,
            snapshot=snapshot,
            candidate=(candidate, run.weights),
            champion=(champion, weights_of(champion, str(config.base["name"]), around.versions)),
            judge=around.judge,
        ),
    )


def side_of(version: str, weights: Path | None) -> dict[str, str | None]:
    """A side of the comparison: a directory with a config.json is a whole model, any other is an adapter."""
    if weights is not None and (weights / "config.json").is_file():
        return {"version": version, "adapter": None, "model": str(weights.absolute())}
    return {"version": version, "adapter": str(weights.absolute()) if weights else None}


def end_children(run: Run) -> str | None:
    """End every process of a run, wherever it runs. Returns a sentence where some may be left."""
    launch = Launch.of(run.config)
    return launcher_for(launch).end(job_of(run.record, launch.launcher), run.directory)


def _ensure_result(
    run: Run,
    stage: str,
    result: Callable[[], dict[str, Any] | None],
    cores: int | None,
    wait: Callable[[float], None],
) -> dict[str, Any]:
    """What the child of this stage leaves, started again as often as `restarts.py` allows. Raises ChildFailed."""
    launch = Launch.of(run.config)
    launcher = launcher_for(launch)
    while (found := result()) is None:
        job = _ensure_job(run, launcher, Work(run.directory, stage, launch, cores))
        memory = _wait_for(run, launcher, job, result, wait)
        if result() is None:
            recipe = from_mapping(run.config.recipe_name, run.config.recipe).halved(run.halvings)
            reason = reason_of_death(run, stage, f"{memory} {training_advice(recipe)}" if memory else None)
            wait(prepare_restart(run, stage, reason, is_out_of_memory=memory is not None))
    return found


def _ensure_job(run: Run, launcher: Launcher, work: Work) -> Job:
    """The child of this stage: the one that was started before, dead or alive, or a fresh one."""
    record = run.record
    known = job_of(record, work.launch.launcher)
    if record.get("child") == work.stage and known is not None:
        return known
    if left := launcher.end(None, run.directory):  # one that an earlier server started but had no time to note
        raise LaunchFailed(f"An earlier child of this run may still write into its directory. {left}")
    job = launcher.start(work)
    run.note(child=work.stage, **job.as_record())
    return job


def _wait_for(
    run: Run, launcher: Launcher, job: Job, result: Callable[[], Any], wait: Callable[[float], None]
) -> str | None:
    """Until the child is gone; afterwards no process of the run is left. What `wait` raises passes through.

    Returns why, where the kernel killed it for lack of memory. Raises DeadlinePassed.
    """
    leave_by: float | None = None
    deadline, memory = run.deadline, None if job.pid is None else MemoryWatch(job.pid)
    while launcher.is_alive(job, run.directory):
        if memory is not None:
            memory.look()
        if deadline is not None and time.time() > deadline and result() is None:
            raise DeadlinePassed(_deadline_sentence(run))
        if run.state is RunState.PREPARING and run.progress.get("stage") == "training":
            run.move(RunState.TRAINING)
        if leave_by is None and result() is not None:
            leave_by = time.monotonic() + EXIT_GRACE_S
        if leave_by is not None and time.monotonic() > leave_by:
            break
        wait(POLL_S)
    launcher.end(job, run.directory)
    settled_by = time.monotonic() + launcher.settle_s  # a shared file system may show its files a little later
    while result() is None and run.failure is None and time.monotonic() < settled_by:
        wait(POLL_S)
    if run.state is RunState.PREPARING and run.metrics():
        run.move(RunState.TRAINING)
    return None if memory is None or result() is not None else memory.sentence()


def _deadline_sentence(run: Run) -> str:
    step = last_step(run.directory)
    kept = f"The checkpoint of step {step} is kept" if step and run.training is None else "What was done is kept"
    return (
        f"The deadline of {run.config.recipe['deadline_minutes']:g} minutes passed while it was {run.state.value}. "
        f"{kept}: resume the run to go on, with as many minutes again, or raise deadline_minutes for the next one."
    )


_EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?([A-Za-z_.]*(?:Error|Exception|Interrupt|Warning))\b:? ?(.*)")
_LAUNCHERS = ("CalledProcessError", "ChildFailedError")
_NOISE = re.compile(
    r"^(\[rank\d+\]: )?(\s|Traceback \(|[-=~^]{4,}|Root Cause|Failures:|<NO_OTHER|The above exception|During handling)"
    r"|^[EWI]\d{4} |^\[[EWI]\d{3}"
)


def _without_noise(lines: list[str]) -> list[str]:
    """Log lines without traceback frames and the launcher's banners."""
    return [line for line in lines if not _NOISE.match(line)]


def _sentence(tail: list[str]) -> str:
    for line in reversed(tail):
        match = _EXCEPTION.match(line)
        if match and not match[1].endswith((*_LAUNCHERS, "Warning")):
            return f"{match[1]}: {match[2]}".rstrip(": ")
    if any("SIGKILL" in line or "Signal 9" in line for line in tail):
        return "its process was killed (signal 9). Often the machine ran out of memory: close programs or use less."
    return "its process was killed or crashed before it was done."
