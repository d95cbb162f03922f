"""The page *Rate a pair*: one pair after the other, blind, with the buttons and keys of the compare view.

Where it sits: components and wiring only; every action is a method of `Operations`. It shows pairs that others judged,
pairs that nobody did, and now and then a gold one, and says after none of them which it was.
"""

from typing import Any

import gradio as gr

from chat_app.operations import BLIND_SENTENCE, Operations
from chat_app.ui.chat import PICKS, WAITING, refused, titled
from chat_app.ui.shown_text import inert, quoted, shown
from chat_app.ui.theme import navigation
from feedback_store.errors import StoreError
from feedback_store.records import Message, PickChoice

NOTHING = "There is nothing to rate now: you have judged every pair there is. Chat with *Compare* on to make new ones."
SETTLED = "You had judged this pair already, and your first word stands."

Updates = dict[Any, Any]


def build_rate(operations: Operations) -> gr.Blocks:
    """The page, ready to mount at `/rate`."""
    with gr.Blocks(title="Zephyr Loop – Rate", analytics_enabled=False) as page:
        RatePage(operations, page)
    return page


class RatePage:
    """The components of the page and the handlers that move them."""

    def __init__(self, operations: Operations, page: gr.Blocks) -> None:
        self.operations = operations
        self.bar = gr.Markdown(sanitize_html=False)  # not gr.HTML: its templates need `unsafe-eval`
        self.pair = gr.Textbox("", visible="hidden", elem_id="pair-id", container=False)  # what the person sees
        self.current = gr.State("")  # what was shown last
        self.asked = gr.Markdown(elem_id="asked", latex_delimiters=[])
        with gr.Column(visible=False, elem_id="pair") as self.pair_box:
            with gr.Row(elem_id="pair-row"):
                self.first = gr.Markdown(elem_classes="zl-answer", elem_id="answer-1", latex_delimiters=[])
                self.second = gr.Markdown(elem_classes="zl-answer", elem_id="answer-2", latex_delimiters=[])
            with gr.Row(elem_id="picks"):
                self.picks = {pick: gr.Button(label, size="sm", elem_id=f"pick-{pick}") for pick, label in PICKS}
        self.note = gr.Markdown(elem_id="note")
        self._wire(page)

    def _wire(self, page: gr.Blocks) -> None:
        view = [self.bar, self.pair, self.current, self.asked, self.pair_box, self.first, self.second, self.note]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(self.next_pair, None, view, **quiet)
        for pick, button in self.picks.items():
            button.click(self._picker(pick), [self.pair, self.current], view, trigger_mode="once", **quiet)

    def _picker(self, pick: PickChoice) -> Any:
        def settle(pair_id: str, current: str) -> Updates:
            return self.settle(pick, pair_id, current)

        return settle

    def settle(self, pick: PickChoice, pair_id: str, current: str | None = None) -> Updates:
        """Store the pick and show the next pair; nothing of this one is revealed.

        The first pick on a pair stands. A second press for a pair that has made way for the next (`current`) by now
        changes nothing: nobody has judged that one yet.
        """
        if not pair_id:
            return self.next_pair()
        try:
            outcome = self.operations.settle_pair(pair_id, pick)
        except StoreError as error:
            raise refused(error) from error
        if current is not None and pair_id != current:
            return {self.note: f"{BLIND_SENTENCE} {WAITING}"}
        return self.next_pair(BLIND_SENTENCE if outcome.is_new else SETTLED)

    def next_pair(self, said: str = "") -> Updates:
        """The next pair, or that there is none."""
        bar = navigation("Rate", self.operations.status())
        try:
            pair = self.operations.raters.next_pair()
        except StoreError as error:
            raise refused(error) from error
        if pair is None:
            note = f"{said} {NOTHING}".strip()
            return {
                self.bar: bar,
                self.pair: "",
                self.current: "",
                self.asked: "",
                self.pair_box: gr.Column(visible=False),
                self.note: note,
            }
        return {
            self.bar: bar,
            self.pair: pair.pair_id,
            self.current: pair.pair_id,
            self.asked: "\n\n".join(map(_quoted, pair.prompt)),
            self.pair_box: gr.Column(visible=True),
            self.first: titled(1, shown(pair.first.text)),
            self.second: titled(2, shown(pair.second.text)),
            self.note: f"{said} {WAITING}".strip(),
        }


def _quoted(message: Message) -> str:
    """A message of the conversation that both answers answer."""
    return f"**{inert(message['role'].capitalize())}**\n\n{quoted(message['content'])}"
