"""Which preferences a snapshot takes, and why the others stay out. Pure: the same rows and mix give the same choice.

    every preference --choose(mix)--> kept rows + what was left out, by reason --snapshots.freeze--> Parquet

A recipe holds the mix. The rules, in this order, each with its reason in ``LeftOut``:

    quarantined         said by a rater who is in quarantine
    without             said by a rater whom a run asked to leave out
    identical           equal answers, once what is private is hidden
    source              edits or retries that the mix does not take
    evaluation_prompt   a train row whose prompt is one of the evaluation prompts
    near_held_out       a train row whose prompt is nearly a held-out one
    rater_weight        a train row whose rater's weight is 0 (``reliability.py``; ``rater_weights: agreement``)
    duplicate           the same prompt and answers by the same rater (or by nobody) twice
    contradicted        the minority where raters disagree on the same two answers; both sides where they are even
    prompt_limit        more rows on nearly the same prompt than ``max_per_prompt``
    rater_cap           more rows of one rater than ``max_rater_share`` of all rows that have a rater
    replay              imported rows beyond ``replay_ratio`` for each of our own

"Nearly the same" is: equal without case, punctuation and white space. Prompts in other words are not found. Sampling
is by a hash of the seed and the row's id, so a new row never reshuffles the others.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, NamedTuple

from feedback_store.errors import InvalidRecord
from feedback_store.preferences import TRAIN, normalise_prompt
from feedback_store.records import OWN_SOURCES
from feedback_store.reliability import Judgement

PAIRS, RATINGS, TEXT = LEARNS_FROM = ("pairs", "ratings", "text")
OFF, AGREEMENT = RATER_WEIGHTS = ("off", "agreement")
_WORD = re.compile(r"\w+")
_ASCII_REST = {code: None for code in range(128) if not _WORD.fullmatch(chr(code))}


@dataclass(frozen=True, slots=True)
class Mix:
    """What a recipe says about its data.

    ``learns_from``: ``pairs`` (preferences), ``ratings`` (labelled answers) or ``text`` (nothing of the store; the
    preferences are then there to judge on). ``replay_ratio``: imported rows for each of our own in the train part, None
    for all of them. ``max_rater_share``: the largest part, of the train rows that have a rater, that one rater may
    have; with R raters never below 1/R. ``max_per_prompt``: the most train rows on nearly the same prompt. None
    switches a limit off. ``rater_weights``: ``agreement`` gives the train rows of a rater the weight that agreement and
    gold pairs say. ``without``: raters of whom no row is taken.
    """

    edits: bool = True
    retries: bool = False
    replay_ratio: float | None = None
    max_rater_share: float | None = None
    max_per_prompt: int | None = None
    seed: int = 0
    learns_from: str = PAIRS
    rater_weights: str = OFF
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rater_weights not in RATER_WEIGHTS:
            raise InvalidRecord("Mix", "rater_weights", self.rater_weights, "one of " + ", ".join(RATER_WEIGHTS))
        if self.learns_from not in LEARNS_FROM:
            raise InvalidRecord("Mix", "learns_from", self.learns_from, "one of " + ", ".join(LEARNS_FROM))
        if self.replay_ratio is not None and not 0 <= self.replay_ratio < float("inf"):
            raise InvalidRecord("Mix", "replay_ratio", self.replay_ratio, "0 or more, or None for all")
        if self.max_rater_share is not None and not 0 < self.max_rater_share <= 1:
            raise InvalidRecord("Mix", "max_rater_share", self.max_rater_share, "above 0 and at most 1, or None")
        if self.max_per_prompt is not None and self.max_per_prompt < 1:
            raise InvalidRecord("Mix", "max_per_prompt", self.max_per_prompt, "1 or more, or None")

    def as_dict(self) -> dict[str, Any]:
        """The mix as a manifest keeps it."""
        return {**asdict(self), "without": list(self.without)}


class MixRow(NamedTuple):
    """What the rules look at; ``part`` is the split of the prompt, ``is_identical`` whether the answers are equal."""

    preference_id: str
    source: str
    rater: str | None
    part: str
    near_key: str
    is_identical: bool


Said = Callable[[int], tuple[str, str, str]]
"""The prompt, the better and the worse answer of the row with this index, each as one text."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The indexes of the kept rows, in the order given, and the ids of the others by reason."""

    kept: tuple[int, ...]
    left_out: Mapping[str, tuple[str, ...]]


def near_key(text: str) -> str:
    """A prompt's letters and digits, without case: nearly the same prompts have the same key."""
    if text.isascii():  # the same, several times faster
        return text.lower().translate(_ASCII_REST)
    return "".join(_WORD.findall(normalise_prompt(text)))


