"""The chat page: conversations on the left, the thread, the compare view, one line that says what a pick did.

Where it sits: components and wiring only; every action is a method of `Operations`. The thread is what the store
holds, so a reload or a restart shows the same. Which conversation and which pair a person looks at, the browser says:
two hidden fields change together with what is shown, so an event is about what its sender sees, in this tab and no
other. Nothing that comes from a browser is taken for granted: an event may carry any text, whatever a field allows.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from chat_app.admission import Place
from chat_app.answers import ANYBODY, Asker, Comparison
from chat_app.api import MAX_MESSAGE_CHARACTERS
from chat_app.error_shape import BROKEN
from chat_app.operations import Operations, Refused
from chat_app.pairs import sentence_after_choice
from chat_app.prompts import left_out_sentence
from chat_app.serving.engine import EngineError
from chat_app.turns import TurnStream
from chat_app.ui.shown_text import in_html, inert, shown, source_of, visible, with_source
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
BAR_EVERY_S = 5.0
STOPPED = "Stopped. What was written so far is kept; Retry asks again."
LEFT_OUT = "The model reads the newest part of a long conversation. Nothing is lost: the conversation keeps everything."
WAITING = "Which answer is better? Use a button; or click an answer, then press 1, 2, 0, x or s."
GONE = "This conversation is not there any more. Press + New to begin another; your words are still in the box."
DRAWN_EVERY_S = 0.05
DRAWING_SHARE = 0.1
"""Of the time, at most, while an answer grows: a long one is drawn more seldom."""

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
        self.conversation = gr.Textbox("", visible="hidden", elem_id="conversation-id", container=False)
        self.pair = gr.Textbox("", visible="hidden", elem_id="pair-id", container=False)
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
                    latex_delimiters=[],  # what LaTeX draws is not what was written
                    placeholder="Ask something. Now and then you see two answers: pick one, the model learns from it.",
                )
                with gr.Column(visible=False, elem_id="pair") as self.pair_box:
                    with gr.Row(elem_id="pair-row"):
                        self.first = gr.Markdown(elem_classes="zl-answer", elem_id="answer-1", latex_delimiters=[])
                        self.second = gr.Markdown(elem_classes="zl-answer", elem_id="answer-2", latex_delimiters=[])
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
                        elem_id="message",  # no max_length: it cuts what is pasted without a word
                    )  # fmt: skip
                with gr.Row(elem_id="actions"):
                    self.send = gr.Button("Send", variant="primary", elem_id="send")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="stop")
                    self.retry = gr.Button("Retry", elem_id="retry")
                    self.compare = gr.Radio(COMPARE, value="sometimes", label="Compare two answers", elem_id="compare")
                self.teach = gr.Checkbox(True, label="Learn from this conversation", elem_id="teach", container=False)

    def _wire(self, page: gr.Blocks) -> None:
        view = [
            self.bar, self.conversation, self.threads, self.thread, self.pair, self.pair_box,
            self.first, self.second, *self.picks.values(), self.reasons, self.note, self.box, self.send, self.stop,
            self.retry, self.teach, self.preset,
        ]  # fmt: skip
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        streaming: dict[str, Any] = {**quiet, "concurrency_limit": None}  # whose turn it is, admission says

        page.load(self.open_page, None, view, **quiet)
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

    async def open_page(self, request: gr.Request) -> Updates:
        """First paint: the conversation of this tab, which its address names, where it still exists."""
        named = str(request.query_params.get("c", ""))
        return self._shown(named) if named and self._exists(named) else self.open_new()

    def look(self, seen: str) -> tuple[Any, Any]:
        """The bar as it is now: who answers, what waits, a pause. Nothing where it stands there already."""
        bar = navigation("Chat", self.operations.status())
        return (gr.skip(), gr.skip()) if bar == seen else (bar, bar)

    def open_new(self) -> Updates:
        """An empty thread; nothing is stored before the first message."""
        return self._at_rest("") | {self.thread: [], self.note: ""}

    def open_thread(self, conversation_id: str) -> Updates:
        """Show a stored conversation."""
        return self._shown(conversation_id) if self._exists(conversation_id) else self.open_new() | {self.note: GONE}

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
        refusal = _refusal(text) or (GONE if conversation_id and not self._exists(conversation_id) else "")
        if refusal:
            yield {self.note: refusal}
            return
        try:
            turn = await asyncio.to_thread(self.operations.begin_turn, conversation_id or None, text, preset or None)
            if not conversation_id and not teach:
                self.operations.data.record_learning("conversation", turn.conversation_id, False)
        except (StoreError, Refused) as error:
            raise refused(error) from error
        async with aclosing(self._streamed(turn, compare, _asker(request))) as updates:
            async for update in updates:
                yield update

    async def again(
        self, conversation_id: str, compare: str, pair_id: str, request: gr.Request | None = None
    ) -> AsyncGenerator[Updates, None]:
        """Answer the last message once more."""
        turns = self.operations.turns(conversation_id) if self._exists(conversation_id) else ()
        if pair_id or not turns:
            yield {self.note: WAITING if pair_id else "There is nothing to retry yet."}
            return
        async with aclosing(self._streamed(turns[-1], compare, _asker(request))) as updates:
            async for update in updates:
                yield update

    async def _streamed(self, turn: Turn, compare: str, asker: Asker) -> AsyncGenerator[Updates, None]:
        before = self._messages(turn.conversation_id, before=turn)
        asked = {"role": "user", "content": with_source(turn.text)}
        here: Updates = {self.conversation: turn.conversation_id}  # with every change of the thread
        yield self._busy(turn) | {self.thread: [*before, asked]}
        both = compare == "always" or (
            compare == "sometimes" and random.random() < self.operations.settings.compare_share  # noqa: S311
        )
        stopped, pace = False, Pace()
        try:
            if both:
                async with aclosing(self.operations.compare(turn, asker)) as growing:
                    async for comparison in growing:
                        stopped = isinstance(comparison, Place) or comparison.pair is None
                        if pace.is_due() or isinstance(comparison, Place):
                            left_out = 0 if isinstance(comparison, Place) else comparison.first.left_out.messages
                            drawn = self._comparing(comparison)
                            pace.drawn()
                            yield here | drawn | {self.thread: [*before, asked, *_left_out(left_out)]}
            else:
                async with aclosing(self.operations.reply(turn, asker)) as growing_one:
                    async for answer in growing_one:
                        stopped = isinstance(answer, Place) or answer.finish_reason is None
                        if pace.is_due() or isinstance(answer, Place):
                            drawn_one = _growing(answer)
                            pace.drawn()
                            yield here | {self.thread: [*before, asked, *drawn_one]}
        except (EngineError, StoreError, Refused) as error:
            yield self._shown(turn.conversation_id) | {self.note: f"No answer: {inert(error)}"}
            return
        except Exception:
            log.exception("An answer broke while it was shown.")
            yield self._shown(turn.conversation_id) | {self.note: f"No answer: {BROKEN}"}
            return
        await self.operations.answers.settled()
        yield self._shown(turn.conversation_id) | ({self.note: STOPPED} if stopped else {})

    async def end(self, conversation_id: str) -> str:
        """Stop: the answers end themselves, and the event that shows them says so."""
        exists = await asyncio.to_thread(self._exists, conversation_id)
        turns = await asyncio.to_thread(self.operations.turns, conversation_id) if exists else ()
        if turns:
            self.operations.answers.stop(turns[-1].turn_id)
        return "Stopping…"

    # --- picking ---------------------------------------------------------------------------------------------------

    def _picker(self, pick: PickChoice) -> Any:
        def settle(pair_id: str, reasons: list[str], conversation_id: str) -> Updates:
            return self.settle(pick, pair_id, reasons, conversation_id)

        return settle

    def settle(self, pick: PickChoice, pair_id: str, reasons: list[str], conversation_id: str) -> Updates:
        """Store the pick; the conversation goes on with the picked answer, and the versions are revealed.

        The first pick on a pair stands: what another press or another tab says of it later is not kept.
        """
        if not pair_id:
            return {self.note: "There is nothing to pick yet."}
        if len(reasons) > len(REASONS) or not set(reasons) <= set(REASONS):
            return {self.note: f"The reasons are {', '.join(REASONS)}; each may be given once. Nothing was saved."}
        try:
            outcome = self.operations.settle_pair(pair_id, pick, reasons)
        except StoreError as error:
            raise refused(error) from error
        view = self._shown(conversation_id) if self._exists(conversation_id) else {}
        return view | {self.note: inert(outcome.sentence_for(pick))}

    def rate(self, conversation_id: str, event: gr.LikeData) -> str:
        """Thumbs on one answer of the thread."""
        rated = self._candidate_ids(conversation_id, lines=True).get(_index(event))
        if rated is None:
            return "This answer is not stored yet; rate it when it is complete."
        try:
            kept = self.operations.record_rating(rated, "up" if event.liked is True else "down", None)
            return self.operations.sentence_of(kept)
        except StoreError as error:
            raise refused(error) from error

    def rewrite(self, conversation_id: str, event: gr.EditData) -> Updates:
        """A person's rewrite of an answer teaches; the conversation keeps what the model wrote."""
        if not self._exists(conversation_id):
            return {self.note: GONE}
        index = _index(event)
        rewritten = self._candidate_ids(conversation_id).get(index)
        if rewritten is None and index in self._candidate_ids(conversation_id, lines=True):
            return {self.conversation: conversation_id}  # the line above an answer, handed in beside it
        text = source_of(event.value) if isinstance(event.value, str) else ""
        if rewritten is None or not text.strip():
            return self._shown(conversation_id) | {self.note: "Only an answer can be rewritten, and not to nothing."}
        refusal = _refusal(text)
        if refusal:
            return self._shown(conversation_id) | {self.note: refusal}
        try:
            kept = self.operations.record_edit(rewritten, text)
        except StoreError as error:
            raise refused(error) from error
        return self._shown(conversation_id) | {self.note: self.operations.sentence_of(kept)}

    def choose_learning(self, conversation_id: str, teach: bool) -> str:
        """Whether this conversation's words may teach; a conversation not begun yet remembers it at its first turn."""
        teaches = teach is True
        if conversation_id:
            try:
                self.operations.data.record_learning("conversation", conversation_id, teaches)
            except StoreError as error:
                raise refused(error) from error
        return sentence_after_choice(teach=teaches, begun=bool(conversation_id))

    def choose_preset(self, conversation_id: str, preset: str) -> str:
        """How the next answers are written; a conversation not begun yet remembers it at its first turn."""
        if preset and preset not in self.operations.presets:
            return f"There is no preset “{inert(preset[:60])}”. The next answers are written as before."
        if conversation_id:
            try:
                self.operations.choose_preset(conversation_id, preset or None)
            except (StoreError, Refused) as error:
                raise refused(error) from error
        return f"The next answers follow “{inert(preset)}”." if preset else "The next answers follow no preset."

    # --- views -----------------------------------------------------------------------------------------------------

    def _exists(self, conversation_id: str | None) -> bool:
        if not conversation_id:
            return False
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
        thread: list[dict[str, Any]] = []
        for turn in self.operations.turns(conversation_id):
            if before is not None and turn.position >= before.position:
                break
            thread.append({"role": "user", "content": with_source(turn.text)})
            if turn.answer is not None:
                thread += _left_out(turn.left_out)
                answer = with_source(turn.answer.text) if turn.answer.text else "*(an empty answer)*"
                thread.append({"role": "assistant", "content": answer})
        return thread

    def _candidate_ids(self, conversation_id: str, *, lines: bool = False) -> dict[int, str]:
        """Message index in the thread → the candidate shown there. `lines`: the line above an answer counts as it."""
        ids: dict[int, str] = {}
        index = 0
        if not self._exists(conversation_id):
            return ids
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
            self.threads: gr.Radio(choices=self._thread_choices(), value=conversation_id or None),
            self.pair: "",
            self.pair_box: gr.Column(visible=False),
            self.first: "",
            self.second: "",
            self.reasons: [],
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
            self.threads: gr.Radio(choices=self._thread_choices(), value=turn.conversation_id),
            self.note: "",
            self.box: "",
            self.send: gr.Button(interactive=False),
            self.stop: gr.Button(interactive=True),
            self.retry: gr.Button(interactive=False),
        }

    def _comparing(self, comparison: Comparison | Place) -> Updates:
        if isinstance(comparison, Place):
            first = second = f"*{inert(comparison.sentence)}*"
        else:
            first, second = shown(comparison.first.text), shown(comparison.second.text)
        return {
            self.pair_box: gr.Column(visible=True),
            self.first: titled(1, first),
            self.second: titled(2, second),
        }

    def _waiting(self, pair: Pair) -> Updates:
        """Two complete answers, blind, and the buttons that settle them. What is typed meanwhile stays in the box."""
        return {
            self.pair: pair.pair_id,
            self.pair_box: gr.Column(visible=True),
            self.first: titled(1, shown(pair.first.text), pair.first.finish_reason),
            self.second: titled(2, shown(pair.second.text), pair.second.finish_reason),
            self.note: WAITING,
            self.send: gr.Button(interactive=False),
            self.retry: gr.Button(interactive=False),
            **{button: gr.Button(interactive=True) for button in self.picks.values()},
        }

    def _thread_choices(self) -> list[tuple[str, str]]:
        return [(visible(one.title) or "Untitled", one.conversation_id) for one in self.operations.conversations()]


