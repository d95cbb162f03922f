"""The trial section of the admin page: what the live trial says, start and stop; and is it getting better?

Where it sits: components and wiring only; every action is a method of `TrialOperations`. A challenger found better is
proposed on top of the page (`proposals.py`). It looks by itself every two seconds, and draws only what changed.
"""

from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from chat_app.operations import Operations
from chat_app.ui.shown_text import inert
from chat_app.ui.strength import strength_shown

EVERY_S = 2.0
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
MAY_BE_TRIED = ("candidate", "retired", "rejected")
WORDS = {
    "running": ("running", "keep"),
    "better": ("better", "promote"),
    "worse": ("worse", "reject"),
    "futile": ("not worth it", "keep"),
    "max_votes": ("not enough evidence", "keep"),
    "stopped": ("stopped", "keep"),
    "promoted": ("promoted", "promote"),
    "overtaken": ("overtaken", "keep"),
    "failed": ("failed", "reject"),
}
"""State → what the badge says, and its colour."""

Updates = dict[Any, Any]


class TrialSection:
    """The section; build it inside the page's Blocks."""

    def __init__(self, operations: Operations, page: gr.Blocks, refusals: tuple[type[Exception], ...]) -> None:
        self.operations = operations
        self.trials = operations.trials
        self.refusals = refusals
        self._lay_out()
        self._wire(page)

    def _lay_out(self) -> None:
        gr.Markdown("### Live trial")
        self.shown = gr.HTML(padding=False, elem_id="trial")
        with gr.Row(elem_classes="zl-end"):
            self.version = gr.Dropdown([], label="Challenger", scale=2, filterable=False, elem_id="challenger")
            usual = self.operations.settings.trial_share
            self.share = gr.Dropdown(
                [(f"{share:.0%}", share) for share in sorted({*SHARES, usual})],
                value=usual,
                label="Share of the pairs",
                min_width=120,
                filterable=False,
            )
            self.start = gr.Button("Start live trial", elem_id="start-trial")
            self.stop = gr.Button("Stop", interactive=False, elem_id="stop-trial")
        self.message = gr.Markdown(elem_id="trial-message")
        gr.Markdown("### Is it getting better?")
        self.strength = gr.HTML(padding=False, elem_id="strength")
        self.seen = gr.State("")
        self.timer = gr.Timer(EVERY_S)

    def _wire(self, page: gr.Blocks) -> None:
        view = [self.shown, self.version, self.start, self.stop, self.strength, self.seen]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(self.look, None, view, **quiet)
        self.timer.tick(self.look_again, [self.seen], view, **quiet)
        acted = [self.message, *view]
        self.start.click(self.start_trial, [self.version, self.share], acted, trigger_mode="once", **quiet)
        self.stop.click(self.stop_trial, None, acted, trigger_mode="once", **quiet)

    # --- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> Updates:
        """Everything the section shows, as it is now."""
        trials = self.trials.trials()
        newest = trials[0] if trials else None
        running = newest is not None and newest["state"] == "running"
        choices = [row["version"] for row in self.operations.version_rows() if row["state"] in MAY_BE_TRIED]
        return {
            self.shown: trial_card(newest),
            self.version: gr.Dropdown(choices=choices, value=choices[-1] if choices else None),
            self.start: gr.Button(interactive=bool(choices) and not running),
            self.stop: gr.Button(interactive=running),
            self.strength: self._strength(),
            self.seen: self._fingerprint(),
        }

    def _strength(self) -> Any:
        try:
            return strength_shown(self.operations.strength())
        except self.refusals:  # others count already
            return gr.skip()

    def look_again(self, seen: str) -> Updates:
        """Redraw only what changed, so that nothing moves under the pointer; the strengths not for every vote."""
        now = self._fingerprint()
        if now == seen:
            return {self.seen: seen}
        if now.rpartition(" ")[0] == seen.rpartition(" ")[0]:
            return {self.shown: trial_card(next(iter(self.trials.trials()), None)), self.seen: now}
        return self.look()

    def _fingerprint(self) -> str:
        """The versions, the champion, the newest trial; last, how many picks there are."""
        versions = len(self.operations.version_rows())
        return f"{versions} {self.operations.champion()} {self.trials.latest()} {self.operations.status().counts.picks}"

    # --- acting ----------------------------------------------------------------------------------------------------

    async def start_trial(self, version: str | None, share: float) -> Updates:
        """Show the chosen version against the champion."""
        if not version:
            return {self.message: "There is no version to try yet: retrain first."}
        try:
            begun = await self.trials.start(version, share=share, reason="started on the admin page")
        except self.refusals as error:
            return self.look() | {self.message: f"**{inert(version)} is not on trial.** {inert(error)}"}
        champion = inert(begun["champion"])
        said = f"{inert(version)} is shown against {champion} in {begun['share']:.0%} of the pairs from now on."
        if against := self.operations.against(version):
            said = f"{said} In spite of this: {inert(against)}"
        return self.look() | {self.message: said}

    async def stop_trial(self) -> Updates:
        """End the running trial; the champion stays."""
        try:
            for one in self.trials.trials()[:1]:
                await self.trials.stop(one["trial_id"])
        except self.refusals as error:
            return self.look() | {self.message: f"**{inert(error)}**"}
        return self.look() | {self.message: "The trial is stopped; the champion stays."}


