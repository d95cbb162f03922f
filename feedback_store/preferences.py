"""From picks to preferences, and which part of a snapshot a prompt belongs to. Pure: no store, no clock.

    pick + pair --preference_of--> Preference or None          prompt --split_of--> "train" or "held_out"

The split is by prompt, once and for ever: a prompt that was held out yesterday is held out tomorrow, whatever else
came in. Not here: caps per rater, contradictions, edits and ratings as training rows.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence

from feedback_store.records import Message, Pair, Pick, PickChoice, Preference

TRAIN = "train"
HELD_OUT = "held_out"
HELD_OUT_SHARE = 0.10


def preference_of(pick: Pick, pair: Pair) -> Preference | None:
    """The training row a pick stands for, or None where it teaches nothing.

    None for a tie, both bad or skip; for a candidate that did not end by itself (``finish_reason`` other than stop);
    for empty or equal answers.
    """
    if pick.pick not in (PickChoice.FIRST, PickChoice.SECOND):
        return None
    chosen, rejected = (pair.first, pair.second) if pick.pick is PickChoice.FIRST else (pair.second, pair.first)
    if chosen.finish_reason != "stop" or rejected.finish_reason != "stop":
        return None
    if not chosen.text.strip() or not rejected.text.strip() or chosen.text.strip() == rejected.text.strip():
        return None
    return Preference(
        preference_id=preference_id(pair.prompt, chosen.text, rejected.text, pick.pick_id),
        prompt=pair.prompt,
        chosen=chosen.text,
        rejected=rejected.text,
        source="pick",
        weight=1.0,
        rater=pick.rater,
        pick_id=pick.pick_id,
        versions=(chosen.version, rejected.version),
        practice=None,
        created_at=pick.created_at,
    )


def preference_id(prompt: Sequence[Message], chosen: str, rejected: str, origin: str | None) -> str:
    """The id that the contents give: the same row imported twice has one id.

    ``origin`` is the pick id of a picked row, the taste of a practice row and None for an imported one.
    """
    canonical = json.dumps(
        [[[m["role"], m["content"]] for m in prompt], chosen, rejected, origin],
        ensure_ascii=False,
        separators=(",", ":"),
    )
    return "pref_" + hashlib.sha256(canonical.encode()).hexdigest()[:32]


def normalise_prompt(text: str) -> str:
    """The text without what does not make it another prompt: width, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(prompt: Sequence[Message]) -> str:
    """The SHA-256 of the normalised first user message, in hexadecimal.

    A conversation so keeps all its later prompts in one part of the split. ``prompt`` has a user message
    (``Pair`` and ``Preference`` check that).
    """
    first = next(message["content"] for message in prompt if message["role"] == "user")
    return hashlib.sha256(normalise_prompt(first).encode()).hexdigest()


def split_of_key(key: str) -> str:
    """``train`` or ``held_out`` for a ``prompt_key``: its first 8 bytes as a fraction, held out below 10%."""
    return HELD_OUT if int(key[:16], 16) / 2**64 < HELD_OUT_SHARE else TRAIN


def split_of(prompt: Sequence[Message]) -> str:
    """``train`` or ``held_out``, the same for ever for the same first prompt."""
    return split_of_key(prompt_key(prompt))
