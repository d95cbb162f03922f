"""The pictures of a benchmark as SVG: bars of the parts of a result, and a radar over categories; drawn by matplotlib.

A radar only from three categories and only for marks: bars tell lengths better, the radar is what papers show.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.curves import AMBER, TEAL, as_svg
from trainer.scorer import CANDIDATE, CHAMPION

LEAST_CATEGORIES = 3
_COLOURS = {CANDIDATE: TEAL, CHAMPION: AMBER}


def pictures(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """{"title", "about", "svg"} of what there is to draw."""
    found = []
    names = {CANDIDATE: str(result["version"]), CHAMPION: str(result["against"])}
    if result["marks"]:
        series = {side: one["categories"] for side, one in result["marks"].items()}
        found.append(_picture("Marks by category", "Mean mark of the judge, 1 to 10.", bars(series, names, 10)))
        if len(series[CANDIDATE]) >= LEAST_CATEGORIES:
            found.append(_picture("The same as a radar", "The rim is 10.", radar(series, names)))
    if result["ifeval"]:
        series = {
            side: {group: own["strict"] for group, own in one["groups"].items()}
            for side, one in result["ifeval"].items()
        }
        found.append(_picture("Instructions followed", "Share by group, strict.", bars(series, names, 1)))
    if result["comparison"]:
        found.append(
            _picture("Comparisons", "Wins, ties and losses by category.", outcomes(result["comparison"]["categories"]))
        )
    return found


Series = Mapping[str, Mapping[str, float | None]]


def bars(series: Series, names: Mapping[str, str], highest: float) -> str:
    """Lying bars, a group for each category, a colour for each version."""
    import numpy as np

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        categories = list(series[CANDIDATE])
        places, height = np.arange(len(categories)), 0.8 / len(series)
        for number, (side, values) in enumerate(series.items()):
            lengths = [values.get(category) or 0.0 for category in categories]
            axes.barh(places + number * height, lengths, height * 0.92, color=_COLOURS[side], label=names[side])
        axes.set_yticks(places + (len(series) - 1) * height / 2, categories)
        axes.set_xlim(0, highest)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)

    return as_svg(draw, "bars", (4.6, 1.2 + 0.32 * len(series[CANDIDATE])))


def radar(series: Series, names: Mapping[str, str]) -> str:
    """One closed line a version over the categories, from 0 in the middle to 10 at the rim."""
    import numpy as np

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(projection="polar")
        categories = list(series[CANDIDATE])
        angles = np.linspace(0, 2 * np.pi, len(categories), endpoint=False)
        for side, values in series.items():
            reach = [values.get(category) or 0.0 for category in categories]
            axes.plot([*angles, angles[0]], [*reach, reach[0]], color=_COLOURS[side], label=names[side])
            axes.fill(angles, reach, color=_COLOURS[side], alpha=0.12)
        axes.set_xticks(angles, categories)
        axes.set_ylim(0, 10)
        axes.set_yticks([2, 4, 6, 8])
        axes.tick_params(labelsize=8)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=8)

    return as_svg(draw, "radar", (4.6, 4.2))


def outcomes(categories: Mapping[str, Mapping[str, int]]) -> str:
    """Stacked lying bars of wins, ties and losses."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        names = list(categories)
        left = [0] * len(names)
        for key, colour in (("wins", TEAL), ("ties", "#cbd5e1"), ("losses", "#dc2626")):
            counts = [categories[name][key] for name in names]
            axes.barh(names, counts, 0.7, left=left, color=colour, label=key)
            left = [before + count for before, count in zip(left, counts, strict=True)]
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)

    return as_svg(draw, "outcomes", (4.6, 1.2 + 0.28 * len(categories)))


def _picture(title: str, about: str, svg: str) -> dict[str, str]:
    return {"title": title, "about": about, "svg": svg}
