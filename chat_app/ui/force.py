"""The second step of a promotion or a roll back that something speaks against: what that is, and why all the same.

Where it sits: components and words only; `admin.py` opens it where `Operations` asks for force, and wires its buttons.
"""

from html import escape
from typing import Any, NamedTuple

import gradio as gr

from chat_app.operations import NeedsForce


class Asked(NamedTuple):
    """What was asked for: a version to promote, None to roll back; and by whom."""

    version: str | None
    by: str


class ForceStep:
    """The step; build it inside the page's Blocks, where its buttons are to stand."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="force-step", elem_classes="zl-card zl-force") as self.box:
            self.said = gr.HTML(padding=False, elem_id="force-said")
            self.reason = gr.Textbox(
                label="Why all the same?", info="Your reason stands in the history, beside what speaks against it.",
                max_length=2_000, lines=2, autofocus=True, elem_id="force-reason",
            )  # fmt: skip
            with gr.Row():
                self.leave = gr.Button("Leave it", elem_id="force-leave")
                self.go = gr.Button("Promote", variant="stop", elem_id="force-go")
        self.asked = gr.State(None)

    @property
    def components(self) -> list[Any]:
        """What `shown` and `hidden` change."""
        return [self.box, self.said, self.reason, self.leave, self.go, self.asked]

    def shown(self, asked: Asked, error: NeedsForce, champion: str) -> dict[Any, Any]:
        """Open, with what speaks against the version."""
        verb = "Promote" if asked.version is not None else "Roll back to"
        head = f"<h4>{verb} {escape(error.version)} against the evidence?</h4>"
        return {
            self.box: gr.Column(visible=True),
            self.said: f"{head}<p>{escape(error.against)}</p>",
            self.reason: "",
            self.leave: gr.Button(f"Keep {champion}"),
            self.go: gr.Button(f"{verb} {error.version} all the same"),
            self.asked: asked,
        }

    def hidden(self) -> dict[Any, Any]:
        """Closed."""
        return {self.box: gr.Column(visible=False), self.asked: None, self.reason: ""}
