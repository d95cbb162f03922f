"""Test support: the pages' real handlers on a real store, without a browser."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import gradio as gr

from chat_app.__main__ import open_store
from chat_app.operations import Operations
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.records import Candidate, Pair, new_id, now
from feedback_store.store import FeedbackStore
from trainer import schedule

PageT = TypeVar("PageT")


@contextmanager
def operations_in(data_dir: Path) -> Iterator[Operations]:
    """The operations on a data directory; nothing is served."""
    settings = load_settings({"ZLOOP_DATA_DIR": str(data_dir), "ZLOOP_GOLD_SHARE": "0"})
    with open_store(settings) as store:
        yield Operations(settings, store, TrainerRoom(settings, store), None, schedule.is_due)


def built(kind: Callable[[Operations, gr.Blocks], PageT], operations: Operations) -> PageT:
    """A page, made inside a loop: Gradio would else open one of its own and leave it open."""

    async def build() -> PageT:
        with gr.Blocks() as page:
            return kind(operations, page)

    return asyncio.run(build())


def answer(text: str) -> Candidate:
    return Candidate(new_id("cand"), "v0", text, "stop", {}, None, 1.0, now())


def record_pair(
    store: FeedbackStore,
    prompt: str = "Which?",
    turn_id: str | None = None,
    rater: str = "local",
    answers: tuple[str, str] = ("a", "b"),
) -> Pair:
    first, second = map(answer, answers)
    pair = Pair(new_id("pair"), [{"role": "user", "content": prompt}], first, second, turn_id, rater, now())
    store.record_pair(pair)
    return pair
