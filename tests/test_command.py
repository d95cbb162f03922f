"""What is started: accelerate reads every configuration as it is meant, and the line that is shown runs when pasted."""

import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_supervisor import Place

from feedback_store.durable import write_json
from trainer.command import Launch, accelerate_config, choose_launch, write_accelerate_config
from trainer.errors import BadRunRequest, TrainingUnavailable
from trainer.launch import kill_tree
from trainer.runs import Run
from trainer.supervisor import Supervisor

PASTED_TIMEOUT_S = 200


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    return Place(tmp_path / "data").supervisor()


def read_by_accelerate(directory: Path, launch: Launch) -> tuple[Any, dict[str, str]]:
    """The options and the environment that `accelerate launch` makes of a configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", str(write_accelerate_config(directory, launch)), "-m", "trainer.job"]
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return options, prepare_multi_gpu_env(options) if options.multi_gpu or options.use_fsdp else {}


@pytest.mark.parametrize(
    ("launch", "started"),
    [
        (Launch(), {"multi_gpu": False, "use_cpu": True, "num_processes": 1}),
        (Launch(strategy="ddp", num_processes=2), {"multi_gpu": True, "use_cpu": True, "nproc_per_node": "2"}),
        (Launch(device="gpu", bf16=True), {"multi_gpu": False, "use_cpu": False, "mixed_precision": "bf16"}),
        (
            Launch(strategy="ddp", num_processes=8, device="gpu"),
            {"multi_gpu": True, "use_fsdp": False, "use_cpu": False, "mixed_precision": "no", "nproc_per_node": "8"},
        ),
        (
            Launch(strategy="fsdp2", num_processes=4, device="gpu", bf16=True),
            {"use_fsdp": True, "multi_gpu": False, "use_cpu": False, "nproc_per_node": "4"},
        ),
        (
            Launch(strategy="zero3", num_processes=4, device="gpu", bf16=True),
            {"use_deepspeed": True, "zero_stage": 3, "zero3_init_flag": True, "num_processes": 4},
        ),
        (
            Launch(strategy="fsdp2", num_processes=16, machines=2, device="gpu", bf16=True),
            {"use_fsdp": True, "num_processes": 16, "nproc_per_node": "8", "nnodes": "2", "node_rank": 0},
        ),
    ],
    ids=lambda value: f"{value.device}-{value.strategy}-{value.machines}" if isinstance(value, Launch) else "",
)
def test_accelerate_reads_a_configuration_as_it_is_meant(
    tmp_path: Path, launch: Launch, started: dict[str, Any]
) -> None:
    options, environment = read_by_accelerate(tmp_path, launch)
    assert {key: getattr(options, key) for key in started} == started
    if launch.strategy == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"launcher": "kubernetes"}, BadRunRequest, "launcher is 'kubernetes', it must be one of local, slurm, ray"),
        ({"strategy": "fsdp"}, BadRunRequest, "strategy is 'fsdp', it must be one of ddp, fsdp2, zero3"),
        ({"strategy": "fsdp2", "device": "cpu"}, BadRunRequest, "fsdp2 shards a model over GPUs, and there is none"),
        ({"strategy": "fsdp2", "num_processes": 1}, BadRunRequest, "1 process: there is nothing to shard"),
        ({"strategy": "zero3"}, TrainingUnavailable, "zero3 needs the package deepspeed"),
        ({"machines": 3}, BadRunRequest, "4 processes cannot be spread evenly over 3 machines"),
        ({"machines": 8}, BadRunRequest, "4 processes cannot be spread evenly over 8 machines"),
    ],
)
def test_a_way_that_cannot_work_is_refused(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    way = {"launcher": "local", "strategy": None, "machines": None, "num_processes": 4, "device": "gpu", **asked}
    with pytest.raises(error, match=said):
        choose_launch(way.pop("launcher"), way.pop("strategy"), way.pop("machines"), **way)


@pytest.mark.parametrize(
    ("strategy", "num_processes", "chosen"), [(None, 1, "single"), (None, 2, "ddp"), ("ddp", 1, "single")]
)
def test_without_a_wish_the_number_of_processes_decides(strategy: str | None, num_processes: int, chosen: str) -> None:
    assert choose_launch("local", strategy, None, num_processes=num_processes, device="cpu").strategy == chosen


def test_every_run_has_a_port_of_its_own_on_several_machines() -> None:
    launch = Launch(strategy="ddp", num_processes=2, machines=2)
    one, other = (accelerate_config(launch, name) for name in ("run_1", "run_2"))
    assert one == accelerate_config(launch, "run_1")
    assert 20_000 <= one["main_process_port"] < 30_000 != other["main_process_port"]
    assert one["main_process_port"] != other["main_process_port"]


def paste(command: dict[str, Any], tmp_path: Path) -> list[str]:
    """What the lines print, each pasted into a shell that knows nothing, all at the same time."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    printed = [tmp_path / f"shell_{number}.txt" for number in range(len(command["lines"]))]
    shells = []
    for line, path in zip(command["lines"], printed, strict=True):
        with path.open("wb") as file:  # not a pipe: what both said is there where they take too long
            shells.append(
                subprocess.Popen(
                    ["/bin/sh", "-c", line], cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            )
    deadline = time.monotonic() + PASTED_TIMEOUT_S
    try:
        while any(shell.poll() is None for shell in shells):
            assert time.monotonic() < deadline, "\n".join(path.read_text() for path in printed)
            time.sleep(0.1)
    finally:
        kill_tree(None, None, Path(command["directory"]))
        for shell in shells:
            shell.wait()
    return [path.read_text() for path in printed]


@pytest.mark.parametrize(("machines", "lines"), [(1, 1), (2, 2)])
def test_the_line_that_is_shown_runs_when_pasted(
    supervisor: Supervisor, tmp_path: Path, machines: int, lines: int
) -> None:
    """Two processes: on one machine, and on two, both of them this one."""
    command = supervisor.prepare_by_hand(max_steps=1, num_processes=2, machines=machines)
    run = Run(Path(command["directory"]))
    assert supervisor.runs() == []
    assert len(command["lines"]) == lines
    assert (run.directory / "accelerate.yaml").read_text() == command["accelerate"]
    assert yaml.safe_load(command["recipe"]) == run.config.recipe
    assert command["submission"] is None
    printed = paste(command, tmp_path)
    assert run.training is not None, printed
    assert run.training["steps"] == 1
    if machines == 1:  # a second time: what is there stays
        again = subprocess.run(
            [sys.executable, "-m", "trainer.job", str(run.directory)], check=False, capture_output=True, text=True
        )
        assert again.returncode == 0, again.stderr
        assert "holds a finished training" in again.stdout
        assert len(run.metrics()) == 1
        assert run.failure is None


def test_a_configuration_that_accelerate_makes_something_else_of_is_refused(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    """FSDP on CPUs: accelerate starts two processes with DDP, and says nothing."""
    command = supervisor.prepare_by_hand(max_steps=1, num_processes=2)
    run = Run(Path(command["directory"]))
    path = run.directory / "accelerate.yaml"
    sharded = accelerate_config(Launch(strategy="fsdp2", num_processes=2, device="gpu"), "x")
    path.write_text(yaml.safe_dump(sharded | {"use_cpu": True}))
    write_json(run.directory / "config.json", {**asdict(run.config), "launch": {"strategy": "fsdp2"}})
    printed = paste(command, tmp_path)
    assert run.training is None, printed
    assert run.failure is not None, printed
    assert run.failure.startswith("The strategy fsdp2 was asked for (accelerate's FSDP), accelerate started MULTI_CPU.")


def test_a_run_from_before_there_was_a_choice_was_local(supervisor: Supervisor) -> None:
    run = Run(Path(supervisor.prepare_by_hand(num_processes=2)["directory"]))
    config = asdict(run.config)
    del config["launch"]
    write_json(run.directory / "config.json", config)
    assert Launch.of(run.config) == Launch("local", "ddp", num_processes=2)


def test_the_settings_strategy_is_for_several_processes(tmp_path: Path) -> None:
    place = Place(tmp_path / "data")
    sharding = Supervisor(place.directory, place.supervisor().base, place.freeze, lambda: "v0", strategy="fsdp2")
    assert sharding.prepare_by_hand(num_processes=1)["strategy"] == "single"
    with pytest.raises(BadRunRequest, match="fsdp2 shards a model over GPUs"):
        sharding.prepare_by_hand(num_processes=2)


def test_the_local_launcher_refuses_several_machines_and_says_what_to_do(supervisor: Supervisor) -> None:
    with pytest.raises(BadRunRequest, match=r"this machine only, not on 2.*--show-command"):
        supervisor.start_run(num_processes=2, machines=2)
    assert supervisor.runs() == []
