"""The curves of a run as SVG pictures that stand in a page by themselves; drawn by matplotlib, for `report.py`.

One picture a quantity: the training's line, pale where it is noisy and firm as a running mean, and the validations as
points. Text stays text. Long runs are drawn from at most `POINTS` means of neighbouring steps.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

POINTS = 400
SMOOTHED_FROM = 20  # steps
TEAL, AMBER, GREY = "#0d9488", "#d97706", "#94a3b8"
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#cbd5e1",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.6,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "text.color": "#0f172a",
    "axes.labelcolor": "#475569",
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture: its title, what it is in words, the keys of metrics.jsonl that it draws."""

    title: str
    about: str
    keys: tuple[str, ...]
    validation: str | None = None
    level: float | None = None  # a line to compare with


CURVES = (
    Curve("loss", "Falls from ln 2 = 0.693, where the model is its reference.", ("loss",), "eval/loss", 0.6931),
    Curve(
        "rewards/margins",
        "How much more than its reference the model favours the chosen answer, times beta.",
        ("rewards/margins",),
        "eval/rewards/margins",
    ),
    Curve(
        "rewards/accuracies",
        "Share of pairs whose chosen answer it favours more than its reference does.",
        ("rewards/accuracies",),
        "eval/rewards/accuracies",
        0.5,
    ),
    Curve(
        "logps",
        "Log-probability of the answers: chosen and rejected should part, not both fall far.",
        ("logps/chosen", "logps/rejected"),
    ),
    Curve("lengths", "Tokens of the answers it learns from.", ("lengths/chosen", "lengths/rejected")),
    Curve("grad_norm", "Before clipping; lone spikes are hard pairs, growth is trouble.", ("grad_norm",)),
    Curve("learning_rate", "As the recipe's schedule has it.", ("learning_rate",)),
)


def draw(curve: Curve, lines: Sequence[Mapping[str, Any]]) -> str | None:
    """The picture as an `<svg>` element, None where metrics.jsonl holds none of its keys twice."""
    series = {key: _series(lines, key) for key in curve.keys}
    series = {key: found for key, found in series.items() if len(found[0]) > 1}
    if not series:
        return None

    def picture(figure: Any) -> None:
        axes = figure.add_subplot()
        for (key, (steps, values)), colour in zip(series.items(), (TEAL, AMBER), strict=False):
            name = key.rpartition("/")[2]
            noisy = len(steps) >= SMOOTHED_FROM
            axes.plot(steps, values, color=colour, alpha=0.3 if noisy else 1, linewidth=1.2 if noisy else 1.8,
                      label=None if noisy else name)  # fmt: skip
            if noisy:
                axes.plot(steps, _running_mean(values), color=colour, linewidth=1.8, label=name)
        if curve.validation and len((points := _series(lines, curve.validation))[0]):
            axes.plot(*points, "o-", color=AMBER, markersize=4, linewidth=1, label="validation")
        if curve.level is not None:
            axes.axhline(curve.level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel("step")
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="best", fontsize=8)

    return as_svg(picture, curve.title, (4.6, 2.3))


def as_svg(draw_on: Callable[[Any], None], name: str, size: tuple[float, float]) -> str:
    """An `<svg>` element of `size` inches, in the reports' style; the same drawing under the same name is the same."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw_on(figure)
        picture = io.StringIO()
        FigureCanvasSVG(figure).print_svg(picture, metadata={"Date": None, "Creator": None})
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, Any]:
    found = np.array([(line["step"], line[key]) for line in lines if line.get(key) is not None], dtype=float)
    if not len(found):
        return np.empty(0), np.empty(0)
    parts = np.array_split(found, min(len(found), POINTS))
    means = np.array([part.mean(axis=0) for part in parts])
    return means[:, 0], means[:, 1]


def _running_mean(values: Any) -> Any:
    """Centred, over a tenth of the steps; shorter at both ends."""
    width = max(3, len(values) // 10)
    ones = np.convolve(np.ones(len(values)), np.ones(width), mode="same")
    return np.convolve(values, np.ones(width), mode="same") / ones