def _asker(request: gr.Request | None) -> Asker:
    """An open page is a user, until accounts exist."""
    return ANYBODY if request is None else Asker(f"page:{request.session_hash}", origin=f"page:{request.session_hash}")


class Pace:
    """When a growing answer is drawn again: not at every token, and for a small share of the time."""

    def __init__(self) -> None:
        self._asked_at = self._next_at = 0.0

    def is_due(self) -> bool:
        """Whether to draw now; then say `drawn` when that is done."""
        self._asked_at = time.monotonic()
        return self._asked_at >= self._next_at

    def drawn(self) -> None:
        took_s = time.monotonic() - self._asked_at
        self._next_at = self._asked_at + max(DRAWN_EVERY_S, took_s / DRAWING_SHARE)


def refused(error: Exception) -> gr.Error:
    """What a person reads of a refusal; it may quote what somebody wrote, and the page shows it as HTML."""
    return gr.Error(in_html(error), print_exception=False)


def titled(number: int, answer: str, finish_reason: str | None = None) -> str:
    """An answer of a pair, below its number."""
    cut = "\n\n*(cut at the longest length allowed)*" if finish_reason == "length" else ""
    return f'<h4 class="zl-head">Answer {number}</h4>\n\n{answer or "…"}{cut}'


def _refusal(text: str) -> str:
    """Why a text cannot be kept; empty where it can. It stays in its box."""
    if not isinstance(text, str) or not text.strip():
        return "Write a message first."
    if len(text) > MAX_MESSAGE_CHARACTERS:
        return (
            f"Your message has {len(text):,} characters; the limit is {MAX_MESSAGE_CHARACTERS:,}. "
            "Nothing was sent: shorten it, or send it in parts."
        )
    half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        return f"Your message holds half a character (U+{ord(half):04X}), which cannot be kept. Remove it."
    return ""


def _index(event: gr.EventData) -> int:
    """Which message of the thread an event is about; -1 where it says nothing of the kind."""
    index = getattr(event, "index", None)
    if isinstance(index, (list, tuple)) and index:
        index = index[0]
    return index if isinstance(index, int) else -1


def _growing(answer: TurnStream | Place) -> list[dict[str, Any]]:
    """An answer as far as it is written, or the place in line."""
    if isinstance(answer, Place):
        return [{"role": "assistant", "content": f"*{inert(answer.sentence)}*"}]
    return [*_left_out(answer.left_out.messages), {"role": "assistant", "content": shown(answer.text) or "…"}]


def _left_out(messages: int) -> list[dict[str, Any]]:
    """The line above an answer for which the beginning of the conversation was not read: a message of its own."""
    if not messages:
        return []
    line = {"title": left_out_sentence(messages), "status": "done"}  # done: it stays folded
    return [{"role": "assistant", "content": LEFT_OUT, "metadata": line}]
