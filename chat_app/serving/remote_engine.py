"""The engine `remote`: answers come from a model server somewhere else (vLLM, TGI, any OpenAI-compatible URL).

Where it sits: `RemoteBuilder` is the EngineBuilder that a ModelSlot is given; `upstream.py` is the server it talks to.
How a version gets there depends on what the server can do:

    vLLM   is told to load the version's adapter, under a new name each time: a name used again would answer from the
           prefix cache of the weights before. The slot drains the old engine, whose `close` unloads its adapter.
    TGI    takes adapters only when it starts. It answers unknown ones as the base, without a word, so an adapter counts
           as there only where it makes a difference.
    any    serves the versions its /v1/models lists by their names.

With two URLs a version is served by whichever has it: start the idle one with the new version, then promote
(blue/green). What cannot be served is known before anything changes: `limits` says it at start, VersionUnservable when
it is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from chat_app.serving.deadlines import Waits
from chat_app.serving.engine import (
    BadMessages,
    Chunk,
    ContextOverflow,
    EngineBroken,
    EngineBusy,
    EngineError,
    EngineRefused,
    EngineStartFailed,
    Sampling,
    ServedVersion,
    VersionUnservable,
)
from chat_app.serving.roles import first_refused
from chat_app.serving.upstream import TGI_BASE, ModelCard, Upstream
from chat_app.serving.upstream_errors import ModelGone
from feedback_store.control_text import FLOOR
from feedback_store.records import Message

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a version is served: the model name to send, and the adapter to load and unload for it, if any."""

    upstream: Upstream
    model: str
    adapter_path: PurePosixPath | None = None


