"""The schema moves forward in whole steps, with a copy of the file before."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import duckdb
import pytest

from feedback_store.errors import StoreDamaged, StoreTooNew
from feedback_store.migrations import MIGRATIONS, Migration, migrate
from feedback_store.records import PickChoice
from feedback_store.store import FeedbackStore

MOMENT = datetime(2026, 11, 22, 12)
NEXT = Migration(
    MIGRATIONS[-1].version + 1,
    "moods",
    ("ALTER TABLE conversations ADD COLUMN mood VARCHAR", "CREATE TABLE moods (mood VARCHAR)"),
)


def run(path: Path, migrations: tuple[Migration, ...]) -> list[int]:
    with duckdb.connect(str(path)) as connection:
        return migrate(connection, path, path.parent / "backups", MOMENT, migrations)


def ask(path: Path, question: str) -> list[tuple[object, ...]]:
    with duckdb.connect(str(path)) as connection:
        return connection.execute(question).fetchall()


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A store with one conversation in it."""
    path = tmp_path / "store.duckdb"
    with FeedbackStore.open(path) as store:
        store.record_conversation("kept")
    return path


def test_versions_count_up_from_one_and_have_names() -> None:
    assert [migration.version for migration in MIGRATIONS] == list(range(1, len(MIGRATIONS) + 1))
    assert all(migration.name and migration.statements for migration in MIGRATIONS)


def test_a_new_file_gets_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    assert run(path, MIGRATIONS) == [migration.version for migration in MIGRATIONS]
    assert run(path, MIGRATIONS) == []
    assert ask(path, "SELECT version, name, checksum, applied_at FROM schema_migrations") == [
        (migration.version, migration.name, migration.checksum, MOMENT) for migration in MIGRATIONS
    ]
    assert not (tmp_path / "backups").exists()


def test_a_step_forward_keeps_the_rows_and_a_copy_from_before(used: Path) -> None:
    assert run(used, (*MIGRATIONS, NEXT)) == [NEXT.version]
    assert ask(used, "SELECT title, mood FROM titles JOIN conversations USING (conversation_id)") == [("kept", None)]
    (backup,) = (used.parent / "backups").iterdir()
    assert backup.name == f"schema-{MIGRATIONS[-1].version}-20261122-120000.duckdb"
    with FeedbackStore.open(backup) as store:
        assert [conversation.title for conversation in store.load_conversations()] == ["kept"]
        store.record_conversation("the copy works on, numbering and keys included")


def test_a_step_that_fails_leaves_the_schema_as_it_was(used: Path) -> None:
    broken = Migration(NEXT.version, "broken", (*NEXT.statements, "INSERT INTO nowhere VALUES (1)"))
    with pytest.raises(duckdb.CatalogException):
        run(used, (*MIGRATIONS, broken))
    assert ask(used, "SELECT max(version) FROM schema_migrations") == [(MIGRATIONS[-1].version,)]
    with pytest.raises(duckdb.BinderException):
        ask(used, "SELECT mood FROM conversations")
    with FeedbackStore.open(used) as store:
        assert len(store.load_conversations()) == 1


def test_a_file_of_a_newer_program_is_refused_untouched(used: Path) -> None:
    run(used, (*MIGRATIONS, NEXT))
    before = used.read_bytes()
    with pytest.raises(StoreTooNew, match=f"schema version {NEXT.version}.*up to {MIGRATIONS[-1].version}.*Update"):
        FeedbackStore.open(used)
    assert used.read_bytes() == before
    run(used, (*MIGRATIONS, NEXT))  # and it is not left locked


def test_a_step_that_is_not_ours_is_refused(used: Path) -> None:
    ask(used, "UPDATE schema_migrations SET checksum = 'somebody else'")
    with pytest.raises(StoreDamaged, match="not of this Zephyr Loop"):
        FeedbackStore.open(used)


