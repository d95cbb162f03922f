"""The supervisor against real children: finish, refuse, cancel, be killed, be adopted, go on, and never a ghost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny_model
from resume.kills import Nursery

from feedback_store.errors import NotEnoughPreferences
from feedback_store.mixing import Mix
from feedback_store.snapshots import Snapshot, freeze, load_snapshot
from trainer import launch
from trainer.benchmarks.bench import Asked
from trainer.benchmarks.words import NO_JUDGE
from trainer.checkpoints import last_step
from trainer.errors import (
    BadRecipe,
    BadRunRequest,
    EvaluationNotFound,
    NotEnoughDisk,
    RunActive,
    RunNotFound,
    TrainingUnavailable,
    UnknownRecipe,
    VersionNotFound,
)
from trainer.runs import Run, RunState
from trainer.supervisor import Supervisor

RUN_TIMEOUT_S = 180


class Place:
    """A data directory with a champion that can be changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.champion = "v0"
        self.preferences = 40
        tiny_model.lend_models(directory)

    def freeze(self, practice: str | None, mix: Mix) -> Snapshot:
        made = tiny_model.made_up_preferences(self.preferences, practice)
        return freeze(made, self.directory / "snapshots", practice, mix)

    def supervisor(self) -> Supervisor:
        return Supervisor(self.directory, tiny_model.shared_tiny(), self.freeze, lambda: self.champion)


@pytest.fixture(autouse=True)
def _unhindered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run like any process: a nice one on the last core starves beside other tests. See ``test_launch.py``."""
    monkeypatch.setattr(launch, "_lower_priority", lambda _pid: None)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data")


@pytest.fixture
def supervisor(place: Place) -> Iterator[Supervisor]:
    made = place.supervisor()
    made.start()
    yield made
    made.stop()
    for run in made.runs():
        launch.kill_tree(run.record.get("pid"), run.record.get("process_start_time"), run.directory)


def processes_of(run: Run) -> list[psutil.Process]:
    return launch._family(run.record.get("pid"), run.record.get("process_start_time"), run.directory)


def workers_of(run: Run) -> list[psutil.Process]:
    """The processes that run the job itself: those with the module as Python's `-m`."""
    words = [(process, process.cmdline()) for process in processes_of(run)]  # a launcher starts other things too
    return [process for process, said in words if "trainer.job" in said and "accelerate.commands.launch" not in said]


