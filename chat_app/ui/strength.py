"""Is it getting better? One sentence, one plot over the calendar, one table; HTML and SVG from GET /v1/strength. Pure.

The plot: the win rate of every version against the first, at the time it was promoted first, else made, with its 95%
interval as a bar; the champion's as a step line with a band; promotions and returns marked above. It is drawn twice,
for wide and for narrow windows, and the stylesheet shows one: letters of a drawing that shrinks could not be read.

Where it sits: part of the trial section (`trial.py`). Points that would lie on one another stand a few pixels apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import pairwise
from typing import Any

SHOWN_VERSIONS = 24
WIDTHS = {"wide": 1080, "narrow": 330}
HEIGHT, TOP, BOTTOM, LEFT, RIGHT = 274, 38, 30, 44, 14
APART = {"wide": 14.0, "narrow": 9.0}
LETTER, LINE = 6.6, 13.0  # how much room a letter takes
TICK_HOURS = (
    1,
    2,
    3,
    6,
    12,
    24,
    48,
    24 * 4,
    24 * 7,
    24 * 14,
    24 * 28,
    24 * 56,
    24 * 91,
    24 * 182,
    24 * 365,
    24 * 365 * 5,
)
KINDS = {
    "promote": ("▲", "forward", "was promoted"),
    "auto": ("▲", "forward", "was promoted by itself"),
    "rollback": ("▽", "back", "came back: a person rolled back"),
    "auto-rollback": ("▼", "back", "came back by itself"),
}
"""Kind of a promotion → its mark, the colour of that, and what the version did."""

Row = Mapping[str, Any]


def strength_shown(found: Mapping[str, Any]) -> str:
    """One sentence, one plot, the numbers, and what they do not show."""
    judged = [row for row in found["versions"] if row["win_rate"] is not None][-SHOWN_VERSIONS:]
    parts = [f'<p class="zl-health">{escape(found["sentence"])}</p>']
    if any(row["votes"] for row in judged):
        parts += [strength_plot(judged, found, size) for size in WIDTHS]
    if found["votes"]:
        low, high = found["first_interval"]
        parts.append(
            f"<p><small>{found['votes']:,} blind picks. Between equals the answer shown first wins "
            f"{found['first_share']:.0%} ({low:.0%}–{high:.0%}) of the decided ones, and {found['tie_share']:.0%} are "
            "ties; neither counts for a version. Bars and band: 95% intervals. Line and filled points: the champion. "
            "▲ promoted, ▽ rolled back, ▼ taken back by itself. Times are UTC.</small></p>"
        )
        parts.append(f"<details><summary>The numbers</summary>{strength_table(found['versions'])}</details>")
    strangers = [row for row in found["versions"] if row["win_rate"] is None]
    if strangers:
        named = ", ".join(escape(row["version"]) for row in strangers[-SHOWN_VERSIONS:])
        parts.append(f"<p><small>Cannot be compared, for want of picks: {named}.</small></p>")
    return f'<div class="zl-card">{"".join(parts)}</div>'


def strength_table(rows: Sequence[Row]) -> str:
    """Every version, the newest first."""
    lines = "".join(
        f"<tr><td><b>{escape(row['version'])}</b></td><td>{_day(row['made_at'])}</td>"
        f"<td>{', '.join(map(_day, row['promoted_at']))}</td><td>{_rate(row)}</td><td>{row['votes']:,}</td></tr>"
        for row in reversed(rows)
    )
    return (
        '<div class="zl-scroll"><table class="zl-table"><thead><tr><th>Version</th><th>Made</th><th>Promoted</th>'
        f"<th>Wins against the first</th><th>Picks</th></tr></thead><tbody>{lines}</tbody></table></div>"
    )


def strength_plot(rows: Sequence[Row], found: Mapping[str, Any], size: str = "wide") -> str:
    """The versions `rows` over the calendar as an SVG; `found` is the body they are from."""
    frame = _frame(rows, found, size)
    bounds = [bound for row in rows for bound in row["interval"]]
    low, high = float(min(0.4, *bounds)), float(max(0.6, *bounds))

    def y(rate: float) -> float:
        return round(TOP + (high - rate) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    reference = escape(found["reference"])
    rates = [step / 10 for step in range(11) if low <= step / 10 <= high]
    marks = [
        f'<line x1="{LEFT}" x2="{frame.width}" y1="{y(rate)}" y2="{y(rate)}" '
        f'class="{"even" if rate == 0.5 else "grid"}"/>'
        f'<text x="{LEFT - 6}" y="{y(rate) + 4}" text-anchor="end">{rate:.0%}</text>'
        for rate in rates
    ]
    marks += _axis(frame)
    reigns = list(_reigns(found, frame))
    marks += _champions_line(reigns, {row["version"]: row for row in rows}, frame, y)
    marks += [_event(event, frame) for event in found["events"] if _time(event["at"]) >= frame.begin]
    champions = {found["champion"], *(event[key] for event in found["events"] for key in ("version", "previous"))}
    places = _places(rows, frame, APART[size])
    for row, x in zip(rows, places, strict=True):
        bottom, top = row["interval"]
        marks.append(
            f"<g><title>{_told(row, found['reference'])}</title>"
            f'<line x1="{x}" x2="{x}" y1="{y(bottom)}" y2="{y(top)}" class="interval"/>'
            f'<circle cx="{x}" cy="{y(row["win_rate"])}" r="5" '
            f'class="{"champion" if row["version"] in champions else "other"}"/></g>'
        )
    marks += _labels(
        [(row, x, y(row["interval"][1]), y(row["interval"][0])) for row, x in zip(rows, places, strict=True)]
    )
    return (
        f'<svg class="zl-plot zl-{size}" role="img" viewBox="0 0 {frame.width} {HEIGHT}" '
        f'aria-label="Win rate of each version against {reference} over time">{"".join(marks)}</svg>'
    )


# --- the calendar ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frame:
    """The part of the calendar that is shown, and how wide."""

    begin: datetime
    until: datetime
    width: int

    def x(self, at: datetime) -> float:
        share = (max(self.begin, min(at, self.until)) - self.begin) / (self.until - self.begin)
        return round(LEFT + 8 + share * (self.width - RIGHT - LEFT - 8), 1)


def _frame(rows: Sequence[Row], found: Mapping[str, Any], size: str) -> _Frame:
    """From when the first of these versions was made until now; at least an hour."""
    until = _time(found["until"])
    known = [_time(row["made_at"]) for row in rows if row["made_at"] is not None]
    begin = min([*known, until - timedelta(hours=1)])
    return _Frame(begin, until, WIDTHS[size])


def _at(row: Row) -> datetime | None:
    """When a version was promoted first, else made; None for the base, which was always there."""
    when = row["promoted_at"][0] if row["promoted_at"] and row["made_at"] else row["made_at"]
    return None if when is None else _time(when)


def _axis(frame: _Frame) -> Iterator[str]:
    """Ticks at round hours, days or weeks; the first says the year, one at midnight the day."""
    most = frame.width / 66
    hours = (frame.until - frame.begin) / timedelta(hours=1)
    step = timedelta(hours=next((one for one in TICK_HOURS if hours / one <= most), TICK_HOURS[-1]))
    epoch = datetime(1970, 1, 5, tzinfo=UTC)  # a Monday
    at = epoch + -((epoch - frame.begin) // step) * step
    is_first = True
    while at <= frame.until:
        x = frame.x(at)
        if LEFT + 30 <= x <= frame.width - 24:
            text = f"{at:%Y-%m-%d}" if is_first else f"{at:%m-%d}" if step >= timedelta(days=1) or at.hour == 0 else ""
            yield f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>'
            yield f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{text or f"{at:%H:%M}"}</text>'
            is_first = False
        at += step


def _reigns(found: Mapping[str, Any], frame: _Frame) -> Iterator[tuple[str, datetime, datetime]]:
    """Who was the champion from when to when, within the frame."""
    events = found["events"]
    champion = events[0]["previous"] if events else found["champion"]
    changes = [(champion, frame.begin), *((event["version"], _time(event["at"])) for event in events)]
    changes = [(version, max(at, frame.begin)) for version, at in changes]
    for (version, at), (_, until) in pairwise([*changes, ("", frame.until)]):
        if until > at:
            yield version, at, until


def _champions_line(
    reigns: Sequence[tuple[str, datetime, datetime]],
    rows: Mapping[str, Row],
    frame: _Frame,
    y: Callable[[float], float],
) -> Iterator[str]:
    """A step line with its band; a gap where the champion of the time cannot be compared."""
    before: tuple[float, float] | None = None
    for version, begin, until in reigns:
        left, right, row = frame.x(begin), frame.x(until), rows.get(version)
        if row is None:
            before = None
            continue
        at, (bottom, top) = y(row["win_rate"]), row["interval"]
        if before is not None:
            yield f'<line x1="{left}" x2="{left}" y1="{before[1]}" y2="{at}" class="reign"/>'
        yield (
            f'<rect x="{left}" y="{y(top)}" width="{right - left:.1f}" height="{y(bottom) - y(top):.1f}" class="band"/>'
            f'<line x1="{left}" x2="{right}" y1="{at}" y2="{at}" class="reign"/>'
        )
        before = (right, at)


def _event(event: Mapping[str, Any], frame: _Frame) -> str:
    x, (mark, colour, did) = frame.x(_time(event["at"])), KINDS[event["kind"]]
    why = f": {event['reason']}" if event["reason"] else ""
    told = escape(f"{_day(event['at'])}: {event['version']} {did}{why}")
    top = TOP - 26 if colour == "forward" else TOP - 13  # below, as a return may come minutes after
    return (
        f"<g><title>{told}</title>"
        f'<line x1="{x}" x2="{x}" y1="{top + 3}" y2="{HEIGHT - BOTTOM}" class="event {colour}"/>'
        f'<text x="{x}" y="{top}" text-anchor="middle" class="{colour}">{mark}</text></g>'
    )


def _places(rows: Sequence[Row], frame: _Frame, apart: float) -> list[float]:
    """Where each version stands: at its time, or as near to it as the others leave room."""
    times = [at if (at := _at(row)) is not None else frame.begin for row in rows]
    order = sorted(range(len(rows)), key=lambda index: times[index])
    places = [frame.x(at) for at in times]
    for earlier, later in pairwise(order):
        places[later] = max(places[later], places[earlier] + apart)
    edge = frame.width - RIGHT + apart
    for index in reversed(order):
        edge = places[index] = min(places[index], edge - apart)
    return [round(place, 1) for place in places]


def _labels(points: Sequence[tuple[Row, float, float, float]]) -> Iterator[str]:
    """The names above or below their bars, champions first; one that finds no room is only in the tooltip and table."""
    taken: list[tuple[float, float, float]] = []
    newest_first = list(reversed(points))
    for row, x, top, bottom in sorted(newest_first, key=lambda point: not point[0]["promoted_at"]):
        name = row["version"][:12]
        half = LETTER * len(name) / 2
        for baseline in (top - 6, bottom + 14):
            free = all(abs(x - other) >= half + its or abs(baseline - its_y) >= LINE for other, its, its_y in taken)
            if free and TOP - 2 <= baseline <= HEIGHT - BOTTOM + 8:
                taken.append((x, half, baseline))
                yield f'<text x="{x}" y="{baseline}" text-anchor="middle" class="name">{escape(name)}</text>'
                break


# --- words -----------------------------------------------------------------------------------------------------------


def _told(row: Row, reference: str) -> str:
    bottom, top = row["interval"]
    interval = "the reference" if row["version"] == reference else f"{bottom:.0%}–{top:.0%} against {reference}"
    made = f", made {_day(row['made_at'])}" if row["made_at"] else ""
    promoted = f", promoted {', '.join(map(_day, row['promoted_at']))}" if row["promoted_at"] else ""
    return escape(f"{row['version']}: {row['win_rate']:.0%} ({interval}), {row['votes']} picks{made}{promoted}")


def _rate(row: Row) -> str:
    if row["win_rate"] is None:
        return escape(row["note"])
    if row["interval"][0] == row["interval"][1]:
        return "the reference"
    return f"{row['win_rate']:.0%} ({row['interval'][0]:.0%}–{row['interval'][1]:.0%})"


def _time(moment: str) -> datetime:
    at = datetime.fromisoformat(moment)
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _day(moment: str | None) -> str:
    return "" if moment is None else f"{_time(moment).astimezone(UTC):%Y-%m-%d %H:%M}"
