"""Slurm: a run as batch jobs, its files streaming back; adopted, cancelled and refused as a local one is."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm_stand_in
from test_supervisor import Place

from trainer.command import Launch
from trainer.errors import TrainingUnavailable
from trainer.launchers import EVALUATION, TRAINING, Job, Work, launcher_for
from trainer.launchers.slurm import SlurmLauncher, batch_script, gpus_of, state_of
from trainer.runs import RunState
from trainer.supervisor import Supervisor

OPTIONS = "--partition=gpu --time=12:00:00"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in commands, first on PATH; the directory in which they keep their jobs."""
    state = tmp_path / "slurm"
    slurm_stand_in.install(tmp_path / "bin", state)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("trainer.launchers.slurm.ASK_EVERY_S", 0.2)
    return state


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "data")


def supervisor_of(place: Place) -> Supervisor:
    base = place.supervisor().base
    options = {"slurm": OPTIONS}
    return Supervisor(place.directory, base, place.freeze, lambda: "v0", launcher="slurm", launcher_options=options)


def wait_until(what: str, done: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


def test_a_run_on_slurm_outlives_its_server_and_is_judged_there_too(place: Place, slurm: Path) -> None:
    first = supervisor_of(place)
    first.start()
    run = first.start_run(max_steps=1, num_processes=2)
    wait_until("the training is submitted", lambda: run.record.get("job_id"))
    first.stop()
    assert slurm_stand_in.processes_of(run.record["job_id"])
    assert (slurm / "options").read_text() == f"--parsable {OPTIONS}"

    second = place.supervisor()  # its own runs would be local
    second.start()
    try:
        wait_until("a pair is judged, or it failed", lambda: not run.is_active or run.progress.get("evaluation"), 120)
        assert run.error is None
        assert run.state is RunState.EVALUATING
        second.cancel(run.run_id)  # the whole evaluation takes longer, and is not Slurm's doing
        assert second.wait(run.run_id, 15).state is RunState.CANCELLED
    finally:
        second.stop()
    assert run.training is not None
    assert [line["step"] for line in run.metrics()] == [1]
    names = [name.read_text() for name in sorted(slurm.glob("*.name"))]
    assert names == [f"{run.run_id}-training", f"{run.run_id}-evaluation"]
    assert [slurm_stand_in.processes_of(job_id) for job_id in ("1000", "1001")] == [[], []]
    command = second.command(run.run_id)
    assert command["launcher"] == "slurm"
    script = (run.directory / "training.sbatch").read_text()
    assert command["submission"] == f"# sbatch {OPTIONS} {run.directory}/training.sbatch\n{script}"


def test_cancelling_leaves_no_process(place: Place, slurm: Path) -> None:
    supervisor = supervisor_of(place)
    supervisor.start()
    try:
        run = supervisor.start_run(num_processes=2)
        wait_until("launcher and workers run", lambda: len(slurm_stand_in.processes_of("1000")) >= 3)
        began = time.monotonic()
        supervisor.cancel(run.run_id)
        assert supervisor.wait(run.run_id, 15).state is RunState.CANCELLED
        assert time.monotonic() - began < 15
        assert slurm_stand_in.processes_of("1000") == []
    finally:
        supervisor.stop()


def test_a_refused_job_fails_the_run_with_slurms_words(place: Place, slurm: Path) -> None:
    (slurm / "refuse").touch()
    supervisor = supervisor_of(place)
    supervisor.start()
    try:
        run = supervisor.start_run()
        assert supervisor.wait(run.run_id, 20).state is RunState.FAILED
        assert run.error is not None
        assert "invalid partition specified: gpu" in run.error
    finally:
        supervisor.stop()


def test_without_sbatch_nothing_is_started(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    supervisor = supervisor_of(place)
    with pytest.raises(TrainingUnavailable, match="no `sbatch` here"):
        supervisor.start_run()
    assert supervisor.runs() == []


def test_a_job_lives_while_slurm_is_away_and_says_why_it_was_ended(slurm: Path, tmp_path: Path) -> None:
    job = Job("slurm", "1000")
    (slurm / "1000.name").write_text("run_x-training")
    (slurm / "away").touch()
    assert state_of("1000") is None
    assert SlurmLauncher().is_alive(job, tmp_path)
    (slurm / "away").unlink()
    (slurm / "1000.ended").write_text("TIMEOUT")
    assert not SlurmLauncher().is_alive(job, tmp_path)
    assert (
        "Slurm ended job 1000 (TIMEOUT): it ran longer than its time limit" in (tmp_path / "failure.json").read_text()
    )


def test_a_lost_machine_is_in_the_log_and_not_the_runs_own_failure(slurm: Path, tmp_path: Path) -> None:
    (slurm / "1000.name").write_text("run_x-training")
    (slurm / "1000.ended").write_text("NODE_FAIL")
    assert not SlurmLauncher().is_alive(Job("slurm", "1000"), tmp_path)
    assert (tmp_path / "log.txt").read_text() == "Slurm ended job 1000: NODE_FAIL\n"
    assert not (tmp_path / "failure.json").exists()


def test_a_job_that_was_never_noted_is_found_by_its_name(slurm: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run_y"
    run_dir.mkdir()
    script = run_dir / "s.sbatch"
    directives = ["job-name=run_y-training", f"output={run_dir}/log.txt", f"chdir={run_dir}", "cpus-per-task=1"]
    ignore = "trap '' TERM; sleep 300 & wait; wait"  # SIGKILL must follow
    script.write_text("#!/bin/bash\n" + "".join(f"#SBATCH --{one}\n" for one in directives) + ignore)
    subprocess.run(["sbatch", "--parsable", str(script)], check=True, capture_output=True)
    wait_until("it runs", lambda: len(slurm_stand_in.processes_of("1000")) == 2)
    assert SlurmLauncher().end(None, run_dir) is None
    assert slurm_stand_in.processes_of("1000") == []


def test_what_could_not_be_seen_to_end_is_said(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launchers.slurm.GONE_S", 0.2)
    (slurm / "away").touch()
    assert SlurmLauncher().end(Job("slurm", "1000"), tmp_path) == (
        "Slurm did not say within 0 s that its job 1000 ended: look with squeue, end it with scancel."
    )


def test_the_script_of_several_machines(tmp_path: Path) -> None:
    launch = Launch("slurm", "fsdp2", num_processes=8, machines=2, device="gpu", bf16=True)
    script = batch_script(Work(tmp_path / "run_z", TRAINING, launch))
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=16", "--no-requeue"):
        assert f"#SBATCH {line}\n" in script
    assert 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in script
    assert '--machine_rank "$SLURM_NODEID" --main_process_ip "$head" -m trainer.job' in script
    assert '\nsrun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-4}" bash -c ' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    alone = batch_script(Work(tmp_path / "run_z", EVALUATION, launch))
    assert "#SBATCH --nodes=1\n" in alone
    assert "#SBATCH --gpus-per-node=1\n" in alone
    assert "srun" not in alone


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [("(null)", 0), ("gpu:4", 4), ("gpu:a100:4(S:0-1)", 4), ("gpu:a100:2,gpu:h100:8(S:0),shard:16", 10)],
)
def test_gpus_of_a_node(resources: str, gpus: int) -> None:
    assert gpus_of(resources) == gpus


def test_the_launcher_is_the_one_that_is_named() -> None:
    assert isinstance(launcher_for(Launch("slurm")), SlurmLauncher)
