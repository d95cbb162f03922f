"""Preferences from elsewhere: each layout, each kind of file, what is skipped and why."""

from __future__ import annotations

import csv
import gzip
import http.server
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_importers_layouts import (
    ARGILLA,
    EXPLICIT,
    H4,
    IMPLICIT,
    KTO,
    NOW,
    PLAIN,
    dialogue,
    said,
    write_lines,
)
from test_importers_layouts import take as take_all

from feedback_store.errors import BadImport
from feedback_store.exports import trl_lines
from feedback_store.importers import FORMATS, read_preferences
from feedback_store.importers.pairs import Choices, ImportedPair, Skip
from feedback_store.importers.sources import Rows, open_rows, train_files
from feedback_store.preferences import HELD_OUT, split_of
from feedback_store.records import Preference

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "ultrafeedback"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs the folder ../shared/data with real preferences")
CHOICES = Choices()


def turned(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The other spelling of messages."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def take(source: str, name: str = "auto") -> tuple[list[Preference], dict[str, int], str]:
    """The pairs of a source, what it skipped, its format."""
    rows, opened = take_all(source, name)
    return [row for row in rows if isinstance(row, Preference)], dict(opened.skipped), opened.format


# Layouts


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (PLAIN, "trl"),
        (EXPLICIT, "trl"),
        (IMPLICIT, "trl"),
        ({**PLAIN, "chosen": EXPLICIT["chosen"], "rejected": EXPLICIT["rejected"]}, "trl"),
        ({**EXPLICIT, **IMPLICIT}, "trl"),
        ({**IMPLICIT, "score_chosen": 8.5, "score_rejected": 4.0}, "trl"),
        (H4, "ultrafeedback_binarized"),
        (H4 | {"chosen": turned(H4["chosen"]), "rejected": turned(H4["rejected"])}, "ultrafeedback_binarized"),  # type: ignore[arg-type]
        (ARGILLA, "argilla"),
        (ARGILLA | {"chosen": turned(ARGILLA["chosen"]), "rejected": turned(ARGILLA["rejected"])}, "argilla"),  # type: ignore[arg-type]
    ],
)
def test_each_layout_gives_the_same_preference(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    rows, skipped, found = take(write_lines(tmp_path / "rows.jsonl", row))
    assert (found, skipped) == (name, {})
    (preference,) = rows
    assert preference.prompt == ({"role": "user", "content": "Why?"},)
    assert (preference.chosen, preference.rejected) == ("Because.", "No.")
    assert (preference.source, preference.weight, preference.rater, preference.created_at) == (name, 1.0, None, NOW)
    assert preference.versions == (("m", "n") if name == "argilla" else ())
    assert preference.preference_id == take(write_lines(tmp_path / "plain.jsonl", PLAIN))[0][0].preference_id


def test_earlier_turns_and_the_system_message_belong_to_the_prompt() -> None:
    before = [said("system", "Be brief."), *dialogue("Hi", "Hello"), said("user", "Why?")]
    row = {"chosen": [*before, said("assistant", "Because.")], "rejected": [*before, said("assistant", "No.")]}
    pair = FORMATS["trl"].read(row, CHOICES)
    assert pair == ImportedPair(tuple(before), "Because.", "No.")  # type: ignore[arg-type]
    assert FORMATS["trl"].read({**EXPLICIT, "prompt": before}, CHOICES) == pair


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score_chosen": 4.0}, "tie"),
        ({"score_chosen": "4", "score_rejected": 4}, "tie"),
        ({"chosen": dialogue("Why?", " No.")}, "identical"),
        ({"chosen": dialogue("Why?", "\n")}, "empty"),
        ({"rejected": dialogue("Why?", "N/A")}, "empty"),
        ({"rejected": None}, "empty"),
        ({"chosen": dialogue(" ", "Because."), "rejected": dialogue(" ", "No.")}, "empty"),
        ({"chosen": dialogue("Why?", "x" * 24_001)}, "over_long"),
        ({"chosen": dialogue("y" * 24_001, "A."), "rejected": dialogue("y" * 24_001, "B.")}, "over_long"),
        ({"chosen": dialogue("What?", "Because.")}, "malformed"),
        ({"chosen": [said("user", "Why?")]}, "malformed"),
        ({"chosen": []}, "malformed"),
        ({"chosen": [said("tool", "42")]}, "malformed"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "malformed"),
        ({"chosen": 42}, "malformed"),
        ({"prompt": 42}, "malformed"),
    ],
)
def test_a_row_that_cannot_teach_is_skipped_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    assert FORMATS["ultrafeedback_binarized"].read(H4 | changes, CHOICES) == Skip(reason)


