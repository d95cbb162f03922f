"""The curves of the newest run on the admin page, with what they say in words above and the tail of its log below.

Where it sits: components only; `admin.py` builds it, and asks `look` for what each second brings. The numbers are the
lines of metrics.jsonl, as GET /v1/runs/{id}/metrics gives them.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr
import pandas as pd

PLOTS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("loss", {"loss": "training", "eval/loss": "validation"}),
    ("rewards/margins", {"rewards/margins": "training", "eval/rewards/margins": "validation"}),
    ("rewards/accuracies", {"rewards/accuracies": "training", "eval/rewards/accuracies": "validation"}),
    ("logps", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    ("lengths (tokens)", {"lengths/chosen": "chosen", "lengths/rejected": "rejected"}),
)
"""Title, and which keys of a line make which series."""
COLOURS = {"training": "#0d9488", "validation": "#d97706", "chosen": "#0d9488", "rejected": "#d97706"}
POINTS = 300  # a browser draws this many a second without a stutter
LOG_LINES = 40
LONGER = 1.2

Updates = dict[Any, Any]


class LiveCurves:
    """Build it inside the page's Blocks; `components` are what `look` updates."""

    def __init__(self) -> None:
        self.words = gr.HTML(padding=False, elem_id="run-words")
        with gr.Row(visible=False) as self.row:
            self.plots = [
                gr.LinePlot(
                    x="step", y="value", color="series", color_map=COLOURS, title=title, height=200, x_title="step",
                    y_title=" ", min_width=300, show_label=False,
                )
                for title, _ in PLOTS
            ]  # fmt: skip
        with gr.Accordion("Log of the run", open=False, visible=False, elem_id="run-log") as self.log_part:
            self.log = gr.HTML(padding=False)
        self.components = [self.words, self.row, *self.plots, self.log_part, self.log]

    def look(self, lines: Sequence[Mapping[str, Any]], log: Sequence[str]) -> Updates:
        """What to show of a run's lines and the end of its log; nothing of a run that has none."""
        return {
            self.words: in_words(lines),
            self.row: gr.Row(visible=len(lines) > 1),
            **{
                plot: gr.LinePlot(value=points(lines, series))
                for plot, (_, series) in zip(self.plots, PLOTS, strict=True)
            },
            self.log_part: gr.Accordion(visible=bool(log)),
            self.log: f'<pre class="zl-log">{escape(chr(10).join(log[-LOG_LINES:]))}</pre>',
        }


def points(lines: Sequence[Mapping[str, Any]], series: Mapping[str, str]) -> pd.DataFrame:
    """Rows of step, value and series; of a long run every n-th line of each."""
    rows: list[tuple[int, float, str]] = []
    for key, name in series.items():
        found = [(line["step"], line[key], name) for line in lines if line.get(key) is not None]
        every = -(-len(found) // POINTS) or 1
        rows += found[::-every][::-1]
    return pd.DataFrame(rows, columns=["step", "value", "series"])


def in_words(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the curves say, for people who do not read curves."""
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "eval/rewards/accuracies" in line]
    if len(steps) < 2:
        return ""
    said = []
    accuracies = [line["rewards/accuracies"] for line in steps if "rewards/accuracies" in line]
    if accuracies:
        recent = accuracies[-10:]
        said.append(
            f"In the last {len(recent)} steps it favoured the chosen answer in {sum(recent) / len(recent):.0%} of the "
            "pairs it learns from."
        )
    if validations:
        last = validations[-1]
        best = max(validations, key=lambda line: (line["eval/rewards/accuracies"], -line["eval/loss"]))
        said.append(
            f"On rows kept aside it was {last['eval/rewards/accuracies']:.0%} after step {last['step']}"
            + ("." if best is last else f", at best {best['eval/rewards/accuracies']:.0%} after step {best['step']}.")
        )
    lengths = [(line["lengths/chosen"], line["lengths/rejected"]) for line in steps if "lengths/chosen" in line]
    if lengths:
        chosen, rejected = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
        longer = " That teaches it to write more." if chosen > LONGER * rejected else ""
        said.append(f"Chosen answers have {chosen:.0f} tokens, rejected ones {rejected:.0f}.{longer}")
    return f"<p>{escape(' '.join(said))}</p>" if said else ""
