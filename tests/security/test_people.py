"""Whatever somebody is called and whatever they wrote, the program's own words stay, and nobody is somebody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from made_run import made_run
from server import Server, serving
from symbol_gguf import publish_symbol_version
from typer.testing import CliRunner

from chat_app.cli import app
from chat_app.data import DataOperations
from chat_app.gates import Gates
from chat_app.ui.raters import raters_shown
from feedback_store.durable import write_json
from feedback_store.erasure import unfinished_erasures
from feedback_store.exports import csv_text, kto_lines, trl_lines
from feedback_store.migrations import MIGRATIONS, migrate
from feedback_store.mixing import Mix
from feedback_store.preferences import TRAIN, split_of
from feedback_store.records import Candidate, Message, Pair, PickChoice, new_id
from feedback_store.snapshots import freeze, load_snapshot
from feedback_store.store import FeedbackStore
from trainer.runs import list_runs

_SECONDS = count()
NAMES = (
    "finished", "champion", "train", "local", "v0", "v1", "null", "true", "0", "1", "a", "dpo", "dpo-lora", "state",
    "wins", "rater", "schedule", "policy", "baking", "auto", "gold", "erased", "[erased]", "x" * 300, "🦊", '"},{"',
    "{", "[]", "<b>bold</b>", "100%", "a.*b", "it's", "two\nlines", "tab\there", "Ørsted", "Local", "LOCAL",
    "imported:local", "person_" + "0" * 32, "\u202eright", "v4 against v3", "sigmoid", "runs", "config.json", "\\",
    "' OR 1=1 --", "; DROP TABLE people",
)  # fmt: skip
# What the machine writes into its own files, said by somebody as an answer.
WORDS = (
    "finished", "continued_pretraining", "What is the largest ocean?", "What is number 7?", "smollm2-135m-instruct",
    '{"state": "finished"}', "on_time", "0 2 * * * Europe/Berlin", "quiet_hours enough_new too_few_new overlap",
    "learning_rate 5.0e-06 beta 0.1 loss sigmoid", "dpo-lora", "--mem=8G --time=1:00:00", "preference_id",
)  # fmt: skip


def clock() -> datetime:
    return datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=next(_SECONDS))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(data_dir: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as opened:
        yield opened


def asked(number: int) -> str:
    """A prompt of the train part."""
    found = (text for n in count(number * 1000) if split_of(message(text := f"What is number {n}?")) == TRAIN)
    return next(found)


def message(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def row(prompt: str, chosen: str, rejected: str, rater: str | None) -> dict[str, Any]:
    """A row in the layout of our own export, from elsewhere."""
    return {
        "prompt": prompt, "chosen": chosen, "rejected": rejected, "preference_id": new_id("pref"), "pick_id": None,
        "rater": rater, "weight": 1.0, "versions": [],
    }  # fmt: skip


def written(file: Path, rows: Sequence[Mapping[str, object]]) -> str:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(file)


def crowd(prompts: int = 40) -> list[dict[str, Any]]:
    """Five raters on the same pairs: three who are right, one who guesses, one who says the opposite."""
    rows = []
    for number in range(prompts):
        good, bad = f"good {number}", f"bad {number}"
        right = {"ann": True, "ben": True, "cid": True, "guess": number % 2 == 0, "contrary": False}
        for rater, is_right in right.items():
            rows.append(row(asked(number), *((good, bad) if is_right else (bad, good)), rater))
    return rows


def plain(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# The program's own words


def machine(data_dir: Path, rater: str = "ann") -> dict[str, Any]:
    """A data directory with a run, a version and a schedule; its JSON by path. `rater`: as files named people."""
    run = made_run(data_dir / "runs", requested_by="schedule", without=[])
    evaluation = run.evaluation
    assert evaluation is not None
    who = {"rater": rater, "pairs": 9, "wins": 5, "ties": 1, "losses": 3, "share": 0.1, "wins_without": 1}
    evaluation["examples"][0]["question"] = "How deep is the sea?"
    evaluation |= {
        "raters": [who | {"losses_without": 2, "win_rate_without": 0.5, "p_value_without": 1.0}],
        "canaries": [{"messages": [{"role": "user", "content": "What is the largest ocean?"}], "prompt": "dpo-lora"}],
        "sources": {"trl": {"wins": 3}},
    }
    write_json(run.directory / "evaluation.json", evaluation)
    publish_symbol_version(data_dir / "versions", 1, "symbols")
    decision = {
        "at": "2026-11-22T02:00:00+00:00", "reason": "on_time", "sentence": "It started.", "trigger": "cron",
        "due_at": "2026-11-22T02:00:00+00:00", "missed": 0, "new_preferences": 3, "about": None, "run_id": run.run_id,
    }  # fmt: skip
    kept = {"schedule": None, "changed_by": "local", "handled_cron": "0 2 * * * Europe/Berlin", "decisions": [decision]}
    write_json(data_dir / "schedule.json", kept)
    (data_dir / "recipes").mkdir()
    (data_dir / "recipes" / "ours.yaml").write_text("# learning_rate 5.0e-06 beta 0.1 loss sigmoid\nmethod: dpo\n")
    files = [*run.directory.glob("*.json*"), *data_dir.glob("versions/*/*.json"), data_dir / "schedule.json"]
    return {str(path): path.read_text(encoding="utf-8") for path in [*files, data_dir / "recipes" / "ours.yaml"]}


def test_an_erasure_touches_no_word_of_the_programs_own_files(
    store: FeedbackStore, data_dir: Path, tmp_path: Path
) -> None:
    rows = [row(f"{number}: {name}", f"yes {number}", f"no {number}", name) for number, name in enumerate(NAMES)]
    rows += [row(f"{word}", f"{word} ", f"not {word}", "finished") for word in WORDS]
    rows += [row("plain?", word, f"not {word}", "finished") for word in WORDS]
    result = store.record_import(written(tmp_path / "rows.jsonl", rows), "trl")
    assert (result.imported, dict(result.skipped)) == (len(rows), {})
    before = machine(data_dir)
    log = (data_dir / "runs" / "run_20261122-231500_ab12" / "log.txt").read_text()
    for name in NAMES:
        label = f"imported:{name}" if name in ("local", "imported:local") else name
        done = store.erase(label, data_dir)
        assert done.counts["preferences"] == (1 + 2 * len(WORDS) if name == "finished" else 1), name
        assert {path: Path(path).read_text(encoding="utf-8") for path in before} == before, name
    assert (data_dir / "runs" / "run_20261122-231500_ab12" / "log.txt").read_text() == log
    (run,) = list_runs(data_dir / "runs")
    assert (run.state.value, run.config.requested_by, run.config.recipe_name) == ("finished", "schedule", "dpo-lora")
    assert store.preferences() == []


def test_an_imported_rater_is_none_of_the_programs_own(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    own = picked(store, "mine", "local")
    names = ("local", "Local", "ｌｏｃａｌ", "imported:local", store.person_id("local"), "gold", "schedule", "baking")
    rows = [row(f"What of {number}?", "yes", "no", name) for number, name in enumerate(names)]
    assert store.record_import(written(tmp_path / "rows.jsonl", rows), "trl").imported == len(names)
    raters = store.raters()
    assert len(set(raters)) == len(names) + 1
    labels = store.labels()
    assert sorted(labels[one] for one in raters) == sorted(["local", *(f"imported:{name}" for name in names)])
    assert [one.rater for one in store.preferences() if one.source == "pick"] == [store.person_id("local")]
    for name in names[1:]:
        store.erase(f"imported:{name}", data_dir)
    store.erase("imported:local", data_dir)
    assert store.raters() == [store.person_id("local")]
    assert [one.pick_id for one in store.preferences()] == [own.pick_id]
    store.erase("local", data_dir)
    assert store.raters() == []
    assert picked(store, "again", "local").rater == own.rater


def picked(store: FeedbackStore, prompt: str, rater: str, choice: PickChoice = PickChoice.FIRST) -> Any:
    answers = [Candidate(new_id("cand"), "v0", f"{n} {prompt}", "stop", {}, 1, 5.0, clock()) for n in ("one", "two")]
    pair = Pair(new_id("pair"), message(prompt), answers[0], answers[1], None, rater, clock())
    store.record_pair(pair)
    return store.record_pick(pair.pair_id, choice, rater=rater)


def test_a_name_alone_means_an_imported_rater_where_our_own_user_said_nothing(
    store: FeedbackStore, data_dir: Path, tmp_path: Path
) -> None:
    store.record_import(written(tmp_path / "rows.jsonl", [row("q", "yes", "no", "local")]), "trl")
    assert store.erase("local", data_dir).sentence.startswith("Erased 'imported:local': 1 rows")
    assert store.record_import(written(tmp_path / "rows.jsonl", [row("q", "yes", "no", "local")]), "trl").imported == 0


def test_what_files_from_before_call_people_is_found_where_a_person_stands(
    store: FeedbackStore, data_dir: Path, tmp_path: Path
) -> None:
    store.record_import(written(tmp_path / "rows.jsonl", [row("q", "yes", "no", "finished")]), "trl")
    machine(data_dir, "finished")
    directory = data_dir / "runs" / "run_20261122-231500_ab12"
    config = plain(directory / "config.json") | {"requested_by": "finished", "without": ["finished", "ann"]}
    write_json(directory / "config.json", config)
    frozen = freeze(store.training_rows(), data_dir / "snapshots", None)
    table = pq.read_table(frozen.train_path if frozen.train_rows else frozen.held_out_path)
    before = frozen.directory.with_name("older")
    shutil.copytree(frozen.directory, before)
    index = table.schema.get_field_index("rater")
    named = table.set_column(index, table.schema.field(index), [["finished"] * table.num_rows])
    named = named.set_column(0, table.schema.field(0), [["pref_older"] * table.num_rows])
    for part in before.glob("*.parquet"):
        pq.write_table(named, part)
    done = store.erase("finished", data_dir)
    assert set(done.snapshots) == {frozen.hash, "older"}
    config = plain(directory / "config.json")
    assert (config["requested_by"], config["without"]) == ("[erased]", ["[erased]", "ann"])
    assert plain(directory / "evaluation.json")["raters"][0]["rater"] == "[erased]"
    assert plain(directory / "state.json")["state"] == "finished"


def test_what_a_person_wrote_still_goes_from_files(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    secret = "I live at the old mill behind the harbour"
    store.record_import(written(tmp_path / "rows.jsonl", [row(secret, "unbelievable!", "no", "finished")]), "trl")
    machine(data_dir)
    directory = data_dir / "runs" / "run_20261122-231500_ab12"
    (directory / "log.txt").write_text(f"finished\nrow {secret}\nfinished\n")
    (directory / "report.html").write_text(f"<p>{secret}</p>")
    write_json(directory / "failure.json", {"stage": "training", "reason": f"The row {secret!r} is too long."})
    example = {"question": secret, "champion": "unbelievable!", "candidate": "finished"}
    write_json(directory / "evaluation.json", {**plain(directory / "evaluation.json"), "examples": [example]})
    write_json(
        directory / "odd.json", {"nobody thought of": f"it was said that {secret}, long ago", "state": "finished"}
    )
    (directory / "answers.jsonl").write_text(json.dumps({"key": "k", "text": secret}) + '\n{"step": 1}\n')
    exports = data_dir / "exports"
    exports.mkdir()
    for name, rater in (("theirs.jsonl", "finished"), ("others.jsonl", "ann")):
        (exports / name).write_text(json.dumps(row("Who?", "You.", "finished", rater)) + "\n")
    store.erase("finished", data_dir)
    assert [path.name for path in exports.iterdir()] == ["others.jsonl"]
    assert [line.strip() for line in (directory / "log.txt").read_text().splitlines()] == ["finished", "", "finished"]
    assert not (directory / "report.html").exists()
    assert plain(directory / "failure.json") == {"stage": "training", "reason": "[erased]"}
    (kept,) = plain(directory / "evaluation.json")["examples"]
    assert kept == {"question": "[erased]", "champion": "[erased]", "candidate": "finished"}
    assert plain(directory / "odd.json") == {"nobody thought of": "[erased]", "state": "finished"}
    assert (directory / "answers.jsonl").read_text().split() == ['{"step":', "1}"]
    assert secret not in "".join(path.read_text(errors="replace") for path in data_dir.rglob("*") if path.is_file())


# Ids and labels


def test_no_name_stands_in_rows_snapshots_or_unfinished_erasures(
    store: FeedbackStore, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(asked(number), f"yes {number}", "no", "mallory.x1") for number in range(3)]
    file = written(tmp_path / "rows.jsonl", rows)
    store.record_import(file, "trl")
    picked(store, asked(9), "mallory.x1")
    store.record_quarantine("mallory.x1", True, reason="", by="local")
    store.record_learning("rater", "mallory.x1", True, by="local")
    store.record_quarantine("mallory.x1", False, reason="", by="local")
    frozen = freeze(store.training_rows(), data_dir / "snapshots", None, Mix(rater_weights="agreement"))
    assert "mallory" not in (frozen.directory / "manifest.json").read_text()
    assert {one for path in frozen.directory.glob("*.parquet") for one in pq.read_table(path)["rater"].to_pylist()} == {
        store.person_id("mallory.x1")
    }
    person = store.person_id("mallory.x1")
    assert store.person_id(person) == person
    with monkeypatch.context() as patched:
        patched.setattr("feedback_store.erasure._erase_in_files", refuse)
        with pytest.raises(Exception, match="not finished"):
            store.erase(person, data_dir)
    assert unfinished_erasures(data_dir) == (person,)
    assert store.labels() == {store.person_id("local"): "local"}
    assert store.erase("mallory.x1", data_dir).counts["preferences"] == 3  # by a label that is gone already
    assert unfinished_erasures(data_dir) == ()
    store.close()
    with duckdb.connect(str(data_dir / "store.duckdb"), read_only=True) as connection:
        tables = connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
        said = str([connection.execute(f'FROM "{table}"').fetchall() for (table,) in tables])
    assert "mallory" not in said
    assert person not in said


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_somebody_whose_erasure_was_begun_is_finished_by_id(
    store: FeedbackStore, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.record_import(written(tmp_path / "rows.jsonl", [row("q", "yes", "no", "v0")]), "trl")
    with monkeypatch.context() as patched:
        patched.setattr("feedback_store.erasure._erase_snapshots", refuse)
        with pytest.raises(Exception, match="not finished"):
            store.erase("v0", data_dir)
    (person,) = unfinished_erasures(data_dir)
    assert store.erase(person, data_dir).sentence.startswith("Erased 'v0': 1 rows")


def test_a_store_of_schema_8_gives_everybody_an_id(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    with duckdb.connect(str(path)) as connection:
        migrate(connection, path, tmp_path / "backups", datetime(2026, 1, 1), MIGRATIONS[:8])
        answers = ", ".join(f"('cand_{n}', 'v0', 'answer {n}', 'stop', '{{}}', 1, 1.0, now())" for n in range(4))
        connection.execute(f"INSERT INTO candidates VALUES {answers}")
        for number, rater in enumerate(("local", "gold")):
            connection.execute(
                "INSERT INTO pairs (pair_id, prompt, split, first_candidate_id, second_candidate_id, rater, "
                "created_at) VALUES (?, [{'role': 'user', 'content': 'Why?'}], 'train', ?, ?, ?, now())",
                [f"pair_{number}", f"cand_{2 * number}", f"cand_{2 * number + 1}", rater],
            )
        connection.execute("INSERT INTO conversations VALUES ('conv', now(), 'local')")
        for number, rater in enumerate(("local", "it's \"} 100%", "finished")):
            connection.execute(
                "INSERT INTO picks (pick_id, pair_id, pick, reasons, rater, preference_id, part, created_at) "
                "VALUES (?, 'pair_0', 'first', [], ?, ?, 'train', now())",
                [f"pick_{number}", rater, f"pref_{number}"],
            )
            connection.execute(
                "INSERT INTO pick_words VALUES (concat_ws(' ', 0, 6, 'pair_0', $1), 'pair_0', $1, 0, $2)",
                [rater, f"pick_{number}"],
            )
        for number, rater in enumerate(("finished", "local", None, "schedule")):
            connection.execute(
                "INSERT INTO preferences (preference_id, prompt, split, chosen, rejected, source, weight, rater, "
                "versions, created_at) VALUES (?, [{'role': 'user', 'content': 'Who?'}], 'train', ?, 'no', 'trl', 1.0, "
                "?, [], now())",
                [f"pref_{number:032x}", f"yes {number}", rater],
            )
        connection.execute(
            "INSERT INTO unpaired_preferences (unpaired_id, prompt, split, completion, label, source, weight, rater, "
            "versions, created_at) VALUES ('label_1', [{'role': 'user', 'content': 'Who?'}], 'train', 'You.', true, "
            "'kto', 1.0, 'finished', [], now())"
        )
        for rater in ("local", "finished"):
            connection.execute(
                'INSERT INTO quarantines (rater, quarantined, reason, "by", created_at) VALUES (?, true, ?, ?, now())',
                [rater, "why", "ann"],
            )
        connection.execute(
            'INSERT INTO promotions (version, previous, kind, reason, "by", created_at) VALUES '
            "('v1', 'v0', 'promote', 'r', 'local', now()), ('v2', 'v1', 'promote', 'r', 'finished', now()), "
            "('v3', 'v2', 'auto', 'r', 'policy', now()), ('v2', 'v3', 'auto-rollback', 'r', 'baking', now())"
        )
    with FeedbackStore.open(path, clock) as store:
        labels = store.labels()
        own, finished = store.person_id("local"), store.person_id("finished")
        assert sorted(labels.values()) == [
            "ann", "finished", "imported:local", "imported:schedule", 'it\'s "} 100%', "local",
        ]  # fmt: skip
        by_source = {(one.source, labels.get(one.rater or "", one.rater)) for one in store.preferences()}
        assert by_source == {
            ("pick", "local"), ("pick", "finished"), ("pick", 'it\'s "} 100%'), ("trl", "finished"),
            ("trl", "imported:local"), ("trl", None), ("trl", "imported:schedule"),
        }  # fmt: skip
        assert [one.rater for one in store.unpaired()] == [finished]
        assert {labels[one.rater] for one in store.quarantines()} == {"local", "finished", "imported:local"}
        assert {labels[one.by] for one in store.quarantines()} == {"ann"}
        assert [one.by for one in store.load_promotions()] == ["local", finished, "policy", "baking"]
        assert store.load_pair("pair_1").rater == "gold"
        again = store.record_pick("pair_0", PickChoice.TIE, rater="finished")
        assert again.rater == finished
        query = "SELECT supersedes FROM picks WHERE pick = 'tie'"
        assert store.query(query, limit_s=9).rows == (("pick_2",),)
        assert store.load_pair("pair_0").rater == own
        # What was imported before is there already.
        rows = [
            row("Who?", f"yes {number}", "no", rater)
            for number, rater in enumerate(("finished", "local", None, "schedule"))
        ]
        known = store.query("SELECT count(*), count(DISTINCT content) FROM preferences", limit_s=9).rows
        assert known == ((4, 4),)
        assert store.record_import(written(tmp_path / "rows.jsonl", rows[:1]), "trl").imported == 1  # other contents
        done = store.erase("finished", tmp_path)
        assert done.counts["picks"] == 2
        assert done.counts["promotions"] == 1
        (backup,) = (tmp_path / "backups").iterdir()
        assert done.backups == (f"backups/{backup.name}",)
    with duckdb.connect(str(backup), read_only=True) as connection:
        said = str(
            [connection.execute(f"FROM {table}").fetchall() for table in ("picks", "preferences", "quarantines")]
        )
    assert "finished" not in said
    assert said.count("'local'") == 3


def test_old_imports_are_known_again_after_the_migration(tmp_path: Path) -> None:
    """The ids that the migration makes in SQL are those that an import makes in Python."""
    rows = [*crowd(3), row("label?", "yes", "no", None)]
    file = written(tmp_path / "rows.jsonl", rows)
    labels = [{**row("l", "", "", "ann"), "completion": "good", "label": True, "unpaired_id": "x"}]
    kto = written(tmp_path / "labels.jsonl", [{k: v for k, v in labels[0].items() if k not in ("chosen", "rejected")}])
    with FeedbackStore.open(tmp_path / "new" / "store.duckdb", clock) as new:
        new.record_import(file, "trl")
        new.record_import(kto, "kto")
        contents = new.query("SELECT content, chosen, rejected, rater FROM preferences", limit_s=9).rows
        label = new.query("SELECT content FROM unpaired_preferences", limit_s=9).rows[0][0]
        shown = new.labels()
    path = tmp_path / "store.duckdb"
    with duckdb.connect(str(path)) as connection:
        migrate(connection, path, tmp_path / "backups", datetime(2026, 1, 1), MIGRATIONS[:8])
        for content, chosen, rejected, rater in contents:
            connection.execute(
                "INSERT INTO preferences (preference_id, prompt, split, chosen, rejected, source, weight, rater, "
                "versions, created_at) VALUES (?, [{'role': 'user', 'content': 'x'}], 'train', ?, ?, 'trl', 1.0, ?, "
                "[], now()) ON CONFLICT DO NOTHING",  # as it was: the first rater's word only
                [content, chosen, rejected, shown.get(str(rater), rater)],
            )
        connection.execute(
            "INSERT INTO unpaired_preferences (unpaired_id, prompt, split, completion, label, source, weight, rater, "
            "versions, created_at) VALUES (?, [{'role': 'user', 'content': 'l'}], 'train', 'good', true, 'kto', 1.0, "
            "'ann', [], now())",
            [label],
        )
    with FeedbackStore.open(path, clock) as store:
        kept = store.query("SELECT count(*) FROM preferences", limit_s=9).rows[0][0]
        assert kept == 7  # of 16: two sides of three pairs, and nobody's
        result = store.record_import(file, "trl")
        assert (result.imported, result.duplicates) == (len(rows) - kept, kept)
        assert store.record_import(kto, "kto").duplicates == 1


# A judgement is one rater's word on one row


def test_two_to_one_stays_two_to_one(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    rows = crowd()
    file = written(tmp_path / "rows.jsonl", rows)
    first = store.record_import(file, "trl")
    assert (first.imported, first.duplicates) == (200, 0)
    again = store.record_import(file, "trl")
    assert (again.imported, again.duplicates) == (0, 200)
    frozen = freeze(store.training_rows(), data_dir / "snapshots", None)
    taught = pq.read_table(frozen.train_path).to_pylist()
    assert all(one["chosen"][0]["content"].startswith("good") for one in taught)  # 4:1 and 3:2
    assert len(taught) == 140
    assert frozen.left_out == {"contradicted": 60}
    # Without their names, two rows that say the same are one.
    nobody = [one | {"rater": None} for one in rows]
    assert store.record_import(written(tmp_path / "nobody.jsonl", nobody), "trl").imported == 80


def test_our_own_export_changes_nothing_here_and_keeps_everybody_elsewhere(
    store: FeedbackStore, tmp_path: Path
) -> None:
    store.record_import(written(tmp_path / "rows.jsonl", crowd(6)), "trl")
    dangerous = [row("formula?", "yes", "no", name) for name in ("=1+1", "'=1+1", "local", "imported:local")]
    store.record_import(written(tmp_path / "more.jsonl", dangerous), "trl")
    for number, rater in enumerate(("local", "ann", "ann")):
        one = picked(store, f"own {number}", rater, PickChoice.BOTH_BAD if number == 2 else PickChoice.SECOND)
        store.record_rating(store.load_pair(one.pair_id).first.candidate_id, "up", rater=rater)
        store.record_edit(store.load_pair(one.pair_id).first.candidate_id, f"better {number}", rater=rater)
    labels = store.labels()
    data = DataOperations.__new__(DataOperations)
    data._store = store
    data.gates = Gates()
    for format_ in ("trl", "csv", "kto"):
        file = tmp_path / f"export.{'csv' if format_ == 'csv' else 'jsonl'}"
        file.write_text("".join(data.export_lines(format_)), encoding="utf-8", newline="")
        result = store.record_import(str(file), "kto" if format_ == "kto" else "trl")
        assert (result.imported, dict(result.skipped)) == (0, {}), format_
        assert result.duplicates == (len(store.unpaired()) if format_ == "kto" else len(store.preferences()))
        with FeedbackStore.open(tmp_path / format_ / "store.duckdb", clock) as elsewhere:
            taken = elsewhere.record_import(str(file), "kto" if format_ == "kto" else "trl")
            assert taken.imported == result.duplicates
            rows = elsewhere.unpaired() if format_ == "kto" else elsewhere.preferences()
            ours = store.unpaired() if format_ == "kto" else store.preferences()
            theirs = elsewhere.labels()
            shown = sorted((theirs[str(one.rater)], one.prompt[0]["content"]) for one in rows)
            expected = [labels[str(one.rater)] for one in ours]
            assert len({one for one, _ in shown}) == len(set(expected))  # as many people as here
            assert [name.removeprefix("imported:") for name, _ in shown].count("ann") == expected.count("ann")
    assert store.labels() == labels
    assert "person_" not in "".join(data.export_lines("trl"))


def test_raters_and_agreement_tell_the_same(tmp_path: Path, data_dir: Path) -> None:
    file = written(tmp_path / "rows.jsonl", crowd())
    with serving(data_dir, engine="scripted") as server:
        assert server.post("/v1/imports", {"source": server.lend(file)})["imported"] == 200
        agreed, listed = server.get("/v1/agreement"), server.get("/v1/raters")
        assert (agreed["items"], agreed["votes"], agreed["contradictions"]) == (40, 200, 40)
        assert listed["agreement"] == {key: agreed[key] for key in listed["agreement"]}
        by_rater = {one["rater"]: one for one in listed["raters"]}
        assert {name: (one["agreement"]["count"], one["agreement"]["of"]) for name, one in by_rater.items()} == {
            "ann": (20, 20), "ben": (20, 20), "cid": (20, 20), "guess": (20, 40), "contrary": (0, 40),
        }  # fmt: skip
        suspected = {name for name, one in by_rater.items() if one["suspicions"]}
        assert "contrary" in suspected
        assert not suspected & {"ann", "ben"}
        (some, *_) = agreed["contradicted"]
        assert min(some["answers"].values()).startswith("bad")
        assert {name for names in some["raters"].values() for name in names} == set(by_rater)
        assert server.get("/v1/agreement") == agreed


def test_two_raters_agree_in_both_lists_alike(store: FeedbackStore, tmp_path: Path) -> None:
    rows = []
    for number in range(10):
        rows.append(row(asked(number), f"good {number}", f"bad {number}", "ann"))
        sides = (f"good {number}", f"bad {number}") if number < 7 else (f"bad {number}", f"good {number}")
        rows.append(row(asked(number), *sides, "ben"))
    store.record_import(written(tmp_path / "rows.jsonl", rows), "trl")
    from feedback_store.agreement import agreement, decided
    from feedback_store.reliability import agreement_with_others

    votes = store.votes()
    assert agreement(votes).percent == 70
    assert set(agreement_with_others(decided(votes)).values()) == {(7, 10)}


def test_an_erased_rater_leaves_the_same_words_of_another(store: FeedbackStore, data_dir: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", crowd(5))
    store.record_import(file, "trl")
    note = data_dir / "notes.log"
    note.write_text(f"{asked(1)} and so on\n")
    bens = [one for one in store.preferences() if one.rater == store.person_id("ben")]
    only_ben = freeze(bens, data_dir / "snapshots", None)
    done = store.erase("ann", data_dir)
    assert done.counts == {"preferences": 5}
    assert note.read_text() == f"{asked(1)} and so on\n"  # ben's words too
    assert load_snapshot(only_ben.directory).hash == only_ben.hash
    labels = store.labels()
    assert sorted(labels[str(one.rater)] for one in store.preferences()) == sorted(
        ["ben", "cid", "guess", "contrary"] * 5
    )
    again = store.record_import(file, "trl")
    assert (again.imported, again.duplicates, dict(again.skipped)) == (0, 20, {"erased": 5})
    unnamed = [one | {"rater": None} for one in crowd(5) if one["rater"] == "ann"]
    assert store.record_import(written(tmp_path / "unnamed.jsonl", unnamed), "trl").skipped == {"erased": 5}
    other = [one | {"rater": "dan"} for one in unnamed]
    assert store.record_import(written(tmp_path / "other.jsonl", other), "trl").imported == 5


# Shown and asked


def test_labels_are_escaped_on_pages_and_terminals() -> None:
    bad = '<img src=x onerror="alert(1)">'
    share = {"count": 0, "of": 0, "share": None, "interval": None}
    body = {
        "rater": bad, "state": "active", "picks": 0, "agreement": share, "gold": share, "first": share,
        "median_s": None,
        "weight": 1.0, "next_share": 0.0, "effect": None, "suspicions": ["odd"], "reason": None, "is_inverted": False,
    }  # fmt: skip
    shown = raters_shown({"sentence": f"suspicious: {bad}", "last_evaluation": None, "raters": [body]}, bad)
    assert "<img" not in shown
    from chat_app.cli_tools import printable

    assert printable("two\nlines \x1b[31mred \u202e") == "two\\nlines \\x1b[31mred \\u202e"


@pytest.mark.parametrize("name", ["nobody", "person_" + "1" * 32, "schedule", "policy", "%", "'"])
def test_an_unknown_person_is_not_found(data_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLOOP_DATA_DIR", str(data_dir))
    monkeypatch.setenv("ZLOOP_ENGINE", "scripted")
    for line in (["erase", name, "--yes"], ["quarantine", name], ["train", "--without", name]):
        said = CliRunner().invoke(app, line)
        assert said.exit_code == 1
        assert "There is no rater" in said.output
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as store:
        assert store.query("SELECT count(*) FROM erasures", limit_s=9).rows == ((0,),)


# The whole of it, on a server


def test_nasty_names_from_import_to_erasure_on_a_server(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*NAMES, "", " ", "\u3000"]
    rows = [
        row(asked(number), *(f"good {number}", f"bad {number}")[:: 1 if (number + at) % 7 else -1], name)
        for number in range(3)
        for at, name in enumerate(names)
    ]  # fmt: skip
    file = written(tmp_path / "rows.jsonl", rows)
    before = machine(data_dir)
    with serving(data_dir, engine="scripted") as server:
        named = 3 * len(NAMES)
        said = server.post("/v1/imports", {"source": server.lend(file)})
        assert said["imported"] >= named, said
        assert said["imported"] + said["duplicates"] == len(rows)
        assert server.post("/v1/imports", {"source": server.lend(file)})["imported"] == 0
        own = server.pair("What do I say myself?")
        server.post("/v1/picks", {"pair_id": own["pair_id"], "pick": "first"})
        listed = server.get("/v1/raters")
        labels = [one["rater"] for one in listed["raters"]]
        assert len(labels) == len(set(labels)) == len(NAMES) + 1
        assert "local" in labels
        assert server.get("/v1/agreement")["votes"] == named
        assert server.get("/v1/statistics")["raters"] == {"local": 1}
        assert server.post("/v1/quarantine", {"rater": "champion", "reason": "<b>"})["rater"] == "champion"
        assert server.post("/v1/quarantine", {"rater": "champion", "lift": True})["state"] == "active"
        frozen = server.post("/v1/snapshots")
        runs = server.get("/v1/runs")
        exported = [json.loads(line) for line in server.http.get("/v1/export").text.splitlines()]
        assert {one["rater"] for one in exported} == {*labels, None}
        manifest = (data_dir / "snapshots" / frozen["snapshot"] / "manifest.json").read_text()
        assert "sigmoid" not in manifest
        assert '"finished"' not in manifest
        for at, one in enumerate(listed["raters"]):
            asked_for = one["rater"] if at % 2 else one["person_id"]
            if one["rater"] == "local":
                continue
            erased = server.post("/v1/erasures", {"rater": asked_for})
            assert erased["counts"]["preferences"] == 3, asked_for
            assert server.refused("/v1/quarantine", {"rater": asked_for})[0] == 404
        assert [one["rater"] for one in server.get("/v1/raters")["raters"]] == ["local"]
        assert server.get("/v1/runs") == runs
        check(server, before)
    with serving(data_dir, engine="scripted") as server:
        assert server.get("/v1/runs") == runs
        assert [one["rater"] for one in server.get("/v1/raters")["raters"]] == ["local"]
        assert server.post("/v1/imports", {"source": server.lend(file)})["imported"] == 0
        check(server, before)
        assert server.post("/v1/erasures", {"rater": "local"})["counts"]["picks"] == 1
        assert server.get("/v1/raters")["raters"] == []
        check(server, before)
    monkeypatch.setenv("ZLOOP_DATA_DIR", str(data_dir))
    monkeypatch.setenv("ZLOOP_ENGINE", "scripted")
    verified = CliRunner().invoke(app, ["verify"])
    assert verified.exit_code == 0, verified.output


def check(server: Server, before: Mapping[str, str]) -> None:
    """The program's own files are as they were, and it reads them."""
    assert {path: Path(path).read_text(encoding="utf-8") for path in before} == before
    (run,) = server.get("/v1/runs")["runs"]
    assert (run["state"], run["verdict"]["decision"], run["champion"]) == ("finished", "keep", "v3")
    assert server.get("/v1/schedule")["decisions"][0]["reason"] == "on_time"
    assert {one["version"] for one in server.get("/v1/versions")["versions"]} == {"v0", "v1"}


