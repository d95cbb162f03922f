"""The reviews of h2oGPT: the file ``reviews.csv`` (``--reviews_file``), which has no header and two kinds of rows.

* a review with stars (``--visible_ratings=True``): ``review text, stars 1 to 5, chat, chat, …, time``, where each chat
  is the last exchange of one model's window, written as a Python list ``['question', 'answer']``; the stars are left
  out where nobody pressed them;
* a thumb: ``True,label of the window`` or ``False,label of the window`` in one cell, the answer, the time.

Seen in repository h2oai/h2ogpt, gradio_utils/prompt_form.py, functions ``submit_review`` and ``on_like`` (2024; commits
022361a and 70ef4f8). Four and five stars make the answers good ones, one and two bad ones; three say nothing. **A thumb
has no question with it** (issue 1864 of that repository asks for one), so these rows are skipped as empty; no export
has the asker's name, nor the turns before the last one. A row number is the number of the review, from 1.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from feedback_store.importers.pairs import MAX_ANSWER_CHARACTERS, MAX_PROMPT_CHARACTERS, Choices, Item, Skip, read_label
from feedback_store.importers.sources import CELLS, Row, is_time

NAME = "h2ogpt"
WHY = "it is a table without a header whose rows are h2oGPT reviews: a review, the chats or an answer, the time"

_THUMBS = ("True,", "False,")
_LABELS = {"1": False, "2": False, "4": True, "5": True}
# A line break takes two characters in the written list, a rare sign up to ten.
_LONGEST_CHAT = 10 * (MAX_PROMPT_CHARACTERS + MAX_ANSWER_CHARACTERS)


def matches(row: Row) -> bool:
    """Whether a row is a review or a thumb."""
    cells = row.get(CELLS)
    if not isinstance(cells, list) or len(cells) < 3 or not all(isinstance(cell, str) for cell in cells):
        return False
    if not is_time(cells[-1]):
        return False
    return cells[0].startswith(_THUMBS) or any(cell.startswith("[") for cell in cells[1:-1])


def read(row: Row, _choices: Choices) -> Item | Sequence[Item]:
    """One labelled answer for each chat that a review with stars has."""
    if not matches(row):
        return Skip("malformed")
    review, *said, _ = row[CELLS]
    if review.startswith(_THUMBS):
        return Skip("empty")
    label = _LABELS.get(said[0])
    if label is None:
        return Skip("unlabelled")
    return [_labelled(chat, label) for chat in said[1:]]


def _labelled(chat: str, label: bool) -> Item:
    if len(chat) > _LONGEST_CHAT:
        return Skip("over_long")
    try:
        exchange = ast.literal_eval(chat)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return Skip("malformed")
    if not isinstance(exchange, list | tuple) or len(exchange) != 2 or not isinstance(exchange[0], str):
        return Skip("malformed")
    return read_label(exchange[0], exchange[1], label)
