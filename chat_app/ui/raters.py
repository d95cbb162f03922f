"""The raters section of the admin page: who looks suspicious and why, quarantine, retrain without.

Where it sits: components and wiring only, in a part of the page that is closed until it is needed; every action is a
method of `RaterOperations`, but the run without a rater, which `admin.py` starts as it starts all others.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from chat_app.operations import Operations

HEADS = (
    "Rater", "State", "Picks", "Agrees with others", "Gold pairs right", "First answer taken", "Seconds a pick",
    "Weight by agreement", "Of the next snapshot", "Last verdict without them",
)  # fmt: skip

Updates = dict[Any, Any]


class RaterSection:
    """The section; build it inside the page's Blocks. `retrain` and `rater` are wired by the page."""

    def __init__(self, operations: Operations, refusals: tuple[type[Exception], ...]) -> None:
        self.raters = operations.raters
        self.refusals = refusals
        with gr.Accordion("Raters: on whom can one rely?", open=False, elem_id="raters"):
            self.list = gr.Button("List the raters", size="sm", elem_id="list-raters")
            self.shown = gr.HTML(padding=False, elem_id="raters-shown")
            with gr.Row(elem_classes="zl-end"):
                self.rater = gr.Dropdown([], label="Rater", filterable=False, elem_id="rater")
                self.reason = gr.Textbox(label="Why (kept with it)", max_length=2000, elem_id="quarantine-reason")
            with gr.Row():
                self.quarantine = gr.Button("Quarantine", variant="stop", elem_id="quarantine")
                self.lift = gr.Button("Lift the quarantine", elem_id="lift")
                self.retrain = gr.Button("Retrain without", elem_id="retrain-without")
        view = [self.shown, self.rater]
        once: dict[str, Any] = {"trigger_mode": "once", "api_visibility": "private"}
        self.list.click(self.look, None, view, **once)
        self.quarantine.click(
            lambda rater, why: self._set(rater, why, lift=False), [self.rater, self.reason], view, **once
        )
        self.lift.click(lambda rater, why: self._set(rater, why, lift=True), [self.rater, self.reason], view, **once)

    def look(self, said: str = "") -> Updates:
        """The list as it is now."""
        try:
            found = self.raters.raters()
        except self.refusals as error:
            return {self.shown: f"<p><b>{escape(str(error))}</b></p>"}
        names = [row["rater"] for row in found["raters"]]
        return {
            self.shown: raters_shown(found, said),
            self.rater: gr.Dropdown(choices=names, value=names[0] if names else None),
        }

    def _set(self, rater: str | None, reason: str, *, lift: bool) -> Updates:
        if not rater:
            return {self.shown: "<p><b>List the raters and choose one first.</b></p>"}
        try:
            self.raters.quarantine(rater, lift=lift, reason=reason)
        except self.refusals as error:
            return self.look(str(error))
        return self.look(
            f"{rater} may teach again."
            if lift
            else f"{rater} is in quarantine: retrain, and no version learns from them."
        )


def raters_shown(found: Mapping[str, Any], said: str = "") -> str:
    """One sentence, what looks suspicious, the table."""
    parts = [f"<p><b>{escape(said)}</b></p>" if said else "", f'<p class="zl-health">{escape(found["sentence"])}</p>']
    suspected = [row for row in found["raters"] if row["suspicions"]]
    parts += [f"<p><b>{escape(row['rater'])}</b>: {escape(' '.join(row['suspicions']))}</p>" for row in suspected]
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    lines = "".join(_line(row) for row in found["raters"])
    parts.append(
        f'<div class="zl-scroll"><table class="zl-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
    last = found["last_evaluation"]
    if last is not None:
        parts.append(f"<p><small>The last verdict is that of {escape(last['version'])} against "
                     f"{escape(last['champion'])}: wins and losses without the pairs of each.</small></p>")  # fmt: skip
    return "".join(parts)


def _line(row: Mapping[str, Any]) -> str:
    state = "in quarantine" if row["state"] == "quarantined" else "suspicious" if row["suspicions"] else "active"
    if row["reason"]:
        state += f": {row['reason']}"
    effect = row["effect"]
    without = "" if effect is None else (
        f"{effect['wins_without']} : {effect['losses_without']}, p {effect['p_value_without']:.2g}"
    )  # fmt: skip
    cells: Sequence[str] = (
        escape(row["rater"]), escape(state), f"{row['picks']:,}",
        _share(row["agreement"]), _share(row["gold"]), _share(row["first"]),
        "" if row["median_s"] is None else f"{row['median_s']:.1f}", f"{row['weight']:.2f}",
        f"{row['next_share']:.0%}", without,
    )  # fmt: skip
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _share(found: Mapping[str, Any]) -> str:
    if not found["of"]:
        return ""
    low, high = found["interval"]
    return f"{found['count']}&nbsp;of&nbsp;{found['of']}<br><small>{low:.0%}–{high:.0%}</small>"