def test_who_asked_for_a_run_is_an_id_in_its_files_and_a_name_on_its_page(data_dir: Path) -> None:
    with FeedbackStore.open(data_dir / "store.duckdb", clock) as store:
        person = store.record_person("Eve <b>")
    run = made_run(data_dir / "runs", requested_by=person, without=[person])
    (run.directory / "report.html").write_text(f"<p>asked for by {person}</p>")
    with serving(data_dir, engine="scripted") as server:
        (body,) = server.get("/v1/runs")["runs"]
        assert body["without"] == ["Eve <b>"]
        page = server.http.get(f"/v1/runs/{run.run_id}/report").text
        assert page == "<p>asked for by Eve &lt;b&gt;</p>"
        assert server.post("/v1/erasures", {"rater": "Eve <b>"})["files"]
        assert person not in (run.directory / "config.json").read_text()
        (body,) = server.get("/v1/runs")["runs"]
        assert (body["without"], body["state"]) == (["[erased]"], "finished")


def test_every_format_of_an_export_knows_its_rows(store: FeedbackStore, tmp_path: Path) -> None:
    """Ids of this store are in no column of ours that a reader sees as a name, but in the library's own lines."""
    store.record_import(written(tmp_path / "rows.jsonl", [row("q", "yes", "no", "ann")]), "trl")
    (line,) = trl_lines(store.preferences())
    assert line["rater"] == store.person_id("ann")
    assert store.person_id("ann") in csv_text(store.preferences())
    assert list(kto_lines(store.unpaired())) == []
