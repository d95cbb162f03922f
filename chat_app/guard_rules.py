"""Which requests the guard lets in: one rule for each route there is, and Gradio's own routes that stay closed.

Where it sits: a table for `guard.py`. A path that no rule names is refused, and `tests/security/test_guard.py` fails
for a route of the application that is named neither here nor among `CLOSED`. `{name}` stands for one part of a path,
`{rest}` for any number of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

KIB, MIB = 1024, 1024 * 1024
JSON_BYTES = 256 * KIB
CONVERSATION_BYTES = 8 * MIB
TEXT_BYTES = 2 * MIB
UPLOAD_BYTES = 1024 * MIB
GRADIO = "/gradio_api"
PAGES = ("", "/rate", "/admin")
"""Where the pages are mounted: chat, rate, admin."""
ADMIN = "/admin"


class Pace(Enum):
    """How often one address may ask: `(requests, seconds)`."""

    USUAL = (3_000, 10)
    HEAVY = (300, 60)  # what reads or writes much


class Body(Enum):
    """What a request may carry."""

    NONE = "no body"
    JSON = "application/json"
    FORM = "multipart/form-data"


@dataclass(frozen=True)
class Rule:
    """What a request to one route may be. `path` is a template; `max_bytes` bounds a JSON body, `form_bytes` a file.

    `opens_from_elsewhere`: a link on another site may lead here (a page, a report), as a navigation and nothing else.
    `is_stream`: an event stream that stays open for as long as a page does. `is_event`: an event of a page.
    """

    methods: tuple[str, ...]
    path: str
    bodies: tuple[Body, ...] = (Body.NONE,)
    max_bytes: int = 0
    form_bytes: int = 0
    pace: Pace = Pace.USUAL
    opens_from_elsewhere: bool = False
    is_stream: bool = False
    is_event: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole, percent-decoded path."""
        parts = re.split(r"(\{\w+\})", self.path)
        kinds = {"{rest}": r".+", "{session}": r"[A-Za-z0-9_-]{6,64}"}
        return re.compile("".join(kinds.get(one, r"[^/]+") if one.startswith("{") else re.escape(one) for one in parts))


def _get(path: str, **more: Any) -> Rule:
    return Rule(("GET", "HEAD"), path, **more)


def _post(path: str, max_bytes: int = JSON_BYTES, pace: Pace = Pace.USUAL, method: str = "POST") -> Rule:
    return Rule((method,), path, (Body.JSON,), max_bytes, pace=pace)


API = (
    _get("/livez", opens_from_elsewhere=True),
    _get("/readyz", opens_from_elsewhere=True),
    _get("/metrics", opens_from_elsewhere=True),
    _get("/openapi.json", opens_from_elsewhere=True),
    # chat and feedback
    _post("/v1/chat/completions", CONVERSATION_BYTES),
    _post("/v1/pairs", CONVERSATION_BYTES),
    _post("/v1/picks"),
    _post("/v1/ratings"),
    _post("/v1/edits", TEXT_BYTES),
    _get("/v1/presets"),
    _get("/v1/models"),
    _post("/v1/rate"),
    # data
    Rule(("POST",), "/v1/imports", (Body.JSON, Body.FORM), JSON_BYTES, UPLOAD_BYTES, Pace.HEAVY),
    _get("/v1/imports"),
    _get("/v1/export", pace=Pace.HEAVY),
    _post("/v1/datasets", pace=Pace.HEAVY),
    _get("/v1/statistics"),
    _get("/v1/agreement"),
    _get("/v1/redactions", pace=Pace.HEAVY),
    _post("/v1/query", pace=Pace.HEAVY),
    _post("/v1/learning"),
    _post("/v1/erasures", pace=Pace.HEAVY),
    _post("/v1/backups", pace=Pace.HEAVY),
    _get("/v1/backups"),
    # the loop
    _post("/v1/snapshots", pace=Pace.HEAVY),
    _get("/v1/recipes"),
    _post("/v1/runs"),
    _get("/v1/runs"),
    _get("/v1/runs/{run_id}"),
    _post("/v1/runs/{run_id}/cancel"),
    _post("/v1/runs/{run_id}/resume"),
    _get("/v1/runs/{run_id}/metrics"),
    _get("/v1/runs/{run_id}/log"),
    _get("/v1/runs/{run_id}/report", opens_from_elsewhere=True),
    _get("/v1/schedule"),
    _post("/v1/schedule", method="PUT"),
    _post("/v1/preflight", pace=Pace.HEAVY),
    _post("/v1/evaluations", pace=Pace.HEAVY),
    _get("/v1/evaluations/{evaluation_id}/report", opens_from_elsewhere=True),
    _post("/v1/benchmarks", pace=Pace.HEAVY),
    _post("/v1/comparisons", pace=Pace.HEAVY),
    _get("/v1/worth"),
    # versions, trials, raters
    _get("/v1/versions"),
    _post("/v1/versions/{version}/promote"),
    _post("/v1/versions/{version}/serve"),
    _post("/v1/versions/{version}/release"),
    _post("/v1/rollback"),
    _get("/v1/baking"),
    _get("/v1/proposals"),
    _post("/v1/proposals/{version}/dismiss"),
    _post("/v1/trials"),
    _get("/v1/trials"),
    _get("/v1/trials/{trial_id}"),
    _post("/v1/trials/{trial_id}/stop"),
    _get("/v1/strength"),
    _get("/v1/raters"),
    _post("/v1/quarantine"),
    _get("/v1/gold"),
)


