"""ON THE CLUSTER: a Ray job that holds one worker per process and runs a run's child in them.

    python -m trainer.launchers.ray_workers RUN_DIR training --workers 2 --threads 1 [--gpus]

Started by `ray.py`; by hand inside a cluster. Each worker is an actor with one GPU (or its CPUs) in a placement group,
so either all of them get a place or none does. In a worker the environment is what `accelerate launch` would set from
RUN_DIR/accelerate.yaml, with rank, world size and the first worker's address; then the child's own `main` runs in it.
No further process is started: when a worker is ended, nothing is left. What it prints goes to RUN_DIR/log.txt.

Tried with two CPU workers; the GPU side (each worker sees its one GPU as device 0) is not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from feedback_store.private_files import new_files_private
from trainer.command import training_arguments
from trainer.launchers import TRAINING

MODULES = {"training": "trainer.job", "evaluation": "trainer.evaluate"}
LOOK_EVERY_S = 1.0


class Worker:
    """One process of the child. An actor: Ray starts and ends its process."""

    def __init__(self, run_dir: str) -> None:
        new_files_private()
        _print_to(Path(run_dir) / "log.txt")

    def address(self) -> tuple[str, int]:
        """Where the others find this worker, should it be the first: its address and a free port."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, run_dir: str, stage: str, environment: dict[str, str]) -> int:
        """Run the child to its end. 0: it did what it had to; what went wrong is in the log."""
        os.environ.update(environment)
        if stage == TRAINING:
            os.environ.update(accelerate_environment(Path(run_dir)))
            os.environ.update(environment)  # the rank is ours to say
        module = MODULES[stage]
        sys.argv = [module, run_dir]
        try:
            importlib.import_module(module).main()
        except SystemExit as end:
            if end.code:
                print(end.code, flush=True)
            return int(bool(end.code))
        except BaseException:  # noqa: BLE001 - an edge: the log is where the run's error is read from
            traceback.print_exc()
            return 1
        return 0


def main() -> None:
    """Get the workers, run them, and end them all as soon as one fails."""
    new_files_private()
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    asked = _arguments()
    run_dir = asked.run_dir.absolute()
    _print_to(run_dir / "log.txt")
    print(f"\n$ python {' '.join(sys.orig_argv[1:])}", flush=True)
    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    bundle = {"CPU": asked.threads, **({"GPU": 1} if asked.gpus else {})}
    group = placement_group([bundle] * asked.workers)
    while not group.wait(LOOK_EVERY_S):
        pass  # the cluster is full: this job waits for its turn
    place = PlacementGroupSchedulingStrategy(group)
    actor = ray.remote(num_cpus=asked.threads, num_gpus=int(asked.gpus), scheduling_strategy=place, max_restarts=0)(
        Worker
    )
    workers = [actor.remote(str(run_dir)) for _ in range(asked.workers)]
    try:
        address, port = ray.get(workers[0].address.remote())
        left = [
            worker.run.remote(str(run_dir), asked.stage, ranks(rank, asked.workers, address, port))
            for rank, worker in enumerate(workers)
        ]
        while left:
            done, left = ray.wait(left, timeout=LOOK_EVERY_S)
            if any(ray.get(done)):
                raise SystemExit(1)
    except RayError as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        raise SystemExit(1) from None
    finally:
        for worker in workers:
            ray.kill(worker)


def ranks(rank: int, world: int, address: str, port: int) -> dict[str, str]:
    """torch.distributed's variables of one worker; a single one has none. Each is a machine of its own to torch."""
    if world == 1:
        return {}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def accelerate_environment(run_dir: Path) -> dict[str, str]:
    """What `accelerate launch` sets for its processes from RUN_DIR/accelerate.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    arguments = training_arguments(run_dir, os.environ.get("OMP_NUM_THREADS", "1"))
    options, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment: Any
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
        environment = prepare_deepspeed_cmd_env(options)[1]
    elif options.use_fsdp or options.multi_gpu:
        environment = prepare_multi_gpu_env(options)
    else:
        environment = prepare_simple_launcher_cmd_env(options)[1]
    return dict(environment)


def _print_to(log: Path) -> None:
    """Send this process's output, also that of C++ code, to the run's log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for output in (1, 2):
        os.dup2(file, output)
    os.close(file)
    # Ray puts writers of its own in the place of these.
    sys.stdout, sys.stderr = (os.fdopen(os.dup(1), "w", buffering=1, errors="replace") for _ in range(2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("stage", choices=sorted(MODULES))
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpus", action="store_true", help="one GPU for each worker")
    return parser.parse_args()


if __name__ == "__main__":
    main()
