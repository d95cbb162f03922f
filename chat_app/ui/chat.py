"""The chat page: conversations on the left, the thread, the compare view, one line that says what a pick did.

Where it sits: components and wiring only; every action is a method of `Operations`. The thread is what the store
holds, so a reload, another tab or a restart shows the same.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from chat_app.admission import Place
from chat_app.answers import ANYBODY, Asker, Comparison
from chat_app.error_shape import BROKEN
from chat_app.operations import Operations, Refused
from chat_app.pairs import sentence_after_choice
from chat_app.prompts import left_out_sentence
from chat_app.serving.engine import EngineError
from chat_app.turns import TurnStream
from chat_app.ui.theme import navigation
from feedback_store.errors import StoreError
from feedback_store.records import Pair, PickChoice, Turn

log = logging.getLogger(__name__)

COMPARE = ("always", "sometimes", "never")
PICKS = (
    (PickChoice.FIRST, "1 First"),
    (PickChoice.SECOND, "2 Second"),
    (PickChoice.TIE, "0 Tie"),
    (PickChoice.BOTH_BAD, "x Both bad"),
    (PickChoice.SKIP, "s Skip"),
)
REASONS = ("clearer", "correct", "shorter", "tone", "safer")
LONGEST_MESSAGE = 20_000
BAR_EVERY_S = 5.0
STOPPED = "Stopped. What was written so far is kept; Retry asks again."
LEFT_OUT = "The model reads the newest part of a long conversation. Nothing is lost: the conversation keeps everything."
WAITING = "Which answer is better? Use a button, or its key."

Updates = dict[Any, Any]


def build_chat(operations: Operations) -> gr.Blocks:
    """The page, ready to mount at `/`."""
    with gr.Blocks(title="Zephyr Loop", analytics_enabled=False) as page:
        ChatPage(operations, page)
    return page


class ChatPage:
    """The components of the page and the handlers that move them."""

    def __init__(self, operations: Operations, page: gr.Blocks) -> None:
        self.operations = operations
        self._lay_out()
        self._wire(page)

    # --- components ------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        self.bar = gr.Markdown(sanitize_html=False)  # not gr.HTML: its templates need `unsafe-eval`
        self.remembered = gr.BrowserState("", storage_key="zloop-conversation", secret="zephyr-loop")  # noqa: S106
        self.conversation = gr.State("")
        self.pair = gr.State("")
        self.seen = gr.State("")
        self.timer = gr.Timer(BAR_EVERY_S)
        with gr.Row(elem_id="layout"):
            with gr.Column(scale=1, min_width=210, elem_id="side"):
                self.new = gr.Button("+ New", size="sm")
                self.threads = gr.Radio([], show_label=False, container=False)
            with gr.Column(scale=4):
                self.thread = gr.Chatbot(
                    label="Conversation",
                    elem_id="conversation",
                    height="56vh",
                    buttons=["copy"],
                    editable="all",
                    show_label=False,
                    layout="bubble",
                    placeholder="Ask something. Now and then you see two answers: pick one, the model learns from it.",
                )
                with gr.Column(visible=False, elem_id="pair") as self.pair_box:
                    with gr.Row(elem_id="pair-row"):
                        self.first = gr.Markdown(elem_classes="zl-answer", elem_id="answer-1")
                        self.second = gr.Markdown(elem_classes="zl-answer", elem_id="answer-2")
                    with gr.Row(elem_id="picks"):
                        self.picks = {
                            pick: gr.Button(label, size="sm", interactive=False, elem_id=f"pick-{pick}")
                            for pick, label in PICKS
                        }
                    self.reasons = gr.CheckboxGroup(REASONS, label="Why? (optional, before you pick)", container=False)
                self.note = gr.Markdown(elem_id="note")
                with gr.Row(elem_id="composer"):
                    self.preset = gr.Dropdown(
                        [("No preset", ""), *self.operations.presets], value="", show_label=False, scale=1,
                        min_width=180, filterable=False, elem_id="preset", visible=bool(self.operations.presets),
                    )  # fmt: skip
                    self.box = gr.Textbox(
                        placeholder="Message…", show_label=False, lines=1, max_lines=8, scale=6, autofocus=True,
                        elem_id="message", max_length=LONGEST_MESSAGE,
                    )  # fmt: skip
                with gr.Row(elem_id="actions"):
                    self.send = gr.Button("Send", variant="primary", elem_id="send")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="stop")
                    self.retry = gr.Button("Retry", elem_id="retry")
                    self.compare = gr.Radio(COMPARE, value="sometimes", label="Compare two answers", elem_id="compare")
                self.teach = gr.Checkbox(True, label="Learn from this conversation", elem_id="teach", container=False)

    def _wire(self, page: gr.Blocks) -> None:
        view = [
            self.bar, self.conversation, self.remembered, self.threads, self.thread, self.pair, self.pair_box,
            self.first, self.second, *self.picks.values(), self.reasons, self.note, self.box, self.send, self.stop,
            self.retry, self.teach, self.preset,
        ]  # fmt: skip
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        streaming: dict[str, Any] = {**quiet, "concurrency_limit": None}  # whose turn it is, admission says

        page.load(self.open_page, [self.remembered], view, **quiet)
        self.timer.tick(self.look, [self.seen], [self.bar, self.seen], **quiet)
        sending = gr.on(
            [self.send.click, self.box.submit], self.say,
            [self.box, self.conversation, self.compare, self.pair, self.teach, self.preset], view,
            trigger_mode="once", **streaming,
        )  # fmt: skip
        retrying = self.retry.click(self.again, [self.conversation, self.compare, self.pair], view, **streaming)
        self.stop.click(self.end, [self.conversation], [self.note], **quiet)
        self.new.click(self.open_new, None, view, cancels=[sending, retrying], **quiet)
        self.threads.input(self.open_thread, [self.threads], view, cancels=[sending, retrying], **quiet)
        for pick, button in self.picks.items():
            button.click(
                self._picker(pick), [self.pair, self.reasons, self.conversation], view, trigger_mode="once", **quiet
            )
        self.thread.like(self.rate, [self.conversation], [self.note], **quiet)
        self.thread.edit(self.rewrite, [self.conversation], view, **quiet)
        self.preset.input(self.choose_preset, [self.conversation, self.preset], [self.note], **quiet)
        self.teach.input(self.choose_learning, [self.conversation, self.teach], [self.note], **quiet)

    # --- opening ---------------------------------------------------------------------------------------------------

    async def open_page(self, remembered: str) -> Updates:
        """First paint: the conversation this browser had open, where it still exists."""
        return self._shown(remembered) if remembered and self._exists(remembered) else self.open_new()

    def look(self, seen: str) -> tuple[Any, Any]:
        """The bar as it is now: who answers, what waits, a pause. Nothing where it stands there already."""
        bar = navigation("Chat", self.operations.status())
        return (gr.skip(), gr.skip()) if bar == seen else (bar, bar)

    def open_new(self) -> Updates:
        """An empty thread; nothing is stored before the first message."""
        return self._at_rest("") | {self.thread: [], self.note: ""}

    def open_thread(self, conversation_id: str) -> Updates:
        """Show a stored conversation."""
        return self._shown(conversation_id)

    # --- talking ---------------------------------------------------------------------------------------------------

    async def say(  # noqa: PLR0917 - Gradio hands its inputs over by position
        self,
        text: str,
        conversation_id: str,
        compare: str,
        pair_id: str,
        teach: bool = True,
        preset: str = "",
        request: gr.Request | None = None,
    ) -> AsyncGenerator[Updates, None]:
        """Store the message, then stream one answer or two."""
        if pair_id:
            yield {self.note: WAITING}
            return
        if not text.strip():
            yield {self.note: "Write a message first."}
            return
        try:
            turn = await asyncio.to_thread(self.operations.begin_turn, conversation_id or None, text, preset or None)
            if not conversation_id and not teach:
                self.operations.data.record_learning("conversation", turn.conversation_id, False)
        except (StoreError, Refused) as error:
            raise gr.Error(str(error)) from error
        async with aclosing(self._streamed(turn, compare, _asker(request))) as updates:
            async for update in updates:
                yield update

    async def again(
        self, conversation_id: str, compare: str, pair_id: str, request: gr.Request | None = None
    ) -> AsyncGenerator[Updates, None]:
        """Answer the last message once more."""
        turns = self.operations.turns(conversation_id) if conversation_id else ()
        if pair_id or not turns:
            yield {self.note: WAITING if pair_id else "There is nothing to retry yet."}
            return
        async with aclosing(self._streamed(turns[-1], compare, _asker(request))) as updates:
            async for update in updates:
                yield update

    async def _streamed(self, turn: Turn, compare: str, asker: Asker) -> AsyncGenerator[Updates, None]:
        before = self._messages(turn.conversation_id, before=turn)
        asked = {"role": "user", "content": turn.text}
        yield self._busy(turn) | {self.thread: [*before, asked]}
        both = compare == "always" or (
            compare == "sometimes" and random.random() < self.operations.settings.compare_share  # noqa: S311
        )
        stopped = False
        try:
            if both:
                async with aclosing(self.operations.compare(turn, asker)) as growing:
                    async for comparison in growing:
                        stopped = isinstance(comparison, Place) or comparison.pair is None
                        left_out = 0 if isinstance(comparison, Place) else comparison.first.left_out.messages
                        yield self._comparing(comparison) | {self.thread: [*before, asked, *_left_out(left_out)]}
            else:
                async with aclosing(self.operations.reply(turn, asker)) as growing_one:
                    async for answer in growing_one:
                        stopped = isinstance(answer, Place) or answer.finish_reason is None
                        yield {self.thread: [*before, asked, *_growing(answer)]}
        except (EngineError, StoreError, Refused) as error:
            yield self._shown(turn.conversation_id) | {self.note: f"No answer: {error}"}
            return
        except Exception:
            log.exception("An answer broke while it was shown.")
            yield self._shown(turn.conversation_id) | {self.note: f"No answer: {BROKEN}"}
            return
        await self.operations.answers.settled()
        yield self._shown(turn.conversation_id) | ({self.note: STOPPED} if stopped else {})

    async def end(self, conversation_id: str) -> str:
        """Stop: the answers end themselves, and the event that shows them says so."""
        turns = await asyncio.to_thread(self.operations.turns, conversation_id) if conversation_id else ()
        if turns:
            self.operations.answers.stop(turns[-1].turn_id)
        return "Stopping…"

    # --- picking ---------------------------------------------------------------------------------------------------

    def _picker(self, pick: PickChoice) -> Any:
        def settle(pair_id: str, reasons: list[str], conversation_id: str) -> Updates:
            return self.settle(pick, pair_id, reasons, conversation_id)

        return settle

    def settle(self, pick: PickChoice, pair_id: str, reasons: list[str], conversation_id: str) -> Updates:
        """Store the pick; the conversation goes on with the picked answer, and the versions are revealed."""
        if not pair_id:
            return {self.note: "There is nothing to pick yet."}
        try:
            outcome = self.operations.record_pick(pair_id, pick, reasons)
        except StoreError as error:
            raise gr.Error(str(error)) from error
        return self._shown(conversation_id) | {self.note: outcome.sentence}

    def rate(self, conversation_id: str, event: gr.LikeData) -> str:
        """Thumbs on one answer of the thread."""
        rated = self._candidate_ids(conversation_id, lines=True).get(
            event.index if isinstance(event.index, int) else event.index[0]
        )
        if rated is None:
            return "This answer is not stored yet; rate it when it is complete."
        return self.operations.sentence_of(self.operations.record_rating(rated, "up" if event.liked else "down", None))

    def rewrite(self, conversation_id: str, event: gr.EditData) -> Updates:
        """A person's rewrite of an answer teaches; the conversation keeps what the model wrote."""
        index = event.index if isinstance(event.index, int) else event.index[0]
        rewritten = self._candidate_ids(conversation_id).get(index)
        if rewritten is None and index in self._candidate_ids(conversation_id, lines=True):
            return {self.conversation: conversation_id}  # the line above an answer, handed in beside it
        if rewritten is None or not str(event.value).strip():
            return self._shown(conversation_id) | {self.note: "Only an answer can be rewritten, and not to nothing."}
        kept = self.operations.record_edit(rewritten, str(event.value))
        return self._shown(conversation_id) | {self.note: self.operations.sentence_of(kept)}

    def choose_learning(self, conversation_id: str, teach: bool) -> str:
        """Whether this conversation's words may teach; a conversation not begun yet remembers it at its first turn."""
        if conversation_id:
            self.operations.data.record_learning("conversation", conversation_id, teach)
        return sentence_after_choice(teach=teach, begun=bool(conversation_id))

    def choose_preset(self, conversation_id: str, preset: str) -> str:
        """How the next answers are written; a conversation not begun yet remembers it at its first turn."""
        if conversation_id:
            self.operations.choose_preset(conversation_id, preset or None)
        return f"The next answers follow “{preset}”." if preset else "The next answers follow no preset."

    # --- views -----------------------------------------------------------------------------------------------------

    def _exists(self, conversation_id: str) -> bool:
        try:
            self.operations.turns(conversation_id)
        except StoreError:
            return False
        return True

    def _shown(self, conversation_id: str) -> Updates:
        """The whole page for a stored conversation, with the pair that still waits for a pick, if there is one."""
        turns = self.operations.turns(conversation_id)
        messages = self._messages(conversation_id)
        updates = self._at_rest(conversation_id) | {self.thread: messages, self.note: ""}
        pair = self.operations.waiting_pair(turns[-1]) if turns else None
        if pair is not None:
            left_out = _left_out(self.operations.left_out_of(pair))
            updates |= self._waiting(pair) | {self.thread: [*messages, *left_out]}
        elif turns and turns[-1].answer is None:
            updates |= {self.note: "The last message has no answer yet. Retry asks again."}
        elif turns and turns[-1].answer is not None and turns[-1].answer.finish_reason == "length":
            updates |= {self.note: "The answer was cut at the longest length allowed."}
        return updates

    def _messages(self, conversation_id: str, before: Turn | None = None) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        for turn in self.operations.turns(conversation_id):
            if before is not None and turn.position >= before.position:
                break
            shown.append({"role": "user", "content": turn.text})
            if turn.answer is not None:
                shown += _left_out(turn.left_out)
                shown.append({"role": "assistant", "content": turn.answer.text or "*(an empty answer)*"})
        return shown

    def _candidate_ids(self, conversation_id: str, *, lines: bool = False) -> dict[int, str]:
        """Message index in the thread → the candidate shown there. `lines`: the line above an answer counts as it."""
        ids: dict[int, str] = {}
        index = 0
        for turn in self.operations.turns(conversation_id):
            index += 1
            if turn.answer is not None:
                if turn.left_out:
                    ids |= {index: turn.answer.candidate_id} if lines else {}
                    index += 1
                ids[index] = turn.answer.candidate_id
                index += 1
        return ids

    def _at_rest(self, conversation_id: str) -> Updates:
        return {
            self.bar: navigation("Chat", self.operations.status()),
            self.conversation: conversation_id,
            self.remembered: conversation_id,
            self.threads: gr.Radio(choices=self._thread_choices(), value=conversation_id or None),
            self.pair: "",
            self.pair_box: gr.Column(visible=False),
            self.first: "",
            self.second: "",
            self.reasons: [],
            self.box: gr.Textbox(interactive=True),
            self.send: gr.Button(interactive=True),
            self.stop: gr.Button(interactive=False),
            self.retry: gr.Button(interactive=True),
            self.preset: (conversation_id and self.operations.preset_of(conversation_id)) or "",
            self.teach: not conversation_id or self.operations.data.learns_from(conversation_id),
            **{button: gr.Button(interactive=False) for button in self.picks.values()},
        }

    def _busy(self, turn: Turn) -> Updates:
        return {
            self.conversation: turn.conversation_id,
            self.remembered: turn.conversation_id,
            self.threads: gr.Radio(choices=self._thread_choices(), value=turn.conversation_id),
            self.note: "",
            self.box: gr.Textbox(value="", interactive=False),
            self.send: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.retry: gr.Button(interactive=False),
        }

    def _comparing(self, comparison: Comparison | Place) -> Updates:
        if isinstance(comparison, Place):
            first = second = f"*{comparison.sentence}*"
        else:
            first, second = comparison.first.text, comparison.second.text
        return {
            self.pair_box: gr.Column(visible=True),
            self.first: _answer(1, first),
            self.second: _answer(2, second),
        }

    def _waiting(self, pair: Pair) -> Updates:
        """Two complete answers, blind, and the buttons that settle them. The composer waits for the pick."""
        return {
            self.pair: pair.pair_id,
            self.pair_box: gr.Column(visible=True),
            self.first: _answer(1, pair.first.text, pair.first.finish_reason),
            self.second: _answer(2, pair.second.text, pair.second.finish_reason),
            self.note: WAITING,
            self.box: gr.Textbox(interactive=False),
            self.send: gr.Button(interactive=False),
            self.retry: gr.Button(interactive=False),
            **{button: gr.Button(interactive=True) for button in self.picks.values()},
        }

    def _thread_choices(self) -> list[tuple[str, str]]:
        return [(one.title or "Untitled", one.conversation_id) for one in self.operations.conversations()]


def _asker(request: gr.Request | None) -> Asker:
    """An open page is a user, until accounts exist."""
    return ANYBODY if request is None else Asker(f"page:{request.session_hash}", origin=f"page:{request.session_hash}")


def _growing(answer: TurnStream | Place) -> list[dict[str, Any]]:
    """An answer as far as it is written, or the place in line."""
    if isinstance(answer, Place):
        return [{"role": "assistant", "content": f"*{answer.sentence}*"}]
    return [*_left_out(answer.left_out.messages), {"role": "assistant", "content": answer.text or "…"}]


def _answer(number: int, text: str, finish_reason: str | None = None) -> str:
    cut = "\n\n*(cut at the longest length allowed)*" if finish_reason == "length" else ""
    return f"#### Answer {number}\n\n{text or '…'}{cut}"


def _left_out(messages: int) -> list[dict[str, Any]]:
    """The line above an answer for which the beginning of the conversation was not read: a message of its own."""
    if not messages:
        return []
    line = {"title": left_out_sentence(messages), "status": "done"}  # done: it stays folded
    return [{"role": "assistant", "content": LEFT_OUT, "metadata": line}]
