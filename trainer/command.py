"""What starts a training: the accelerate configuration, the line and the environment, for a launcher or for a person.

A run's configuration is one file of `recipes/accelerate/`, chosen by device and strategy, with the run's own numbers
filled in; it is written to RUN_DIR/accelerate.yaml before the start. `show_command` gives the line that does by hand
what the launcher does: `accelerate launch --config_file RUN_DIR/accelerate.yaml … -m trainer.job RUN_DIR`.

Strategies: `single` (one process), `ddp` (gradients all-reduced), `fsdp2` and `zero3` (weights sharded too; GPUs only).
Where accelerate would quietly start something else – one process, or DDP instead of FSDP – the job refuses to go on.
Imports neither torch nor accelerate. The GPU configurations are read by accelerate in tests, but not run here.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import zlib
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import yaml

from feedback_store.bounded import load_yaml
from trainer.errors import BadRunRequest, TrainingUnavailable
from trainer.recipe import from_mapping
from trainer.runs import Run, RunConfig

CONFIGS = Path(__file__).parent / "recipes" / "accelerate"
CONFIG_FILE = "accelerate.yaml"
LAUNCHERS = ("local", "slurm", "ray")
SHARDED = ("fsdp2", "zero3")
STRATEGIES = ("ddp", *SHARDED)


@dataclass(frozen=True, slots=True)
class Launch:
    """How a run's children are started; kept in config.json under `launch`.

    `num_processes` is the total over all machines. `options`: what the launcher needs besides, sbatch options for
    `slurm` and the cluster's URL for `ray`.
    """

    launcher: str = "local"
    strategy: str = "single"
    num_processes: int = 1
    machines: int = 1
    device: str = "cpu"
    bf16: bool = False
    options: str = ""

    @classmethod
    def of(cls, config: RunConfig) -> Launch:
        """How the run of `config` is started. Runs of before there was a choice were local."""
        kept: dict[str, Any] = {**config.launch}
        if kept.get("strategy", "single") == "single" and config.num_processes > 1:
            kept["strategy"] = "ddp"
        recipe = from_mapping(config.recipe_name, config.recipe)
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and config.device == "gpu")
        return cls(**kept, num_processes=config.num_processes, device=config.device, bf16=bf16)

    def kept(self) -> dict[str, Any]:
        """What config.json holds under `launch`; the rest stands elsewhere in it.

        "local" does not stand there: it is also a rater's name, which an erasure would look for and mend.
        """
        return {
            **({} if self.launcher == "local" else {"launcher": self.launcher}),
            "strategy": self.strategy,
            "machines": self.machines,
            "options": self.options,
        }

    @property
    def processes_per_machine(self) -> int:
        return self.num_processes // self.machines


LOCAL = Launch()


def choose_launch(
    launcher: str,
    strategy: str | None,
    machines: int | None,
    *,
    num_processes: int,
    device: str,
    options: str = "",
) -> Launch:
    """A way to start that can work. Raises BadRunRequest, and TrainingUnavailable where a package is missing."""
    machines = machines or 1
    strategy = strategy or ("single" if num_processes == 1 else "ddp")
    if launcher not in LAUNCHERS:
        raise BadRunRequest(f"launcher is {launcher!r}, it must be one of {', '.join(LAUNCHERS)}.")
    if strategy not in ("single", *STRATEGIES):
        raise BadRunRequest(f"strategy is {strategy!r}, it must be one of {', '.join(STRATEGIES)}.")
    if machines > num_processes or num_processes % machines:
        raise BadRunRequest(
            f"{num_processes} processes cannot be spread evenly over {machines} machines. num_processes is the total: "
            f"ask for a multiple of {machines}."
        )
    if strategy in SHARDED:
        if device == "cpu":
            raise BadRunRequest(
                f"strategy {strategy} shards a model over GPUs, and there is none. Use ddp, or leave it out."
            )
        if num_processes == 1:
            raise BadRunRequest(
                f"strategy {strategy} with 1 process: there is nothing to shard over. Ask for 2 or more."
            )
    if strategy == "zero3" and util.find_spec("deepspeed") is None:
        raise TrainingUnavailable(
            "strategy zero3 needs the package deepspeed, which is not installed. "
            "Install it with `pip install deepspeed`, or use fsdp2, which needs nothing more."
        )
    if strategy == "ddp" and num_processes == 1:
        strategy = "single"
    return Launch(launcher, strategy, num_processes, machines, device, options=options)


def accelerate_config(launch: Launch, name: str) -> dict[str, Any]:
    """The accelerate configuration of a run called `name`, whose hash is its port where there are several machines."""
    values = _read(f"{launch.device}_{launch.strategy}")
    if launch.machines > 1:
        port = 20_000 + zlib.crc32(name.encode()) % 10_000
        values |= _read("machines") | {"main_process_ip": socket.gethostname(), "main_process_port": port}
    return values | {
        "num_processes": launch.num_processes,
        "num_machines": launch.machines,
        "mixed_precision": "bf16" if launch.bf16 else "no",
    }


def write_accelerate_config(run_dir: Path, launch: Launch) -> Path:
    """Write RUN_DIR/accelerate.yaml; its path."""
    path = run_dir.absolute() / CONFIG_FILE
    path.write_text(_as_yaml(accelerate_config(launch, run_dir.name)), encoding="utf-8")
    return path


def training_arguments(run_dir: Path, threads: int | str, *more: str) -> list[str]:
    """What follows `accelerate launch`; `more` are options of one machine."""
    run_dir = run_dir.absolute()
    options = ["--config_file", str(run_dir / CONFIG_FILE), "--num_cpu_threads_per_process", str(threads), *more]
    return [*options, "-m", "trainer.job", str(run_dir)]


def child_environment(threads: int | str) -> dict[str, str]:
    """What a child's environment has beside its parent's: this package importable, one thread count, no calls home."""
    root = str(Path(__file__).parent.parent)
    paths = [root, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", root))]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def accelerate_launch() -> list[str]:
    """`accelerate launch` of this environment."""
    script = Path(sys.executable).parent / "accelerate"
    return [str(script), "launch"] if script.is_file() else [sys.executable, "-m", "accelerate.commands.launch"]


def show_command(run: Run, threads: int, submission: str | None) -> dict[str, Any]:
    """How to do by hand what the launcher does for `run`: lines (one a machine, folded), configuration, recipe.

    `submission` is what Slurm or Ray is given, where the run is theirs.
    """
    launch = Launch.of(run.config)
    environment = [f"{name}={value}" for name, value in child_environment(threads).items()]
    lines = []
    for rank in range(launch.machines):
        more = ["--machine_rank", str(rank)] if launch.machines > 1 else []
        arguments = training_arguments(run.directory, threads, *more)
        parts = (["env", *environment], accelerate_launch(), arguments)
        lines.append(" \\\n  ".join(map(shlex.join, parts)))
    return {
        "directory": str(run.directory),
        "launcher": launch.launcher,
        "strategy": launch.strategy,
        "lines": lines,
        "submission": submission,
        "accelerate": _as_yaml(accelerate_config(launch, run.directory.name)),
        "recipe": _as_yaml(run.config.recipe),
    }


def _read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = load_yaml(CONFIGS / f"{name}.yaml")
    return values


def _as_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
