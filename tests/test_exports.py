"""What leaves: TRL and KTO rows, a CSV that no spreadsheet runs, whole files, and a data set that opens."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from feedback_store import dataset_card, exports
from feedback_store.dataset_export import DatasetFiles, load_dataset_files, write_dataset
from feedback_store.errors import Conflict, InvalidRecord, NotEnoughPreferences, StoreDamaged
from feedback_store.exports import CSV_COLUMNS, csv_text, kto_lines, trl_lines, write_file
from feedback_store.preferences import split_of
from feedback_store.records import Message, Preference, UnpairedPreference

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
TRAIN_FILE = "data/train-00000-of-00001.parquet"
HELD_OUT_FILE = "data/held_out-00000-of-00001.parquet"
UNPAIRED_FILES = ("unpaired/train-00000-of-00001.parquet", "unpaired/held_out-00000-of-00001.parquet")


def preference(chosen: str = "Because.", rejected: str = "No.", rater: str | None = "ana") -> Preference:
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content="Why?"))
    return Preference("pref_1", prompt, chosen, rejected, "pick", 1.0, rater, "pick_1", ("v1", "v0"), None, NOW)


def unpaired_preference(completion: str = "Because.", rater: str | None = "ana") -> UnpairedPreference:
    prompt = (Message(role="user", content="Why?"),)
    return UnpairedPreference("label_1", prompt, completion, True, "rating", 1.0, rater, ("v1",), NOW)


def many(count: int = 60) -> list[Preference]:
    return [
        replace(
            preference(chosen=f"Good {number} 😀", rater=("ana", "ben", None)[number % 3]),
            preference_id=f"pref_{number}",
            prompt=(Message(role="user", content=f"Question {number}?"),),
            source=("pick", "edit", "trl")[number % 3],
            created_at=NOW + timedelta(days=number),
        )
        for number in range(count)
    ]


def many_unpaired(count: int = 60) -> list[UnpairedPreference]:
    return [
        replace(
            unpaired_preference(rater=("ana", "cid")[number % 2]),
            unpaired_id=f"label_{number}",
            prompt=(Message(role="user", content=f"Question {number}?"),),
            label=number % 2 == 0,
        )
        for number in range(count)
    ]


def write(directory: Path, **options: str) -> DatasetFiles:
    return write_dataset(directory, many(), many_unpaired(), name="Our picks", created_at=NOW, **options)  # type: ignore[arg-type]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def raters(path: Path) -> list[str | None]:
    return pq.read_table(path)["rater"].to_pylist()  # type: ignore[no-any-return]


# Rows


def test_a_trl_row_has_the_conversation_and_where_it_comes_from() -> None:
    (row,) = trl_lines([preference()])
    assert json.loads(json.dumps(row)) == {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "preference_id": "pref_1",
        "pick_id": "pick_1",
        "source": "pick",
        "rater": "ana",
        "weight": 1.0,
        "versions": ["v1", "v0"],
        "practice": None,
        "created_at": "2026-11-22T12:00:00+00:00",
    }


def test_a_kto_row_has_the_answer_its_label_and_where_it_comes_from() -> None:
    (row,) = kto_lines([unpaired_preference()])
    assert json.loads(json.dumps(row)) == {
        "prompt": [{"role": "user", "content": "Why?"}],
        "completion": [{"role": "assistant", "content": "Because."}],
        "label": True,
        "unpaired_id": "label_1",
        "source": "rating",
        "rater": "ana",
        "weight": 1.0,
        "versions": ["v1"],
        "created_at": "2026-11-22T12:00:00+00:00",
    }


# CSV


def cells(text: str) -> dict[str, str]:
    header, row = csv.reader(io.StringIO(text, newline=""))
    return dict(zip(header, row, strict=True))


@pytest.mark.parametrize(
    "start",
    ["=", "+", "-", "@", "\t", "\r", "\n", "  =", "＝", "＋", "－", "＠", "\0", "﹦", "⁺", "\u2212", "\ufeff=",
     "\u200b=", "\u2060 @", "\u00a0-", "\u3000＝", "\x0b=", "\u0301=", "'=", "''+", "' =", " \t"],
)  # fmt: skip
def test_no_csv_cell_is_a_formula(start: str) -> None:
    danger = start + 'HYPERLINK("https://evil","x")'
    named = cells(csv_text([preference(chosen=danger, rater=danger)]))
    assert named["chosen"] == "'" + danger
    assert named["rater"] == "'" + danger


@pytest.mark.parametrize("text", ["a=1", "'tis", "’=1", "1-2", "(=1)", "e@mail", " .", "…=", " '=", "é"])
def test_what_is_no_formula_is_left_alone(text: str) -> None:
    assert cells(csv_text([preference(chosen=text)]))["chosen"] == text


def test_every_cell_is_quoted_so_that_no_other_delimiter_starts_a_cell() -> None:
    text = 'fine;=1+1\t=2,"=3"\n=4'
    line = csv_text([preference(chosen=text)])
    assert '"fine;=1+1\t=2,""=3""\n=4"' in line
    assert line.startswith('"preference_id","prompt",')
    assert cells(line)["chosen"] == text


def test_csv_keeps_text_as_it_is() -> None:
    text = 'Lines\nand "quotes", commas – and 😀 = fine'
    rows = list(csv.reader(io.StringIO(csv_text([preference(chosen=text, rater=None)]), newline="")))
    assert rows[0] == list(CSV_COLUMNS)
    named = dict(zip(CSV_COLUMNS, rows[1], strict=True))
    assert (named["chosen"], named["rater"], named["versions"], named["weight"]) == (text, "", "v1 v0", "1")
    assert json.loads(named["prompt"])[1] == {"role": "user", "content": "Why?"}


def test_random_texts_come_back_and_never_start_a_formula() -> None:
    chance = random.Random(20261122)
    alphabet = "=+-@＝﹣−\t\r\n\0 '\"“,;|ab1\u00a0\ufeff\u200b\u0301é😀\x7f\u2028"
    for _ in range(3000):
        text = "".join(chance.choices(alphabet, k=chance.randint(1, 8)))
        if not text.strip() or text == "No.":
            continue
        cell = cells(csv_text([preference(chosen=text)]))["chosen"]
        assert cell[0] not in "=+-@＝﹣−\t\r\n\0"
        assert cell.strip(" \u00a0\ufeff\u200b\u0301\u2028\x7f")[:1] not in tuple("=+-@＝﹣−")
        restored = cell[1:] if cell[0] == "'" and exports._may_be_formula(cell) else cell
        assert restored == text


# Files


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_trl_files_hold_a_row_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new folder" / name
    assert write_file(path, "trl", iter(many()), []) == 60
    data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    assert [json.loads(line) for line in data.decode().splitlines()] == list(trl_lines(many()))
    assert [entry.name for entry in path.parent.iterdir()] == [name]


def test_kto_files_hold_labelled_answers_and_leave_the_pairs_alone(tmp_path: Path) -> None:
    def untouched() -> Iterator[Preference]:
        raise AssertionError("asked for pairs")
        yield

    path = tmp_path / "rows.jsonl"
    assert write_file(path, "kto", untouched(), iter(many_unpaired())) == 60
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(kto_lines(many_unpaired()))


def test_a_csv_file_is_the_csv_text(tmp_path: Path) -> None:
    assert write_file(tmp_path / "rows.csv", "csv", iter(many()), []) == 60
    assert (tmp_path / "rows.csv").read_bytes() == csv_text(many()).encode()
    write_file(tmp_path / "rows.CSV.GZ", "csv", iter(many()), [])
    assert gzip.decompress((tmp_path / "rows.CSV.GZ").read_bytes()) == csv_text(many()).encode()


def test_a_parquet_file_holds_the_trl_rows(tmp_path: Path) -> None:
    assert write_file(tmp_path / "rows.parquet", "parquet", iter(many()), []) == 60
    found = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row | {"created_at": row["created_at"].isoformat()} for row in found] == list(trl_lines(many()))


@pytest.mark.parametrize("format_", ["trl", "kto", "csv", "parquet"])
def test_nothing_to_export_is_a_file_without_rows(tmp_path: Path, format_: str) -> None:
    assert write_file(tmp_path / "rows", format_, [], []) == 0
    assert (tmp_path / "rows").is_file()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        write_file(tmp_path / folder / name, "trl", many(), [])
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_file_export_that_breaks_off_leaves_the_earlier_file(tmp_path: Path) -> None:
    def breaking() -> Iterator[Preference]:
        yield from many()
        raise RuntimeError("the store went away")

    for format_ in ("trl", "parquet"):
        path = tmp_path / format_
        path.write_text("earlier")
        with pytest.raises(RuntimeError, match="went away"):
            write_file(path, format_, breaking(), [])
        assert path.read_text() == "earlier"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["parquet", "trl"]


def test_the_raters_of_a_file_are_kept_unless_asked_otherwise(tmp_path: Path) -> None:
    for choice in ("keep", "drop", "hash"):
        write_file(tmp_path / choice, "parquet", many(), [], raters=choice)
    assert raters(tmp_path / "keep")[:3] == ["ana", "ben", None]
    assert set(raters(tmp_path / "drop")) == {None}
    assert raters(tmp_path / "hash")[2] is None
    assert raters(tmp_path / "hash")[0] == raters(tmp_path / "hash")[3] != raters(tmp_path / "hash")[1]


@pytest.mark.parametrize(
    ("name", "format_", "choice", "match"),
    [
        ("rows", "xml", "keep", r"Export.format is 'xml'; it must be one of trl, kto, csv, parquet"),
        ("rows", "trl", "blur", r"Export.raters is 'blur'; it must be one of keep, hash, drop"),
        ("rows.parquet.gz", "parquet", "keep", "without .gz for Parquet"),
    ],
)
def test_unknown_options_of_a_file_are_refused(
    tmp_path: Path, name: str, format_: str, choice: str, match: str
) -> None:
    with pytest.raises(InvalidRecord, match=match):
        write_file(tmp_path / name, format_, many(), [], raters=choice)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match=r"exists and is no file\. Nothing was written"):
        write_file(tmp_path, "trl", many(), [])
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreDamaged, match="cannot be written"):
        write_file(tmp_path / "file" / "rows.jsonl", "trl", many(), [])


# The data set


def test_a_data_set_holds_every_row_in_its_part(tmp_path: Path) -> None:
    files = write(tmp_path / "set", raters="keep")
    assert files.directory == tmp_path / "set"
    assert set(contents(files.directory)) == set(files.names)
    assert set(files.names) == {"README.md", TRAIN_FILE, HELD_OUT_FILE, *UNPAIRED_FILES, "export.json"}
    for name, part in ((TRAIN_FILE, "train"), (HELD_OUT_FILE, "held_out")):
        found = pq.read_table(files.directory / name).to_pylist()
        expected = list(trl_lines(one for one in many() if split_of(one.prompt) == part))
        assert [row | {"created_at": row["created_at"].isoformat()} for row in found] == expected
        assert files.rows[name] == len(found) > 0
    for name, part in zip(UNPAIRED_FILES, ("train", "held_out"), strict=True):
        found = pq.read_table(files.directory / name).to_pylist()
        expected = list(kto_lines(one for one in many_unpaired() if split_of(one.prompt) == part))
        assert [row | {"created_at": row["created_at"].isoformat()} for row in found] == expected
    assert load_dataset_files(files.directory) == files
    assert list(tmp_path.iterdir()) == [files.directory]


def test_the_card_says_what_is_in_the_data_set(tmp_path: Path) -> None:
    files = write(tmp_path / "set")
    text = (files.directory / "README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "license": "unknown",
        "pretty_name": "Our picks",
        "size_categories": "n<1K",
        "tags": ["preference", "dpo", "kto"],
        "configs": [
            {
                "config_name": config,
                "data_files": [
                    {"split": part, "path": f"{folder}/{part}-00000-of-00001.parquet"} for part in ("train", "held_out")
                ],
            }
            for config, folder in (("default", "data"), ("unpaired", "unpaired"))
        ],
    }
    assert body.startswith("\n# Our picks\n")
    train, held_out = files.rows[TRAIN_FILE], files.rows[HELD_OUT_FILE]
    assert train + held_out == 60
    assert f"| all | | {train} | {held_out} |" in body
    assert "| `pick` | somebody saw two answers to the same prompt and picked one |" in body
    assert "| `trl` | imported from elsewhere, read as the format `trl` |" in body
    assert "Rows by 3 raters, and 20 without a rater; made from 2026-11-22 to 2027-01-20." in body
    assert "The rows with the source `trl` were imported from files or data sets of others" in body
    assert "Exported on 2026-11-22 12:00 UTC." in body
    assert "people's own words" in body
    for column in (*exports.PREFERENCE_SCHEMA.names, *exports.UNPAIRED_SCHEMA.names):
        assert f"| `{column}` |" in body
    for rater in ("ana", "ben", "cid"):
        assert f"{rater} " not in body


def test_the_card_names_the_licence_that_is_given(tmp_path: Path) -> None:
    files = write_dataset(tmp_path / "set", many(1), [], name="One", created_at=NOW, licence="cc-by-4.0")
    text = (files.directory / "README.md").read_text()
    assert "license: cc-by-4.0\n" in text
    assert "Licence: `cc-by-4.0`, as given for this export." in text
    assert "were imported" not in text
    assert "Rows by 1 rater, and 0 without a rater" in text


@pytest.mark.parametrize(
    ("count", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**8 - 1, "10M<n<100M"), (10**8, "100M<n<1B")],
)
def test_the_size_category_is_that_of_the_hub(count: int, category: str) -> None:
    assert dataset_card._size_category(count) == category


def test_a_part_without_rows_has_no_file_and_no_split(tmp_path: Path) -> None:
    held_out = [one for one in many_unpaired() if split_of(one.prompt) == "held_out"]
    files = write_dataset(tmp_path / "set", [], held_out, name="Thumbs", created_at=NOW)
    assert set(files.rows) == {UNPAIRED_FILES[1]}
    metadata = yaml.safe_load((files.directory / "README.md").read_text().split("---\n")[1])
    assert metadata["tags"] == ["preference", "kto"]
    assert metadata["configs"] == [
        {"config_name": "unpaired", "data_files": [{"split": "held_out", "path": UNPAIRED_FILES[1]}]}
    ]


def test_hashed_raters_keep_rows_of_a_person_together_and_differ_between_exports(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one").directory, write(tmp_path / "two").directory
    original = [one.rater for one in many() if split_of(one.prompt) == "train"]
    named = dict(zip(original, raters(first / TRAIN_FILE), strict=True))
    assert [named[rater] for rater in original] == raters(first / TRAIN_FILE)
    assert named[None] is None
    assert named["ana"] != named["ben"]
    assert named["ana"] in raters(first / UNPAIRED_FILES[0])
    assert set(named.values()) & set(raters(second / TRAIN_FILE)) == {None}
    manifest = (first / "export.json").read_text()
    for text in (manifest, *(str(pq.read_table(path).to_pylist()) for path in first.rglob("*.parquet"))):
        assert not [name for name in ("ana", "ben", "cid") if f"'{name}'" in text or f'"{name}"' in text]


def test_dropped_raters_are_nowhere(tmp_path: Path) -> None:
    files = write(tmp_path / "set", raters="drop")
    for name in files.rows:
        assert set(raters(files.directory / name)) == {None}
    assert "The column `rater` is empty" in (files.directory / "README.md").read_text()


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_the_same_inputs_give_the_same_data_set(tmp_path: Path, choice: str) -> None:
    one, two = write(tmp_path / "one", raters=choice), write(tmp_path / "two", raters=choice)
    assert contents(one.directory) == contents(two.directory)


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "set")
    files = write_dataset(tmp_path / "set", many(3), [], name="Fewer", created_at=NOW)
    assert set(contents(tmp_path / "set")) == set(files.names)
    assert sum(files.rows.values()) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_a_folder_that_is_no_unchanged_export_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    extra, edited, changed, other = (write(tmp_path / name).directory for name in ("extra", "edited", "changed", "x"))
    (extra / ".git").mkdir()
    (extra / ".git" / "HEAD").write_text("ref")
    (edited / "README.md").write_text("# By hand")
    (changed / TRAIN_FILE).write_bytes(b"other")
    manifest = json.loads((other / "export.json").read_text())
    (other / "export.json").write_text(json.dumps(manifest | {"format": 99}))
    for directory, reason in (
        (foreign, "it has no export.json"),
        (extra, r"other or missing files: \.git/HEAD"),
        (edited, "README.md was changed by hand"),
        (changed, f"changed since: {TRAIN_FILE}"),
        (other, "of another kind or version"),
    ):
        before = contents(directory)
        with pytest.raises(Conflict, match=rf"{reason}.*It was not replaced: name a new folder"):
            write(directory)
        assert contents(directory) == before
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(Conflict, match="not replaced"):
        write(tmp_path / "set")
    assert (tmp_path / "set").read_text() == "mine"


@pytest.mark.parametrize("damage", ["{}", "[]", "not json", '{"kind": "zephyr-loop data set", "format": 1}'])
def test_a_manifest_that_is_none_is_said_to_be_so(tmp_path: Path, damage: str) -> None:
    directory = write(tmp_path / "set").directory
    (directory / "export.json").write_text(damage)
    with pytest.raises(Conflict, match=r"its export\.json cannot be read"):
        load_dataset_files(directory)


def test_a_data_set_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set", raters="keep")
    before = contents(tmp_path / "set")
    moves = []
    real_replace = Path.replace

    def refusing(path: Path, target: Path) -> Path:
        moves.append(path)
        if len(moves) == 2:
            raise OSError(28, "No space left on device")
        return real_replace(path, target)

    monkeypatch.setattr(Path, "replace", refusing)
    with pytest.raises(StoreDamaged, match=r"cannot be written: .*No space left.*Nothing was kept"):
        write(tmp_path / "set", raters="drop")
    assert contents(tmp_path / "set") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_nothing_to_export_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughPreferences, match="0 preferences and 0 labelled answers"):
        write_dataset(tmp_path / "set", [], [], name="None", created_at=NOW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": " "}, "Export.name"),
        ({"name": "two\nlines"}, "Export.name"),
        ({"created_at": datetime(2026, 11, 22)}, "Export.created_at"),
        ({"raters": "blur"}, "Export.raters"),
    ],
)
def test_bad_options_of_a_data_set_are_refused(tmp_path: Path, options: dict[str, str], match: str) -> None:
    with pytest.raises(InvalidRecord, match=match):
        write_dataset(tmp_path / "set", many(), [], **{"name": "Ours", "created_at": NOW, **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_many_rows_are_written_in_bounded_memory(tmp_path: Path) -> None:
    base = preference(chosen="Good. " * 200, rejected="Bad. " * 200)
    rows = [replace(base, preference_id=f"pref_{number}") for number in range(12_000)]
    tracemalloc.start()
    try:
        write_dataset(tmp_path / "set", rows, [], name="Many", created_at=NOW)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000  # the rows as Python objects would be 12,000 x 3 kB and more
    with pq.ParquetFile(tmp_path / "set" / TRAIN_FILE) as file:
        assert (file.num_row_groups, file.metadata.num_rows) == (6, 12_000)


# Who reads it


def test_datasets_opens_it_and_trl_finds_its_layout(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    directory = shutil.move(write(tmp_path / "first").directory, tmp_path / "set")  # as after a download
    loaded = datasets.load_dataset(str(directory), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "held_out"}
    assert loaded["train"].num_rows + loaded["held_out"].num_rows == 60
    assert {"prompt", "chosen", "rejected"} <= set(loaded["train"].column_names)
    for row in loaded["train"]:
        for column in ("prompt", "chosen", "rejected"):
            assert row[column]
            assert all(set(message) == {"role", "content"} for message in row[column])
        assert row["prompt"][-1]["role"] == "user"
        assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
    unpaired = datasets.load_dataset(str(directory), "unpaired", cache_dir=str(tmp_path / "cache"))
    assert unpaired["train"].features["label"].dtype == "bool"
    row = unpaired["train"][0]
    assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