def _page(mount: str) -> tuple[Rule, ...]:
    """What a page needs of Gradio, and nothing else."""
    events = mount + GRADIO
    uploads = (
        Rule(("POST",), f"{events}/upload", (Body.FORM,), 0, UPLOAD_BYTES, Pace.HEAVY),
        _get(f"{events}/upload_progress", is_stream=True),
    )
    return (
        _get(f"{mount}/", opens_from_elsewhere=True),
        *((_get(mount, opens_from_elsewhere=True),) if mount else ()),
        *(_get(f"{mount}/{file}") for file in ("config", "theme.css", "favicon.ico", "manifest.json")),
        *(_get(f"{mount}/{folder}/{{rest}}") for folder in ("assets", "static", "svelte")),
        _get(f"{events}/theme.css"),
        _get(f"{events}/heartbeat/{{session}}", is_stream=True),
        _get(f"{events}/queue/data", is_stream=True),
        Rule(("POST",), f"{events}/queue/join", (Body.JSON,), CONVERSATION_BYTES, is_event=True),
        Rule(("POST",), f"{events}/cancel", (Body.JSON,), JSON_BYTES),
        *(uploads if mount == ADMIN else ()),
    )


RULES: tuple[Rule, ...] = (*API, *(rule for mount in PAGES for rule in _page(mount)))

CLOSED = (
    # Gradio's file server, fetcher and doors into components: nothing on our pages is served or called that way.
    "/gradio_api/file={path_or_url:path}",
    "/gradio_api/file/{path:path}",
    "/gradio_api/proxy={url_path:path}",
    "/gradio_api/component_server",
    "/gradio_api/custom_component/{id}/{environment}/{type}/{file_name}",
    "/gradio_api/deep_link",
    "/gradio_api/process_recording",
    "/gradio_api/stream/{event_id}",
    "/gradio_api/stream/{event_id}/close",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}",
    "/gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file",
    # Only the admin page has an upload.
    "/gradio_api/upload",
    "/gradio_api/upload_progress",
    # Other ways to call a handler: the pages use the queue alone.
    "/gradio_api/run/{api_name}",
    "/gradio_api/api/{api_name}",
    "/gradio_api/call/{api_name}",
    "/gradio_api/call/v2/{api_name}",
    "/gradio_api/call/{api_name}/{event_id}",
    "/gradio_api/call/v2/{api_name}/{event_id}",
    "/gradio_api/queue/status",
    "/gradio_api/reset",
    "/gradio_api/startup-events",
    # Descriptions, logins and tools of Gradio's own.
    "/gradio_api/info",
    "/gradio_api/openapi.json",
    "/gradio_api/app_id",
    "/gradio_api/user",
    "/gradio_api/token",
    "/gradio_api/login_check",
    "/gradio_api/runs",
    "/gradio_api/dev/reload",
    "/gradio_api/vibe-edit",
    "/gradio_api/undo-vibe-edit",
    "/gradio_api/vibe-code",
    "/gradio_api/vibe-starter-queries",
    "/login",
    "/logout",
    "/monitoring",
    "/monitoring/summary",
    "/monitoring/{key}",
    "/pwa_icon",
    "/pwa_icon/{size}",
    "/robots.txt",
    "/gradio_api/robots.txt",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
)
"""Gradio's routes below each mount that nobody reaches, as Gradio writes them (a closing slash left out)."""
