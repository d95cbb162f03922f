"""Is it getting better, drawn: the calendar, the champion's line, the marks, what finds no room."""

import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from chat_app.ui.strength import KINDS, WIDTHS, strength_plot, strength_shown
from feedback_store.records import PROMOTION_KINDS, Comparisons
from trainer.strength import as_body, fit

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def ago(days: float) -> str:
    return (NOW - timedelta(days=days)).isoformat(timespec="seconds")


def body(
    events: list[tuple[float, str, str, str]], made: dict[str, float], counts: list[Comparisons]
) -> dict[str, Any]:
    """The body of GET /v1/strength. `events`: days ago, version, previous, kind; `made`: days ago."""
    told = [
        {"at": ago(days), "version": version, "previous": previous, "kind": kind, "reason": "<why>"}
        for days, version, previous, kind in events
    ]
    promotions: dict[str, list[str]] = {}
    for event in told:
        promotions.setdefault(event["version"], []).append(event["at"])
    times = {"v0": None, **{version: ago(days) for version, days in made.items()}}
    champion = told[-1]["version"] if told else "v0"
    found = as_body(fit(counts, "v0", list(times)), champion, promotions, times)
    return {**found, "events": told, "until": NOW.isoformat()}


def balanced(version: str, wins: int, losses: int) -> list[Comparisons]:
    return [Comparisons(version, "v0", wins, 5, losses), Comparisons("v0", version, losses, 5, wins)]


STORY = body(
    [(8, "v1", "v0", "promote"), (4, "v2", "v1", "auto"), (3.9, "v1", "v2", "auto-rollback")],
    {"v1": 10, "v2": 5, "v3": 1, "v4": 0.5},
    [*balanced("v1", 60, 40), *balanced("v2", 40, 60), *balanced("v3", 65, 35)],
)
JUDGED = [row for row in STORY["versions"] if row["win_rate"] is not None]


def xs(pattern: str, plot: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, plot)]


@pytest.mark.parametrize("size", list(WIDTHS))
def test_versions_stand_at_their_time_and_the_champions_line_goes_on_until_now(size: str) -> None:
    plot = strength_plot(JUDGED, STORY, size)
    v0, v1, v2, v3 = xs(r'<circle cx="([\d.]+)"', plot)
    # v1 was promoted 8 days ago, v2 4 days ago, v3 made 1 day ago: the axis is linear in time
    assert (v2 - v1) / (v3 - v1) == pytest.approx(4 / 7, abs=0.01)
    assert v0 < v1
    reigns = [(float(a), float(b)) for a, b in re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*class="reign"', plot)]
    level = [one for one in reigns if one[0] != one[1]]
    assert len(level) == 4  # v0, v1, v2, v1 again
    assert [right for _, right in level[:-1]] == [left for left, _ in level[1:]]
    assert level[-1][1] == pytest.approx(WIDTHS[size] - 14, abs=0.1)
    assert plot.count('class="champion"') == 3  # v0 was the first
    assert plot.count('class="other"') == 1


def test_promotions_and_returns_are_marked_with_their_reason() -> None:
    plot = strength_plot(JUDGED, STORY)
    assert plot.count("▲") == 2
    assert plot.count("▼") == 1
    assert "2026-11-19 14:24: v1 came back by itself: &lt;why&gt;" in plot
    assert "<why>" not in plot
    assert set(KINDS) == set(PROMOTION_KINDS)


def test_the_axis_says_the_year_once_and_is_round() -> None:
    ticks = re.findall(r'text-anchor="middle">([\d:-]+)</text>', strength_plot(JUDGED, STORY))
    assert ticks[0].startswith("2026-11-")
    assert all(re.fullmatch(r"11-\d\d", tick) for tick in ticks[1:])
    assert len(ticks) >= 4


def test_versions_of_one_minute_stand_apart_and_names_do_not_lie_on_one_another() -> None:
    names = [f"v{number}" for number in range(1, 21)]
    counts = [one for name in names for one in balanced(name, 52, 48)]
    found = body([], dict.fromkeys(names, 0.01), counts)
    for size, width in WIDTHS.items():
        plot = strength_plot(found["versions"], found, size)
        places = xs(r'<circle cx="([\d.]+)"', plot)
        assert len(places) == 21
        assert min(later - earlier for earlier, later in pairwise(places)) >= 8.9
        assert 0 < places[0] < places[-1] < width
        named = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*class="name"', plot)]
        assert named
        assert all(abs(x - u) >= 13 or abs(y - v) >= 13 for at, (x, y) in enumerate(named) for u, v in named[:at])


def test_what_is_shown_says_it_in_words_draws_it_for_both_windows_and_gives_the_numbers() -> None:
    shown = strength_shown(STORY)
    assert "v1, the champion, wins 60% of decided picks" in shown
    assert shown.count("<svg") == 2
    assert "Cannot be compared, for want of picks: v4." in shown
    assert "<td><b>v3</b></td><td>2026-11-22 12:00</td><td></td><td>65% (" in shown
    assert "<td>the reference</td>" in shown


def test_without_picks_there_is_a_sentence_and_no_plot() -> None:
    shown = strength_shown(body([], {"v1": 1}, []))
    assert "<svg" not in shown
    assert "first champion" in shown


def test_a_champion_nobody_could_compare_leaves_a_gap_in_the_line() -> None:
    found = body([(2, "v2", "v0", "promote"), (1, "v1", "v2", "promote")], {"v1": 3, "v2": 3}, balanced("v1", 60, 40))
    judged = [row for row in found["versions"] if row["win_rate"] is not None]
    plot = strength_plot(judged, found)
    assert plot.count('class="band"') == 2  # v0, then v1
    assert "NaN" not in plot
