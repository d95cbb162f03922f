"""Metrics for Prometheus: what the answers, the admission and the swaps report, in one registry of its own.

Where it sits: the composition root makes one `Metrics` and hands it to `Operations`; `GET /metrics` renders it. It
holds numbers and the names of versions, never a text or a user. It survives no restart; that is Prometheus' work.
"""

import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from chat_app.serving.engine import Engine, EngineBuilder, ServedVersion
from chat_app.turns import TurnStream

__all__ = ["CONTENT_TYPE", "Metrics"]

FINISHES = ("stop", "length", "cancelled", "error")
FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
BETWEEN_TOKENS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 5)
WAIT_S = (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40, 80, 120)
LOAD_S = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One object everything reports to."""

    def __init__(self) -> None:
        self._registry = all_of_it = CollectorRegistry()
        ProcessCollector(registry=all_of_it)
        version = ("version",)
        self._first_token = Histogram(
            "zloop_first_token_seconds", "From the seat to the first token.", version,
            buckets=FIRST_TOKEN_S, registry=all_of_it,
        )  # fmt: skip
        self._between = Histogram(
            "zloop_between_tokens_seconds", "Between two pieces of an answer.", version,
            buckets=BETWEEN_TOKENS_S, registry=all_of_it,
        )  # fmt: skip
        self._waited = Histogram(
            "zloop_waiting_seconds", "In line before an answer was begun.", buckets=WAIT_S, registry=all_of_it
        )
        self._answers = Counter(
            "zloop_answers", "Answers that ended.", (*version, "finish_reason", "route"), registry=all_of_it
        )
        self._prompt_tokens = Counter("zloop_prompt_tokens", "Tokens read.", version, registry=all_of_it)
        self._completion_tokens = Counter("zloop_completion_tokens", "Tokens written.", version, registry=all_of_it)
        self._refusals = Counter("zloop_refusals", "Requests sent away.", ("reason",), registry=all_of_it)
        self._swaps = Counter("zloop_swaps", "Changes of the champion.", ("kind", "outcome"), registry=all_of_it)
        self._swap_s = Histogram(
            "zloop_swap_seconds", "How long a change of the champion took.", buckets=LOAD_S, registry=all_of_it
        )
        self._bakings = Counter(
            "zloop_bakings", "Watches over a new champion that ended.", ("outcome",), registry=all_of_it
        )
        self._rescued = Counter(
            "zloop_rescued_answers", "Answers that the version before wrote for a new champion.", version,
            registry=all_of_it,
        )  # fmt: skip
        self._builds = Counter(
            "zloop_engine_builds", "Engines built: at the start, for a swap, and again after one died.", ("outcome",),
            registry=all_of_it,
        )  # fmt: skip
        self._build_s = Histogram(
            "zloop_engine_build_seconds", "How long an engine took to load.", buckets=LOAD_S, registry=all_of_it
        )
        self._served = Gauge("zloop_served_info", "1 for the version that answers.", version, registry=all_of_it)
        self._store_ok = Gauge("zloop_store_ok", "1 where the store could write at the last look.", registry=all_of_it)

    def answered(self, turn: TurnStream, route: str) -> None:
        """An answer ended, however it did. A stopped one has no token counts: engines tell them at the end."""
        finish = turn.finish_reason if turn.finish_reason in FINISHES else "other"
        self._answers.labels(turn.version, finish, route).inc()
        if turn.first_token_ms is not None:
            self._first_token.labels(turn.version).observe(turn.first_token_ms / 1000)
        between = self._between.labels(turn.version)
        for gap_s in turn.gaps_s:
            between.observe(gap_s)
        if turn.usage is not None:
            self._prompt_tokens.labels(turn.version).inc(turn.usage.prompt_tokens)
            self._completion_tokens.labels(turn.version).inc(turn.usage.completion_tokens)

    def seated(self, waited_s: float) -> None:
        """A request left the line for a seat."""
        self._waited.observe(waited_s)

    def refused(self, reason: str) -> None:
        """A request was sent away."""
        self._refusals.labels(reason).inc()

    def swapped(self, kind: str, *, ok: bool, took_s: float) -> None:
        """The champion was changed, or could not be."""
        self._swaps.labels(kind, "ok" if ok else "failed").inc()
        self._swap_s.observe(took_s)

    def baked(self, outcome: str) -> None:
        """The watch over a new champion ended: it is kept, was taken back, or a person decided."""
        self._bakings.labels(outcome).inc()

    def rescued(self, version: str) -> None:
        """`version` broke an answer before its first word, and the version before is asked."""
        self._rescued.labels(version).inc()

    def store_checked(self, *, ok: bool) -> None:
        """The store was asked whether it can write."""
        self._store_ok.set(ok)

    def counting(self, build: EngineBuilder) -> Callable[[ServedVersion], Awaitable[Engine]]:
        """The same builder, with every engine it builds counted and timed."""

        async def counted(served: ServedVersion) -> Engine:
            began = time.monotonic()
            outcome = "failed"
            try:
                engine = await build(served)
                outcome = "ok"
                return engine
            finally:
                self._builds.labels(outcome).inc()
                self._build_s.observe(time.monotonic() - began)

        return counted

    def watch(self, decoding: Callable[[], float], waiting: Callable[[], float], data_dir: Path) -> None:
        """What is looked up whenever somebody asks."""
        looked_up: dict[str, tuple[str, Callable[[], float]]] = {
            "zloop_answers_decoding": ("Answers being written now.", decoding),
            "zloop_answers_waiting": ("Requests in line now.", waiting),
            "zloop_store_bytes": ("Size of the store's file.", lambda: _size(data_dir / "store.duckdb")),
            "zloop_disk_free_bytes": ("Free below the data directory.", lambda: shutil.disk_usage(data_dir).free),
        }
        for name, (sentence, look) in looked_up.items():
            Gauge(name, sentence, registry=self._registry).set_function(look)

    def render(self, serving: str | None) -> bytes:
        """Everything, in Prometheus' text format."""
        self._served.clear()
        if serving is not None:
            self._served.labels(serving).set(1)
        return generate_latest(self._registry)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
