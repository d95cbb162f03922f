"""The card of an exported data set: what its rows are, who made them and when, in plain words; nothing invented.

Used by ``dataset_export.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from feedback_store.exports import PREFERENCE_SCHEMA, UNPAIRED_SCHEMA, Record
from feedback_store.preferences import HELD_OUT, HELD_OUT_SHARE, TRAIN
from feedback_store.records import IMPORT_SOURCES, Preference, UnpairedPreference

MANIFEST = "export.json"
PREFERENCE_FOLDER = "data"
UNPAIRED_FOLDER = "unpaired"
PARTS = (TRAIN, HELD_OUT)
PART_FILE = "{}-00000-of-00001.parquet"
_PREFERENCE_SOURCES = {
    "pick": "somebody saw two answers to the same prompt and picked one",
    "edit": "somebody rewrote an answer; the rewrite is chosen, what they rewrote is rejected",
    "retry": "somebody asked again; the answer they kept is chosen, the one before it rejected (weak evidence)",
    "practice": "labelled by a fixed rule of form, not by people",
}
_UNPAIRED_SOURCES = {
    "rating": "thumbs up or down on one answer",
    "pick": "an answer of a pair that somebody called both bad",
}
_COLUMNS = {
    "prompt": "the conversation up to the question, as a list of `{role, content}`",
    "chosen": "the better answer, as a list with one message of the assistant",
    "rejected": "the worse answer, as a list with one message of the assistant",
    "completion": "the answer, as a list with one message of the assistant",
    "label": "true for a good answer, false for a bad one",
    "preference_id": "the id that the contents of the row give",
    "unpaired_id": "the id that the contents of the row give",
    "source": "where the row comes from (see above)",
    "rater": "who said so; empty where that is not known",
    "weight": "how much the row counts, above 0",
    "pick_id": "the id of the pick the row stands for; empty for other sources",
    "versions": "the versions of the assistant that wrote the answers, chosen first, where they are known",
    "practice": "the rule of a practice row; empty for others",
    "created_at": "when the row was made (UTC); for an imported row, when it was imported",
}
_RATER_SENTENCES = {
    "keep": "The column `rater` holds the names of the raters as the assistant knows them.",
    "hash": (
        "The column `rater` holds a keyed hash: the rows of one person have the same one. The key was made at random "
        "for this export and not kept, so names cannot be worked out from the hashes, and the hashes of two exports "
        "cannot be matched."
    ),
    "drop": "The column `rater` is empty: the names of the raters were left out.",
}


def dataset_card(
    paired: Mapping[str, Sequence[Preference]],
    unpaired: Mapping[str, Sequence[UnpairedPreference]],
    *,
    name: str,
    created_at: datetime,
    raters: str,
    licence: str | None,
) -> str:
    """The card as Markdown with the hub's metadata on top."""
    from huggingface_hub import DatasetCard, DatasetCardData

    records: list[Preference | UnpairedPreference] = [
        *chain.from_iterable(paired.values()),
        *chain.from_iterable(unpaired.values()),
    ]
    data = DatasetCardData(
        license=licence or "unknown",
        pretty_name=name,
        size_categories=_size_category(len(records)),
        tags=["preference", *(["dpo"] if any(paired.values()) else []), *(["kto"] if any(unpaired.values()) else [])],
        configs=[
            *_configs("default", PREFERENCE_FOLDER, paired),
            *_configs("unpaired", UNPAIRED_FOLDER, unpaired),
        ],
    )
    sections = [
        f"# {name}",
        "Preferences about answers to prompts, as rows to learn from. Exported on "
        f"{created_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC.",
        "## What a row is",
        *_row_sections(paired, unpaired),
        "## Who and when",
        _who_and_when(records),
        _RATER_SENTENCES[raters],
        "## How the parts are made",
        f"The first message of the user alone decides the part of a row. It is normalised (Unicode NFKC, case folded, "
        f"white space joined) and hashed with SHA-256; the first 8 bytes of the hash, read as a fraction of 1, "
        f"put the row into `{HELD_OUT}` below {HELD_OUT_SHARE:.2f} and into `{TRAIN}` otherwise. The same prompt is so "
        f"in the same part in every export. `{HELD_OUT}` is for judging: do not learn from it.",
        "## Personal data",
        "Prompts are people's own words, and so are answers that people rewrote: they may be personal, and answers may "
        "repeat them. The export takes nothing out of the texts. Read them before you share them.",
        "## Licence and origin",
        _licence_section({record.source for record in records}, licence),
        "## How it was made",
        "Written by the export of Zephyr Loop, a self-hosted chat assistant that learns from its people's ratings. "
        f"The SHA-256 of every Parquet file stands in `{MANIFEST}`. Open it with `datasets.load_dataset`, given this "
        "folder or the name of this data set on the hub.",
    ]
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _configs(config: str, folder: str, parts: Mapping[str, Sequence[object]]) -> list[dict[str, Any]]:
    files = [
        {"split": part, "path": f"{folder}/{PART_FILE.format(part)}"} for part, records in parts.items() if records
    ]
    return [{"config_name": config, "data_files": files}] if files else []


def _row_sections(
    paired: Mapping[str, Sequence[Preference]], unpaired: Mapping[str, Sequence[UnpairedPreference]]
) -> Iterator[str]:
    if any(paired.values()):
        yield (
            f"`default` (folder `{PREFERENCE_FOLDER}`): one preference. As an answer to `prompt`, `chosen` is better "
            "than `rejected`. The layout is TRL's conversational preference layout, for DPO and its kin."
        )
        yield _source_table(paired, _PREFERENCE_SOURCES)
        yield _column_table(PREFERENCE_SCHEMA.names)
    if any(unpaired.values()):
        yield (
            f"`unpaired` (folder `{UNPAIRED_FOLDER}`): one answer with a label. The layout is TRL's conversational "
            "unpaired preference layout, for KTO."
        )
        yield _source_table(unpaired, _UNPAIRED_SOURCES)
        yield _column_table(UNPAIRED_SCHEMA.names)


def _source_table(parts: Mapping[str, Sequence[Record]], meanings: Mapping[str, str]) -> str:
    counted = {part: Counter(record.source for record in records) for part, records in parts.items()}
    sources = sorted(set().union(*counted.values()))
    lines = [f"| source | what it is | {' | '.join(parts)} |", "|---|---|" + "---:|" * len(parts)]
    for source in sources:
        meaning = meanings.get(source, f"imported from elsewhere, read as the format `{source}`")
        lines.append(f"| `{source}` | {meaning} | {' | '.join(str(counted[part][source]) for part in parts)} |")
    lines.append(f"| all | | {' | '.join(str(len(records)) for records in parts.values())} |")
    return "\n".join(lines)


def _column_table(columns: Iterable[str]) -> str:
    return "\n".join(
        ["| column | what it holds |", "|---|---|", *(f"| `{column}` | {_COLUMNS[column]} |" for column in columns)]
    )


def _who_and_when(records: Sequence[Preference | UnpairedPreference]) -> str:
    raters = {record.rater for record in records if record.rater is not None}
    without = sum(record.rater is None for record in records)
    times = [record.created_at.astimezone(UTC) for record in records]
    return (
        f"Rows by {len(raters)} rater{'' if len(raters) == 1 else 's'}, and {without} without a rater; "
        f"made from {min(times):%Y-%m-%d} to {max(times):%Y-%m-%d}."
    )


def _licence_section(sources: set[str], licence: str | None) -> str:
    imported = sorted(sources.intersection(IMPORT_SOURCES))
    given = f"Licence: `{licence}`, as given for this export." if licence else "No licence was given for this export."
    if not imported:
        return given
    listed = ", ".join(f"`{source}`" for source in imported)
    return (
        f"{given} The rows with the source {listed} were imported from files or data sets of others: their licences "
        "are not known here, and they keep them. Look them up before you share these rows."
    )


def _size_category(count: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
    return next((name for exponent, name in enumerate(names, start=3) if count < 10**exponent), "100M<n<1B")
