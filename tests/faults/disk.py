"""The failing disk of ``disk.c``: how a child is started on it, and how that child steers it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("disk.c")
WRITES, SYNCS = 1, 2
CAN_COMPILE = shutil.which("cc") is not None and sys.platform == "linux"


def compiled(folder: Path) -> Path:
    """The library, made by the system's C compiler."""
    library = folder / "disk.so"
    if not library.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def start(*arguments: object, library: Path | None = None, below: Path | None = None) -> subprocess.Popen[str]:
    """Start ``faults.child`` with these arguments; with a library on a disk that can fail below a directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    if library is not None:
        environment |= {"LD_PRELOAD": str(library), "FAULT_DIR": str(below)}
    return subprocess.Popen(
        [sys.executable, "-m", "faults.child", *map(str, arguments)],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steering() -> Any:
    """In a child: the functions of ``disk.c``."""
    functions = ctypes.CDLL(None)
    functions.faults_kill_at.argtypes = [ctypes.c_long, ctypes.c_int]
    functions.faults_steps.restype = ctypes.c_long
    return functions
