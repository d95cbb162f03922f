"""Room on the disk for a run: asked before it starts, and said in numbers when it was not enough after all.

Needed are the checkpoints (those kept and the one being written), the adapter or whole model in its forms, in the run
and in the version, what lies between two stages, and the base's Hugging Face directory where it is still to be made.
Parameters are counted from the headers of the base's files. Not covered: a model of the hub that is not here yet; what
other programs write meanwhile.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from trainer.base_model import BaseModel, base_directory
from trainer.checkpoints import KEPT, discard_unfinished
from trainer.errors import DiskFull, NotEnoughDisk
from trainer.recipe import Recipe

SLACK = 64 * 2**20  # logs, metrics, trainer state, the report
FULL = 2 * 2**20  # less than this is a full disk
_FLOAT = 4
_ADAM = 2  # moments, each as large as what is trained
_FORMS = 4  # PEFT and GGUF, in the run and in the version
_NOT_ADAPTED = re.compile(r"embed|embd|lm_head|^output\.weight")
_SAID = ("No space left on device", "PytorchStreamWriter failed writing file", "Disk quota exceeded")


def check_disk(data_dir: Path, base: BaseModel, recipe: Recipe) -> None:
    """Raises NotEnoughDisk when what the run will write is more than the free space.

    Takes milliseconds, seconds where the base is still a GGUF file only."""
    needed = bytes_needed(base, data_dir / "models", recipe)
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise NotEnoughDisk(
            f"This run needs about {_mib(needed)} on the disk for checkpoints and adapter, {_mib(free)} are free below "
            f"{data_dir}. Free {_mib(needed - free)} (checkpoints of runs that failed lie in runs/*/checkpoints), or "
            "set ZLOOP_DATA_DIR to a larger disk."
        )


def bytes_needed(base: BaseModel, models_dir: Path, recipe: Recipe) -> int:
    """What a run writes at most, as far as the base's files tell."""
    directory = base_directory(base, models_dir)
    converted = sorted(directory.glob("*.safetensors"))
    if converted:
        shapes = dict(_safetensors_shapes(converted))
    elif base.gguf is not None:
        shapes = _gguf_shapes(base.gguf, base.gguf.stat().st_mtime_ns)
    else:
        return SLACK
    whole = sum(math.prod(shape) for shape in shapes.values())
    adapter = recipe.lora_rank * sum(
        sum(shape) for name, shape in shapes.items() if len(shape) == 2 and not _NOT_ADAPTED.search(name)
    )
    trained, stages = whole if recipe.is_full else adapter, len(recipe.stages())
    checkpoints = stages * (KEPT + 1) * (1 + _ADAM) * trained
    between = whole if stages > 1 and not recipe.is_full else 0  # the base with the first adapter merged
    conversion = 0 if converted else whole
    return SLACK + _FLOAT * (checkpoints + _FORMS * trained + between + conversion)


def is_disk_full(error: BaseException) -> bool:
    """Whether this is one of the ways to be told that the disk is full."""
    told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return told or any(said in str(error) for said in _SAID)


def disk_full(run_directory: Path, step: int) -> DiskFull:
    """The sentence, `step` steps done. What was written of an unfinished checkpoint goes first: it holds the room."""
    free = shutil.disk_usage(run_directory).free
    discard_unfinished(run_directory)
    return DiskFull(
        f"The disk was full after step {step}: {_mib(free)} were free below {run_directory}. "
        "Make room, then resume the run: it goes on from its last checkpoint."
    )


def full_disk(run_directory: Path) -> str | None:
    """The sentence for a child that could not even say why it ended; None where there is room."""
    free = shutil.disk_usage(run_directory).free
    if free >= FULL:
        return None
    return f"the disk is full, {_mib(free)} are free below {run_directory}. Make room, then resume the run."


def _safetensors_shapes(paths: list[Path]) -> Iterator[tuple[str, list[int]]]:
    """Eight bytes of length, then a JSON header."""
    for path in paths:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, entry["shape"]


@lru_cache(maxsize=4)
def _gguf_shapes(path: Path, _written_at: int) -> dict[str, list[int]]:
    """Read once: the reader goes through the whole vocabulary, for seconds in which no other thread gets a word in."""
    from gguf import GGUFReader

    return {tensor.name: [int(size) for size in tensor.shape] for tensor in GGUFReader(path).tensors}


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
