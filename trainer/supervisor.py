"""The loop thread: wait → look → act. It runs one cycle at a time and is the one writer of every run's state.

    supervisor = Supervisor(data_dir, base, freeze, champion); supervisor.start() … supervisor.stop()

At `start` it adopts what an earlier server left: a run whose child lives goes on, one whose child is dead fails with
the last lines of its log, and never a ghost stays. `stop` leaves a child running for the next server.
Imports no torch. Not covered: automatic promotion, several machines, starting by the clock (`schedule.py` decides).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from feedback_store.durable import write_json
from feedback_store.errors import StoreError
from feedback_store.mixing import Mix
from feedback_store.records import BASE_VERSION
from feedback_store.snapshots import Snapshot
from trainer.base_model import BaseModel
from trainer.command import Launch, choose_launch, show_command, write_accelerate_config
from trainer.cycle import (
    Plan,
    Surroundings,
    adapter_of,
    comparison,
    end_children,
    plan_run,
    reason_of_death,
    run_cycle,
)
from trainer.errors import BadRunRequest, ChildFailed, RunActive, TrainerError
from trainer.launch import available_cores, check_training_available, threads_per_process
from trainer.launchers import EVALUATION, TRAINING, Work, launcher_for
from trainer.recipe import DEFAULT, PRACTICE, load_recipe
from trainer.runs import Run, RunState, list_runs
from trainer.versions import Versions

MAX_PROCESSES = 64
DISK_RETRY_S = 5.0


class _Stopping(BaseException):
    """The server is stopping: leave the child as it is."""


class _Cancelled(BaseException):
    """Someone cancelled the run."""


class Supervisor:
    """Starts, watches, cancels and lists runs. Thread-safe.

    `freeze(practice, mix)` makes a snapshot of the present preferences, `champion()` names the version being served.
    `cpu_count`: cores to plan with, by default those this process may use. `launcher`, `strategy`: those of runs that
    name none; `launcher_options` are those of each launcher, by its name.
    """

    def __init__(
        self,
        data_dir: Path,
        base: BaseModel,
        freeze: Callable[[str | None, Mix], Snapshot],
        champion: Callable[[], str],
        cpu_count: int | None = None,
        *,
        launcher: str = "local",
        strategy: str | None = None,
        launcher_options: Mapping[str, str] | None = None,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.base = base
        self.versions = Versions(self.data_dir / "versions")
        self._freeze = freeze
        self._champion = champion
        self._cpu_count = cpu_count
        self._launcher = launcher
        self._strategy = strategy
        self._launcher_options = launcher_options or {}
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

    def _act(self, run: Run) -> None:
        """Bring one run to its end, whatever happens."""
        try:
            run_cycle(run, Surroundings(self.versions, self._champion, self._wait, self._cpu_count))
        except _Cancelled:
            self._end_processes(run)
            run.end(RunState.CANCELLED)
        except (TrainerError, StoreError) as error:
            self._fail(run, str(error))
        except Exception as error:  # noqa: BLE001 - an edge: our own bug must end one run, not the loop with a ghost
            self._fail(run, f"An error inside Zephyr Loop: {type(error).__name__}: {error}. Please report it.")

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
        self._end_processes(run)
        run.end(RunState.FAILED, error=reason)

    @staticmethod
    def _end_processes(run: Run) -> None:
        end_children(run)

    # What people ask for

    def start_run(  # noqa: PLR0917 - all optional; callers name them
        self,
        recipe: str | None = None,
        max_steps: int | None = None,
        num_processes: int | None = None,
        seed: int | None = None,
        practice: str | None = None,
        requested_by: str = "local",
        launcher: str | None = None,
        strategy: str | None = None,
        machines: int | None = None,
    ) -> Run:
        """Freeze a snapshot and queue a run on it.

        Raises RunActive, UnknownRecipe, BadRecipe, BadRunRequest, TrainingUnavailable, and what `freeze` raises
        (NotEnoughPreferences, …): nothing is left behind then.
        """
        with self._starting:
            self._refuse_second()
            plan = self._plan(
                recipe=recipe,
                max_steps=max_steps,
                num_processes=num_processes,
                seed=seed,
                practice=practice,
                requested_by=requested_by,
                launcher=launcher,
                strategy=strategy,
                machines=machines,
            )
            if plan.launch.launcher == "local" and plan.launch.machines > 1:
                raise BadRunRequest(
                    f"The local launcher starts processes on this machine only, not on {plan.launch.machines}. Use the "
                    "launcher slurm or ray, or start by hand the lines that `zloop train --show-command` prints."
                )
            snapshot = self._freeze(practice, plan.recipe.mix(plan.seed))
            run = plan_run(plan, snapshot, self.base, self.data_dir)
            with self._changed:
                self._active = run
                self._changed.notify_all()
            return run

    def prepare_by_hand(self, **request: Any) -> dict[str, Any]:
        """The command of the run that `start_run` would start for `request`; see `show_command`. Starts nothing.

        It needs a directory to run in, so one is made in `by_hand/`, where nothing is started or published by itself.
        Raises what `start_run` raises.
        """
        plan = self._plan(**request)
        snapshot = self._freeze(plan.practice, plan.recipe.mix(plan.seed))
        run = plan_run(plan, snapshot, self.base, self.data_dir, "by_hand")
        write_accelerate_config(run.directory, plan.launch)
        return self._command(run)

    def command(self, run_id: str) -> dict[str, Any]:
        """How the training of a run is started, see `show_command`. Raises RunNotFound."""
        return self._command(self.run(run_id))

    def _command(self, run: Run) -> dict[str, Any]:
        launch = Launch.of(run.config)
        work = Work(run.directory, TRAINING, launch, self._cpu_count)
        threads = threads_per_process(self._cpu_count or available_cores(), launch.processes_per_machine)
        return show_command(run, threads, launcher_for(launch).submission(work))

    def _choose_launch(
        self, launcher: str | None, strategy: str | None, machines: int | None, num_processes: int | None
    ) -> Launch:
        check_training_available()
        launcher = launcher or self._launcher
        options = self._launcher_options.get(launcher, "")
        gpus = launcher_for(Launch(launcher, options=options)).gpus()
        wanted = _checked("num_processes", num_processes, 1, gpus or MAX_PROCESSES)
        processes = wanted or (max(1, gpus) if launcher == "local" else 1)
        return choose_launch(
            launcher,
            strategy or (self._strategy if processes > 1 else None),
            _checked("machines", machines, 1, MAX_PROCESSES),
            num_processes=processes,
            device="gpu" if gpus else "cpu",
            options=options,
        )

    def _plan(
        self,
        *,
        recipe: str | None = None,
        max_steps: int | None = None,
        num_processes: int | None = None,
        seed: int | None = None,
        practice: str | None = None,
        requested_by: str = "local",
        launcher: str | None = None,
        strategy: str | None = None,
        machines: int | None = None,
    ) -> Plan:
        launch = self._choose_launch(launcher, strategy, machines, num_processes)
        plan = Plan(
            recipe=load_recipe(recipe or (PRACTICE if practice else DEFAULT)),
            max_steps=_checked("max_steps", max_steps, 1, 1_000_000),
            num_processes=launch.num_processes,
            seed=_checked("seed", seed, 0, 2**32 - 1) or 0,
            practice=practice,
            device=launch.device,
            requested_by=requested_by,
            launch=launch,
        )
        plan.recipe.per_process_batch(plan.num_processes)
        return plan

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
        recipe, launch = load_recipe(PRACTICE if practice else DEFAULT), self._choose_launch(None, None, None, 1)
        snapshot = self._freeze(practice, recipe.mix(seed=0))
        directory = self.data_dir / "evaluations" / f"evaluation_{uuid.uuid4().hex[:12]}"
        directory.mkdir(parents=True)
        request = comparison(
            recipe=recipe,
            base=self.base.as_dict(),
            models_dir=str(self.data_dir / "models"),
            device=launch.device,
            snapshot=snapshot,
            candidate=(version, adapter_of(version, self.base.name, self.versions)),
            champion=(against, adapter_of(against, self.base.name, self.versions)),
        )
        write_json(directory / "comparison.json", request)
        return self._evaluate_in(directory, launch)

    def _refuse_second(self) -> None:
        with self._changed:
            # A run whose state has ended is let go by the loop a moment later.
            self._changed.wait_for(lambda: self._active is None or self._active.is_active, timeout=5)
            if self._active is not None:
                raise RunActive(self._active)

    def _evaluate_in(self, directory: Path, launch: Launch) -> dict[str, Any]:
        handle, launcher = Run(directory), launcher_for(launch)
        job = launcher.start(Work(directory, EVALUATION, launch, self._cpu_count))
        try:
            while launcher.is_alive(job, directory):
                time.sleep(0.2)
        finally:
            launcher.end(job, directory)
        settled_by = time.monotonic() + launcher.settle_s
        while handle.evaluation is None and handle.failure is None and time.monotonic() < settled_by:
            time.sleep(0.2)
        result = handle.evaluation
        if result is None:
            raise ChildFailed(reason_of_death(handle, EVALUATION))
        return result


def _checked(name: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise BadRunRequest(f"{name} is {value!r}, it must be a whole number from {low} to {high}.")
    return value
