"""The admin page's "Show command": how the newest run is trained, to do the same by hand.

Where it sits: components and wiring only; what they show is `Operations.command`. It is asked for when a person opens
the section, not every second.
"""

from typing import Any

import gradio as gr

from chat_app.operations import Operations
from chat_app.ui.shown_text import inert

PREPARE = "`zloop train --show-command` makes a directory for a new one and starts nothing."


class CommandSection:
    """The section; build it inside the page's Blocks, below the run."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        with gr.Accordion("Show command", open=False, elem_id="command") as section:
            self.note = gr.Markdown(elem_id="command-note")
            code: dict[str, Any] = {"visible": False, "max_lines": 24}
            self.lines = gr.Code(language="shell", label="The line", elem_id="command-lines", **code)
            self.accelerate = gr.Code(language="yaml", label="RUN_DIR/accelerate.yaml", **code)
            self.recipe = gr.Code(language="yaml", label="The recipe, resolved", **code)
            self.submission = gr.Code(language="shell", label="What the launcher submits", **code)
        section.expand(
            self._show,
            None,
            [self.note, self.lines, self.accelerate, self.recipe, self.submission],
            show_progress="hidden",
            api_visibility="private",
        )

    def _show(self) -> dict[Any, Any]:
        newest = next(iter(self.operations.runs()), None)
        if newest is None:
            return {self.note: f"There is no run yet. {PREPARE}"}
        command = self.operations.command(newest.run_id)
        several = " One line for each machine, the first where the chat runs." if len(command["lines"]) > 1 else ""
        return {
            self.note: f"{inert(newest.run_id)}: launcher **{inert(command['launcher'])}**, "
            f"strategy **{inert(command['strategy'])}**."
            f"{several} A finished training is not done again: {PREPARE}",
            self.lines: gr.Code(value="\n".join(command["lines"]), visible=True),
            self.accelerate: gr.Code(value=command["accelerate"], visible=True),
            self.recipe: gr.Code(value=command["recipe"], visible=True),
            self.submission: gr.Code(value=command["submission"] or "", visible=command["submission"] is not None),
        }
