"""The schedule section of the admin page: when runs start by themselves, and what was decided lately.

Where it sits: components and wiring only, in a part of the page that is closed until it is needed; every action is a
method of `Scheduling`.
"""

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr

from chat_app.scheduling import Scheduling

BY = "local"
SHOWN = 10
WHAT = {"cron": "by the clock", "count": "by number"}


class ScheduleSection:
    """The section; build it inside the page's Blocks."""

    def __init__(self, scheduling: Scheduling, refusals: tuple[type[Exception], ...]) -> None:
        self.scheduling = scheduling
        self.refusals = refusals
        self._lay_out()
        self._wire()

    def _lay_out(self) -> None:
        with gr.Accordion("Schedule: when retrains start by themselves", open=False, elem_id="schedule") as self.box:
            self.shown = gr.HTML(padding=False, elem_id="schedule-shown")
            with gr.Row():
                self.cron = gr.Textbox(
                    label="Times", info="Cron: minute hour day month weekday. Empty: none.", placeholder="0 2 * * *",
                    min_width=160, elem_id="schedule-cron",
                )  # fmt: skip
                self.at_least = gr.Number(
                    1, label="Fewest new preferences", info="With fewer, a time is skipped.", precision=0, minimum=0,
                    min_width=160, elem_id="schedule-at-least",
                )  # fmt: skip
                self.every = gr.Number(
                    0, label="Start after this many new", info="0: not by number.", precision=0, minimum=0,
                    min_width=160, elem_id="schedule-every",
                )  # fmt: skip
            with gr.Row():
                self.quiet = gr.Textbox(
                    label="Quiet hours", info="No start in them. Empty: none.", placeholder="08:00-18:00",
                    min_width=160, elem_id="schedule-quiet",
                )  # fmt: skip
                self.zone = gr.Textbox(
                    label="Time zone", info="Of times and quiet hours.", min_width=160, elem_id="schedule-zone"
                )
            with gr.Row():
                self.save = gr.Button("Save schedule", variant="primary", size="sm", elem_id="schedule-save")
                self.off = gr.Button("Switch off", size="sm", elem_id="schedule-off")
                self.reset = gr.Button("Back to the settings", size="sm", elem_id="schedule-reset")

    def _wire(self) -> None:
        once: dict[str, Any] = {"trigger_mode": "once", "api_visibility": "private"}
        fields = [self.cron, self.at_least, self.every, self.quiet, self.zone]
        view = [self.shown, *fields]
        self.box.expand(lambda: self._said(self.scheduling.state), None, view, **once)
        self.save.click(self._save, fields, view, **once)
        self.off.click(
            lambda: self._said(lambda: self.scheduling.change({"cron": None, "every": 0}, BY)), None, view, **once
        )
        self.reset.click(lambda: self._said(self.scheduling.reset), None, view, **once)

    def _save(self, cron: str, at_least: float | None, every: float | None, quiet: str, zone: str) -> dict[Any, Any]:
        changes = {
            "cron": cron.strip() or None,
            "at_least": int(at_least or 0),
            "every": int(every or 0),
            "quiet": quiet.strip() or None,
            "time_zone": zone.strip(),
        }
        return self._said(lambda: self.scheduling.change(changes, BY))

    def _said(self, action: Callable[[], Mapping[str, Any]]) -> dict[Any, Any]:
        """The section as it is after `action`; what was refused is said above it, and the fields stay as typed."""
        try:
            state = action()
        except self.refusals as error:
            return {self.shown: f"<p><b>{escape(str(error))}</b></p>" + schedule_table(self.scheduling.state())}
        return {
            self.shown: schedule_table(state),
            self.cron: state["cron"] or "",
            self.at_least: state["at_least"],
            self.every: state["every"],
            self.quiet: state["quiet"] or "",
            self.zone: state["time_zone"],
        }


def schedule_table(state: Mapping[str, Any]) -> str:
    """When the next run starts, in words, and the newest decisions."""
    by = f"Changed by {state['changed_by']}." if state["changed_by"] else "As the settings say."
    head = f"<p><b>{escape(state['outlook'])}</b> <small>{escape(by)}</small></p>"
    if not state["decisions"]:
        return head + "<p>Nothing was decided yet.</p>"
    rows = "".join(
        f"<tr><td>{escape(one['at'][:16].replace('T', ' '))}</td><td>{WHAT.get(one['trigger'], '')}</td>"
        f"<td>{'started' if one['started'] else 'skipped'}</td><td>{escape(one['sentence'])}</td></tr>"
        for one in state["decisions"][:SHOWN]
    )
    return (
        f'{head}<div class="zl-scroll"><table class="zl-table"><thead><tr><th>When (UTC)</th><th></th><th></th>'
        f"<th>Why</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )
