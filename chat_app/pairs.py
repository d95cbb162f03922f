"""Two answers side by side: their blind random order, what a pick settles, and what is said after it. Pure.

The answers are written by `turns.py`, stored and turned into preferences by `feedback_store`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from feedback_store.records import PickChoice
from feedback_store.teaching import Untaught

Answer = TypeVar("Answer")

WHY_NOT: Mapping[Untaught, str] = MappingProxyType(
    {
        Untaught.CONVERSATION: "this conversation is not learned from",
        Untaught.RATER: "you asked that nothing of yours is learned from",
        Untaught.ASKER: "whoever asked the question wants nothing of theirs learned from",
        Untaught.QUARANTINE: "what you say is set aside until an admin has looked at it (quarantine)",
        Untaught.SUPERSEDED: "you have said something else since, and that stands",
    }
)
"""Why something is kept and does not teach, where that is about people and not about the answers."""


def shuffle(answers: tuple[Answer, Answer], dice: random.Random) -> tuple[Answer, Answer]:
    """The two answers in the order they are shown, each order equally likely."""
    return answers if dice.random() < 0.5 else (answers[1], answers[0])


def settle(pick: PickChoice) -> int:
    """The index, in shown order, of the answer the conversation goes on with: the first unless the second won."""
    return 1 if pick is PickChoice.SECOND else 0


def sentence_after(
    pick: PickChoice,
    versions: tuple[str, str],
    *,
    preference: bool,
    collected: int,
    every: int,
    untaught: Untaught | None = None,
) -> str:
    """What the page says after a pick: who wrote which answer, and what the pick did.

    versions: in shown order. preference: whether the pick became a preference. collected: how many preferences from
    picks there are since the last retrain, this one included. every: how many start a retrain, 0 for never by itself.
    untaught: why it does not teach, where it does not; where that is about people, no number is named beside it.
    """
    if (only := _saved_only(untaught)) is not None:
        return f"{_reveal(versions)} {only}"
    return f"{_reveal(versions)} {_effect(pick, preference)} {_progress(collected, every)}"


def sentence_after_edit(untaught: Untaught | None, *, judges: bool = False) -> str:
    """What a person reads after rewriting an answer. judges: its prompt is held out, so versions are judged by it."""
    kept = "The conversation keeps the answer as it was written."
    if (only := _saved_only(untaught)) is not None:
        return f"{only} {kept}"
    if untaught is not None:
        return f"Saved, but it does not teach: the answer was cut off, or your version says the same. {kept}"
    measured = " by what it asks of others: this question is held out, so new versions are judged by it"
    return f"Saved: your version teaches{measured if judges else ''}. {kept}"


def sentence_after_rating(untaught: Untaught | None) -> str:
    """What a person reads after a thumb."""
    said = "Thank you – your rating is saved. Picks between two answers are what the model is trained on."
    return _saved_only(untaught) or said


def sentence_after_choice(*, teach: bool, begun: bool) -> str:
    """What a person reads who said whether a conversation may teach; one not begun yet can have taught nothing."""
    if teach:
        return "This conversation may teach."
    return "Nothing of this conversation will teach" + (
        " from now on. What was trained before, or is being trained now, keeps what it learned." if begun else "."
    )


def _saved_only(untaught: Untaught | None) -> str | None:
    """What a person reads whose words are kept and do not teach; None where they do, or the answers are why not."""
    if untaught is None or untaught not in WHY_NOT:
        return None
    return f"Saved, but it does not teach and does not count towards a retrain: {WHY_NOT[untaught]}."


def _reveal(versions: tuple[str, str]) -> str:
    first, second = versions
    if first == second:
        return f"Both answers came from {first}."
    return f"Answer 1 came from {first}, answer 2 from {second}."


def _effect(pick: PickChoice, preference: bool) -> str:
    if preference:
        return "Saved, thank you:"
    if pick is PickChoice.SKIP:
        return "Skipped, nothing to learn from it:"
    if pick is PickChoice.TIE:
        return "Saved as a tie, which does not count:"
    if pick is PickChoice.BOTH_BAD:
        return "Saved as both bad, which does not count:"
    return "Saved, but it does not count, because an answer was cut off or both were the same:"


def _progress(collected: int, every: int) -> str:
    noun = "pick" if collected == 1 else "picks"
    if every == 0:
        return f"{collected} {noun} collected for the next retrain."
    if collected >= every:
        return f"{collected} {noun} collected, enough for the next retrain."
    return f"{collected} of {every} until the next retrain."