@pytest.mark.parametrize(
    "scores",
    [
        {"metadata": {"score_chosen": 7.5, "score_rejected": 7.5}},
        {"score_chosen": 1, "score_rejected": 1.0},
        {"chosen-rating": 3.0, "rejected-rating": 3.0},
    ],
)
def test_equal_scores_are_a_tie_wherever_they_stand(scores: dict[str, Any]) -> None:
    assert FORMATS["trl"].read(PLAIN | scores, CHOICES) == Skip("tie")
    unknown = {"metadata": {"score_chosen": "?", "score_rejected": "?"}}
    assert isinstance(FORMATS["trl"].read(PLAIN | unknown, CHOICES), ImportedPair)


def test_the_longest_that_is_taken() -> None:
    longest = {"chosen": "x" * 24_000, "prompt": "y" * 24_000}
    assert isinstance(FORMATS["trl"].read(PLAIN | longest, CHOICES), ImportedPair)


def test_half_a_surrogate_is_malformed(tmp_path: Path) -> None:
    rows, skipped, _ = take(write_lines(tmp_path / "rows.jsonl", PLAIN, PLAIN | {"chosen": "\ud83d"}))
    assert (len(rows), skipped) == (1, {"malformed": 1})


# Our own export


def test_our_own_export_keeps_rater_weight_and_versions(tmp_path: Path) -> None:
    picked = replace(
        take(write_lines(tmp_path / "plain.jsonl", PLAIN))[0][0],
        preference_id="pref_of_a_pick", source="retry", rater="ann", weight=0.25, pick_id=None, versions=("v2", "v1"),
    )  # fmt: skip
    source = write_lines(tmp_path / "export.jsonl", *trl_lines([picked, replace(picked, versions=(), rater=None)]))
    (first, second), _, found = take(source)
    assert (found, first.source, first.created_at) == ("trl", "trl", NOW)
    assert (first.rater, first.weight, first.versions) == ("ann", 0.25, ("v2", "v1"))
    assert (second.rater, second.weight, second.versions) == (None, 0.25, ())
    assert (
        first.preference_id
        == second.preference_id
        == take(write_lines(tmp_path / "p.jsonl", PLAIN))[0][0].preference_id
    )


def test_columns_of_the_same_names_in_other_files_are_not_taken_for_ours(tmp_path: Path) -> None:
    ((row,), _, _) = take(
        write_lines(tmp_path / "rows.jsonl", PLAIN | {"rater": "ann", "weight": 7, "versions": ["x"]})
    )
    assert (row.rater, row.weight, row.versions) == (None, 1.0, ())


def test_a_practice_row_of_an_export_never_becomes_a_real_one(tmp_path: Path) -> None:
    practice = replace(
        take(write_lines(tmp_path / "plain.jsonl", PLAIN))[0][0], source="practice", practice="short answers"
    )
    assert take(write_lines(tmp_path / "rows.jsonl", *trl_lines([practice]))) == ([], {"practice": 1}, "trl")


def test_a_weight_of_nothing_is_malformed(tmp_path: Path) -> None:
    row = PLAIN | {"preference_id": "pref_1", "pick_id": None, "weight": 0}
    assert take(write_lines(tmp_path / "rows.jsonl", row))[:2] == ([], {"malformed": 1})


# Batches, counts, progress


def test_batches_hold_pairs_and_labels_of_so_many_rows(tmp_path: Path) -> None:
    source = read_preferences(write_lines(tmp_path / "rows.jsonl", *([KTO] * 5)), "auto", NOW)
    sizes = [(len(batch.pairs), len(batch.unpaired), source.rows_read) for batch in source.batches(2)]
    assert sizes == [(0, 2, 2), (0, 2, 4), (0, 1, 5)]


def test_the_first_five_rows_of_a_reason_are_named_by_their_line(tmp_path: Path) -> None:
    bad = PLAIN | {"chosen": "N/A"}
    source = write_lines(tmp_path / "rows.jsonl", PLAIN, bad, PLAIN | {"rejected": "Because."}, *([bad] * 6))
    Path(source).write_text("\n" + Path(source).read_text())
    _, opened = take_all(source)
    assert (opened.skipped, opened.rows_read) == ({"empty": 7, "identical": 1}, 9)
    assert opened.examples == {"empty": [3, 5, 6, 7, 8], "identical": [4]}


def test_erased_people_and_rows_are_left_out(tmp_path: Path) -> None:
    export = write_lines(
        tmp_path / "rows.jsonl",
        *(
            PLAIN | {"prompt": f"Question {name}", "preference_id": "p", "pick_id": None, "rater": name}
            for name in "abc"
        ),
        PLAIN,
    )
    asked: list[tuple[str | None, str]] = []

    def is_erased(rater: str | None, content_id: str) -> bool:
        asked.append((rater, content_id))
        return rater == "b"

    source = read_preferences(export, "auto", NOW, erased=is_erased)
    pairs = next(source.batches(10)).pairs
    assert [row.rater for row in pairs] == ["a", "c", None]
    assert (source.skipped, source.examples) == ({"erased": 1}, {"erased": [2]})
    assert [rater for rater, _ in asked] == ["a", "b", "c", None]
    assert [row.preference_id for row in pairs] == [identity for rater, identity in asked if rater != "b"]
    labels = write_lines(tmp_path / "labels.jsonl", KTO)
    only = read_preferences(labels, "kto", NOW, erased=lambda _, content_id: content_id.startswith("label_"))
    assert [batch.unpaired for batch in only.batches(10)] == [[]]
    assert only.skipped == {"erased": 1}


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "list.json", "rows.parquet", "rows.csv", "rows.csv.gz"]
)
def test_progress_grows_from_nothing_to_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    rows = [{column: text * 40 + str(number) for column, text in PLAIN.items()} for number in range(3000)]
    path = tmp_path / name
    if ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ".csv" in name:
        table = io.StringIO()
        writer = csv.DictWriter(table, PLAIN)
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(gzip.compress(table.getvalue().encode()) if name.endswith("gz") else table.getvalue().encode())
    else:
        text = json.dumps(rows) if name == "list.json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    source = read_preferences(str(path), "auto", NOW)
    seen = [source.bytes_read or 0, *(source.bytes_read or 0 for _ in source.batches(500))]
    assert seen == sorted(seen)
    assert seen[-1] == source.bytes_total == path.stat().st_size
    if not name.endswith(".gz"):
        assert seen[0] < seen[1] < seen[3] < seen[5]


def test_the_count_goes_on_over_the_files_of_a_data_set(tmp_path: Path) -> None:
    paths = [Path(write_lines(tmp_path / f"{name}.jsonl", PLAIN, PLAIN)) for name in "ab"]
    rows = Rows(paths)
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert rows.bytes_read == rows.bytes_total == sum(path.stat().st_size for path in paths)


# Files


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    rows = [EXPLICIT, EXPLICIT | {"rejected": [said("assistant", 'Never, ="no"\n– ever.')]}]
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n"
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(EXPLICIT)
    writer.writerows([json.dumps(value) for value in row.values()] for row in rows)
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    contents = {
        "lines.jsonl": lines.encode(),
        "list.json": json.dumps(rows, indent=2).encode(),
        "lines.json": lines.encode(),
        "rows.csv": table.getvalue().encode(),
        "rows.parquet": parquet.getvalue(),
    }
    expected = take(write_lines(tmp_path / "expected.jsonl", *rows))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        assert take(str(tmp_path / name)) == expected, name
        assert take(str(tmp_path / f"{name}.gz")) == expected, f"{name}.gz"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON"),
        ("rows.jsonl", b'{"prompt": "a"}\n[1, 2]\n', "row 2 is a list, not an object"),
        ("rows.jsonl", b'{"prompt": "\xff"}\n', "cannot be read after row 0.*utf-8"),
        ("rows.jsonl", b"", "it holds no rows"),
        ("rows.json", b"\xef\xbb\xbf \n\n", "it holds no rows"),
        ("rows.json", b"[]", "it holds no rows"),
        ("rows.json", b"[1, 2]", "row 1 is a int, not an object"),
        ("rows.json", b"3", "row 1 is a int, not an object"),
        ("rows.jsonl", b'{"prompt": \n{"prompt": "a"}\n', "line 1 is not JSON"),
        ("rows.json", b'{\n"prompt": "a",\n"chosen": \n', "cannot be read after row 0: .* line 4"),
        ("rows.csv", b"", "it holds no rows"),
        ("rows.json", b'[{"prompt": "a"', "cannot be read after row 0"),
        ("rows.json", b"[" * 100_000, "cannot be read after row 0.*recursion"),
        ("rows.jsonl.gz", b"not gzip", "Check that it is a whole .jsonl file"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-9],
            "Check that it is a whole .jsonl file",
        ),
        ("rows.parquet", b"PAR1 and then nothing", "Check that it is a whole .parquet file"),
        ("rows.csv", b"prompt,chosen,rejected\na,b\n", "row 1 has more or fewer cells"),
        ("rows.csv", b'prompt,chosen,rejected\n"a,b,c\n', "cannot be read after row 0"),
        ("rows.txt", b"hello", "files ending in '.txt' are not read. Use .parquet"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadImport, match=rf"Nothing was imported from .*{name}: .*{reason}"):
        take(str(tmp_path / name))


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadImport, match=r"missing\.jsonl: there is no such file. Give a path, or owner/name"):
        take(str(tmp_path / "missing.jsonl"))
    with pytest.raises(BadImport, match="it is a folder"):
        take(str(tmp_path))
    with pytest.raises(BadImport, match="no such file"):
        take("data/missing.jsonl.gz")


