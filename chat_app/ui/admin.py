"""The admin page: what is served, what waits, one next step; train and watch; versions; import.

Where it sits: components and wiring only; every action is a method of `Operations`. A run lives in its run directory,
not in this page: closing the tab or restarting the server loses nothing, and any number of tabs watch the same run.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from chat_app.against import is_reason
from chat_app.operations import NeedsForce, NeedsMaintenance, Operations, Refused, RunHandle, Status
from chat_app.serving.engine import EngineError
from chat_app.ui.command import CommandSection
from chat_app.ui.curves import LOG_LINES, LiveCurves
from chat_app.ui.data import DataSection
from chat_app.ui.force import Asked, ForceStep
from chat_app.ui.preflight import PreflightLine, preflight_line
from chat_app.ui.proposals import ProposalSection
from chat_app.ui.raters import RaterSection
from chat_app.ui.schedule import ScheduleSection
from chat_app.ui.shown_text import inert
from chat_app.ui.theme import navigation
from chat_app.ui.trial import TrialSection
from feedback_store.errors import StoreError
from feedback_store.practice import TASTES
from feedback_store.records import OWN_SOURCES

EVERY_S = 1.0
EVENTS = 10
ENDED = ("finished", "failed", "cancelled")

Updates = dict[Any, Any]


def build_admin(operations: Operations, refusals: tuple[type[Exception], ...]) -> gr.Blocks:
    """The page, ready to mount at `/admin`. `refusals`: errors whose sentence is shown to the person."""
    with gr.Blocks(title="Zephyr Loop – Admin", analytics_enabled=False) as page:
        AdminPage(operations, page, (*refusals, Refused, StoreError, EngineError))
    return page


class AdminPage:
    """The components of the page and the handlers that move them."""

    def __init__(self, operations: Operations, page: gr.Blocks, refusals: tuple[type[Exception], ...]) -> None:
        self.operations = operations
        self.refusals = refusals
        self._lay_out(page)
        self._wire(page)

    def _lay_out(self, page: gr.Blocks) -> None:
        self.bar = gr.HTML(padding=False)
        self.proposals = ProposalSection(self.operations)
        self.overview = gr.HTML(padding=False, elem_id="overview")
        self.seen = gr.State("")
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown("### Train")
                self.recipe = gr.Dropdown(
                    _recipe_choices(self.operations.recipes()), label="Recipe", filterable=False, elem_id="recipe"
                )
                with gr.Row():
                    self.steps = gr.Number(0, label="Steps", info="0: all it needs", precision=0, min_width=90)
                    self.processes = gr.Number(0, label="Processes", info="0: automatic", precision=0, min_width=110)
                with gr.Row():
                    self.start = gr.Button("Start retrain", variant="primary", elem_id="start-retrain")
                    self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-run")
                    self.resume = gr.Button("Resume", visible=False, elem_id="resume-run")
                self.preflight = PreflightLine(self.operations, self.refusals, self.recipe, self.steps, self.processes)
            with gr.Column(min_width=320):
                gr.Markdown("### Practice: teach it a taste")
                self.taste = gr.Radio(
                    [(taste.label, name) for name, taste in TASTES.items()], value=next(iter(TASTES)), label="Taste",
                    info="The whole loop in minutes, on prepared pairs kept apart from real ones. Roll back undoes it.",
                )  # fmt: skip
                self.practise = gr.Button("Start practice", elem_id="start-practice")
        self.message = gr.Markdown(elem_id="message-line")
        self.run = gr.HTML(padding=False, elem_id="run")
        self.curves = LiveCurves()
        CommandSection(self.operations)
        with gr.Row():
            self.promote_newest = gr.Button("Promote", visible=False, elem_id="promote-newest")
        self.force = ForceStep()
        gr.Markdown("### Versions")
        self.versions = gr.HTML(padding=False, elem_id="versions")
        with gr.Row(elem_classes="zl-end"):
            self.version = gr.Dropdown([], label="Version", scale=2, filterable=False)
            self.promote = gr.Button("Promote", elem_id="promote")
            self.rollback = gr.Button("Roll back", elem_id="rollback")
        self.history = gr.HTML(padding=False, elem_id="history")
        self.without_room = gr.State(None)  # what was asked for where two models did not fit
        self.maintenance = gr.Button(visible=False, variant="stop", elem_id="maintenance")
        TrialSection(self.operations, page, self.refusals)
        self.raters = RaterSection(self.operations, self.refusals)
        gr.Markdown("### Import preferences")
        with gr.Row(elem_classes="zl-end"):
            self.source = gr.Textbox(
                label="A file in a folder for imports (data/imports), or a hub id", scale=4,
                placeholder="preferences.jsonl",
                elem_id="import-source",
            )  # fmt: skip
            self.format = gr.Dropdown(
                self.operations.data.import_formats(), value="auto", label="Format", min_width=120, filterable=False
            )
            self.import_ = gr.Button("Import", elem_id="import")
        self.upload = gr.UploadButton(
            "Upload a file instead", file_types=[".jsonl", ".json", ".parquet", ".csv", ".gz"], size="sm"
        )
        self.imported = gr.Markdown(elem_id="imported")
        ScheduleSection(self.operations.scheduling, self.refusals)
        DataSection(self.operations.data, self.refusals)
        self.timer = gr.Timer(EVERY_S)

    def _wire(self, page: gr.Blocks) -> None:
        view = [
            self.bar, *self.proposals.components, self.overview, self.run, *self.curves.components, self.promote_newest,
            self.versions, self.version, self.history, self.cancel, self.resume, self.start, self.practise,
            self.rollback, self.seen,
        ]  # fmt: skip
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        by = self.proposals.by
        page.load(self.look, None, view, **quiet)
        self.preflight.show_on(page, self.imported, self.versions)
        self.timer.tick(self.look_again, [self.seen], view, **quiet)
        self.start.click(
            self.start_retrain, [self.recipe, self.steps, self.processes, by], [self.message, *view],
            trigger_mode="once", **quiet,
        )  # fmt: skip
        self.practise.click(self.start_practice, [self.taste, by], [self.message, *view], trigger_mode="once", **quiet)
        self.cancel.click(self.cancel_run, None, [self.message, *view], **quiet)
        self.resume.click(self.resume_run, None, [self.message, *view], trigger_mode="once", **quiet)
        swapped = [self.message, self.without_room, self.maintenance, *self.force.components, *view]
        proposed, decided = [self.proposals.version, by], [self.proposals.message, *swapped]
        self.proposals.promote.click(self.promote_proposed, proposed, decided, trigger_mode="once", **quiet)
        self.proposals.dismiss.click(self.dismiss_proposed, proposed, decided, trigger_mode="once", **quiet)
        self.promote.click(self.promote_version, [self.version, by], swapped, trigger_mode="once", **quiet)
        self.promote_newest.click(self.promote_latest, [by], swapped, trigger_mode="once", **quiet)
        self.rollback.click(self.roll_back, None, swapped, trigger_mode="once", **quiet)
        self.force.go.click(
            self.go_against, [self.force.asked, self.force.reason], swapped, trigger_mode="once", **quiet
        )
        self.force.leave.click(self.leave_it, None, swapped, **quiet)
        self.maintenance.click(self.swap_in_turn, [self.without_room], swapped, trigger_mode="once", **quiet)
        self.raters.retrain.click(
            self.retrain_without,
            [self.recipe, self.raters.rater, by],
            [self.message, *view],
            trigger_mode="once",
            **quiet,
        )
        self.import_.click(
            self.import_preferences, [self.source, self.format], [self.imported, *view], trigger_mode="once",
            show_progress="full", api_visibility="private",
        )  # fmt: skip
        self.upload.upload(
            self.import_preferences, [self.upload, self.format], [self.imported, *view], show_progress="full",
            api_visibility="private",
        )  # fmt: skip

    # --- looking ---------------------------------------------------------------------------------------------------

    def look(self) -> Updates:
        """Everything the page shows, as it is now."""
        status = self.operations.status()
        newest = self._shown_run()
        body = self.operations.run_body(newest) if newest is not None else None
        rows = self.operations.version_rows()
        active = body is not None and body["state"] not in ENDED
        lines = newest.metrics() if newest is not None else []
        others = [row["version"] for row in rows if row["version"] != status.champion]
        return {
            self.bar: navigation("Admin", status),
            **self.proposals.look(),
            self.overview: overview(status, body, self._worth(status)),
            self.run: run_card(body) if body is not None else "",
            **self.curves.look(lines, newest.log_tail(LOG_LINES) if newest is not None else []),
            self.promote_newest: self._promote_button(body, status, self._against(body["version"] if body else None)),
            self.versions: versions_table(rows),
            self.history: history_list(self.operations.history()),
            self.version: gr.Dropdown(choices=others, value=others[-1] if others else None),
            self.cancel: gr.Button(interactive=active),
            self.resume: gr.Button(visible=body is not None and body["state"] in ("failed", "cancelled")),
            self.start: gr.Button(interactive=not active),
            self.practise: gr.Button(interactive=not active),
            self.rollback: gr.Button(interactive=self.operations.rollback_target() is not None),
            self.seen: self._fingerprint(),
        }

    def look_again(self, seen: str) -> Updates:
        """Each second: redraw only what changed, so that nothing moves under the pointer."""
        return {self.seen: seen} if self._fingerprint() == seen else self.look()

    def _fingerprint(self) -> str:
        run = self._shown_run()
        newest = run.as_body() if run is not None else {}
        newest.pop("eta_s", None)
        status = self.operations.status()
        return repr(
            (
                newest,
                status.champion,
                self.operations.trials.challenger(),
                status.serving,
                status.new_preferences,
                status.counts,
                status.problem,
                status.watch,
                self.proposals.fingerprint(),
            )
        )

    def _worth(self, status: Status) -> str:
        """The estimate in a sentence; nothing while there is nothing to learn from, or where it cannot be had."""
        if not status.counts.train:
            return ""
        try:
            return str(self.operations.watching.worth()["sentence"])
        except self.refusals:
            return ""

    def _against(self, version: str | None) -> str | None:
        """What speaks against a version; nothing where its files are damaged: a promotion then says how."""
        try:
            return None if version is None else self.operations.against(version)
        except self.refusals:
            return None

    @staticmethod
    def _promote_button(body: Mapping[str, Any] | None, status: Status, against: str | None = None) -> gr.Button:
        """With "anyway" where the evidence is not enough; with dots where a second step asks for a reason."""
        if body is None or body["version"] in (None, status.champion):
            return gr.Button(visible=False)
        decision = body["verdict"]["decision"] if body["verdict"] else "keep"
        anyway = "" if decision == "promote" and body["version"] not in status.taken_back else " anyway"
        anyway = anyway if against is None else " anyway…"
        return gr.Button(
            f"Promote {body['version']}{anyway}", visible=True, variant="primary" if not anyway else "secondary"
        )

    # --- acting ----------------------------------------------------------------------------------------------------

    def start_retrain(self, recipe: str, steps: float | None, processes: float | None, by: str = "") -> Updates:
        """Start a run on the real preferences."""
        return self._acted(
            lambda: _named(
                self.operations.start_run(
                    recipe=recipe, max_steps=_whole(steps), num_processes=_whole(processes), by=by
                )
            ),
            "Started {}. It goes on when you close this page.",
        )

    def retrain_without(self, recipe: str, rater: str | None, by: str = "") -> Updates:
        """Start a run on the real preferences of everybody but one."""
        if not rater:
            return {self.message: "Choose a rater first."}
        return self._acted(
            lambda: (
                f"{_named(self.operations.start_run(recipe=recipe, without=[rater], by=by))}, without {_literal(rater)}"
            ),
            "Started {}. It goes on when you close this page.",
        )

    def start_practice(self, taste: str, by: str = "") -> Updates:
        """Start a practice run."""
        return self._acted(
            lambda: _named(self.operations.start_run(practice_taste=taste, by=by)),
            "Practice started as {}. It goes on when you close this page.",
        )

    def cancel_run(self) -> Updates:
        """Cancel the active run."""
        return self._acted(
            lambda: next(
                (self.operations.cancel_run(run.run_id).run_id for run in self.operations.runs() if run.is_active),
                "nothing, as no run is active",
            ),
            "Cancelled {}.",
        )

    def resume_run(self) -> Updates:
        """Go on with the run that is shown."""
        run = self._shown_run()
        return self._acted(
            lambda: self.operations.resume_run(run.run_id).run_id if run is not None else "nothing, as there is no run",
            "Resumed {} from its last checkpoint.",
        )

    def _shown_run(self) -> RunHandle | None:
        """The active run, which may be an older one that was resumed, else the newest."""
        runs = self.operations.runs()
        return next((run for run in runs if run.is_active), runs[0] if runs else None)

    async def promote_version(self, version: str | None, by: str = "") -> Updates:
        """Make the chosen version the champion."""
        return await self._swap(version, by) if version else {self.message: "Choose a version first."}

    async def promote_proposed(self, version: str | None, by: str = "") -> Updates:
        """Make the proposed version the champion, for the reason it is proposed for."""
        if version is None:
            return {}
        return self._said_above(await self._swap(version, by, self.proposals.sentence_of(version)))

    def dismiss_proposed(self, version: str | None, by: str = "") -> Updates:
        """Propose a version no longer."""

        def dismiss() -> str | None:
            if version is not None:
                self.operations.dismiss(version, by=by)
            return version

        return self._said_above(self._acted(dismiss, "{} is not proposed any more; the champion stays."))

    def _said_above(self, updates: Updates) -> Updates:
        """What was said stands beside the buttons of the proposal."""
        return {**updates, self.proposals.message: updates[self.message], self.message: ""}

    async def promote_latest(self, by: str = "") -> Updates:
        """Make the newest run's version the champion."""
        versions = [body["version"] for run in self.operations.runs()[:1] if (body := run.as_body())["version"]]
        return await self.promote_version(versions[0] if versions else None, by)

    async def roll_back(self) -> Updates:
        """Go back to the champion before."""
        return await self._swap(None)

    async def go_against(self, asked: tuple[str | None, str] | None, reason: str) -> Updates:
        """Do what something speaks against, for the reason that was typed."""
        if asked is None:
            return {}
        if not is_reason(reason):
            return {
                self.force.reason: gr.Textbox(info="Write down why first: whoever reads the history wants to know.")
            }
        return await self._swap(*asked, reason, force=True)

    def leave_it(self) -> Updates:
        """The second step is closed; the champion stays."""
        return self.force.hidden() | {self.message: f"{self.operations.champion()} stays the champion."}

    async def swap_in_turn(self, asked: tuple[str | None, str, str, bool] | None) -> Updates:
        """Do what there was no room for, one model after the other; answers wait meanwhile."""
        return {} if asked is None else await self._swap(*asked[:3], force=asked[3], maintenance=True)

    async def _swap(
        self,
        version: str | None,
        by: str = "",
        reason: str = "promoted on the admin page",
        *,
        maintenance: bool = False,
        force: bool = False,
    ) -> Updates:
        """Promote a version, or roll back where it is None; offer to let answers wait where there is no room.

        Where something speaks against it, the second step opens; what it asks for comes back with `force`.
        """
        asked: dict[Any, Any] = {self.without_room: None, self.maintenance: gr.Button(visible=False)}
        asked |= self.force.hidden()
        try:
            if version is None:
                champion, previous = await self.operations.rollback(
                    maintenance=maintenance, force=force, reason=reason if force else ""
                )
                said = f"Rolled back: {inert(champion)} answers again, instead of {inert(previous)}."
            else:
                champion, previous = await self.operations.promote(
                    version, reason=reason, maintenance=maintenance, by=by, force=force
                )
                said = f"{inert(champion)} answers from now on; before it was {inert(previous)}."
        except NeedsMaintenance as error:
            said = f"**There is no room for two models.** Answers would wait up to {error.limit_s:g} s."
            asked |= {
                self.without_room: (version, by, reason, force),
                self.maintenance: gr.Button("Let them wait", visible=True),
            }
        except NeedsForce as error:
            said = f"Something speaks against {error.version}: a reason is asked for below."
            asked |= self.force.shown(Asked(version, by), error, self.operations.champion())
        except self.refusals as error:
            what = f"{inert(version)} was not promoted." if version else "Not rolled back."
            said = f"**{what}** {inert(error)}"
            if force:  # the words that were typed stay there
                asked = {key: value for key, value in asked.items() if key not in self.force.components}
        return self.look() | asked | {self.message: said}

    def import_preferences(self, source: str, format_: str) -> Updates:
        """Import a preference file."""
        if not source.strip():
            return {self.imported: "Name a file or a hub id first."}
        try:
            result = self.operations.data.import_preferences(source.strip(), format_)
        except self.refusals as error:
            return {self.imported: f"**{inert(error)}**"}
        skipped = "; ".join(
            f"{count} {inert(reason)} (row {', '.join(map(str, result.examples.get(reason, ())))}"
            f"{' …' if count > len(result.examples.get(reason, ())) else ''})"
            for reason, count in result.skipped.items()
        )
        return self.look() | {
            self.imported: f"Imported **{result.imported}** preferences from {inert(Path(source).name)} "
            f"({inert(result.format)}: {inert(result.why)}); {result.duplicates} were there already; "
            f"skipped: {skipped or 'none'}."
        }

    def _acted(self, action: Any, done: str) -> Updates:
        try:
            what = action()
        except self.refusals as error:
            return self.look() | {self.message: f"**{inert(error)}**"}
        return self.look() | {self.message: done.format(inert(what))}


