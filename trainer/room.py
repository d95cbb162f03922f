"""How much memory there is to train in: of the machine, or of its GPUs. Asked before a run starts.

GPUs are asked through `nvidia-smi`, which comes with the driver; nothing is imported. Other makers' GPUs are not read.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from feedback_store.clean_environment import clean_environment

ASKING_S = 10.0
MIB = 2**20
_QUERY = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free and that there are; `what`: memory, or GPU memory."""

    free_bytes: int
    total_bytes: int
    what: str = "memory"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


RoomOf = Callable[[str], Room | None]
"""The room on a device, cpu or gpu; None where nothing can be read."""


def machine_room(device: str) -> Room | None:
    """What the system says."""
    if device == "gpu":
        return gpu_room()
    memory = psutil.virtual_memory()
    return Room(int(memory.available), int(memory.total))


def gpu_room() -> Room | None:
    """The GPU with the least free memory: every process of a run needs as much. None where nvidia-smi cannot say."""
    try:
        done = subprocess.run(
            _QUERY, capture_output=True, text=True, timeout=ASKING_S, check=True, env=clean_environment()
        )
        said = done.stdout
        gpus = [tuple(int(number) * MIB for number in line.split(",")) for line in said.splitlines() if line.strip()]
        free, total = min(gpus)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return Room(free, total, "GPU memory")
