"""Preferences from elsewhere: each layout, each kind of file, what is skipped and why."""

from __future__ import annotations

import csv
import gzip
import http.server
import io
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feedback_store.errors import BadImport
from feedback_store.importers import FORMATS, detect, read_preferences
from feedback_store.importers.pairs import ImportedPair, Skip
from feedback_store.importers.sources import open_rows, train_files
from feedback_store.records import ImportResult, PickChoice, Preference
from feedback_store.store import FeedbackStore

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "ultrafeedback"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs the folder ../shared/data with real preferences")

PLAIN = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [said("user", question), said("assistant", answer)]


def turned(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The other spelling of messages."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


H4 = {
    "prompt": "Why?", "prompt_id": "x", "messages": dialogue("Why?", "Because."),
    "chosen": dialogue("Why?", "Because."), "rejected": dialogue("Why?", "No."),
    "score_chosen": 8.5, "score_rejected": 4.0,
}  # fmt: skip
ARGILLA = {
    "source": "evol_instruct", "prompt": "Why?", "chosen": dialogue("Why?", "Because."), "chosen-rating": 5.0,
    "chosen-model": "m", "rejected": dialogue("Why?", "No."), "rejected-rating": 1.25, "rejected-model": "n",
}  # fmt: skip
EXPLICIT = {
    "prompt": [said("user", "Why?")],
    "chosen": [said("assistant", "Because.")],
    "rejected": [said("assistant", "No.")],
}
IMPLICIT = {"chosen": dialogue("Why?", "Because."), "rejected": dialogue("Why?", "No.")}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb") as opened:
        yield opened


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def take(source: str, name: str = "auto") -> tuple[list[Preference], dict[str, int], str]:
    opened = read_preferences(source, name, NOW)
    rows = [row for batch in opened.batches(100) for row in batch]
    return rows, dict(opened.skipped), opened.format


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
    assert (preference.source, preference.weight, preference.versions, preference.created_at) == (name, 1.0, (), NOW)
    assert preference.preference_id == take(write_lines(tmp_path / "plain.jsonl", PLAIN))[0][0].preference_id


def test_earlier_turns_and_the_system_message_belong_to_the_prompt() -> None:
    before = [said("system", "Be brief."), *dialogue("Hi", "Hello"), said("user", "Why?")]
    row = {"chosen": [*before, said("assistant", "Because.")], "rejected": [*before, said("assistant", "No.")]}
    assert FORMATS["trl"].read(row) == ImportedPair(tuple(before), "Because.", "No.")  # type: ignore[arg-type]
    assert FORMATS["trl"].read({"prompt": before, **EXPLICIT} | {"prompt": before}) == FORMATS["trl"].read(row)


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
    assert FORMATS["ultrafeedback_binarized"].read(H4 | changes) == Skip(reason)


@pytest.mark.parametrize(
    "scores",
    [
        {"metadata": {"score_chosen": 7.5, "score_rejected": 7.5}},
        {"score_chosen": 1, "score_rejected": 1.0},
        {"chosen-rating": 3.0, "rejected-rating": 3.0},
    ],
)
def test_equal_scores_are_a_tie_wherever_they_stand(scores: dict[str, Any]) -> None:
    assert FORMATS["trl"].read(PLAIN | scores) == Skip("tie")
    unknown = {"metadata": {"score_chosen": "?", "score_rejected": "?"}}
    assert isinstance(FORMATS["trl"].read(PLAIN | unknown), ImportedPair)


def test_the_longest_that_is_taken() -> None:
    assert isinstance(FORMATS["trl"].read(PLAIN | {"chosen": "x" * 24_000, "prompt": "y" * 24_000}), ImportedPair)


def test_half_a_surrogate_is_malformed(tmp_path: Path) -> None:
    rows, skipped, _ = take(write_lines(tmp_path / "rows.jsonl", PLAIN, PLAIN | {"chosen": "\ud83d"}))
    assert (len(rows), skipped) == (1, {"malformed": 1})


def test_detection_says_which_and_why() -> None:
    assert detect([ARGILLA]) == ("argilla", "it has the columns chosen-rating and rejected-rating")
    assert detect([H4, H4, {"broken": True}]) == ("ultrafeedback_binarized", FORMATS["ultrafeedback_binarized"].WHY)
    assert detect([{"instruction": "Why?", "completions": []}]) is None
    assert (
        detect([{"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: N"}]) is None
    )


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
        ("rows.json", b'[{"prompt": "a"', "cannot be read after row 0"),
        ("rows.json", b"[" * 100_000, "cannot be read after row 0.*recursion"),
        ("rows.jsonl.gz", b"not gzip", "Check that it is a whole .jsonl file"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9)[:-9], "Check that it is a whole .jsonl file"),
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
    with pytest.raises(BadImport, match=r"columns a, b\. Known formats: argilla, ultrafeedback_binarized, trl"):
        take(strange)
    with pytest.raises(BadImport, match=r"'hh_rlhf' is not known\. Known formats: auto, argilla"):
        take(plain, "hh_rlhf")
    with pytest.raises(BadImport, match=r"it is not argilla .*columns are chosen, prompt, rejected"):
        take(plain, "argilla")
    assert len(take(plain, "trl")[0]) == 1