def overview(status: Status, run: Mapping[str, Any] | None, worth: str = "") -> str:
    """One sentence of health, what is served, what waits, one next step, whether a retrain is worth it."""
    counts = status.counts
    own = sum(counts.preferences.get(source, 0) for source in OWN_SOURCES)
    imported = sum(counts.preferences.values()) - own
    until = f"of {status.retrain_every} until the next retrain" if status.retrain_every else "since the last retrain"
    cards = (
        ("answers come from", status.serving or "nothing yet"),
        (f"new picks that count, {until}", str(status.new_preferences)),
        (f"preferences: {own} from your people, {imported} imported", f"{own + imported:,}"),
        ("held out to judge by", f"{counts.held_out:,}"),
        ("picks, of any kind", f"{counts.picks:,}"),
    )
    shown = "".join(
        f'<div class="zl-card"><b>{escape(value)}</b><small>{escape(what)}</small></div>' for what, value in cards
    )
    health = status.problem or f"All is well: {status.serving or 'no version'} answers."
    health += f" {status.watch}" if status.watch else ""
    return (
        f'<p class="zl-health">{escape(health)} <b>Next:</b> {escape(next_step(status, run))}</p>'
        f'<div class="zl-cards">{shown}</div>'
        + (f'<p id="worth"><b>Worth retraining yet?</b> {escape(worth)}</p>' if worth else "")
    )


