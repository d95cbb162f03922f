"""The trial section of the admin page: what the live trial says, start and stop; and is it getting better?

Where it sits: components and wiring only; every action is a method of `TrialOperations`, but a promotion, which is
`Operations.promote`. It looks by itself every two seconds, and draws only what changed.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from chat_app.operations import Operations

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
SHOWN_VERSIONS = 24
HEIGHT, TOP, BOTTOM, LEFT, STEP = 240, 14, 44, 46, 74

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
        self.promote = gr.Button(visible=False, variant="primary", elem_id="promote-challenger")
        self.message = gr.Markdown(elem_id="trial-message")
        gr.Markdown("### Is it getting better?")
        self.strength = gr.HTML(padding=False, elem_id="strength")
        self.seen = gr.State("")
        self.timer = gr.Timer(EVERY_S)

    def _wire(self, page: gr.Blocks) -> None:
        view = [self.shown, self.version, self.start, self.stop, self.promote, self.strength, self.seen]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        page.load(self.look, None, view, **quiet)
        self.timer.tick(self.look_again, [self.seen], view, **quiet)
        acted = [self.message, *view]
        self.start.click(self.start_trial, [self.version, self.share], acted, trigger_mode="once", **quiet)
        self.stop.click(self.stop_trial, None, acted, trigger_mode="once", **quiet)
        self.promote.click(self.promote_challenger, None, acted, trigger_mode="once", **quiet)

    # --- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> Updates:
        """Everything the section shows, as it is now."""
        trials = self.trials.trials()
        newest = trials[0] if trials else None
        running = newest is not None and newest["state"] == "running"
        choices = [row["version"] for row in self.operations.version_rows() if row["state"] in MAY_BE_TRIED]
        proposed = proposal(newest, self.operations.champion())
        return {
            self.shown: trial_card(newest),
            self.version: gr.Dropdown(choices=choices, value=choices[-1] if choices else None),
            self.start: gr.Button(interactive=bool(choices) and not running),
            self.stop: gr.Button(interactive=running),
            self.promote: gr.Button(f"Promote {proposed}", visible=proposed is not None),
            self.strength: strength_shown(self.trials.strength()),
            self.seen: self._fingerprint(),
        }

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
            return self.look() | {self.message: f"**{version} is not on trial.** {error}"}
        said = f"{version} is shown against {begun['champion']} in {begun['share']:.0%} of the pairs from now on."
        return self.look() | {self.message: said}

    async def stop_trial(self) -> Updates:
        """End the running trial; the champion stays."""
        try:
            for one in self.trials.trials()[:1]:
                await self.trials.stop(one["trial_id"])
        except self.refusals as error:
            return self.look() | {self.message: f"**{error}**"}
        return self.look() | {self.message: "The trial is stopped; the champion stays."}

    async def promote_challenger(self) -> Updates:
        """Promote the challenger that the newest trial found better."""
        trials = self.trials.trials()
        version = proposal(trials[0] if trials else None, self.operations.champion())
        if version is None:
            return self.look() | {self.message: "There is nothing to promote any more."}
        try:
            champion, previous = await self.operations.promote(version, reason=trials[0]["ended_reason"])
        except self.refusals as error:
            return self.look() | {self.message: f"**{version} was not promoted.** {error}"}
        return self.look() | {self.message: f"{champion} answers from now on; before it was {previous}."}


def proposal(trial: Mapping[str, Any] | None, champion: str) -> str | None:
    """The version the newest trial proposes to promote: found better than what is still the champion."""
    if trial is None or trial["state"] != "better" or trial["champion"] != champion:
        return None
    return str(trial["challenger"])


def trial_card(trial: Mapping[str, Any] | None) -> str:
    """The newest trial: the bar, the badge, what its votes say, and whose votes they are."""
    if trial is None:
        return (
            '<div class="zl-card"><p>There was no live trial yet. A trial shows a version, blind, in a share of the '
            "pairs that people compare, and stops by itself as soon as their picks say that it is better, worse or not "
            "worth it. It never promotes.</p></div>"
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


def strength_shown(found: Mapping[str, Any]) -> str:
    """One sentence, one plot, and what it does not show."""
    judged = [row for row in found["versions"] if row["win_rate"] is not None]
    parts = [f'<p class="zl-health">{escape(found["sentence"])}</p>']
    if any(row["votes"] for row in judged):
        parts.append(f'<div class="zl-scroll">{strength_plot(judged[-SHOWN_VERSIONS:], found["reference"])}</div>')
    if found["votes"]:
        low, high = found["first_interval"]
        parts.append(
            f"<p><small>{found['votes']:,} blind picks. Between equals the answer shown first wins "
            f"{found['first_share']:.0%} ({low:.0%}–{high:.0%}) of the decided ones, and {found['tie_share']:.0%} are "
            "ties; neither counts for a version. Bars: 95% intervals. Filled: was promoted (▲ when).</small></p>"
        )
    strangers = [row for row in found["versions"] if row["win_rate"] is None]
    if strangers:
        named = ", ".join(escape(row["version"]) for row in strangers[-SHOWN_VERSIONS:])
        parts.append(f"<p><small>Cannot be compared, for want of picks: {named}.</small></p>")
    return f'<div class="zl-card">{"".join(parts)}</div>'


def strength_plot(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """The win rate of each version against the reference, in the order they were made, as an SVG."""
    bounds = [bound for row in rows for bound in row["interval"]]
    low, high = float(min(0.4, *bounds)), float(max(0.6, *bounds))
    width = LEFT + STEP * len(rows) + 8

    def y(rate: float) -> float:
        return round(TOP + (high - rate) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    marks = [
        f'<line x1="{LEFT}" x2="{width}" y1="{y(rate)}" y2="{y(rate)}" class="{"even" if rate == 0.5 else "grid"}"/>'
        f'<text x="{LEFT - 6}" y="{y(rate) + 4}" text-anchor="end">{rate:.0%}</text>'
        for rate in (step / 10 for step in range(11))
        if low <= rate <= high
    ]
    for index, row in enumerate(rows):
        x, rate, (bottom, top) = LEFT + STEP * (index + 0.5), row["win_rate"], row["interval"]
        interval = "the reference" if row["version"] == reference else f"{bottom:.0%}–{top:.0%} against {reference}"
        marks.append(
            f"<g><title>{escape(row['version'])}: {rate:.0%} ({escape(interval)}), {row['votes']} picks</title>"
            f'<line x1="{x}" x2="{x}" y1="{y(bottom)}" y2="{y(top)}" class="interval"/>'
            f'<circle cx="{x}" cy="{y(rate)}" r="5" class="{"champion" if row["promoted_at"] else "other"}"/>'
            f'<text x="{x}" y="{HEIGHT - 24}" text-anchor="middle">{escape(row["version"][:9])}</text>'
            f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle" class="when">{_marked(row)}</text></g>'
        )
    return (
        f'<svg class="zl-plot" role="img" aria-label="Win rate of each version against {escape(reference)}" '
        f'width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}">{"".join(marks)}</svg>'
    )


def _marked(row: Mapping[str, Any]) -> str:
    """When it was promoted, the last time."""
    return f"▲ {row['promoted_at'][-1][5:10]}" if row["promoted_at"] else ""


def _counted(votes: Mapping[str, int]) -> str:
    words = (("wins", "win", "wins"), ("ties", "tie", "ties"), ("losses", "loss", "losses"))
    return ", ".join(f"{votes[kind]} {one if votes[kind] == 1 else many}" for kind, one, many in words)


def _day(moment: str) -> str:
    return escape(moment[:16].replace("T", " "))