# Into the store


def test_the_same_file_twice_changes_nothing(store: FeedbackStore, tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": f"Question {number}"} for number in range(30)]
    source = write_lines(tmp_path / "rows.jsonl", *rows, rows[0], PLAIN | {"chosen": "N/A"})
    first = store.record_import(source)
    assert first == ImportResult(first.import_id, source, "trl", 30, 1, {"empty": 1})
    kept, counts = store.preferences(), store.counts()
    again = store.record_import(source, "trl")
    assert (again.imported, again.duplicates, again.skipped) == (0, 31, {"empty": 1})
    assert (store.preferences(), store.counts()) == (kept, counts)
    assert [row.prompt[0]["content"] for row in kept] == [row["prompt"] for row in rows]


def test_a_row_broken_late_imports_nothing(store: FeedbackStore, tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": f"Question {number}"} for number in range(2500)]
    source = write_lines(tmp_path / "rows.jsonl", *rows)
    Path(source).write_text(Path(source).read_text() + "{broken\n")
    with pytest.raises(BadImport, match="line 2501 is not JSON"):
        store.record_import(source)
    assert store.preferences() == []
    with store._database.read() as cursor:
        assert cursor.execute("SELECT count(*) FROM imports").fetchall() == [(0,)]


def test_a_pick_does_not_wait_for_an_import(store: FeedbackStore, tmp_path: Path) -> None:
    rows = [PLAIN | {"prompt": f"Question {number}"} for number in range(2500)]
    seen: list[tuple[int, int, int]] = []

    def on_progress(number: int) -> None:
        store.record_conversation(f"at {number}")
        seen.append((number, store.counts().conversations, store.counts().train))

    assert store.record_import(write_lines(tmp_path / "rows.jsonl", *rows), on_progress=on_progress).imported == 2500
    assert seen == [(1000, 1, 0), (2000, 2, 0), (2500, 3, 0)]
    assert store.counts().train + store.counts().held_out == 2500


def test_imports_and_picks_stand_side_by_side(store: FeedbackStore, tmp_path: Path) -> None:
    store.record_import(write_lines(tmp_path / "a.jsonl", ARGILLA))
    assert store.record_import(write_lines(tmp_path / "b.jsonl", H4)).duplicates == 1
    assert store.counts().preferences["argilla"] == 1
    assert PickChoice.FIRST not in store.counts().practice


# Real rows


@needs_real_data
def test_real_ultrafeedback_rows_are_counted_right(store: FeedbackStore) -> None:
    result = store.record_import(str(REAL / "trl_train_1000.jsonl"))
    assert (result.format, result.imported, result.duplicates) == ("trl", 884, 0)
    assert result.skipped == {"tie": 111, "identical": 3, "empty": 2}  # one identical row is a tie as well
    reshaped = store.record_import(str(REAL / "h4_format.train_prefs.parquet"))
    assert (reshaped.format, reshaped.imported, reshaped.duplicates) == ("ultrafeedback_binarized", 0, 884)
    counts = store.counts()
    assert counts.train + counts.held_out == 884
    assert 60 <= counts.held_out <= 120


@needs_real_data
def test_real_rows_in_the_other_spelling_are_read(store: FeedbackStore) -> None:
    h4 = store.record_import(str(REAL / "h4_style_2.json"))
    assert (h4.format, h4.imported, h4.skipped) == ("ultrafeedback_binarized", 1, {"tie": 1})
    argilla = store.record_import(str(REAL / "argilla_cleaned_style_8.jsonl"))
    assert (argilla.format, argilla.imported, argilla.skipped) == ("argilla", 8, {})


@needs_real_data
def test_raw_ultrafeedback_is_not_mistaken_for_another_format(store: FeedbackStore) -> None:
    with pytest.raises(BadImport, match="no known format"):
        store.record_import(str(REAL / "raw_openbmb_partial_2.jsonl"))


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
