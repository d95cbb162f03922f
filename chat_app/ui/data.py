"""The data section of the admin page: how people judge, agreement, what snapshots hide, backups, erasing a person.

Where it sits: components and wiring only, in a part of the page that is closed until it is needed; every action is a
method of `DataOperations`. Numbers are asked for when a person asks, not every second.
"""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr

from chat_app.data import DataOperations
from feedback_store.statistics import Statistics

SHOWN = 20


class DataSection:
    """The section; build it inside the page's Blocks."""

    def __init__(self, data: DataOperations, refusals: tuple[type[Exception], ...]) -> None:
        self.data = data
        self.refusals = refusals
        self._lay_out()
        self._wire()

    def _lay_out(self) -> None:
        with gr.Accordion("Data: how people judge, privacy, backups", open=False, elem_id="data"):
            with gr.Row():
                self.count = gr.Button("Count", size="sm", elem_id="count")
                self.agree = gr.Button("Do raters agree?", size="sm", elem_id="agree")
                self.preview = gr.Button("What would a snapshot hide?", size="sm", elem_id="preview")
                self.back_up = gr.Button("Back up now", size="sm", elem_id="back-up")
            self.shown = gr.HTML(padding=False, elem_id="data-shown")
            gr.Markdown("Erase a person: every word of theirs leaves the store, snapshots and backups, for ever.")
            with gr.Row(elem_classes="zl-end"):
                self.person = gr.Textbox(label="Name", elem_id="erase-name")
                self.again = gr.Textbox(label="The name once more", elem_id="erase-again")
                self.erase = gr.Button("Erase", variant="stop", elem_id="erase")

    def _wire(self) -> None:
        once: dict[str, Any] = {"trigger_mode": "once", "api_visibility": "private"}
        self.count.click(lambda: self._said(lambda: counted(self.data.statistics())), None, self.shown, **once)
        self.agree.click(lambda: self._said(lambda: agreed(self.data.agreement())), None, self.shown, **once)
        self.preview.click(lambda: self._said(lambda: hidden(self.data.redaction_preview())), None, self.shown, **once)
        self.back_up.click(
            lambda: self._said(lambda: _paragraph(f"Backed up to {self.data.back_up()['path']}.")),
            None, self.shown, **once,
        )  # fmt: skip
        self.erase.click(self._erase, [self.person, self.again], self.shown, **once)

    def _erase(self, person: str, again: str) -> str:
        if not person.strip() or person != again:
            return _paragraph("Write the same name in both fields: this cannot be undone.")
        return self._said(lambda: _paragraph(self.data.erase(person)["sentence"]))

    def _said(self, action: Callable[[], str]) -> str:
        try:
            return action()
        except self.refusals as error:
            return f"<p><b>{escape(str(error))}</b></p>"


def counted(found: Statistics) -> str:
    """The counts as a table of words and numbers."""
    position = (
        "" if found.first_share is None
        else f"; the answer shown first won {found.first_share:.0%} of the decided ones"
    )  # fmt: skip
    lines = [
        (f"picks that stand{position}", found.counts.picks),
        *((f"of them: {pick.replace('_', ' ')}", number) for pick, number in found.picks.items() if number),
        *((f"preferences from {source}", number) for source, number in found.counts.preferences.items() if number),
        ("to train on", found.counts.train),
        ("held out to judge by", found.counts.held_out),
        *((f"thumbs {way}", number) for way, number in found.ratings.items()),
        ("rewritten answers", found.edits),
        *((f"picks by {rater}", number) for rater, number in found.raters.items()),
    ]
    return _table("".join(f"<tr><td>{escape(what)}</td><td>{number:,}</td></tr>" for what, number in lines))


def agreed(found: Mapping[str, Any]) -> str:
    """What the agreement is, in words, and how many pairs were judged in opposite ways."""
    pairs = "pair was" if found["contradictions"] == 1 else "pairs were"
    return _paragraph(found["sentence"]) + _paragraph(f"{found['contradictions']} {pairs} judged in opposite ways.")


def hidden(found: Mapping[str, Any]) -> str:
    """What a snapshot would hide, every value masked."""
    state = (
        "E-mail addresses, phone numbers and keys are hidden in every snapshot."
        if found["redact"]
        else "Nothing is hidden: ZLOOP_REDACT is off."
    )
    if not found["found"]:
        return _paragraph(f"{state} Nothing of the kind is in the preferences of now.")
    rows = "".join(
        f"<tr><td>{escape(one['kind'])}</td><td>{escape(one['masked'])}</td><td>{escape(one['context'])}</td></tr>"
        for one in found["found"][:SHOWN]
    )
    return _paragraph(state) + _table(rows)


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _table(rows: str) -> str:
    return f'<div class="zl-scroll"><table class="zl-table"><tbody>{rows}</tbody></table></div>'