def test_words_of_schema_2_are_found_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    run(path, MIGRATIONS[:2])
    with duckdb.connect(str(path)) as connection:
        for answer in ("first", "second"):
            connection.execute(
                "INSERT INTO candidates SELECT $1, 'v0', $1 || ' answer', 'stop', '{}', 1, 1.0, TIMESTAMP '2026-11-22'",
                [answer],
            )
        connection.execute(
            "INSERT INTO pairs (pair_id, prompt, split, first_candidate_id, second_candidate_id, rater, created_at) "
            "VALUES ('päir', [{'role': 'user', 'content': 'Why?'}], 'train', 'first', 'second', 'local', now())"
        )
        for number, choice in enumerate(("first", "tie", "second")):
            connection.execute(
                "INSERT INTO picks (pick_id, pair_id, pick, reasons, rater, part, created_at) "
                "VALUES ($1, 'päir', $2, [], 'Ann B', 'train', now())",
                [f"pick {number}", choice],
            )
            connection.execute("INSERT INTO pick_words VALUES ('päir', 'Ann B', $1, $2)", [number, f"pick {number}"])
    with FeedbackStore.open(path) as store:
        store.record_pick("päir", PickChoice.BOTH_BAD, rater="Ann B")
    assert ask(path, "SELECT pick, supersedes FROM picks ORDER BY event DESC LIMIT 1") == [("both_bad", "pick 2")]
    assert ask(path, "SELECT number FROM pick_words ORDER BY ALL") == [(0,), (1,), (2,), (3,)]


def test_a_store_of_schema_3_reads_on_and_keeps_what_the_model_read(tmp_path: Path) -> None:
    path = tmp_path / "store.duckdb"
    run(path, MIGRATIONS[:3])
    ask(path, "INSERT INTO conversations VALUES ('conv', TIMESTAMP '2026-11-22', 'local')")
    ask(path, "INSERT INTO turns VALUES ('turn', 'conv', 0, 'Why?', TIMESTAMP '2026-11-22')")
    ask(path, "INSERT INTO candidates VALUES ('cand', 'v0', 'So.', 'stop', '{}', 1, 1.0, TIMESTAMP '2026-11-22')")
    ask(path, "INSERT INTO answers (turn_id, candidate_id, created_at) VALUES ('turn', 'cand', now())")
    ask(
        path,
        "INSERT INTO generations (candidate_id, prompt, split, turn_id, rater, created_at) "
        "VALUES ('cand', [{'role': 'user', 'content': 'Why?'}], 'train', 'turn', 'local', now())",
    )
    with FeedbackStore.open(path) as store:
        (turn,) = store.load_conversation("conv")[1]
        assert (turn.left_out, store.load_left_out("cand"), store.load_preset("conv")) == (0, 0, None)
        store.record_preset("conv", "Short")
        assert store.load_preset("conv") == "Short"


def test_promotions_survive_the_step_that_allows_one_kind_more(tmp_path: Path) -> None:
    path, kinds = tmp_path / "store.duckdb", ("promote", "rollback")
    step = next(at for at, one in enumerate(MIGRATIONS) if one.name == "going back by itself")
    with duckdb.connect(str(path)) as connection:
        migrate(connection, path, tmp_path / "backups", datetime(2026, 1, 1), MIGRATIONS[:step])
        for version, previous, kind in (("v1", "v0", kinds[0]), ("v0", "v1", kinds[1]), ("v2", "v0", kinds[0])):
            connection.execute(
                'INSERT INTO promotions (version, previous, kind, reason, "by", evaluation, created_at) '
                "VALUES (?, ?, ?, 'why', 'local', '{\"wins\": 3}', now())",
                [version, previous, kind],
            )
    with FeedbackStore.open(path) as store:
        assert [(one.version, one.kind) for one in store.load_promotions()] == [
            ("v1", "promote"), ("v0", "rollback"), ("v2", "promote"),
        ]  # fmt: skip
        assert store.load_promotions()[0].evaluation == {"wins": 3}
        store.record_promotion("v0", kind="auto-rollback", reason="worse", by="baking")
        assert (store.champion(), store.rollback_target()) == ("v0", None)
        store.record_promotion("v3", kind="auto", reason="better", by="policy")
        assert (store.champion(), store.rollback_target()) == ("v3", "v0")