def next_step(status: Status, run: Mapping[str, Any] | None) -> str:
    """The one thing to do now."""
    if run is not None and run["state"] not in ENDED:
        return f"watch {run['run_id']} below."
    if run is not None and run["state"] == "failed":
        return "read below why the last run failed, then resume it or start a new one."
    if status.proposed:
        return f"promote or dismiss {status.proposed[0]}, which is proposed above."
    if run is not None and run["version"] and run["version"] != status.champion and run["verdict"]:
        decision = "taken back" if run["version"] in status.taken_back else run["verdict"]["decision"]
        steps = {
            "taken back": f"keep {status.champion}; {run['version']} answered once and was taken back.",
            "promote": f"promote {run['version']}.",
            "reject": f"keep {status.champion}; {run['version']} is worse.",
        }
        if decision in steps:
            return steps[decision]
    if not status.counts.train:
        return "chat with Compare on and pick answers, import a preference file, or try a practice."
    return "start a retrain, or collect more picks."


def run_card(body: Mapping[str, Any]) -> str:
    """The newest run: its state in words, its progress, its verdict."""
    practice = f' <span class="zl-practice">practice: {escape(body["practice"])}</span>' if body["practice"] else ""
    head = f"<h3>{escape(body['run_id'])}{practice}</h3><p><b>{escape(body['state'])}</b> {escape(_details(body))}</p>"
    if body["state"] == "training":
        done = 100 * body["step"] / max(1, body["total_steps"])
        head += (
            f'<div class="zl-bar" role="progressbar" aria-valuenow="{done:.0f}">'
            f'<i class="done" style="width:{done:.0f}%"></i></div>'
        )
    head += preflight_line(body)
    if body["error"]:
        head += f'<div class="zl-log">{escape(body["error"])}</div>'
    if body["verdict"]:
        head += verdict_card(body)
    if body["state"] in ENDED:
        report = f"/v1/runs/{escape(body['run_id'])}/report"
        head += f'<p><a href="{report}" target="_blank" rel="noopener">Report</a></p>'
    return f'<div class="zl-card">{head}</div>'


