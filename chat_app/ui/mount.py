"""Mounts the pages on the API's application, with what the browser may load from where.

The admin page is a mount of its own, because Gradio runs any handler of a page for anyone who can reach the page; when
accounts exist, `/admin` gets its own check. Which of Gradio's routes can be reached: `chat_app/guard_rules.py`.
"""

from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio import mount_gradio_app
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chat_app.guard_rules import UPLOAD_BYTES
from chat_app.operations import Operations
from chat_app.ui import theme
from chat_app.ui.admin import build_admin
from chat_app.ui.chat import build_chat
from chat_app.ui.rate import build_rate

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'{eval}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; form-action 'none'; "
    "frame-ancestors 'none'; frame-src 'none'; worker-src 'none'; manifest-src 'self'; base-uri 'self'; "
    "object-src 'none'"
)
SESSIONS = 200
"""Open pages whose state is kept, for each mount; beyond it the one that has been quiet longest is forgotten."""
UPLOADS_KEPT_S = (600, 3600)
"""How often old uploads are looked for, and how old they grow, in seconds."""


class ContentSecurity:
    """ASGI middleware: the browser loads nothing from elsewhere, whatever a model writes.

    The plots of the admin page need `unsafe-eval` (Vega); the chat page does without.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        may_eval = " 'unsafe-eval'" if scope["path"].startswith("/admin/") else ""
        policy = POLICY.format(eval=may_eval).encode()

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", policy),
                    (b"cross-origin-opener-policy", b"same-origin"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def mount_pages(app: FastAPI, operations: Operations, refusals: tuple[type[Exception], ...]) -> FastAPI:
    """Mount `/admin`, `/rate` and `/`; the root last, since it takes every path that is left.

    Gradio keeps what is uploaded in GRADIO_TEMP_DIR, which must be set before this.
    """
    keys = theme.key_script()
    _mount(app, build_admin(operations, refusals), "/admin", head=keys)
    _mount(app, build_rate(operations), "/rate", head=keys)
    _mount(app, build_chat(operations), "/", head=keys)
    app.add_middleware(ContentSecurity)
    return app


def _mount(app: FastAPI, page: gr.Blocks, path: str, **more: Any) -> None:
    page.queue(default_concurrency_limit=8, max_size=64)
    page.delete_cache = UPLOADS_KEPT_S
    page.state_session_capacity = SESSIONS
    mount_gradio_app(
        app, page, path, theme=theme.theme(), css=theme.stylesheet(), footer_links=[], run_history=False,
        enable_monitoring=False, max_file_size=UPLOAD_BYTES, **more,
    )  # fmt: skip
    # Gradio lets a page that was not launched by itself read every file its values name (CWE-22): a mounted page says
    # that it was not. From here on only what was uploaded is read.
    page.has_launched = True
