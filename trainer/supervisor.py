"""The loop thread: wait → look → act. It runs one cycle at a time and is the one writer of every run's state.

    supervisor = Supervisor(data_dir, base, freeze, champion); supervisor.start() … supervisor.stop()

At `start` it adopts what an earlier server left: a run whose child lives goes on, one whose child is dead goes on from
its last checkpoint, and never a ghost stays. `stop` leaves a child running for the next server.
Imports no torch. Not covered: automatic promotion, several machines, starting by the clock (`schedule.py` decides).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from feedback_store.durable import write_json
from feedback_store.errors import StoreError
from feedback_store.mixing import TEXT, Mix
from feedback_store.records import BASE_VERSION
from feedback_store.snapshots import Snapshot
from trainer.base_model import BaseModel
from trainer.cycle import Plan, Surroundings, comparison, plan_run, reason_of_death, run_cycle, weights_of
from trainer.disk import check_disk
from trainer.errors import BadRunRequest, ChildFailed, RunActive, TrainerError
from trainer.launch import check_training_available, gpu_count, is_alive, kill_tree, start_evaluation
from trainer.recipe import (
    CONTINUED_PRETRAINING,
    DEFAULT,
    KTO,
    PRACTICE,
    SFT,
    SFT_THEN_DPO,
    Recipe,
    from_mapping,
    load_recipe,
)
from trainer.report import ensure_report
from trainer.restarts import check_resumable
from trainer.runs import Run, RunState, list_runs
from trainer.texts import DIALOGUES, TEXTS, find_dialogues, find_texts
from trainer.trackers import check_trackers
from trainer.tuning import check_tuning
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
    `cpu_count`: cores to plan with, by default those this process may use. `trackers`: see `trackers.py`.
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
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.base = base
        self.versions = Versions(self.data_dir / "versions")
        self.own_recipes = self.data_dir / "recipes"
        self._freeze = freeze
        self._champion = champion
        self._cpu_count = cpu_count
        self._trackers = trackers
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
        record = run.record
        kill_tree(record.get("pid"), record.get("process_start_time"), run.directory)

    # What people ask for

    def start_run(  # noqa: PLR0917 - all optional; callers name them
        self,
        recipe: str | None = None,
        max_steps: int | None = None,
        num_processes: int | None = None,
        seed: int | None = None,
        practice: str | None = None,
        requested_by: str = "local",
        deadline_minutes: float | None = None,
    ) -> Run:
        """Freeze a snapshot and queue a run on it; `deadline_minutes` goes before the recipe's.

        Raises RunActive, UnknownRecipe, BadRecipe, BadRunRequest, TrainingUnavailable, NotEnoughDisk, and what `freeze`
        raises (NotEnoughPreferences, …): nothing is left behind then.
        """
        with self._starting:
            self._refuse_second()
            check_training_available()
            check_trackers(self._trackers)
            gpus = gpu_count()
            named = load_recipe(recipe or (PRACTICE if practice else DEFAULT), self.own_recipes)
            chosen = _with_deadline(named, deadline_minutes)
            check_tuning(chosen, "gpu" if gpus else "cpu")
            plan = Plan(
                recipe=chosen,
                max_steps=_checked("max_steps", max_steps, 1, 1_000_000),
                num_processes=_checked("num_processes", num_processes, 1, gpus or MAX_PROCESSES) or max(1, gpus),
                seed=_checked("seed", seed, 0, 2**32 - 1) or 0,
                practice=practice,
                device="gpu" if gpus else "cpu",
                requested_by=requested_by,
                texts=self._texts(chosen),
                dialogues=None if practice else self._dialogues(chosen),
                trackers=self._trackers,
            )
            chosen.micro_batch(plan.num_processes)
            if practice and chosen.method in (KTO, CONTINUED_PRETRAINING):
                raise BadRunRequest(
                    f"A practice taste gives pairs, and the recipe {chosen.name} does not learn from pairs. "
                    "Practise with another recipe."
                )
            check_disk(self.data_dir, self.base, chosen)
            mix = chosen.mix(plan.seed)
            if plan.dialogues and chosen.method == SFT:
                mix = replace(mix, learns_from=TEXT)  # pairs are welcome, and not needed
            snapshot = self._freeze(practice, mix)
            run = plan_run(plan, snapshot, self.base, self.data_dir)
            self._take_on(run)
            return run

    def _texts(self, recipe: Recipe) -> dict[str, Any] | None:
        if recipe.method != CONTINUED_PRETRAINING:
            return None
        return find_texts(self.data_dir / TEXTS if recipe.texts is None else Path(recipe.texts))

    def _dialogues(self, recipe: Recipe) -> dict[str, Any] | None:
        if recipe.method not in (SFT, SFT_THEN_DPO):
            return None
        return find_dialogues(self.data_dir / DIALOGUES if recipe.dialogues is None else Path(recipe.dialogues))

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
        check_training_available()
        against = against or self._champion()
        if version == against:
            raise BadRunRequest(f"{version} cannot be compared with itself. Name another version with --against.")
        practice = None if version == BASE_VERSION else self.versions.load(version).practice
        recipe, device = load_recipe(PRACTICE if practice else DEFAULT), "gpu" if gpu_count() else "cpu"
        snapshot = self._freeze(practice, recipe.mix(seed=0))
        directory = self.data_dir / "evaluations" / f"evaluation_{uuid.uuid4().hex[:12]}"
        directory.mkdir(parents=True)
        request = comparison(
            recipe=recipe,
            base=self.base.as_dict(),
            models_dir=str(self.data_dir / "models"),
            device=device,
            snapshot=snapshot,
            candidate=(version, weights_of(version, self.base.name, self.versions)),
            champion=(against, weights_of(against, self.base.name, self.versions)),
        )
        write_json(directory / "comparison.json", request)
        return self._evaluate_in(directory, device)

    def _refuse_second(self) -> None:
        with self._changed:
            # A run whose state has ended is let go by the loop a moment later.
            self._changed.wait_for(lambda: self._active is None or self._active.is_active, timeout=5)
            if self._active is not None:
                raise RunActive(self._active)

    def _evaluate_in(self, directory: Path, device: str) -> dict[str, Any]:
        handle = Run(directory)
        child = start_evaluation(directory, device=device, cores=self._cpu_count)
        try:
            while is_alive(child.pid, child.start_time):
                time.sleep(0.2)
        finally:
            kill_tree(child.pid, child.start_time, directory)
        result = handle.evaluation
        if result is None:
            raise ChildFailed(reason_of_death(handle, "evaluation"))
        return result


def _with_deadline(recipe: Recipe, minutes: float | None) -> Recipe:
    return recipe if minutes is None else from_mapping(recipe.name, {**recipe.as_dict(), "deadline_minutes": minutes})


def _checked(name: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise BadRunRequest(f"{name} is {value!r}, it must be a whole number from {low} to {high}.")
    return value
