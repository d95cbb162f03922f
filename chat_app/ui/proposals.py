"""What is proposed, on top of the admin page: what speaks for it, Promote, Dismiss.

Where it sits: components and words only; `admin.py` wires them, because a promotion may find no room for two models.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from chat_app.operations import Operations

SAID = {"verdict": "by its verdict", "trial": "by its live trial"}


class ProposalSection:
    """The section; build it inside the page's Blocks. `version` holds the one that the buttons are about."""

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.shown = gr.HTML(padding=False, elem_id="proposals")
        with gr.Row(elem_id="proposal-buttons"):
            self.promote = gr.Button(visible=False, variant="primary", elem_id="promote-proposed")
            self.dismiss = gr.Button(visible=False, elem_id="dismiss-proposed")
        self.message = gr.Markdown(elem_id="proposal-message")
        self.version = gr.State(None)
        self.by = gr.Textbox(
            label="Your name", info="Who starts a run does not promote its version.", max_length=256, elem_id="by",
            visible=operations.settings.approval == "other",
        )  # fmt: skip

    @property
    def components(self) -> list[Any]:
        """What `look` changes."""
        return [self.shown, self.promote, self.dismiss, self.version]

    def look(self) -> dict[Any, Any]:
        """The section as it is now."""
        rows = self.operations.proposals.current()
        version = next((row["version"] for row in rows if row["state"] == "open"), None)
        return {
            self.shown: proposal_cards(rows),
            self.promote: gr.Button(f"Promote {version}", visible=version is not None),
            self.dismiss: gr.Button(f"Dismiss {version}", visible=version is not None),
            self.version: version,
        }

    def fingerprint(self) -> list[tuple[str, str, str]]:
        """What a change of is to be drawn."""
        return [(row["source_id"], row["state"], row["reason"]) for row in self.operations.proposals.current()]

    def sentence_of(self, version: str) -> str:
        """What speaks for a version, to be kept with its promotion."""
        return next((one.sentence for one in self.operations.proposals.open() if one.version == version), "")


def proposal_cards(rows: Sequence[Mapping[str, Any]]) -> str:
    """What waits, then the newest proposal, which the buttons below are about; older ones in a line each."""
    waiting = [row for row in rows if row["state"] == "waiting"]
    proposed = [row for row in rows if row["state"] == "open"]
    cards = [_card(row, "waits", "keep") for row in waiting]
    older = [
        f"<p><small>Proposed before: <b>{escape(row['version'])}</b>. {escape(row['sentence'])} "
        f"{escape(row['reason'])}</small></p>"
        for row in proposed[1:]
    ]
    if proposed:
        cards.append(_card(proposed[0], "proposed", "promote", "".join(older)))
    return "".join(cards)


def _card(row: Mapping[str, Any], word: str, colour: str, below: str = "") -> str:
    by = "" if row["started_by"] is None else f" Its run was started by {row['started_by']}."
    said = f"{SAID[row['source']]}, {row['at'][:16].replace('T', ' ')}.{by}"
    reason = f"<p>{escape(row['reason'])}</p>" if row["reason"] else ""
    return (
        f'<div class="zl-card zl-proposal"><h4>{escape(row["version"])} instead of {escape(row["champion"])} '
        f'<span class="zl-decision {colour}">{word}</span></h4><p>{escape(row["sentence"])}</p>{reason}'
        f"<p><small>{escape(said[0].upper() + said[1:])}</small></p>{below}</div>"
    )
