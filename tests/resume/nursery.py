"""A process that has imported what a training needs, and forks one for each line it is given: a start in a second.

    python -m resume.nursery      {"run": directory, "place", "torn", "memory", "group"} → {"pid"} → {"status", "steps"}

The fork is the training child itself, `trainer.job`, from its first line on. Under the library of ``faults/disk.c`` it
kills itself before its `place`-th change of a file in the run directory (0: never), torn as that library says.
`memory` is how many bytes more than now it may map, `group` a control group for it.
"""

import json
import os
import resource
import sys
from pathlib import Path

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401
import trl  # noqa: F401
from faults import disk

from trainer import job


def main() -> None:
    ended_before: list[int] = []
    for line in sys.stdin:
        while ended_before:
            os.waitpid(ended_before.pop(), 0)
        asked = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _confine(asked.get("memory"))
            _train(Path(asked["run"]), asked.get("place", 0), asked.get("torn", 0), writing)
        os.close(writing)
        if asked.get("group") is not None:
            Path(asked["group"], "cgroup.procs").write_text(str(pid))
        _say({"pid": pid})
        with os.fdopen(reading) as steps:
            said = steps.read()
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # who kills it must not meet another of this id
        assert ended is not None
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        _say({"status": status, "steps": int(said or 0)})
        ended_before.append(pid)


def _confine(memory: int | None) -> None:
    if memory is not None:
        most = _mapped("VmSize") + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _mapped(name: str) -> int:
    """Bytes, from /proc: VmSize is what is mapped now, VmPeak the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _train(run: Path, place: int, torn: int, writing: int) -> None:
    log = os.open(run / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["job", str(run)]
    before = _mapped("VmSize")
    steering = disk.steering() if "FAULT_DIR" in os.environ else None
    if steering is not None:
        os.environ["FAULT_DIR"] = str(run)
        steering.faults_kill_at(place, torn)
    try:
        job.main()
    except BaseException as error:  # noqa: BLE001 - a fork must not go on in the code of its parent
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    print(f"mapped {_mapped('VmPeak') - before} bytes more at most", flush=True)
    os.write(writing, str(steering.faults_steps() if steering is not None else 0).encode())
    os._exit(0)


def _say(answer: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
