"""Mounts the pages on the API's application, with what the browser may load from where.

The admin page is a mount of its own, because Gradio runs any handler of a page for anyone who can reach the page; when
accounts exist, `/admin` gets its own check.
"""

from fastapi import FastAPI
from gradio import mount_gradio_app
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_policy)


def mount_pages(app: FastAPI, operations: Operations, refusals: tuple[type[Exception], ...]) -> FastAPI:
    """Mount `/admin`, `/rate` and `/`; the root last, since it takes every path that is left."""
    look = {"theme": theme.theme(), "css": theme.stylesheet(), "footer_links": [], "run_history": False}
    admin = build_admin(operations, refusals).queue(default_concurrency_limit=8, max_size=64)
    chat = build_chat(operations).queue(default_concurrency_limit=8, max_size=64)
    rate = build_rate(operations).queue(default_concurrency_limit=8, max_size=64)
    for blocks in (admin, rate, chat):
        blocks.enable_monitoring = False
    app = mount_gradio_app(app, admin, path="/admin", enable_monitoring=False, **look)
    app = mount_gradio_app(app, rate, path="/rate", head=theme.key_script(), enable_monitoring=False, **look)
    app = mount_gradio_app(app, chat, path="/", head=theme.key_script(), enable_monitoring=False, **look)
    app.add_middleware(ContentSecurity)
    return app
