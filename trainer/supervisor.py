"""The loop thread: wait → look → act. It runs one cycle at a time and is the one writer of every run's state.

    supervisor = Supervisor(data_dir, base, freeze, champion); supervisor.start() … supervisor.stop()

At `start` it adopts what an earlier server left: a run whose child lives goes on, one whose child is dead goes on from
its last checkpoint, and never a ghost stays. `stop` leaves a child running for the next server.
Imports no torch. Not covered: promotion (`on_end` tells who decides), several
machines, starting by the clock (`schedule.py` decides).
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from feedback_store.durable import is_plain_name, new_directory, read_json, write_json
from feedback_store.errors import StoreError
from feedback_store.mixing import Mix
from feedback_store.records import BASE_VERSION
from feedback_store.snapshots import Snapshot
from trainer.base_model import BaseModel
from trainer.benchmarks.bench import Asked, Place, run_benchmark
from trainer.benchmarks.judge import Judge
from trainer.command import Launch, show_command, write_accelerate_config
from trainer.cycle import (
    POLL_S,
    Plan,
    Surroundings,
    comparison,
    end_children,
    plan_run,
    reason_of_death,
    run_cycle,
    weights_of,
)
from trainer.disk import check_disk
from trainer.errors import BadRunRequest, ChildFailed, EvaluationNotFound, NotEnoughMemory, RunActive, TrainerError
from trainer.launch import available_cores, check_training_available, threads_per_process
from trainer.launchers import EVALUATION, TRAINING, Work, launcher_for
from trainer.planning import Planner, mix_of
from trainer.preflight import Policy, Preflight, parts_of, preflight
from trainer.recipe import (
    DEFAULT,
    PRACTICE,
    from_mapping,
    load_recipe,
)
from trainer.report import ensure_report
from trainer.restarts import check_resumable
from trainer.room import RoomOf, machine_room
from trainer.runs import Run, RunState, list_runs
from trainer.versions import Versions

DISK_RETRY_S = 5.0


class _Stopping(BaseException):
    """The server is stopping: leave the child as it is."""


class _Cancelled(BaseException):
    """Someone cancelled the run."""


class Lender(Protocol):
    """Who serves a model, and can end it to lend its memory to a run (see `preflight.Policy`)."""

    def pause(self, why: str, back_in_s: float) -> Future[None]:
        """Begin to end the served model; done once its memory is free."""

    def resume(self) -> None:
        """Begin to serve it again."""


class Supervisor:
    """Starts, watches, cancels and lists runs. Thread-safe.

    `freeze(practice, mix)` makes a snapshot of the present preferences, `champion()` names the version being served.
    `cpu_count`: cores to plan with, by default those this process may use. `trackers`: see `trackers.py`. `launcher`,
    `strategy`: those of runs that name none; `launcher_options` are those of each launcher, by its name. `policy`,
    `room`: what `preflight.py` asks. `judge`: who judges answers in benchmarks. `lender`: set before `start` where a
    model is served beside. `on_end`: set before `start` to hear, in the loop thread, that a run has ended.
    """

    def __init__(
        self,
        data_dir: Path,
        base: BaseModel,
        freeze: Callable[[str | None, Mix], Snapshot],
        champion: Callable[[], str],
        cpu_count: int | None = None,
        *,
        trackers: tuple[str, ...] = (),
        launcher: str = "local",
        strategy: str | None = None,
        launcher_options: Mapping[str, str] | None = None,
        policy: Policy = Policy.SHARE,
        room: RoomOf = machine_room,
        judge: Judge | None = None,
    ) -> None:
        self._judge = judge
        self._benchmarking = threading.Lock()
        self.lender: Lender | None = None
        self.on_end: Callable[[], None] | None = None
        self._policy = policy
        self._room = room
        self.data_dir = data_dir.absolute()
        self.base = base
        self.versions = Versions(self.data_dir / "versions")
        self._freeze = freeze
        self._champion = champion
        self._cpu_count = cpu_count
        self._planner = Planner(self.data_dir, trackers, launcher, strategy, launcher_options or {})
        self.own_recipes = self._planner.own_recipes
        self._starting = threading.Lock()
        self._changed = threading.Condition()
        self._active: Run | None = None
        self._cancelling: set[str] = set()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # The thread

    def start(self) -> None:
        """Adopt what is there and start the loop."""
        assert self._thread is None, "Supervisor.start was called twice"
        left = [run for run in self.runs() if run.is_active]
        for older in left[1:]:
            self._fail(older, "It was left behind by an earlier server and another run came after it.")
        self._active = left[0] if left else None
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="trainer-supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop. A child that runs goes on, for the next server to adopt."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._active is not None)
                if self._stopping:
                    return
                run = self._active
            assert run is not None
            try:
                self._act(run)
            except _Stopping:
                return
            except OSError:
                # The run's state cannot be written (a full disk): keep the run and look again, cycles are resumable.
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping, timeout=DISK_RETRY_S)
                continue
            with self._changed:
                self._active = None
                self._changed.notify_all()
            ensure_report(run)
            if self.on_end is not None:
                self.on_end()

    def _act(self, run: Run) -> None:
        """Bring one run to its end, whatever happens."""
        try:
            self._borrow(run)
            run_cycle(run, Surroundings(self.versions, self._champion, self._wait, self._cpu_count, self._judge_name))
        except _Cancelled:
            run.end(RunState.CANCELLED, error=end_children(run))
        except (TrainerError, StoreError) as error:
            self._fail(run, str(error))
        except Exception as error:  # noqa: BLE001 - an edge: our own bug must end one run, not the loop with a ghost
            self._fail(run, f"An error inside Zephyr Loop: {type(error).__name__}: {error}. Please report it.")
        self._give_back(run)  # a server that stops keeps it lent: the next one adopts the run

    def _borrow(self, run: Run) -> None:
        """Have the served model ended where the run needs its memory; returns once that is free."""
        if self.lender is not None and borrows(run):
            ending = self.lender.pause(*pause_of(run))
            while not ending.done():
                self._wait(POLL_S)
            ending.result()

    def _give_back(self, run: Run) -> None:
        if self.lender is not None and borrows(run):
            self.lender.resume()

    def _wait(self, seconds: float) -> None:
        """Sleep, but wake at once to stop or to cancel."""
        with self._changed:
            run_id = self._active.run_id if self._active else ""
            self._changed.wait_for(lambda: self._stopping or run_id in self._cancelling, timeout=seconds)
            if self._stopping:
                raise _Stopping
            if run_id in self._cancelling:
                raise _Cancelled

    def _fail(self, run: Run, reason: str) -> None:
        left = end_children(run)
        run.end(RunState.FAILED, error=f"{reason}\n{left}" if left else reason)

    # What people ask for

    def start_run(self, **request: Any) -> Run:
        """Freeze a snapshot and queue a run on it; `request` is what `Planner.plan` takes.

        Raises RunActive, NotEnoughDisk, NotEnoughMemory, what `Planner.plan` raises, and what `freeze` raises
        (NotEnoughPreferences, …): nothing is left behind then.
        """
        with self._starting:
            self._refuse_second()
            plan = self._planner.plan(**request)
            if plan.launch.launcher == "local" and plan.launch.machines > 1:
                raise BadRunRequest(
                    f"The local launcher starts processes on this machine only, not on {plan.launch.machines}. Use the "
                    "launcher slurm or ray, or start by hand the lines that `zloop train --show-command` prints."
                )
            check_disk(self.data_dir, self.base, plan.recipe)
            snapshot = self._snapshot_for(plan)
            expected = self._preflight(plan, parts_of(snapshot))
            if expected.refusal:
                raise NotEnoughMemory(expected.refusal)
            run = plan_run(plan, snapshot, self.base, self.data_dir, preflight=expected.as_dict())
            self._take_on(run)
            return run

    def preflight(self, preview: Callable[[str | None, Mix], Mapping[str, Any]], **request: Any) -> dict[str, Any]:
        """What `start_run` would make of `request`: memory, time, policy, and why it would be refused. Starts nothing.

        `preview` gives the rows that `freeze` would write. Raises what `start_run` raises of a request.
        """
        plan = self._planner.plan(**request)
        return self._preflight(plan, preview(plan.practice, mix_of(plan))).as_dict()

    def _preflight(self, plan: Plan, parts: Mapping[str, Any]) -> Preflight:
        return preflight(
            plan,
            parts,
            self.base,
            self.data_dir / "models",
            runs=self.runs(),
            room=self._room(plan.device),
            policy=self._policy,
            is_serving=self.lender is not None,
            cores=self._cpu_count,
        )

    def left_paused(self) -> Run | None:
        """The run of an earlier server that goes on with the memory of the served model, if there is one."""
        going_on = next((run for run in self.runs() if run.is_active), None)
        return going_on if going_on is not None and borrows(going_on) else None

    def prepare_by_hand(self, **request: Any) -> dict[str, Any]:
        """The command of the run that `start_run` would start for `request`; see `show_command`. Starts nothing.

        It needs a directory to run in, so one is made in `by_hand/`, where nothing is started or published by itself.
        Raises what `start_run` raises.
        """
        plan = self._planner.plan(**request)
        snapshot = self._snapshot_for(plan)
        run = plan_run(plan, snapshot, self.base, self.data_dir, "by_hand")
        try:
            write_accelerate_config(run.directory, plan.launch)
        except OSError:
            shutil.rmtree(run.directory, ignore_errors=True)
            raise
        return self._command(run)

    def command(self, run_id: str) -> dict[str, Any]:
        """How the training of a run is started, see `show_command`. Raises RunNotFound."""
        return self._command(self.run(run_id))

    def _command(self, run: Run) -> dict[str, Any]:
        launch = Launch.of(run.config)
        work = Work(run.directory, TRAINING, launch, self._cpu_count)
        threads = threads_per_process(self._cpu_count or available_cores(), launch.processes_per_machine)
        return show_command(run, threads, launcher_for(launch).submission(work))

    def _snapshot_for(self, plan: Plan) -> Snapshot:
        return self._freeze(plan.practice, mix_of(plan))

    def resume(self, run_id: str) -> Run:
        """Go on with a run that failed or was cancelled, from its last checkpoint.

        Raises RunNotFound, RunActive, TrainingUnavailable, NotEnoughDisk, and BadRunRequest where it cannot go on.
        """
        with self._starting:
            run = self.run(run_id)
            self._refuse_second()
            check_training_available()
            check_resumable(run, self.base, self.data_dir / "models")
            check_disk(self.data_dir, self.base, from_mapping(run.config.recipe_name, run.config.recipe))
            run.reopen()
            self._take_on(run)
            return run

    def _take_on(self, run: Run) -> None:
        with self._changed:
            self._cancelling.discard(run.run_id)
            self._active = run
            self._changed.notify_all()

    def cancel(self, run_id: str) -> Run:
        """Ask for a run to end; its processes are gone and its state is `cancelled` within about 15 s.

        Raises RunNotFound, and BadRunRequest when it has ended in another way.
        """
        run = self.run(run_id)
        with self._changed:
            if run.is_active:
                self._cancelling.add(run_id)
                self._changed.notify_all()
            elif run.state is not RunState.CANCELLED:
                raise BadRunRequest(f"Run {run_id} is {run.state.value}: there is nothing to cancel.")
        return run

    def run(self, run_id: str) -> Run:
        """Raises RunNotFound."""
        active = self._active
        return active if active is not None and active.run_id == run_id else Run.open(self.data_dir / "runs", run_id)

    def runs(self) -> list[Run]:
        """Newest first."""
        return list_runs(self.data_dir / "runs")

    def wait(self, run_id: str, timeout_s: float) -> Run:
        """The run once it has ended, or as it stands after `timeout_s`."""
        run = self.run(run_id)
        with self._changed:
            self._changed.wait_for(lambda: not run.is_active, timeout=timeout_s)
        return run

    def evaluate(self, version: str, against: str | None = None, on: str = "held_out") -> dict[str, Any]:
        """Compare a version with another (by default the champion) on the held-out preferences of this moment.

        Takes minutes; runs in the caller's thread with a child process. Returns what evaluation.json holds.
        Raises VersionNotFound, RunActive, BadRunRequest, ChildFailed.
        """
        if on != "held_out":
            raise BadRunRequest(f"evaluate on {on!r}: only 'held_out' can be judged on.")
        self._refuse_second()
        against = against or self._champion()
        if version == against:
            raise BadRunRequest(f"{version} cannot be compared with itself. Name another version with --against.")
        practice = None if version == BASE_VERSION else self.versions.load(version).practice
        recipe, launch = load_recipe(PRACTICE if practice else DEFAULT), self._planner.launch(num_processes=1)
        snapshot = self._freeze(practice, recipe.mix(seed=0))
        directory = self.data_dir / "evaluations" / f"evaluation_{uuid.uuid4().hex[:12]}"
        request = comparison(
            recipe=recipe,
            base=self.base.as_dict(),
            models_dir=str(self.data_dir / "models"),
            device=launch.device,
            snapshot=snapshot,
            candidate=(version, weights_of(version, self.base.name, self.versions)),
            champion=(against, weights_of(against, self.base.name, self.versions)),
            judge=self._judge_name,
        )
        with new_directory(directory) as unfinished:
            write_json(unfinished / "comparison.json", request)
        result = self._evaluate_in(directory, launch)
        ensure_report(Run(directory))
        return {**result, "evaluation_id": directory.name}

    def benchmark(self, asked: Asked) -> dict[str, Any]:
        """Ask a benchmark of one or two versions, see `benchmarks/bench.py`; one at a time. Takes minutes.

        Raises RunActive, and what `run_benchmark` raises; what was answered and judged until then is kept.
        """
        self._refuse_second()
        if not self._benchmarking.acquire(blocking=False):
            raise BadRunRequest("Another benchmark is going on. Ask again when it is over.")
        try:
            launch = self._planner.launch(num_processes=1)
            place = Place(
                self.data_dir,
                self.base,
                self.versions,
                launch.device,
                self._judge,
                lambda directory: self._evaluate_in(directory, launch, "answers.json"),
            )
            result = run_benchmark(asked, place)
        finally:
            self._benchmarking.release()
        ensure_report(Run(self.evaluation_directory(result["evaluation_id"])))
        return result

    def evaluation_directory(self, evaluation_id: str) -> Path:
        """The directory of an evaluation or a benchmark that has ended. Raises EvaluationNotFound."""
        directory = self.data_dir / "evaluations" / evaluation_id
        if not is_plain_name(evaluation_id) or not (directory / "evaluation.json").is_file():
            raise EvaluationNotFound(evaluation_id)
        return directory

    @property
    def _judge_name(self) -> str | None:
        return None if self._judge is None else self._judge.model

    def _refuse_second(self) -> None:
        with self._changed:
            # A run whose state has ended is let go by the loop a moment later.
            self._changed.wait_for(lambda: self._active is None or self._active.is_active, timeout=5)
            if self._active is not None:
                raise RunActive(self._active)

    def _evaluate_in(self, directory: Path, launch: Launch, name: str = "evaluation.json") -> dict[str, Any]:
        """What the child leaves in the file `name`."""
        handle, launcher = Run(directory), launcher_for(launch)
        job = launcher.start(Work(directory, EVALUATION, launch, self._cpu_count))
        try:
            while launcher.is_alive(job, directory):
                time.sleep(0.2)
        finally:
            launcher.end(job, directory)
        settled_by = time.monotonic() + launcher.settle_s
        while (result := read_json(directory / name)) is None and handle.failure is None:
            if time.monotonic() >= settled_by:
                break
            time.sleep(0.2)
        if result is None:
            raise ChildFailed(reason_of_death(handle, EVALUATION))
        return result


def borrows(run: Run) -> bool:
    """Whether a run needs the memory of the served model."""
    return (run.config.preflight or {}).get("policy") == Policy.PAUSE


def pause_of(run: Run) -> tuple[str, float]:
    """What people read meanwhile, half a sentence, and in how many seconds it should be over."""
    estimate = (run.config.preflight or {}).get("estimate")
    began = datetime.fromisoformat(run.config.created_at).timestamp()
    left_s = max(0.0, began + estimate["total_s"] - time.time()) if estimate else 0.0
    return f"The model is learning ({run.run_id}) and needs the memory", left_s
