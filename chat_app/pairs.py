"""Two answers side by side: their blind random order, what a pick settles, and what is said after it. Pure.

The answers are written by `turns.py`, stored and turned into preferences by `feedback_store`.
"""

from __future__ import annotations

import random
from typing import TypeVar

from feedback_store.records import PickChoice

Answer = TypeVar("Answer")


def shuffle(answers: tuple[Answer, Answer], dice: random.Random) -> tuple[Answer, Answer]:
    """The two answers in the order they are shown, each order equally likely."""
    return answers if dice.random() < 0.5 else (answers[1], answers[0])


def settle(pick: PickChoice) -> int:
    """The index, in shown order, of the answer the conversation goes on with: the first unless the second won."""
    return 1 if pick is PickChoice.SECOND else 0


def sentence_after(pick: PickChoice, versions: tuple[str, str], *, preference: bool, collected: int, every: int) -> str:
    """What the page says after a pick: who wrote which answer, and what the pick did.

    versions: in shown order. preference: whether the pick became a preference. collected: how many preferences from
    picks there are since the last retrain, this one included. every: how many start a retrain, 0 for never by itself.
    """
    return f"{_reveal(versions)} {_effect(pick, preference)} {_progress(collected, every)}"


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