def test_formats_are_named_where_none_fits(tmp_path: Path) -> None:
    plain, strange = write_lines(tmp_path / "p.jsonl", PLAIN), write_lines(tmp_path / "s.jsonl", {"b": 1, "a": 2})
    with pytest.raises(BadImport, match=r"columns a, b\. Known formats: open_webui, librechat, .*, kto, trl"):
        take(strange)
    with pytest.raises(BadImport, match=r"'sharegpt' is not known\. Known formats: auto, open_webui"):
        take(plain, "sharegpt")
    with pytest.raises(BadImport, match=r"it is not argilla .*columns are chosen, prompt, rejected"):
        take(plain, "argilla")
    assert len(take(plain, "trl")[0]) == 1


# Real rows


@needs_real_data
def test_real_ultrafeedback_rows_are_counted_right() -> None:
    rows, skipped, found = take(str(REAL / "trl_train_1000.jsonl"))
    assert (found, len({row.preference_id for row in rows})) == ("trl", 884)
    assert skipped == {"tie": 111, "identical": 3, "empty": 2}  # one identical row is a tie as well
    reshaped, _, found = take(str(REAL / "h4_format.train_prefs.parquet"))
    assert found == "ultrafeedback_binarized"
    assert [row.preference_id for row in reshaped] == [row.preference_id for row in rows]
    assert 60 <= sum(split_of(row.prompt) == HELD_OUT for row in rows) <= 120


@needs_real_data
def test_real_rows_in_the_other_spelling_are_read() -> None:
    rows, skipped, found = take(str(REAL / "h4_style_2.json"))
    assert (found, len(rows), skipped) == ("ultrafeedback_binarized", 1, {"tie": 1})
    rows, skipped, found = take(str(REAL / "argilla_cleaned_style_8.jsonl"))
    assert (found, len(rows), skipped) == ("argilla", 8, {})
    assert all(len(row.versions) == 2 for row in rows)


# The hub


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["data/train_prefs-00001-of-00002.parquet", "data/train_prefs-00000-of-00002.parquet",
             "data/train_sft-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet", "README.md"],
            ["data/train_prefs-00000-of-00002.parquet", "data/train_prefs-00001-of-00002.parquet"],
        ),
        (["data/train-0.parquet", "data/test-0.parquet"], ["data/train-0.parquet"]),
        (["train.jsonl", "train.csv", "test.jsonl"], ["train.jsonl"]),
        (["pairs.jsonl.gz", "README.md", "dataset_infos.json"], ["pairs.jsonl.gz"]),
        (["sharegpt.jsonl", "flan.jsonl", "README.md"], ["flan.jsonl", "sharegpt.jsonl"]),
        (["a.parquet", "b.jsonl"], []),
        (["one.jsonl", "test.jsonl"], []),
        (["constraints.json", "more.json"], []),
        (["data/train_sft.parquet", "data/train_gen.parquet"], []),
        ([], []),
    ],
)  # fmt: skip
def test_the_train_split_is_found_by_its_file_names(names: list[str], expected: list[str]) -> None:
    assert train_files(names) == expected


class Hub(http.server.BaseHTTPRequestHandler):
    """The three routes of a hub that a download uses, with one data set on it."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        bodies = {
            "/api/datasets/team/prefs": json.dumps(
                {"id": "team/prefs", "sha": "a" * 40, "siblings": [{"rfilename": "train.jsonl"}], "tags": []}
            ),
            "/api/datasets/team/unclear": json.dumps({"id": "team/unclear", "sha": "a" * 40, "siblings": []}),
            "/datasets/team/prefs/resolve/main/train.jsonl": json.dumps(PLAIN) + "\n",
        }
        body = bodies.get(self.path.split("?")[0], "").encode()
        self.send_response(200 if body else 404)
        if not body:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_hub_data_set_is_downloaded(hub: str, tmp_path: Path) -> None:
    assert list(open_rows("team/prefs", endpoint=hub, cache=tmp_path)) == [(1, PLAIN)]


def test_a_data_set_that_is_not_on_the_hub_is_said_to_be_so(hub: str, tmp_path: Path) -> None:
    with pytest.raises(BadImport, match="no such data set, or it is private"):
        open_rows("team/none", endpoint=hub, cache=tmp_path)
    with pytest.raises(BadImport, match="train split is not clear"):
        open_rows("team/unclear", endpoint=hub, cache=tmp_path)


def test_a_hub_out_of_reach_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(BadImport, match=r"the hub http://127\.0\.0\.1:9 cannot be reached"):
        open_rows("team/prefs", endpoint="http://127.0.0.1:9", cache=tmp_path)