def choose(
    rows: Sequence[MixRow],
    said: Said,
    mix: Mix,
    evaluation_prompts: Collection[str] = (),
    held_out_prompts: Collection[str] = (),
    *,
    quarantined: Collection[str] = (),
    weightless: Collection[str] = (),
) -> Choice:
    """Apply the rules. ``said`` is asked only of rows that share their prompt.

    ``evaluation_prompts`` and ``held_out_prompts`` (those that other rows are judged on) are near keys. A labelled
    answer says what a pair says whose other answer is empty: so duplicates and contradictions are found in both.
    ``quarantined`` and ``weightless`` are raters.
    """
    rank = [hashlib.sha256(f"{mix.seed} {row.preference_id}".encode()).digest() for row in rows]
    kept = list(range(len(rows)))
    left_out: dict[str, tuple[str, ...]] = {}

    def leave(reason: str, gone: Iterable[int]) -> None:
        nonlocal kept
        out = set(gone)
        if out:
            left_out[reason] = tuple(sorted(rows[index].preference_id for index in out))
            kept = [index for index in kept if index not in out]

    def train() -> Iterator[int]:
        return (index for index in kept if rows[index].part == TRAIN)

    leave("quarantined", (index for index in kept if rows[index].rater in quarantined))
    leave("without", (index for index in kept if rows[index].rater in mix.without))
    leave("identical", (index for index in kept if rows[index].is_identical))
    unwanted = {source for source, wanted in (("edit", mix.edits), ("retry", mix.retries)) if not wanted}
    leave("source", (index for index in kept if rows[index].source in unwanted))
    judged_on = set(evaluation_prompts)
    leave("evaluation_prompt", (index for index in train() if rows[index].near_key in judged_on))
    held_out = {rows[index].near_key for index in kept if rows[index].part != TRAIN} | set(held_out_prompts)
    leave("near_held_out", (index for index in train() if rows[index].near_key in held_out))
    leave("rater_weight", (index for index in train() if rows[index].rater in weightless))
    shared = {index: said(index) for index in _nearly_same_prompt(rows, kept)}
    leave("duplicate", _duplicates(rows, shared, rank))
    leave("contradicted", _contradicted(shared, set(kept)))
    if mix.max_per_prompt is not None:
        leave("prompt_limit", _over_prompt_limit(rows, train(), rank, mix.max_per_prompt))
    if mix.max_rater_share is not None:
        leave("rater_cap", _over_rater_cap(rows, train(), rank, mix.max_rater_share))
    if mix.replay_ratio is not None:
        leave("replay", _beyond_replay(rows, train(), rank, mix.replay_ratio))
    return Choice(tuple(kept), left_out)


def judgements(
    rows: Sequence[MixRow], said: Said, *, parts: Collection[str], ignored: Collection[str] = ()
) -> list[Judgement]:
    """Who called which answer better, of rows in these parts that share their prompt; ``ignored`` are raters."""
    judging = [
        index
        for index, row in enumerate(rows)
        if row.rater is not None and row.rater not in ignored and row.part in parts and not row.is_identical
    ]
    found = []
    for index in _nearly_same_prompt(rows, judging):
        prompt, chosen, rejected = said(index)
        found.append(Judgement((prompt, *sorted((chosen, rejected))), str(rows[index].rater), chosen < rejected))
    return found


def _nearly_same_prompt(rows: Sequence[MixRow], kept: Iterable[int]) -> list[int]:
    """The rows that share their prompt with another one: most have one of their own and need no second look."""
    by_prompt = _grouped(kept, lambda index: rows[index].near_key)
    return [index for same in by_prompt.values() if len(same) > 1 for index in same]


def _duplicates(
    rows: Sequence[MixRow], shared: Mapping[int, tuple[str, str, str]], rank: Sequence[bytes]
) -> Iterator[int]:
    """All but one of the rows that say the same; a rater's own word goes before an imported one."""
    for same in _grouped(shared, shared.__getitem__).values():
        by_rater = _grouped(same, lambda index: rows[index].rater)
        nobody = by_rater.pop(None, [])
        for indexes in by_rater.values():
            yield from sorted(indexes, key=lambda index: (_is_replay(rows[index]), rank[index]))[1:]
        yield from nobody if by_rater else sorted(nobody, key=rank.__getitem__)[1:]


def _contradicted(shared: Mapping[int, tuple[str, str, str]], kept: Collection[int]) -> Iterator[int]:
    left = (index for index in shared if index in kept)
    for same in _grouped(left, lambda index: (shared[index][0], *sorted(shared[index][1:]))).values():
        sides = _grouped(same, lambda index: shared[index][1])
        if len(sides) > 1:
            one, other = sides.values()
            if len(one) <= len(other):
                yield from one
            if len(other) <= len(one):
                yield from other


def _over_prompt_limit(rows: Sequence[MixRow], kept: Iterable[int], rank: Sequence[bytes], limit: int) -> Iterator[int]:
    for same in _grouped(kept, lambda index: rows[index].near_key).values():
        if len(same) > limit:
            yield from sorted(same, key=lambda index: (_is_replay(rows[index]), rank[index]))[limit:]


def _over_rater_cap(rows: Sequence[MixRow], kept: Iterable[int], rank: Sequence[bytes], share: float) -> Iterator[int]:
    by_rater = _grouped((index for index in kept if rows[index].rater is not None), lambda index: rows[index].rater)
    cap = _cap([len(indexes) for indexes in by_rater.values()], share)
    for indexes in by_rater.values():
        yield from sorted(indexes, key=rank.__getitem__)[cap:]


def _cap(sizes: Sequence[int], share: float) -> int:
    """The largest number of rows a rater may have so that it is at most ``share`` (or 1/R) of what then remains."""
    share = max(share, 1 / len(sizes)) if sizes else 1.0
    low, high = min(sizes, default=0), max(sizes, default=0)  # equal shares always fit
    while low < high:
        middle = (low + high + 1) // 2
        if middle <= share * sum(min(size, middle) for size in sizes) + 1e-9:
            low = middle
        else:
            high = middle - 1
    return low


def _beyond_replay(rows: Sequence[MixRow], kept: Iterable[int], rank: Sequence[bytes], ratio: float) -> Iterator[int]:
    indexes = list(kept)
    replay = sorted((index for index in indexes if _is_replay(rows[index])), key=rank.__getitem__)
    own = len(indexes) - len(replay)
    # Without a row of our own there is nothing to mix with: the imported ones are what there is to learn from.
    yield from replay[ceil(own * ratio) :] if own else ()


def _is_replay(row: MixRow) -> bool:
    return row.source not in OWN_SOURCES


def _grouped(indexes: Iterable[int], key: Callable[[int], Any]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = defaultdict(list)
    for index in indexes:
        groups[key(index)].append(index)
    return groups