def _recipe_choices(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the list of recipes shows, and the name behind each; one that cannot be used is not offered."""
    return [(f"{row['name']}: {row['about']}", row["name"]) for row in recipes if row["error"] is None]


def _details(body: Mapping[str, Any]) -> str:
    metrics = body["metrics"]
    eta = f" · about {_duration(body['eta_s'])} left" if body["eta_s"] is not None else ""
    how = f" ({body['method']}, {body['tuning']})" if "method" in body else ""
    processes = f"{body['num_processes']} process{'es' if body['num_processes'] > 1 else ''}"
    parts = [f"recipe {body['recipe']}{how}", processes]
    if body["state"] in ("training", *ENDED) and metrics:
        parts.append(f"step {body['step']} of {body['total_steps']}{eta if body['state'] == 'training' else ''}")
        forms = (("loss", ".4f"), ("rewards/margins", "+.3f"), ("rewards/accuracies", ".0%"))
        parts += [f"{key} {metrics[key]:{form}}" for key, form in forms if key in metrics]
    if body.get("resumed"):
        parts.append(f"resumed {body['resumed']} time{'' if body['resumed'] == 1 else 's'}")
    if body.get("without"):
        parts.append(f"without {', '.join(body['without'])}")
    progress = body.get("evaluation_progress")
    if body["state"] == "evaluating" and progress:
        parts.append(f"{progress['done']} of {progress['total']} held-out pairs{eta}")
    return "· " + " · ".join(parts)


def verdict_card(body: Mapping[str, Any]) -> str:
    """Candidate against champion: the bar, the counts, the decision, each reason a sentence."""
    verdict, evaluation = body["verdict"], body["evaluation"]
    words = {"promote": "better", "keep": "not enough evidence", "reject": "worse"}
    bar = ""
    if evaluation and evaluation["pairs"]:
        bar = '<div class="zl-bar">' + "".join(
            f'<i class="{kind}" style="width:{100 * evaluation[kind] / evaluation["pairs"]:.1f}%" '
            f'title="{evaluation[kind]} {kind}"></i>'
            for kind in ("wins", "ties", "losses")
        ) + "</div>"  # fmt: skip
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in verdict["reasons"])
    title = f"{escape(body['version'] or 'the candidate')} against {escape(body['champion'] or 'v0')}"
    return (
        f'<h4>{title} <span class="zl-decision {verdict["decision"]}">{words[verdict["decision"]]}</span></h4>'
        f"{bar}{reasons}"
    )


def versions_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every version: state, what it was trained on, what its evaluation said."""
    lines = "".join(
        f"<tr><td><b>{escape(row['version'])}</b></td><td>{escape(row['state'])}</td><td>{escape(row['summary'])}</td>"
        f"<td>{escape(str(row['created_at'] or ''))[:16].replace('T', ' ')}</td></tr>"
        for row in reversed(rows)
    )
    return (
        '<div class="zl-scroll"><table class="zl-table"><thead><tr><th>Version</th><th>State</th><th>What it is</th>'
        f"<th>Made</th></tr></thead><tbody>{lines}</tbody></table></div>"
    )


def history_list(events: Sequence[Mapping[str, Any]]) -> str:
    """How the last champions came to be, the newest first, each with its reason and what was known against it."""
    if not events:
        return ""
    lines = []
    for one in events[:EVENTS]:
        how = f"{one['kind']}, forced" if one["forced"] else one["kind"]
        said = f"<b>{escape(one['version'])}</b> in place of {escape(one['previous'])} ({escape(how)})"
        reason = f": {escape(one['reason'])}" if one["reason"] else ""
        note = f"<br><small>{escape(one['note'])}</small>" if one["note"] else ""
        lines.append(f"<li><small>{escape(one['at'][:16].replace('T', ' '))}</small> {said}{reason}{note}</li>")
    shown = f'<ul class="zl-history">{"".join(lines)}</ul>'
    return f"<details><summary>How the last champions came to be</summary>{shown}</details>"


def _named(run: RunHandle) -> str:
    steps = run.as_body()["total_steps"]
    return f"{run.run_id}, {steps} step{'' if steps == 1 else 's'}"


def _literal(text: str) -> str:
    """A text of somebody else's as Markdown shows it: sign by sign, nothing of it a mark or an element."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _whole(number: float | None) -> int | None:
    """What a person typed; an empty field comes as 0, and means: no wish."""
    return int(number) if number else None


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