def trial_card(trial: Mapping[str, Any] | None) -> str:
    """The newest trial: the bar, the badge, what its votes say, and whose votes they are."""
    if trial is None:
        return (
            '<div class="zl-card"><p>There was no live trial yet. A trial shows a version, blind, in a share of the '
            "pairs that people compare, and stops by itself as soon as their picks say that it is better, worse or not "
            "worth it. What was found better is proposed on top of this page.</p></div>"
        )
    word, colour = WORDS[trial["state"]]
    votes = trial["votes"]
    total = sum(votes.values())
    bar = ""
    if total:
        parts = (
            f'<i class="{kind}" style="width:{100 * votes[kind] / total:.1f}%" title="{votes[kind]} {kind}"></i>'
            for kind in ("wins", "ties", "losses")
        )
        bar = f'<div class="zl-bar">{"".join(parts)}</div>'
    sentences = [trial["sentence"], *_apart(trial)]
    if trial["ended_reason"] not in ("", trial["sentence"]):
        sentences.insert(0, trial["ended_reason"])
    when = f"{trial['share']:.0%} of the pairs, since {_day(trial['started_at'])}"
    if trial["ended_at"]:
        when = f"{when}, until {_day(trial['ended_at'])}"
    return (
        f'<div class="zl-card"><h4>{escape(trial["challenger"])} against {escape(trial["champion"])} '
        f'<span class="zl-decision {colour}">{word}</span></h4><small>{when}</small>{bar}'
        + "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
        + "</div>"
    )


def _apart(trial: Mapping[str, Any]) -> list[str]:
    """Whose votes, and in which place: said where there are any."""
    if not sum(trial["votes"].values()):
        return []
    said = [f"Shown first: {_counted(trial['shown_first'])}. Shown second: {_counted(trial['shown_second'])}."]
    own, others, apart = trial["by_who_trained_it"], trial["by_others"], trial.get("by_quarantined") or {}
    if sum(apart.values()):
        said.append(f"Cast in quarantine, not counted: {_counted(apart)}.")
    if own is None:
        said.append("Who trained it is no longer known: its snapshot is gone.")
    else:
        said.append(f"By those whose preferences trained it: {_counted(own)}. By others: {_counted(others)}.")
    return said


def _counted(votes: Mapping[str, int]) -> str:
    words = (("wins", "win", "wins"), ("ties", "tie", "ties"), ("losses", "loss", "losses"))
    return ", ".join(f"{votes[kind]} {one if votes[kind] == 1 else many}" for kind, one, many in words)


def _day(moment: str) -> str:
    return escape(moment[:16].replace("T", " "))
