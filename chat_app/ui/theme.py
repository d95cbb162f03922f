"""How the pages look: one navigation bar, one theme, one stylesheet, the script of the chat and the rate page.

Where it sits: `chat.py` and `admin.py` take their bar and their words for numbers from here; `__main__.py` hands the
theme, stylesheet and script to the mount. Nothing here is fetched from elsewhere: fonts are the system's.
"""

from pathlib import Path

import gradio as gr

from chat_app.operations import Status
from chat_app.ui.shown_text import in_html

HERE = Path(__file__).parent
PAGES = (("Chat", "/"), ("Rate", "/rate/"), ("Admin", "/admin/"))


def theme() -> gr.themes.Base:
    """Calm, high contrast, system fonts."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def stylesheet() -> str:
    """The CSS of every page."""
    return (HERE / "style.css").read_text(encoding="utf-8")


def key_script() -> str:
    """The `<script>` of the pages with pairs: keys, one press for a pair, the conversation of a tab, Copy and Edit."""
    return f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>"


def navigation(here: str, status: Status) -> str:
    """The bar: pages on the left; on the right which version answers and how far the next retrain is."""
    links = "".join(
        f'<a href="{path}"{" aria-current=page" if name == here else ""}>{name}</a>' for name, path in PAGES
    )
    banner = status.problem if status.is_paused and here != "Admin" else None  # there it stands in the overview
    paused = f'<p class="zl-banner" role="status">{in_html(banner)}</p>' if banner else ""
    return (
        f'<nav class="zl-nav" aria-label="Pages"><span class="zl-brand">Zephyr Loop</span>{links}'
        f'<span class="zl-badge" title="{in_html(badge_title(status))}">{in_html(badge(status))}</span></nav>{paused}'
    )


def badge(status: Status) -> str:
    """Which version answers, and how many new picks wait: `v3 · 14 of 50 picks`."""
    version = status.serving or f"{status.champion} (not ready)"
    if status.retrain_every:
        return f"{version} · {status.new_preferences} of {status.retrain_every} picks"
    return f"{version} · {status.new_preferences} new picks"


def badge_title(status: Status) -> str:
    """What the badge means, in a sentence."""
    if status.retrain_every:
        return (
            f"Answers come from {status.serving or status.champion}. {status.new_preferences} picks that count came in "
            f"since the last retrain; at {status.retrain_every} the next one starts."
        )
    return f"Answers come from {status.serving or status.champion}. Retrains start only when asked for."
