"""From what people said to preferences, and which part of a snapshot a prompt belongs to. Pure: no store, no clock.

    pick + pair ----------preference_of--> Preference or None      rating + answer --labelled--> UnpairedPreference
    edit + answer --------preference_of_edit                       prompt --split_of--> "train" or "held_out"
    retry + both answers -preference_of_retry

The split is by prompt, once and for ever: a prompt that was held out yesterday is held out tomorrow, whatever else
came in. Ties and both bad are evidence and no pairs. Not here: caps per rater, near-duplicates (``mixing.py``),
contradictions and agreement (``agreement.py``).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from datetime import datetime

import orjson

from feedback_store.errors import InvalidRecord
from feedback_store.records import (
    GOLD,
    Candidate,
    Edit,
    Message,
    Pair,
    Pick,
    PickChoice,
    Preference,
    UnpairedPreference,
)

TRAIN = "train"
HELD_OUT = "held_out"
HELD_OUT_SHARE = 0.10
RETRY_WEIGHT = 0.25


def preference_of(pick: Pick, pair: Pair) -> Preference | None:
    """The training row a pick stands for, or None where it teaches nothing.

    None for a tie, both bad or skip; for a candidate that did not end by itself (``finish_reason`` other than stop);
    for empty or equal answers, and for gold pairs.
    """
    if pick.pick not in (PickChoice.FIRST, PickChoice.SECOND):
        return None
    chosen, rejected = (pair.first, pair.second) if pick.pick is PickChoice.FIRST else (pair.second, pair.first)
    if not _may_teach(chosen) or not _may_teach(rejected) or _are_equal(chosen.text, rejected.text):
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


def preference_of_edit(edit: Edit, original: Candidate, prompt: tuple[Message, ...]) -> Preference | None:
    """A person's rewrite is better than the answer they rewrote; None where that was incomplete, empty or equal."""
    if not _may_teach(original) or _are_equal(edit.text, original.text):
        return None
    return Preference(
        preference_id=preference_id(prompt, edit.text, original.text, edit.edit_id),
        prompt=prompt,
        chosen=edit.text,
        rejected=original.text,
        source="edit",
        weight=1.0,
        rater=edit.rater,
        pick_id=None,
        versions=(original.version,),
        practice=None,
        created_at=edit.created_at,
    )


def preference_of_retry(
    turn_id: str, kept: Candidate, given_up: Candidate, prompt: tuple[Message, ...], rater: str
) -> Preference | None:
    """The answer a person kept after asking again may be better than the one before it: weak evidence.

    The person never saw both side by side, so the weight is ``RETRY_WEIGHT`` and mixes leave these rows out unless
    they ask for them.
    """
    if not _may_teach(kept) or not _may_teach(given_up) or _are_equal(kept.text, given_up.text):
        return None
    return Preference(
        preference_id=preference_id(prompt, kept.text, given_up.text, turn_id),
        prompt=prompt,
        chosen=kept.text,
        rejected=given_up.text,
        source="retry",
        weight=RETRY_WEIGHT,
        rater=rater,
        pick_id=None,
        versions=(kept.version, given_up.version),
        practice=None,
        created_at=kept.created_at,
    )


def labelled(
    answer: Candidate,
    prompt: tuple[Message, ...],
    label: bool,
    *,
    source: str,
    rater: str,
    origin: str,
    created_at: datetime,
) -> UnpairedPreference | None:
    """An answer a person called good or bad; ``origin`` is the id of the rating or the pick that says so."""
    if not _may_teach(answer):
        return None
    return UnpairedPreference(
        unpaired_id=unpaired_id(prompt, answer.text, label, origin),
        prompt=prompt,
        completion=answer.text,
        label=label,
        source=source,
        weight=1.0,
        rater=rater,
        versions=(answer.version,),
        created_at=created_at,
    )


def _may_teach(candidate: Candidate) -> bool:
    """A whole answer of a version; those of gold pairs are known, and are there to judge raters."""
    return candidate.finish_reason == "stop" and bool(candidate.text.strip()) and candidate.version != GOLD


def _are_equal(one: str, other: str) -> bool:
    return one.strip() == other.strip()


def preference_id(prompt: Sequence[Message], chosen: str, rejected: str, origin: str | None) -> str:
    """The id that the contents give: the same row imported twice has one id.

    ``origin`` is the pick id of a picked row, the taste of a practice row and None for an imported one.
    """
    return "pref_" + _content_hash([[[m["role"], m["content"]] for m in prompt], chosen, rejected, origin])


def unpaired_id(prompt: Sequence[Message], completion: str, label: bool, origin: str | None) -> str:
    """The id that the contents of a labelled answer give; ``origin`` is None for an imported one."""
    return "label_" + _content_hash([[[m["role"], m["content"]] for m in prompt], completion, label, origin])


def judgement_id(content: str, person_id: str | None) -> str:
    """The id of somebody's word on an imported row, of the row's own id; nobody's word has the row's."""
    if person_id is None:
        return content
    return content.partition("_")[0] + "_" + hashlib.sha256(f"{content} {person_id}".encode()).hexdigest()[:32]


def _content_hash(content: list[object]) -> str:
    try:
        return hashlib.sha256(orjson.dumps(content)).hexdigest()[:32]
    except TypeError as error:
        wanted = "valid Unicode (it holds half a surrogate pair)"
        raise InvalidRecord("Preference", "prompt", content, wanted) from error


def normalise_prompt(text: str) -> str:
    """The text without what does not make it another prompt: width, case, white space."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split())


def prompt_key(prompt: Sequence[Message]) -> str:
    """The SHA-256 of the normalised first user message, in hexadecimal.

    A conversation so keeps all its later prompts in one part of the split. ``prompt`` has a user message
    (``Pair`` and ``Preference`` check that).
    """
    return key_of_text(next(message["content"] for message in prompt if message["role"] == "user"))


def key_of_text(first: str) -> str:
    """The ``prompt_key`` of a prompt whose first user message this is."""
    return hashlib.sha256(normalise_prompt(first).encode()).hexdigest()


def split_of_key(key: str) -> str:
    """``train`` or ``held_out`` for a ``prompt_key``: its first 8 bytes as a fraction, held out below 10%."""
    return HELD_OUT if int(key[:16], 16) / 2**64 < HELD_OUT_SHARE else TRAIN


def split_of(prompt: Sequence[Message]) -> str:
    """``train`` or ``held_out``, the same for ever for the same first prompt."""
    return split_of_key(prompt_key(prompt))
