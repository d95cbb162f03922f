"""The decode loop: requests come, their prompts are read piece by piece, and one forward writes a token of each row.

`step` is the whole idea: let go of who left, let in who waits, read one piece of one prompt, write one token of every
row. So a new request's first token waits for one step of the others, not for their ends, and the others wait for one
piece of its prompt, not for all of it. Requests with the same prompt and version read it once (a pair does).

Knows no thread and no event loop: `model_host.py` calls `step` from its one worker. An answer does not depend on what
else is in the batch, but for the rounding of batched products: greedy text and seeded draws may part where two tokens
are as good as equally likely.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from chat_app.serving.answer_text import AnswerText
from chat_app.serving.engine import Chunk, Crowded, EngineBroken, EngineError, Sampling, Usage
from chat_app.serving.kv_slab import KVSlab, cells
from chat_app.serving.sampler import draw
from chat_app.serving.side_by_side import AdaptersSideBySide

log = logging.getLogger(__name__)

MAX_ROWS = 32


@dataclass(eq=False, slots=True)
class Request:
    """One answer to write: `limit` tokens at most. `emit` is told every piece, the end, or what went wrong."""

    prompt: tuple[int, ...]
    adapter: str | None
    sampling: Sampling
    limit: int
    text: AnswerText
    dice: random.Random
    emit: Callable[[Chunk | EngineError], None]
    written: int = 0
    is_left: bool = False  # set from anywhere, once nobody listens any more

    @property
    def tokens(self) -> int:
        """The most tokens it can come to, prompt and answer."""
        return len(self.prompt) + self.limit


@dataclass(eq=False, slots=True)
class Prompt:
    """A prompt being read, and who waits for it. Once read, `logits` are those of its first new token."""

    tokens: tuple[int, ...]
    adapter: str | None
    requests: list[Request]
    cache: DynamicCache = field(default_factory=DynamicCache)
    read: int = 0
    logits: torch.Tensor | None = None


@dataclass(eq=False, slots=True)
class Row:
    """An answer being written: its place in the slab is its place in `Batch._rows`."""

    request: Request
    prompt: Prompt
    last: int  # the token that the next forward reads
    length: int  # tokens in the slab


class Batch:
    """The rows of one model. `cache_tokens`: room for keys and values; `piece_tokens`: how much of a prompt at once."""

    def __init__(
        self,
        model: Any,
        adapters: AdaptersSideBySide,
        ends: frozenset[int],
        *,
        cache_tokens: int,
        piece_tokens: int,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._ends = ends
        self._cache_tokens = cache_tokens
        self._piece_tokens = piece_tokens
        self._waiting: deque[Request] = deque()
        self._reading: deque[Prompt] = deque()
        self._rows: list[Row] = []
        self._slab = KVSlab()
        self._routed: list[str | None] = []
        self.failures = 0  # forwards that failed, one after the other
        self.tokens_read = 0

    @property
    def is_idle(self) -> bool:
        """True where there is nothing to do."""
        return not (self._waiting or self._reading or self._rows)

    @property
    def rows(self) -> int:
        """How many answers are being written."""
        return len(self._rows)

    def add(self, request: Request) -> None:
        """Let a request wait for its place."""
        self._waiting.append(request)

    def requests(self) -> list[Request]:
        """Everybody who waits, whose prompt is read, or who is written."""
        return [*self._waiting, *self._inside()]

    def step(self) -> None:
        """One round for everybody."""
        self.let_go()
        self._let_in()
        if self._reading:
            self._read_piece(self._reading.popleft())
        if self._rows:
            self._write_tokens()
        if self.is_idle:
            self._slab.clear()

    def close(self) -> None:
        """Forget everybody and free the memory."""
        self._waiting.clear()
        self._reading.clear()
        self._rows.clear()
        self._slab.clear()

    def _inside(self) -> list[Request]:
        """Who has a place: being read or being written."""
        reading = [request for prompt in self._reading for request in prompt.requests]
        return [*reading, *(row.request for row in self._rows)]

    def let_go(self) -> None:
        """Drop the requests that nobody listens to."""
        self._waiting = deque(request for request in self._waiting if not request.is_left)
        for prompt in list(self._reading):
            prompt.requests = [request for request in prompt.requests if not request.is_left]
            if not prompt.requests:
                self._reading.remove(prompt)
        for row in [row for row in self._rows if row.request.is_left]:
            self._remove(row)

    def _let_in(self) -> None:
        """Give places to those who wait, first come first served, while the memory suffices for all their tokens."""
        while self._waiting and self._has_room(self._waiting[0]):
            request = self._waiting.popleft()
            same = [prompt for prompt in self._reading if _is_prompt_of(prompt, request)]
            written = [row for row in self._rows if _is_prompt_of(row.prompt, request)]
            if same:
                same[0].requests.append(request)
            elif written:
                place = partial(self._slab.place_copy, self._rows.index(written[0]), len(request.prompt))
                self._begin(request, written[0].prompt, place)
            else:
                self._reading.append(Prompt(request.prompt, request.adapter, [request]))

    def _has_room(self, request: Request) -> bool:
        inside = self._inside()
        longest = max(other.tokens for other in (request, *inside))
        return len(inside) < MAX_ROWS and cells(len(inside) + 1, longest) <= self._cache_tokens

    def _read_piece(self, prompt: Prompt) -> None:
        """Read the next piece of a prompt; after the last one its requests become rows."""
        end = min(prompt.read + self._piece_tokens, len(prompt.tokens))
        try:
            self._route([prompt.adapter])
            logits = read(self._model, prompt.tokens[prompt.read : end], prompt.read, prompt.cache)
        except Exception as error:  # noqa: BLE001 - whatever it was, it concerns this prompt only
            self._fail(prompt.requests, error)
            return
        self.failures = 0
        self.tokens_read += end - prompt.read
        prompt.read = end
        if end < len(prompt.tokens):
            self._reading.append(prompt)  # the others first
            return
        prompt.logits = logits
        for request in prompt.requests:
            self._begin(request, prompt, partial(self._slab.place, prompt.cache))
        prompt.requests, prompt.cache = [], DynamicCache()

    def _begin(self, request: Request, prompt: Prompt, place: Callable[[], None]) -> None:
        """A request becomes the last row: `place` fills the slab, the first token is drawn from the prompt's logits."""
        assert prompt.logits is not None
        try:
            place()
        except Exception as error:  # noqa: BLE001 - no memory, most likely: the others go on
            self._fail([request], error)
            return
        row = Row(request, prompt, 0, len(prompt.tokens))
        self._rows.append(row)
        self._take([row], draw(prompt.logits, [request.sampling], [request.dice]))

    def _write_tokens(self) -> None:
        """One forward, one token of every row."""
        rows = list(self._rows)
        try:
            self._route([row.request.adapter for row in rows])
            logits = write(self._model, [row.last for row in rows], [row.length for row in rows], self._slab)
        except Exception as error:  # noqa: BLE001 - whatever it was, no row can go on from here
            self._fail([row.request for row in rows], error)
            self._rows.clear()
            self._slab.clear()
            return
        self.failures = 0
        for row in rows:
            row.length += 1
        self._take(rows, draw(logits, [row.request.sampling for row in rows], [row.request.dice for row in rows]))

    def _take(self, rows: Sequence[Row], tokens: Sequence[int | None]) -> None:
        """Each row's new token becomes text; who is done leaves."""
        for row, token in zip(rows, tokens, strict=True):
            request = row.request
            if token is None:
                self._remove(row, wipe=True)
                request.emit(EngineBroken("the model wrote something that is not finite: the answer is not complete"))
                continue
            row.last = token
            request.written += 1
            is_end = token in self._ends
            text = request.text.rest() if is_end else request.text.add(token)
            finish_reason = "stop" if is_end or request.text.is_stopped else None
            if finish_reason is None and request.written == request.limit:
                text += request.text.rest()
                finish_reason = "stop" if request.text.is_stopped else "length"
            if text:
                request.emit(Chunk(text))
            if finish_reason is not None:
                self._remove(row)  # before the end is told: who hears of it finds the place free
                request.emit(Chunk("", finish_reason, Usage(len(request.prompt), request.written)))

    def _remove(self, row: Row, *, wipe: bool = False) -> None:
        """Free a row's place; the last row moves there."""
        index, last = self._rows.index(row), self._rows[-1]
        self._slab.remove(index, last.length, wipe=wipe)
        self._rows[index] = last
        self._rows.pop()

    def _route(self, names: list[str | None]) -> None:
        if names != self._routed:
            self._adapters.route(names)
            self._routed = names

    def adapters_changed(self) -> None:
        """The adapters lie elsewhere now: the next forward finds its way anew."""
        self._routed = []

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Break the answers that a failed forward concerns."""
        is_full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not is_full:  # there may be memory again for the next ones
            self.failures += 1
        log.error("A forward of %d requests failed.", len(requests), exc_info=error)
        reason = str(error).partition("\n")[0] or type(error).__name__
        for request in requests:
            failed = f"the model failed while it wrote: {reason}"
            request.emit(Crowded(failed) if is_full else EngineBroken(failed))


def _is_prompt_of(prompt: Prompt, request: Request) -> bool:
    return prompt.adapter == request.adapter and prompt.tokens == request.prompt


def read(model: Any, tokens: Sequence[int], start: int, cache: DynamicCache) -> torch.Tensor:
    """Read tokens of one prompt, the first at position `start`: the logits after the last one, 1 × vocabulary."""
    device = model.device
    output = model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.arange(start, start + len(tokens), device=device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def write(model: Any, tokens: Sequence[int], positions: Sequence[int], slab: KVSlab) -> torch.Tensor:
    """One forward of a token of each row, at these positions: the logits of the next ones, rows × vocabulary."""
    device = model.device
    at = torch.tensor(positions, device=device)
    slab.begin(at, max(positions) + 1)
    # Each row sees its own tokens, not what lies behind them in the slab.
    seen = torch.arange(max(positions) + 1, device=device) <= at[:, None]
    mask = torch.zeros(seen.shape, device=device, dtype=model.dtype).masked_fill_(~seen, -torch.inf)
    output = model(
        input_ids=torch.tensor(tokens, device=device)[:, None],
        position_ids=at[:, None],
        attention_mask=mask[:, None, None],
        past_key_values=slab,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
