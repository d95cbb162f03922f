"""Which rows become the parts of a snapshot: hide, weigh the raters, mix, split by prompt, sort.

    a table of rows --select(mix, standing)--> Selection (parts, what stayed out, raters) --snapshots.freeze--> Parquet

What a rater's rows weigh comes from the train rows that several judged, and from gold pairs (`reliability.py`), before
the mix: so a rater of weight 0 contradicts nobody. No held-out row counts for it. Pure: the same rows, mix and standing
give the same parts. Not here: the rules of the mix (``mixing.py``), files (``snapshots.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from feedback_store import tables
from feedback_store.errors import InvalidRecord, NotEnoughPreferences
from feedback_store.mixing import AGREEMENT, PAIRS, RATINGS, Choice, Mix, MixRow, choose, judgements, near_key
from feedback_store.preferences import HELD_OUT, TRAIN, key_of_text, split_of_key
from feedback_store.records import Preference, UnpairedPreference
from feedback_store.reliability import GoldAnswers, Reliability, reliabilities

PARTS = (TRAIN, HELD_OUT)
RATED_TRAIN, RATED_HELD_OUT = RATED_PARTS = ("ratings", "held_out_ratings")
_BY_RATER = ("quarantined", "without", "rater_weight")  # why rows stay out, where it is about who said it


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of raters besides their rows: who is in quarantine, and how each did on gold pairs."""

    quarantined: frozenset[str] = frozenset()
    gold: Mapping[str, GoldAnswers] = field(default_factory=dict)


NOBODY_KNOWN = Standing()


@dataclass(frozen=True, slots=True)
class Selection:
    """The parts as they will be written, and what did not get in.

    ``raters_left_out`` is rows by rater by reason, ``weights`` what the raters of the train part weigh, if asked for.
    """

    parts: Mapping[str, pa.Table]
    left_out: Mapping[str, int]
    redacted: Mapping[str, int]
    raters_left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    weights: Mapping[str, Reliability] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A table as the mix looks at it: its keys of prompts, its rows described."""

    table: pa.Table
    keys: Sequence[str]
    described: Sequence[MixRow]

    @classmethod
    def of(cls, table: pa.Table, keys: Sequence[str] | None = None) -> _Rows:
        """``keys`` are those of the prompts as they were, where something was hidden in them since."""
        texts = tables.first_user_texts(table["prompt"])
        if keys is None:
            keys = [key_of_text(text) for text in texts]
        return cls(table, keys, _described(table, keys, texts))

    @property
    def ids(self) -> list[str]:
        return [row.preference_id for row in self.described]


def select(
    preferences: pa.Table | Sequence[Preference],
    practice: str | None,
    mix: Mix,
    evaluation_prompts: Collection[str],
    ratings: Sequence[UnpairedPreference],
    *,
    standing: Standing,
    redact: bool,
) -> Selection:
    """The parts of a snapshot; see ``snapshots.freeze`` for the arguments and what is raised."""
    rows = preferences if isinstance(preferences, pa.Table) else tables.rows_of(preferences)
    selection = _select(rows, practice, mix, evaluation_prompts, standing, redact=redact)
    if mix.learns_from == RATINGS:
        rated = tables.ratings_of(ratings)
        selection = _with_ratings(selection, rated, mix, evaluation_prompts, standing, redact=redact)
    _require_rows(selection.parts, mix)
    return selection


def _select(
    table: pa.Table, practice: str | None, mix: Mix, evaluation_prompts: Collection[str], standing: Standing, *,
    redact: bool,
) -> Selection:  # fmt: skip
    """Hide what is private, weigh the raters, apply the mix, split by prompt, sort by id."""
    strangers = set(table["practice"].unique().to_pylist()) - {practice}
    if strangers:
        raise InvalidRecord("Snapshot", "practice", strangers.pop(), f"{practice!r} in every row")
    table = table.combine_chunks()
    by_id = {identity: index for index, identity in enumerate(table["preference_id"].to_pylist())}
    if len(by_id) < table.num_rows:
        table = table.take(pa.array(by_id.values(), pa.int64()))
    keys = [key_of_text(text) for text in tables.first_user_texts(table["prompt"])]
    if practice is not None:
        return Selection(_split(table, list(by_id), keys, range(table.num_rows), PARTS), {}, {})
    redacted: Counter[str] = Counter()
    if redact:
        table, redacted = tables.redacted(table)
    rows = _Rows.of(table, keys)
    weights = _weights(rows, mix, standing) if mix.rater_weights == AGREEMENT else {}
    choice = _choose(rows, mix, evaluation_prompts, standing, weights=weights)
    parts = _split(table, rows.ids, keys, choice.kept, PARTS)
    parts[TRAIN] = tables.weighted(parts[TRAIN], {rater: found.weight for rater, found in weights.items()})
    return Selection(parts, _numbers(choice), redacted, _left_out_raters(rows, choice), weights)


def _with_ratings(
    pairs: Selection, table: pa.Table, mix: Mix, evaluation_prompts: Collection[str], standing: Standing, *,
    redact: bool,
) -> Selection:  # fmt: skip
    """The selection with the parts of the labelled answers: the same rules, and no prompt that a pair is judged on."""
    keys = [key_of_text(text) for text in tables.first_user_texts(table["prompt"])]
    redacted: Counter[str] = Counter()
    if redact and table.num_rows:
        table, redacted = tables.redacted(table)
    rows = _Rows.of(table, keys)
    judged_on = {near_key(text) for text in tables.first_user_texts(pairs.parts[HELD_OUT]["prompt"])}
    choice = _choose(rows, mix, evaluation_prompts, standing, judged_on)
    left_out = Counter(pairs.left_out) + Counter(_numbers(choice))
    rated = _split(table, rows.ids, keys, choice.kept, RATED_PARTS)
    raters = {
        reason: dict(Counter(pairs.raters_left_out.get(reason, {})) + Counter(numbers))
        for reason, numbers in (dict(pairs.raters_left_out) | _left_out_raters(rows, choice)).items()
    }
    return Selection({**pairs.parts, **rated}, dict(left_out), Counter(pairs.redacted) + redacted, raters)


def _weights(rows: _Rows, mix: Mix, standing: Standing) -> dict[str, Reliability]:
    """What the raters who may teach weigh: from what they judged in common, and from gold pairs. No held-out row."""
    ignored = standing.quarantined | set(mix.without)
    said = partial(tables.said, rows.table)
    gold = {rater: answers for rater, answers in standing.gold.items() if rater not in ignored}
    found = reliabilities(judgements(rows.described, said, parts={TRAIN}, ignored=ignored), gold)
    teaching = {row.rater for row in rows.described}
    return {rater: reliability for rater, reliability in found.items() if rater in teaching}


def _numbers(choice: Choice) -> dict[str, int]:
    return {reason: len(ids) for reason, ids in choice.left_out.items()}


def _left_out_raters(rows: _Rows, choice: Choice) -> dict[str, dict[str, int]]:
    """How many rows of whom stayed out because of who said them, by reason."""
    rater = {row.preference_id: str(row.rater) for row in rows.described}
    return {
        reason: dict(sorted(Counter(rater[identity] for identity in choice.left_out[reason]).items()))
        for reason in _BY_RATER
        if reason in choice.left_out
    }


def _split(
    rows: pa.Table, ids: Sequence[str], keys: Sequence[str], kept: Sequence[int], parts: tuple[str, str]
) -> dict[str, pa.Table]:
    """The kept rows by their prompts' part, sorted by id. ``parts``: what to learn from, what to judge on."""
    train, held_out = parts
    indexes: dict[str, list[int]] = {part: [] for part in parts}
    for index in sorted(kept, key=ids.__getitem__):
        indexes[train if split_of_key(keys[index]) == TRAIN else held_out].append(index)
    return {part: tables.finished(rows, indexes[part], keys) for part in parts}


def _require_rows(parts: Mapping[str, pa.Table], mix: Mix) -> None:
    if mix.learns_from == PAIRS and not parts[TRAIN].num_rows:
        raise NotEnoughPreferences(
            f"There are 0 preferences to train on ({parts[HELD_OUT].num_rows} held out); 1 is the least. "
            "Compare and pick, import a preference file, or practise a taste."
        )
    if mix.learns_from == RATINGS and not parts[RATED_TRAIN].num_rows:
        raise NotEnoughPreferences(
            f"There are 0 rated answers to train on ({parts[RATED_HELD_OUT].num_rows} held out); 1 is the least. "
            "Rate answers with thumbs up and down, or import a file of labelled answers (format kto)."
        )


def _choose(
    rows: _Rows,
    mix: Mix,
    evaluation_prompts: Collection[str],
    standing: Standing,
    held_out_prompts: Collection[str] = (),
    *,
    weights: Mapping[str, Reliability] | None = None,
) -> Choice:
    judged_on = {near_key(prompt) for prompt in evaluation_prompts}
    return choose(
        rows.described,
        partial(tables.said, rows.table),
        mix,
        judged_on,
        held_out_prompts,
        quarantined=standing.quarantined,
        weightless={rater for rater, found in (weights or {}).items() if not found.weight},
    )


def _described(table: pa.Table, keys: Sequence[str], texts: Sequence[str]) -> list[MixRow]:
    identity = "preference_id" if "chosen" in table.column_names else "unpaired_id"
    columns = [table[name].to_pylist() for name in (identity, "source", "rater")]
    near = map(near_key, texts)
    identical = [False] * table.num_rows
    if "chosen" in table.column_names:
        identical = pc.equal(table["chosen"], table["rejected"]).to_pylist()
    return [
        MixRow(identity, source, rater, split_of_key(key), near_prompt, is_identical)
        for identity, source, rater, key, near_prompt, is_identical in zip(*columns, keys, near, identical, strict=True)
    ]
