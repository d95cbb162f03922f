"""One base model in this process: its weights, its tokenizer, and the one thread that does every forward.

All versions on the base share it (`transformers_engine.py` holds a handle for each); their adapters are put in place
and taken away by that same thread, between two steps of the batch, so that no forward sees half an adapter.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError

from chat_app.serving.base_loading import LoadedBase, load_base
from chat_app.serving.batch import Batch, Request
from chat_app.serving.engine import BadMessages, EngineBroken, NoRoom
from chat_app.serving.side_by_side import AdaptersSideBySide, read_adapter
from chat_app.serving.upstream_errors import said
from feedback_store.control_text import tokenizer_markers
from feedback_store.records import Message

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PIECE_TOKENS = {"cpu": 128, "cuda": 512}  # how much of a prompt is read between two tokens of everybody else
STOP_LIMIT_S = 60.0
FAILURES_LIMIT = 2  # forwards that fail one after the other: the model will not recover


class ModelHost:
    """A base that is loaded and works. Its methods block; any thread may call them but the worker.

    `threads` None: on a CPU, one core is left to everything else, as by the embedded engine. Raises EngineStartFailed.
    """

    def __init__(self, base_model: str, *, precision: str = "auto", threads: int | None = None) -> None:
        base = load_base(base_model, precision)
        self.name = base_model
        self.context_tokens = base.context_tokens
        self._model: Any = base.model
        self._encoder, self._decoder = base.tokenizer, copy.deepcopy(base.tokenizer)  # one for each thread
        self._encoding = threading.Lock()
        self._markers: frozenset[str] | None = None
        self._adapters = AdaptersSideBySide(base.model)
        self.batch = _batch(base, self._adapters)
        self._names = 0
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) - 1)
        self._inbox: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._door = threading.Lock()  # held to send into the inbox, and to shut it
        self._is_open = True
        self._worker = threading.Thread(target=self._work, name=f"model {base_model}", daemon=True)
        self._worker.start()

    @property
    def is_alive(self) -> bool:
        """False once it was closed, or its model has failed for good."""
        return self._is_open

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt that these messages make, by the chat template. Raises BadMessages."""
        conversation = [dict(message) for message in messages]
        try:
            with self._encoding:
                encoded = self._encoder.apply_chat_template(
                    conversation, add_generation_prompt=True, tokenize=True, return_dict=True
                )
        except (TemplateError, TypeError, ValueError, LookupError) as error:  # a template fails as it likes
            raise BadMessages(self.name, said({"message": error}), [one["role"] for one in messages]) from error
        return tuple(encoded["input_ids"])

    def control_markers(self) -> frozenset[str]:
        """What must not stand in a message as it is."""
        with self._encoding:
            if self._markers is None:
                self._markers = tokenizer_markers(self._encoder)
            return self._markers

    def decode(self, tokens: list[int]) -> str:
        """The text of these tokens, for the worker."""
        return str(self._decoder.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def submit(self, request: Request) -> None:
        """Let a request be written; `request.emit` hears of it. Raises EngineBroken."""

        def break_it(sent: Future[None]) -> None:
            if sent.exception() is not None:
                request.emit(EngineBroken(str(sent.exception())))

        self._send(lambda: self.batch.add(request)).add_done_callback(break_it)

    def add_adapter(self, directory: Path, version: str) -> str:
        """Put an adapter in place beside the others; returns the name it has here. Raises EngineError."""
        adapter = read_adapter(directory, version, self._model)

        def add() -> str:
            self._names += 1
            name = f"{version}#{self._names}"
            self._adapters.add(name, adapter)
            self.batch.adapters_changed()
            return name

        try:
            return self._send(add).result()
        except (RuntimeError, MemoryError) as error:
            raise NoRoom(f"there is not enough memory for the adapter of {version}: {error}") from error

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away; the requests that use it must have been left. Raises EngineBroken."""

        def remove() -> None:
            self.batch.let_go()
            self._adapters.remove(name)
            self.batch.adapters_changed()

        self._send(remove).result()

    def close(self) -> None:
        """Break what is still written, stop the worker and free the memory."""
        self._shut()
        self._worker.join(STOP_LIMIT_S)
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _send(self, work: Callable[[], Result]) -> Future[Result]:
        """Have the worker do something between two steps. Raises EngineBroken."""
        future: Future[Result] = Future()
        with self._door:
            if not self._is_open:
                raise EngineBroken(f"the model {self.name} is not running any more")
            self._inbox.put((future, work))
        return future

    def _work(self) -> None:
        """The worker: obey, step, again."""
        reason = "the engine was closed"
        try:
            if self._model.device.type == "cpu":
                torch.set_num_threads(self._threads)
            with torch.inference_mode():
                while self._is_open and self.batch.failures < FAILURES_LIMIT:
                    self._obey()
                    if not self.batch.is_idle:
                        self.batch.step()
            if self._is_open:
                reason = f"the model {self.name} failed {FAILURES_LIMIT} times one after the other"
        except BaseException as error:
            log.exception("The worker of %s stopped.", self.name)
            reason = f"the worker of {self.name} stopped: {error!r}"
        self._end(reason)

    def _obey(self) -> None:
        """Do what was sent; wait for something where there is nothing to write."""
        while self.batch.is_idle or not self._inbox.empty():
            future, work = self._inbox.get()
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
                future.set_exception(error)
            if not self._is_open:
                return

    def _shut(self) -> None:
        """Take nothing in any more, and wake the worker to see it."""
        with self._door:
            if self._is_open:
                self._is_open = False
                self._inbox.put((Future(), lambda: None))

    def _end(self, reason: str) -> None:
        """Nobody may wait for an answer that never comes."""
        with self._door:
            self._is_open = False
        for request in self.batch.requests():
            request.emit(EngineBroken(f"{reason}: the answer is not complete"))
        while not self._inbox.empty():
            self._inbox.get()[0].set_exception(EngineBroken(reason))
        self.batch.close()


def _batch(base: LoadedBase, adapters: AdaptersSideBySide) -> Batch:
    return Batch(
        base.model,
        adapters,
        base.ends,
        cache_tokens=base.cache_tokens,
        piece_tokens=PIECE_TOKENS[base.model.device.type],
    )
