"""Beside the Start button: what a run would take; on the card of a run: what it took.

Where it sits: components and wiring only. It is asked for when the page opens and when another choice is made, not
every second: counting the preferences takes a moment where there are many.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from chat_app.operations import Operations
from feedback_store.errors import NotEnoughPreferences


class PreflightLine:
    """One line below the button; build it inside the page's Blocks."""

    def __init__(
        self,
        operations: Operations,
        refusals: tuple[type[Exception], ...],
        recipe: gr.Dropdown,
        steps: gr.Number,
        processes: gr.Number,
    ) -> None:
        self.operations = operations
        self.refusals = refusals
        self.chosen = [recipe, steps, processes]
        self.line = gr.HTML(padding=False, elem_id="preflight")

    def show_on(self, page: gr.Blocks, *news: Any) -> None:
        """Fill it when the page opens, when another choice is made, and when one of the components `news` changes."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
        page.load(self.look, self.chosen, self.line, **quiet)
        for component in (*self.chosen, *news):
            component.change(self.look, self.chosen, self.line, **quiet)

    def look(self, recipe: str, steps: float | None, processes: float | None) -> str:
        """The sentence, with its warning or refusal."""
        try:
            found = self.operations.preflight(
                recipe=recipe,
                max_steps=int(steps) if steps else None,
                num_processes=int(processes) if processes else None,
            )
        except NotEnoughPreferences:
            return ""  # the page says what to do without any
        except self.refusals as error:
            return f"<p>{escape(str(error))}</p>"
        return preflight_sentences(found)


def preflight_sentences(found: Mapping[str, Any]) -> str:
    """What a run would take, in words."""
    if found["refusal"]:
        return f"<p><b>{escape(found['refusal'])}</b></p>"
    warning = f" <b>{escape(found['warning'])}</b>" if found["warning"] else ""
    basis = f"<br><small>{escape(found['estimate']['basis'])}</small>" if found["estimate"] else ""
    return f"<p>{escape(found['sentence'])}{warning}{basis}</p>"


def preflight_line(body: Mapping[str, Any]) -> str:
    """On the card of a run: what was expected, and what happened."""
    said = body.get("preflight")
    if not said:
        return ""
    expected = f"expected {_minutes(said['total_s'])} and {_gb(said['memory_bytes'])}"
    actual = said["actual"]
    measured = ((actual["total_s"], _minutes), (actual["memory_bytes"], _gb))
    took = [say(value) for value, say in measured if value is not None]
    return f"<p><small>{escape(expected + (', took ' + ' and '.join(took) if took else ''))}</small></p>"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