class RemoteEngine:
    """One version on a model server. Made by `RemoteBuilder`."""

    def __init__(self, served: ServedVersion, place: Place, names: AdapterNames) -> None:
        self._served = served
        self._upstream = place.upstream
        self._model = place.model
        self._adapter_path = place.adapter_path
        self._names = names
        self._waits = Waits()
        self._is_open = True
        self._loading = asyncio.Lock()

    @property
    def version(self) -> str:
        return self._served.version

    @property
    def model(self) -> str:
        """The name the server knows it by."""
        return self._model

    @property
    def upstream(self) -> Upstream:
        """The server it is on."""
        return self._upstream

    @property
    def is_alive(self) -> bool:
        """False only after `close`: a server that is away may come back."""
        return self._is_open

    @property
    def context_tokens(self) -> int | None:
        return self._upstream.facts.context_tokens

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        """Stream one answer. Closing the generator closes the connection, which frees the server's slot.

        Two things are put right once, before the first token: an adapter that a restarted vLLM forgot is loaded again,
        and where prompt and max_tokens together are too long the answer may be as long as there is room.
        """
        mended = fitted = False
        limit = self.context_tokens
        if limit is not None and sampling.max_tokens >= limit:  # vLLM refuses that without looking at the prompt
            sampling = replace(sampling, max_tokens=max(1, limit - 1))
        while True:
            self._require_open()
            model, begun = self._model, False
            try:
                async with aclosing(self._upstream.stream(model, messages, sampling, self._waits)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except ModelGone:
                if mended or begun or self._adapter_path is None:
                    raise
                mended = True
                await self._load_again(model)
            except BadMessages as error:
                raise await self._located(error, model, messages) from error
            except ContextOverflow as error:
                if fitted or begun:
                    raise
                fitted = True
                sampling = await self._fit(messages, sampling, error)

    async def prompt_tokens(self, messages: Sequence[Message]) -> int | None:
        return await self._upstream.count_tokens(self._model, messages)

    async def control_markers(self) -> frozenset[str]:
        """Those of all families: a server does not say which tokens its model has."""
        return FLOOR

    async def check(self) -> None:
        """Write up to 8 tokens greedily. Raises EngineError when that fails."""
        hello: Message = {"role": "user", "content": "Say hello."}
        said = "".join([chunk.text async for chunk in self.stream([hello], Sampling(temperature=0, max_tokens=8))])
        if not said.strip():
            raise EngineStartFailed(f"{self.version} on {self._upstream.name} answers nothing to {hello['content']!r}")

    async def close(self) -> None:
        """End the streams that still run; then vLLM may forget the adapter."""
        if not self._is_open:
            return
        self._is_open = False
        self._waits.close()
        if self._adapter_path is not None:
            async with self._loading:
                await _unload(self._upstream, self._model)

    async def _located(self, error: BadMessages, model: str, messages: Sequence[Message]) -> BadMessages:
        """The same refusal with the message it is about, where the server can be asked what its template takes."""

        async def reads(some: Sequence[Message]) -> bool:
            return await self._upstream.reads(model, some) is not False

        hello = Message(role="user", content="Hello")
        knows = await self._upstream.reads(model, [hello])  # one that refuses this, too, has no such route
        index = await first_refused(messages, reads) if knows else None
        return error.at(index, [one["role"] for one in messages])

    def _require_open(self) -> None:
        if not self._is_open:
            raise EngineBroken(f"the engine of {self.version} was closed")

    async def _load_again(self, lost: str) -> None:
        """vLLM was restarted and lost the adapter. All streams that notice share one load."""
        assert self._adapter_path is not None
        async with self._loading:
            self._require_open()
            if self._model != lost:
                return
            log.warning("%s forgot %s (was it restarted?); loading it again.", self._upstream.name, lost)
            name = self._names.new(self.version)
            await self._upstream.load_adapter(name, self._adapter_path)
            self._model = name

    async def _fit(self, messages: Sequence[Message], sampling: Sampling, error: ContextOverflow) -> Sampling:
        """The same sampling with as many tokens as there is room for. Raises ContextOverflow where there is none.

        vLLM and TGI refuse a prompt whose answer could grow over the limit; the engines here write until it is full.
        """
        prompt_tokens = error.prompt_tokens
        with suppress(EngineError):  # the refusal may say "at least": better ask, where one can
            prompt_tokens = await self._upstream.count_tokens(self._model, messages) or prompt_tokens
        room = error.limit - prompt_tokens
        if not 1 <= room < sampling.max_tokens:
            raise ContextOverflow(prompt_tokens, error.limit) from error
        return replace(sampling, max_tokens=room)


class AdapterNames:
    """Names for runtime adapters: never used twice; the prefix, with `owner` in it, makes them ours."""

    def __init__(self, owner: str) -> None:
        self._prefix = f"zloop-{owner}-"

    def new(self, version: str) -> str:
        return f"{self._prefix}{version}-{secrets.token_hex(3)}"

    def is_ours(self, name: str) -> bool:
        return name.startswith(self._prefix)


class RemoteBuilder:
    """Builds engines on the given servers.

    `base`: the base's name there, None for the first model the first server lists. `adapter_root`: where the server
    sees the directory of versions, None where it sees it as we do. `owner` tells our adapters from another's.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        *,
        base: str | None = None,
        adapter_root: PurePosixPath | None = None,
        owner: str = "0",
    ) -> None:
        self._upstreams = tuple(upstreams)
        self._base = base
        self._adapter_root = adapter_root
        self._names = AdapterNames(owner)
        self._is_inspected = False

    @property
    def limits(self) -> list[str]:
        """What these servers cannot serve, in sentences; known once `inspect` has run."""
        return [sentence for upstream in self._upstreams if (sentence := self._limit(upstream)) is not None]

    async def inspect(self) -> list[str]:
        """Ask every server what it is; returns `limits`.

        Raises EngineError where none answers, or where they have neither the base nor a version.
        """
        problems = await self._probe()
        if len(problems) == len(self._upstreams):
            raise problems[0]
        if self._base is None:
            self._base = self._first_base()
        reachable = [upstream for upstream in self._upstreams if upstream.is_probed]
        names = [card.name for upstream in reachable for card in upstream.facts.bases]
        if not any(self._base_place(upstream) for upstream in reachable) and not any(map(_is_version, names)):
            listed = ", ".join(names) or "nothing"
            raise EngineStartFailed(
                f"the base model {self._base!r} is not served at {_urls(reachable)}, which lists: {listed}. "
                "Set ZLOOP_MODEL to one of these, or start the model server with it."
            )
        self._is_inspected = True
        return self.limits

    async def configure(self) -> None:
        """Before serving begins: `inspect`, say what cannot be served, unload what an earlier run of ours left.

        Only the one server of a data directory may do this: what it unloads must not be in use. Raises EngineError.
        """
        for sentence in await self.inspect():
            log.warning("%s", sentence)
        for upstream in self._upstreams:
            for card in upstream.facts.models if upstream.is_probed and upstream.facts.loads_adapters else ():
                if self._names.is_ours(card.name):
                    log.info("Unloading %s, left at %s by an earlier run.", card.name, upstream.name)
                    await _unload(upstream, card.name)

    async def __call__(self, served: ServedVersion) -> RemoteEngine:
        """An engine of this version. Raises VersionUnservable where no server has it or can load it."""
        if self._is_inspected:
            problems: Sequence[EngineError] = await self._probe()  # one may have been started again with other adapters
        else:
            await self.inspect()
            problems = [error for upstream in self._upstreams if (error := upstream.problem) is not None]
        place = await self._place(served)
        if place is not None:
            return RemoteEngine(served, place, self._names)
        if len(problems) == len(self._upstreams):
            raise problems[0]
        raise VersionUnservable(f"cannot serve {served.version}: {'; '.join(self.limits) or 'no server has it'}")

    async def _probe(self) -> list[EngineError]:
        await asyncio.gather(*(upstream.look() for upstream in self._upstreams))
        return [upstream.problem for upstream in self._upstreams if upstream.problem is not None]

    async def _place(self, served: ServedVersion) -> Place | None:
        """The first server that has the version, else the first that can load it."""
        reachable = [upstream for upstream in self._upstreams if upstream.problem is None]
        if served.adapter_directory is None and served.checkpoint is None:
            return next((place for upstream in reachable if (place := self._base_place(upstream))), None)
        for upstream in reachable:
            if (place := await self._ready_place(upstream, served.version)) is not None:
                return place
        if served.checkpoint is not None:
            raise VersionUnservable(
                f"cannot serve {served.version}: it is a whole model, which no server takes while it runs. Start one "
                f"with {served.checkpoint} under the name {served.version} (vLLM: --served-model-name), add its URL to "
                "ZLOOP_REMOTE_URL, then promote"
            )
        for upstream in reachable:
            if upstream.facts.loads_adapters and self._base_place(upstream):
                return await self._load(upstream, served)
        return None

    def _base_place(self, upstream: Upstream) -> Place | None:
        """The base on this server, by its name, its path, or the last part of either."""
        assert self._base is not None
        cards = upstream.facts.bases or (ModelCard(self._base),)  # some gateways list nothing: the check will tell
        exact = [card for card in cards if self._base in (card.name, card.root)]
        named = [card for card in cards if _last(self._base) in (_last(card.name), _last(card.root or ""))]
        for card in [*exact, *named]:
            return Place(upstream, TGI_BASE if upstream.facts.kind == "tgi" else card.name)
        return None

    async def _ready_place(self, upstream: Upstream, version: str) -> Place | None:
        """The version where the server was started with it."""
        for card in upstream.facts.models:
            if _last(card.name) == version:
                return Place(upstream, TGI_BASE if upstream.facts.kind == "tgi" else card.name)
        if upstream.facts.kind != "tgi" or self._base_place(upstream) is None:
            return None
        return Place(upstream, version) if await upstream.differ(version, TGI_BASE) else None

    async def _load(self, upstream: Upstream, served: ServedVersion) -> Place:
        path = self._adapter_path(served)
        name = self._names.new(served.version)
        try:
            await upstream.load_adapter(name, path)
        except (EngineBusy, EngineBroken, EngineRefused, VersionUnservable) as error:
            raise VersionUnservable(
                f"cannot serve {served.version}: {error}. vLLM looks for the adapter at {path}: it must see the "
                "directory of versions there (ZLOOP_REMOTE_ADAPTER_DIR), and be started with --enable-lora and a "
                "--max-lora-rank that is enough"
            ) from error
        return Place(upstream, name, path)

    def _adapter_path(self, served: ServedVersion) -> PurePosixPath:
        assert served.adapter_directory is not None
        if self._adapter_root is None:
            return PurePosixPath(served.adapter_directory.absolute())
        return self._adapter_root / served.version / served.adapter_directory.name

    def _first_base(self) -> str:
        """The first model of the first server: another one may have been started with a version in its place."""
        first = self._upstreams[0]
        if first.problem is not None:
            raise first.problem
        names = [card.name for card in first.facts.bases if not _is_version(card.name)]
        if not names:
            raise EngineStartFailed(f"{first.name} lists no base model: name it with ZLOOP_MODEL")
        return names[0]

    def _limit(self, upstream: Upstream) -> str | None:
        if upstream.problem is not None:
            return str(upstream.problem)
        if upstream.facts.loads_adapters:
            return None
        if upstream.facts.kind == "vllm":
            return (
                f"{upstream.name} cannot load versions while it runs: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        if upstream.facts.kind == "tgi":
            return (
                f"{upstream.name} takes adapters only when it starts: to serve v3, start it (or a second one, with its "
                "URL in ZLOOP_REMOTE_URL) with LORA_ADAPTERS=v3=/versions/v3/adapter, then promote"
            )
        return f"{upstream.name} cannot load versions: it serves only those that its /v1/models lists by name"


async def _unload(upstream: Upstream, name: str) -> None:
    """Best effort: an adapter that stays is found and unloaded at the next start."""
    try:
        await upstream.unload_adapter(name)
    except EngineError as error:
        log.warning("%s could not be unloaded: %s", name, error)


def _is_version(name: str) -> bool:
    return re.fullmatch(r"v\d+(-practice-.*)?", _last(name)) is not None


def _last(name: str) -> str:
    return PurePosixPath(name).name.lower()


def _urls(upstreams: Sequence[Upstream]) -> str:
    return " and ".join(upstream.url for upstream in upstreams)