def wait_until(what: str, done: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


def test_a_run_finishes_with_a_verdict_and_a_version(place: Place, supervisor: Supervisor) -> None:
    heard: list[bool] = []
    supervisor.on_end = lambda: heard.append(run.is_finished)
    run = supervisor.start_run(max_steps=2)
    with pytest.raises(RunActive, match=run.run_id) as refused:
        supervisor.start_run()
    assert refused.value.run.run_id == run.run_id
    assert supervisor.wait(run.run_id, 0.01).is_active

    states = [RunState.QUEUED]
    while run.is_active:
        if run.state is not states[-1]:
            states.append(run.state)
        supervisor.wait(run.run_id, 0.02)
    assert run.error is None
    assert run.is_finished
    story = [RunState.QUEUED, RunState.PREPARING, RunState.TRAINING, RunState.EVALUATING]
    assert states == [state for state in story if state in states]
    assert RunState.TRAINING in states
    assert RunState.EVALUATING in states

    body = supervisor.run(run.run_id).as_body()
    assert (body["state"], body["step"], body["total_steps"], body["version"]) == ("finished", 2, 2, "v1")
    assert body["verdict"]["decision"] in ("promote", "keep", "reject")
    assert body["evaluation"]["pairs"] == body["evaluation_progress"]["done"] > 0
    assert body["champion"] == "v0"
    assert body["finished_at"] > body["created_at"][:19]
    assert processes_of(run) == []

    manifest = supervisor.versions.verify("v1")
    assert manifest.run_id == run.run_id
    assert manifest.snapshot == body["snapshot"]

    wait_until("the report is there", (run.directory / "report.html").is_file)
    assert ">v1</b>" in (run.directory / "report.html").read_text()
    wait_until("who decides about it has heard", lambda: heard == [True])

    place.champion = "v1"
    with pytest.raises(BadRunRequest, match="itself"):
        supervisor.evaluate("v1")
    evaluation = supervisor.evaluate("v1", against="v0")
    assert (evaluation["candidate"], evaluation["champion"]) == ("v1", "v0")
    assert evaluation["wins"] == body["evaluation"]["wins"]
    report = supervisor.evaluation_directory(evaluation["evaluation_id"]) / "report.html"
    assert body["verdict"]["reasons"][0] in report.read_text()
    with pytest.raises(EvaluationNotFound):
        supervisor.evaluation_directory("../runs")
    prompts = place.directory / "prompts.txt"
    prompts.write_text("What is red?\nWhat is blue?\n")
    benchmark = supervisor.benchmark(Asked(str(prompts), "v1", "v0", max_tokens=8))
    answered = supervisor.evaluation_directory(benchmark["evaluation_id"])
    assert "What is blue?" in (answered / "report.html").read_text()
    assert benchmark["sentences"] == [NO_JUDGE]
    with pytest.raises(VersionNotFound):
        supervisor.evaluate("v7")
    with pytest.raises(BadRunRequest, match="held_out"):
        supervisor.evaluate("v1", "v0", on="train")


def test_cancelling_leaves_no_process(supervisor: Supervisor) -> None:
    run = supervisor.start_run(num_processes=2)
    wait_until("both workers run", lambda: len(workers_of(run)) == 2)
    family = processes_of(run)
    began = time.monotonic()
    supervisor.cancel(run.run_id)
    assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED
    assert time.monotonic() - began < 15
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert run.version is None
    assert run.error is None
    wait_until("the report is there", (run.directory / "report.html").is_file)
    supervisor.cancel(run.run_id)  # again: nothing happens
    with pytest.raises(RunNotFound):
        supervisor.cancel("run_unknown")


@pytest.mark.parametrize(("victim", "num_processes"), [("launcher", 1), ("worker", 1), ("launcher", 2), ("worker", 2)])
def test_a_killed_child_is_started_again(supervisor: Supervisor, victim: str, num_processes: int) -> None:
    run = supervisor.start_run(num_processes=num_processes)
    wait_until("the workers run", lambda: len(workers_of(run)) == num_processes)
    family = processes_of(run)
    os.kill(run.record["pid"] if victim == "launcher" else workers_of(run)[0].pid, signal.SIGKILL)
    wait_until("another child runs", lambda: run.record.get("resumed") == 1 and workers_of(run))
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    assert run.is_active
    supervisor.cancel(run.run_id)
    assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED


def dying(run_dir: Path, **_request: object) -> launch.Child:
    """A training that is killed as soon as it starts."""
    return launch._start(["-c", "import os; os.kill(os.getpid(), 9)"], run_dir, 1)


def sleeping(run_dir: Path, **_request: object) -> launch.Child:
    return launch._start(["-c", "import time; time.sleep(600)", str(run_dir), "trainer.job"], run_dir, 1)


def deaf(run_dir: Path, **_request: object) -> launch.Child:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(600)"
    return launch._start(["-c", code, str(run_dir), "trainer.job"], run_dir, 1)


def test_a_run_that_does_not_get_further_fails_and_can_be_resumed_by_hand(
    place: Place, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.restarts.PAUSES_S", (0.0, 0.0, 0.0))
    place.preferences = 250
    with monkeypatch.context() as patch:
        patch.setattr("trainer.launchers.local.start_training", dying)
        run = supervisor.start_run(max_steps=20)
        assert supervisor.wait(run.run_id, 60).state is RunState.FAILED
    assert run.error is not None
    assert run.error.startswith("The training failed: its process was killed")
    assert "Last lines of its log:" in run.error
    assert run.error.endswith("It was started again 3 times and got no further. Resume it when it may.")
    with pytest.raises(BadRunRequest, match="failed"):
        supervisor.cancel(run.run_id)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.launchers.local.start_training", sleeping)
        following = supervisor.start_run()
        with pytest.raises(RunActive, match=following.run_id):
            supervisor.resume(run.run_id)
        wait_until("the next run has a child", lambda: processes_of(following))
        supervisor.cancel(following.run_id)
        assert supervisor.wait(following.run_id, 15).state is RunState.CANCELLED

    with Nursery() as nursery:
        monkeypatch.setattr("trainer.launchers.local.start_training", nursery.stand_in(run))
        assert supervisor.resume(run.run_id).run_id == run.run_id
        wait_until("there is a checkpoint", lambda: last_step(run.directory) > 0, RUN_TIMEOUT_S)
        os.kill(run.record["pid"], signal.SIGKILL)
        wait_until("it is trained", lambda: run.training, RUN_TIMEOUT_S)
        nursery.wait()
    assert run.error is None
    assert run.as_body()["resumed"] == 5
    assert [line["step"] for line in run.metrics()] == list(range(1, 21))
    assert "Going on from checkpoint-" in (run.directory / "log.txt").read_text()
    supervisor.cancel(run.run_id)
    assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED


def test_a_cancelled_run_goes_on_when_it_is_resumed(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launchers.local.start_training", sleeping)
    run = supervisor.start_run()
    for _ in range(2):
        wait_until("it has a child", lambda: processes_of(run))
        supervisor.cancel(run.run_id)
        assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED
        supervisor.resume(run.run_id)
        assert supervisor.runs()[0].is_active
    supervisor.cancel(run.run_id)
    supervisor.wait(run.run_id, 15)


def test_a_child_that_hangs_is_cancelled_too(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launchers.local.start_training", deaf)
    run = supervisor.start_run()
    wait_until("it is deaf", lambda: "deaf" in run.log_tail(3))
    began = time.monotonic()
    supervisor.cancel(run.run_id)
    assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED
    assert time.monotonic() - began < 15
    assert processes_of(run) == []


def test_a_run_past_its_deadline_is_stopped_and_says_so(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.launchers.local.start_training", sleeping)
    run = supervisor.start_run(deadline_minutes=0.01)
    assert supervisor.wait(run.run_id, 30).state is RunState.FAILED
    assert run.error is not None
    assert run.error.startswith("The deadline of 0.01 minutes passed while it was preparing. What was done is kept")
    assert processes_of(run) == []
    assert run.config.recipe["deadline_minutes"] == 0.01
    with pytest.raises(BadRecipe, match="deadline_minutes is 0"):
        supervisor.start_run(deadline_minutes=0)


def test_of_a_hundred_starts_at_once_one_runs(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launchers.local.start_training", sleeping)
    gate, refused = threading.Barrier(100), []

    def start() -> str | None:
        gate.wait()
        try:
            return supervisor.start_run().run_id
        except RunActive as error:
            refused.append(error.run.run_id)
            return None

    with ThreadPoolExecutor(100) as pool:
        started = [run_id for run_id in pool.map(lambda _: start(), range(100)) if run_id]
    assert len(started) == 1
    assert refused == started * 99
    assert [run.run_id for run in supervisor.runs()] == started
    supervisor.cancel(started[0])
    assert supervisor.wait(started[0], 15).state is RunState.CANCELLED


def test_too_little_room_leaves_nothing(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.disk.SLACK", 2**60)
    with pytest.raises(NotEnoughDisk, match="are free below"):
        supervisor.start_run()
    assert supervisor.runs() == []


SERVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_supervisor import Place
place = Place.__new__(Place)
place.directory, place.champion, place.preferences = Path(sys.argv[1]), "v0", 40
from trainer.base_model import BaseModel
from trainer.supervisor import Supervisor
supervisor = Supervisor(place.directory, BaseModel("tiny", Path(sys.argv[3])), place.freeze, lambda: "v0")
supervisor.start()
print(supervisor.start_run(max_steps=2).run_id, flush=True)
time.sleep(300)
"""


def start_server(place: Place) -> tuple[subprocess.Popen[str], str]:
    """Another process with a supervisor and a run; its run id."""
    gguf = tiny_model.shared_tiny().gguf
    arguments = [sys.executable, "-c", SERVER, str(place.directory), str(Path(__file__).parent), str(gguf)]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def kill(server: "subprocess.Popen[str]") -> None:
    server.kill()
    server.wait()
    assert server.stdout is not None
    server.stdout.close()


def test_a_run_survives_its_server_and_is_adopted(place: Place) -> None:
    server, run_id = start_server(place)
    run = Run.open(place.directory / "runs", run_id)
    try:
        wait_until("a worker runs", lambda: workers_of(run))
    finally:
        kill(server)
    assert run.is_active
    child = run.record["pid"]

    supervisor = place.supervisor()
    supervisor.start()
    try:
        with pytest.raises(RunActive):
            supervisor.start_run()
        assert supervisor.wait(run_id, RUN_TIMEOUT_S).is_finished, run.error
        assert [line["step"] for line in run.metrics()] == [1, 2]
        assert (run.directory / "log.txt").read_text().count("accelerate.commands.launch") == 1, "trained twice"
        assert not psutil.pid_exists(child)
        assert supervisor.versions.names() == [run.version]
    finally:
        supervisor.stop()


def test_stopping_leaves_the_child_and_a_dead_one_is_started_again_at_the_next_start(place: Place) -> None:
    supervisor = place.supervisor()
    supervisor.start()
    run = supervisor.start_run(num_processes=2)
    wait_until("the workers run", lambda: len(workers_of(run)) == 2)
    supervisor.stop()
    assert run.is_active
    workers = workers_of(run)
    assert len(workers) == 2
    os.kill(run.record["pid"], signal.SIGKILL)

    following = place.supervisor()
    following.start()
    try:
        wait_until("other workers run", lambda: run.record.get("resumed") == 1 and len(workers_of(run)) == 2)
        assert not any(worker.is_running() for worker in workers), "workers of a dead launcher are left"
        following.cancel(run.run_id)
        assert following.wait(run.run_id, 15).state is RunState.CANCELLED
    finally:
        following.stop()


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"recipe": "ppo"}, UnknownRecipe, "dpo-lora"),
        ({"recipe": "dpo-qlora"}, TrainingUnavailable, "needs a GPU"),
        ({"recipe": "kto"}, NotEnoughPreferences, "0 rated answers"),
        ({"recipe": "kto", "practice": "shorter"}, BadRunRequest, "does not learn from pairs"),
        ({"recipe": "continued-pretraining"}, BadRunRequest, "no text to learn from"),
        ({"num_processes": 3}, BadRecipe, "3 processes"),
        ({"num_processes": 0}, BadRunRequest, "num_processes is 0"),
        ({"max_steps": 0}, BadRunRequest, "max_steps is 0"),
        ({"max_steps": True}, BadRunRequest, "max_steps is True"),
        ({"seed": -1}, BadRunRequest, "seed is -1"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    supervisor: Supervisor, asked: dict[str, int], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        supervisor.start_run(**asked)  # type: ignore[arg-type]
    assert supervisor.runs() == []


def test_no_preferences_no_run(place: Place, supervisor: Supervisor) -> None:
    place.preferences = 0
    with pytest.raises(NotEnoughPreferences):
        supervisor.start_run()
    assert supervisor.runs() == []


def test_a_state_that_cannot_be_written_is_written_later(
    place: Place, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, failures = Run.end, [OSError("No space left on device")]

    def end(run: Run, state: RunState, **details: object) -> None:
        if failures:
            raise failures.pop()
        write(run, state, **details)

    monkeypatch.setattr(Run, "end", end)
    monkeypatch.setattr("trainer.supervisor.DISK_RETRY_S", 0.05)
    monkeypatch.setattr("trainer.cycle.load_snapshot", lambda path: load_snapshot(path / "gone"))
    run = supervisor.start_run()
    assert supervisor.wait(run.run_id, 30).state is RunState.FAILED
    assert run.error is not None
    assert "snapshot" in run.error
    assert failures == []
    wait_until("the report is there", (run.directory / "report.html").is_file)
    assert "snapshot" in (run.directory / "report.html").read_text()


def test_importing_the_supervisor_is_light() -> None:
    code = "import sys, trainer.supervisor; print([m for m in ('torch', 'transformers', 'duckdb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
