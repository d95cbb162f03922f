"""The builder of the embedded engine, with a spare child ready, so that the next version starts sooner.

Where it sits: between `chat_app/engines.py` and `llama_engine.py`. A little after an engine was built, one more child
(`llama_process.py`) is started: Python and the native library are loaded, and it waits for its configuration on stdin.
The next engine takes it; where there is none, or it died, a child is started as before. The spare lasts as long as an
engine of this builder does, and like every child it ends with its parent, kill -9 included.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

from chat_app.serving import llama_engine
from chat_app.serving.engine import ServedVersion
from chat_app.serving.llama_engine import LlamaEngine, build_llama_engine

SPARE_AFTER_S = 2.0  # so that it takes no time from the first answers of the new engine


class LlamaEngines:
    """Builds engines of versions; all calls belong to one event loop."""

    def __init__(self, log_dir: Path, *, spare_after_s: float = SPARE_AFTER_S) -> None:
        self._log_dir = log_dir
        self._spare_after_s = spare_after_s
        self._spare: subprocess.Popen[bytes] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._open = 0

    @property
    def spare_pid(self) -> int | None:
        """The process id of the spare child, where there is one."""
        return None if self._spare is None else self._spare.pid

    async def build(self, served: ServedVersion) -> LlamaEngine:
        """Start an engine. Raises like `build_llama_engine`."""
        try:
            engine = await build_llama_engine(served, log_dir=self._log_dir, spawn=self._take, on_close=self._closed)
            self._open += 1
        finally:
            if self._open and self._later is None:
                self._later = asyncio.get_running_loop().call_later(self._spare_after_s, self._ensure_spare)
        return engine

    def _take(self, log_path: Path) -> subprocess.Popen[bytes]:
        """The spare child where it lives, else a new one."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.poll() is None:
            return spare
        if spare is not None:
            llama_engine.stop_process(spare)
        return llama_engine._spawn(log_path)

    def _ensure_spare(self) -> None:
        self._later = None
        if self._spare is None:
            self._spare = llama_engine._spawn(None)

    def _closed(self) -> None:
        """An engine was closed; the last one takes the spare with it."""
        self._open -= 1
        if self._open:
            return
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._spare is not None:
            llama_engine.stop_process(self._spare)
            self._spare = None
