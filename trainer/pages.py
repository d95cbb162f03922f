"""A template of this package → one page of HTML that stands alone. Used by every report.

`page.html` is the frame with its styles, `parts.html` what several reports show alike. Every text is escaped by Jinja2;
pictures are SVG of our own drawing. No script, nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from feedback_store.durable import sync

REPORT = "report.html"


def render_page(template: str, facts: Mapping[str, Any]) -> str:
    """The page; `template` is a path below this package. Raises jinja2's UndefinedError for a fact that is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": _percent, "short": _short}
    return environment.get_template(template).render(**facts)


def write_page(directory: Path, page: str) -> Path:
    """Write DIRECTORY/report.html, whole or not at all."""
    path = directory / REPORT
    temporary = path.with_name(f".{REPORT}")
    try:
        temporary.write_text(page, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"
