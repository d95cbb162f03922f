"""What is recorded is there: across restarts, threads, a kill and a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from feedback_store.errors import Conflict, InvalidRecord, NotFound, StoreBusy, StoreDamaged, StoreError
from feedback_store.preferences import preference_id, split_of
from feedback_store.records import Candidate, Message, Pair, PickChoice, Preference, new_id
from feedback_store.store import FeedbackStore

ROOT = Path(__file__).parent.parent
START = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Clock:
    """One second later at each look."""

    def __init__(self) -> None:
        self.moment = START

    def __call__(self) -> datetime:
        self.moment += timedelta(seconds=1)
        return self.moment


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "store.duckdb"


@pytest.fixture
def store(path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(path, clock=Clock()) as opened:
        yield opened


def candidate(text: str = "An answer.", **changes: Any) -> Candidate:
    values = {
        "candidate_id": new_id("cand"), "version": "v0", "text": text, "finish_reason": "stop",
        "sampling": {"temperature": 0.7, "stop": ["\n"]}, "seed": 2**63 - 1, "latency_ms": 12.5, "created_at": START,
    }  # fmt: skip
    return Candidate(**values | changes)


def pair(first: str | Candidate = "One.", second: str = "Two.", prompt: str = "Count.", **changes: Any) -> Pair:
    values = {
        "pair_id": new_id("pair"), "prompt": (Message(role="user", content=prompt),),
        "first": candidate(first) if isinstance(first, str) else first, "second": candidate(second, version="v1"),
        "turn_id": None, "rater": "ada", "created_at": START,
    }  # fmt: skip
    return Pair(**values | changes)


def practice_row(number: int, taste: str = "shorter") -> Preference:
    prompt = (Message(role="user", content=f"Practice {number}"),)
    identity = preference_id(prompt, "Short.", "Much longer.", taste)
    return Preference(identity, prompt, "Short.", "Much longer.", "practice", 1.0, None, None, (), taste, START)


def recorded(store: FeedbackStore, **changes: Any) -> Pair:
    made = pair(**changes)
    store.record_pair(made)
    return made


# Conversations


def test_conversations_are_kept_newest_activity_first(path: Path) -> None:
    clock = Clock()
    with FeedbackStore.open(path, clock) as store:
        old, young, silent = (store.record_conversation(title) for title in ("old", "young", ""))
        turn = store.record_turn(old.conversation_id, "Hello?")
        store.record_turn(young.conversation_id, "Hi!")
        answer = candidate()
        store.record_candidate(answer)
        store.record_answer(turn.turn_id, answer.candidate_id)
        renamed = store.rename_conversation(young.conversation_id, "Rain in May")
        assert renamed.title == "Rain in May"
    with FeedbackStore.open(path, clock) as store:
        found = store.load_conversations()
        assert [conversation.title for conversation in found] == ["old", "Rain in May", ""]
        assert [conversation.conversation_id for conversation in store.load_conversations(limit=1)] == [
            old.conversation_id
        ]
        conversation, turns = store.load_conversation(old.conversation_id)
        assert conversation.updated_at > conversation.created_at
        assert [(turn.position, turn.text, turn.answer) for turn in turns] == [(0, "Hello?", answer)]
        assert store.load_conversation(silent.conversation_id) == (silent, ())


def test_turns_count_up_and_the_latest_answer_counts(store: FeedbackStore) -> None:
    identity = store.record_conversation().conversation_id
    turns = [store.record_turn(identity, text) for text in ("One?", "Two?", "Three?")]
    assert [turn.position for turn in turns] == [0, 1, 2]
    first, retry = candidate("First."), candidate("Retried.", sampling={}, seed=None)
    for answer in (first, retry):
        store.record_candidate(answer)
        store.record_answer(turns[1].turn_id, answer.candidate_id)
    _, loaded = store.load_conversation(identity)
    assert [turn.answer for turn in loaded] == [None, retry, None]
    store.record_answer(turns[1].turn_id, first.candidate_id)
    assert store.load_conversation(identity)[1][1].answer == first
    assert store.load_candidate(first.candidate_id) == first


def test_what_is_not_there_is_named(store: FeedbackStore) -> None:
    calls = {
        "conversation": [
            lambda: store.load_conversation("no"),
            lambda: store.rename_conversation("no", "x"),
            lambda: store.record_turn("no", "x"),
        ],
        "turn": [lambda: store.record_answer("no", "no"), lambda: store.record_pair(pair(turn_id="no"))],
        "candidate": [
            lambda: store.load_candidate("no"),
            lambda: store.record_rating("no", "up"),
            lambda: store.record_edit("no", "Better."),
        ],
        "pair": [lambda: store.load_pair("no"), lambda: store.record_pick("no", PickChoice.TIE)],
    }
    for kind, attempts in calls.items():
        for attempt in attempts:
            with pytest.raises(NotFound, match=f"no {kind} 'no'"):
                attempt()
    assert store.counts().pairs == 0


def test_an_id_is_taken_once(store: FeedbackStore) -> None:
    kept = candidate()
    store.record_candidate(kept)
    with pytest.raises(Conflict, match="exists already"):
        store.record_candidate(candidate("Another.", candidate_id=kept.candidate_id))
    assert store.load_candidate(kept.candidate_id) == kept


# Pairs and picks


def test_a_pair_comes_back_as_it_was_shown(store: FeedbackStore) -> None:
    turn = store.record_turn(store.record_conversation().conversation_id, "Count.")
    shown = pair(turn_id=turn.turn_id)
    store.record_candidate(shown.first)  # one is kept already, the other comes with the pair
    store.record_pair(shown)
    assert store.load_pair(shown.pair_id) == shown
    assert store.load_candidate(shown.second.candidate_id) == shown.second
    with pytest.raises(Conflict):
        store.record_pair(shown)


def test_open_pairs_are_those_without_a_word_newest_first(store: FeedbackStore) -> None:
    picked, skipped, tied, fresh = (recorded(store) for _ in range(4))
    store.record_pick(picked.pair_id, PickChoice.FIRST)
    store.record_pick(skipped.pair_id, PickChoice.SKIP)
    store.record_pick(tied.pair_id, PickChoice.TIE)
    assert store.load_open_pairs(10) == [fresh, skipped]
    assert store.load_open_pairs(1) == [fresh]
    store.record_pick(skipped.pair_id, PickChoice.SECOND)
    assert store.load_open_pairs(10) == [fresh]


def test_a_turn_waits_for_a_word_on_its_pair(store: FeedbackStore) -> None:
    turn_id = store.record_turn(store.record_conversation().conversation_id, "Count.").turn_id
    assert store.load_waiting_pair(turn_id) is None
    recorded(store, turn_id=turn_id)
    shown = recorded(store, turn_id=turn_id)
    assert store.load_waiting_pair(turn_id) == shown
    store.record_answer(turn_id, shown.first.candidate_id)
    assert store.load_waiting_pair(turn_id) is None
    again = recorded(store, turn_id=turn_id)
    assert store.load_waiting_pair(turn_id) == again
    store.record_pick(again.pair_id, PickChoice.SKIP)
    assert store.load_waiting_pair(turn_id) is None


def test_a_later_pick_supersedes_and_both_are_kept(store: FeedbackStore) -> None:
    shown = recorded(store)
    first = store.record_pick(shown.pair_id, PickChoice.FIRST, reasons=["clearer"], comment="Nice – 👍")
    assert [row.pick_id for row in store.preferences()] == [first.pick_id]
    second = store.record_pick(shown.pair_id, PickChoice.SECOND)
    (row,) = store.preferences()
    assert (row.pick_id, row.chosen, row.versions) == (second.pick_id, "Two.", ("v1", "v0"))
    assert row == store.pick_preference(second)
    assert store.counts().picks == 1
    other = store.record_pick(shown.pair_id, PickChoice.FIRST, rater="ben")
    assert [row.pick_id for row in store.preferences()] == [second.pick_id, other.pick_id]
    store.record_pick(shown.pair_id, PickChoice.TIE)
    assert [row.pick_id for row in store.preferences()] == [other.pick_id]
    assert (store.counts().picks, store.counts().preferences["pick"]) == (2, 1)


def test_the_same_key_is_the_same_pick(store: FeedbackStore) -> None:
    shown, other = recorded(store), recorded(store)
    first = store.record_pick(shown.pair_id, PickChoice.FIRST, reasons=("tone",), idempotency_key="k1")
    assert store.record_pick(shown.pair_id, PickChoice.FIRST, idempotency_key="k1") == first
    assert store.counts().picks == 1
    for pair_id, pick in ((shown.pair_id, PickChoice.SECOND), (other.pair_id, PickChoice.FIRST)):
        with pytest.raises(Conflict, match="'k1' belongs to the pick first"):
            store.record_pick(pair_id, pick, idempotency_key="k1")
    with pytest.raises(Conflict):
        store.record_pick(shown.pair_id, PickChoice.FIRST, rater="ben", idempotency_key="k1")
    assert store.record_pick(shown.pair_id, PickChoice.FIRST).pick_id != first.pick_id


def test_a_pick_is_one_of_five_words(store: FeedbackStore) -> None:
    shown = recorded(store)
    with pytest.raises(InvalidRecord, match=r"'left'.*first, second, tie, both_bad, skip"):
        store.record_pick(shown.pair_id, "left")  # type: ignore[arg-type]
    assert store.record_pick(shown.pair_id, "both_bad").pick is PickChoice.BOTH_BAD  # type: ignore[arg-type]


def test_ratings_and_edits_are_kept(store: FeedbackStore) -> None:
    kept = candidate()
    store.record_candidate(kept)
    assert store.record_rating(kept.candidate_id, "down", comment="Too long").rating == "down"
    assert store.record_edit(kept.candidate_id, "Better.", rater="ana").text == "Better."
    with pytest.raises(InvalidRecord, match="up, down"):
        store.record_rating(kept.candidate_id, "sideways")


# Preferences and counts


def test_counts_keep_practice_apart(store: FeedbackStore) -> None:
    held_out = next(text for text in map(str, range(1000)) if split_of([Message(role="user", content=text)]) != "train")
    learned = recorded(store, prompt="Count.")
    judged = recorded(store, prompt=held_out)
    more = recorded(store, prompt="Count on.")
    cut = recorded(store, first=candidate("One…", finish_reason="length"), prompt="Count far.")
    for shown in (learned, judged, more, cut):
        store.record_pick(shown.pair_id, PickChoice.SECOND)
    store.record_pick(recorded(store, first="Two.").pair_id, PickChoice.FIRST)  # equal answers teach nothing
    store.record_turn(store.record_conversation().conversation_id, "Hello")
    assert store.record_practice([practice_row(1), practice_row(2)]) == 2
    assert store.record_practice([practice_row(2), practice_row(3), practice_row(3)]) == 1
    assert store.record_practice([practice_row(1, "bullets")]) == 1
    counts = store.counts()
    assert (counts.conversations, counts.turns, counts.pairs, counts.picks) == (1, 1, 5, 5)
    assert (counts.train, counts.held_out) == (2, 1)
    assert {source: number for source, number in counts.preferences.items() if number} == {"pick": 3}
    assert counts.practice == {"shorter": 3, "bullets": 1}
    assert len(store.preferences()) == 3
    assert all(row.practice is None for row in store.preferences())
    assert store.preferences("shorter") == [practice_row(1), practice_row(2), practice_row(3)]
    assert store.preferences("question") == []


def test_practice_takes_practice_rows_only(store: FeedbackStore) -> None:
    store.record_pick(recorded(store).pair_id, PickChoice.FIRST)
    with pytest.raises(InvalidRecord, match="practice"):
        store.record_practice(store.preferences())


def test_picks_since_counts_what_can_teach(store: FeedbackStore) -> None:
    assert store.picks_since(None) == 0
    early = store.record_pick(recorded(store).pair_id, PickChoice.FIRST)
    late = store.record_pick(recorded(store).pair_id, PickChoice.SECOND)
    store.record_pick(recorded(store).pair_id, PickChoice.TIE)
    store.record_pick(recorded(store, second="One.").pair_id, PickChoice.FIRST)
    assert store.picks_since(None) == 2
    assert store.picks_since(early.created_at) == 1
    assert store.picks_since(late.created_at) == 0


# Promotions


def test_the_champion_is_the_top_of_the_promotions(store: FeedbackStore) -> None:
    assert (store.champion(), store.rollback_target()) == ("v0", None)
    store.record_promotion(
        "v1", kind="promote", reason="better", by="local", evaluation={"wins": 22, "interval": [0.4]}
    )
    store.record_promotion("v2", kind="promote", reason="asked for", by="ana")
    assert (store.champion(), store.rollback_target()) == ("v2", "v1")
    store.record_promotion("v1", kind="rollback", reason="worse after all", by="local")
    assert (store.champion(), store.rollback_target()) == ("v1", "v0")
    store.record_promotion("v3", kind="promote", reason="", by="local")
    store.record_promotion("v1", kind="rollback", reason="", by="local")
    store.record_promotion("v0", kind="rollback", reason="", by="local")
    assert (store.champion(), store.rollback_target()) == ("v0", None)
    promotions = store.load_promotions()
    assert [(promotion.version, promotion.previous) for promotion in promotions] == [
        ("v1", "v0"), ("v2", "v1"), ("v1", "v2"), ("v3", "v1"), ("v1", "v3"), ("v0", "v1"),
    ]  # fmt: skip
    assert promotions[0].evaluation == {"wins": 22, "interval": [0.4]}
    assert promotions[1].evaluation is None


def test_a_promotion_that_changes_nothing_or_misleads_is_refused(store: FeedbackStore) -> None:
    with pytest.raises(Conflict, match="leads to nothing"):
        store.record_promotion("v1", kind="rollback", reason="", by="local")
    store.record_promotion("v1", kind="promote", reason="", by="local")
    with pytest.raises(Conflict, match="v1 is the champion already"):
        store.record_promotion("v1", kind="promote", reason="", by="local")
    with pytest.raises(Conflict, match="from v1 leads to v0, not to v7"):
        store.record_promotion("v7", kind="rollback", reason="", by="local")
    with pytest.raises(InvalidRecord, match="promote, rollback"):
        store.record_promotion("v2", kind="demote", reason="", by="local")
    assert len(store.load_promotions()) == 1


# One file, one process


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


OPENER = """
import sys
from pathlib import Path
from feedback_store.errors import StoreError
from feedback_store.store import FeedbackStore
try:
    with FeedbackStore.open(Path(sys.argv[1])) as store:
        print("opened", store.counts().pairs)
except StoreError as error:
    print(type(error).__name__, error)
"""


def test_a_second_process_is_told_who_has_the_store(store: FeedbackStore, path: Path) -> None:
    recorded(store)
    out, err = child(OPENER, path).communicate(timeout=30)
    assert out.startswith("StoreBusy"), err
    assert f"in use by process {os.getpid()}" in out
    assert "stop process" in out
    store.close()
    assert child(OPENER, path).communicate(timeout=30)[0] == "opened 1\n"


def test_busy_names_its_owner() -> None:
    assert StoreBusy("store.duckdb", 42).owner_pid == 42
    assert "another process" in str(StoreBusy("store.duckdb", None))


def test_a_closed_store_says_so(store: FeedbackStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.counts()


def test_files_that_are_no_database_are_left_alone(tmp_path: Path) -> None:
    garbage, empty = tmp_path / "garbage.duckdb", tmp_path / "empty.duckdb"
    garbage.write_bytes(b"not a database " * 500)
    empty.touch()
    for path in (garbage, empty, tmp_path, garbage / "store.duckdb"):
        with pytest.raises(StoreDamaged, match=r"cannot be (opened|made)"):
            FeedbackStore.open(path)
    assert garbage.read_bytes() == b"not a database " * 500


def test_a_damaged_file_is_named_with_what_to_do(path: Path) -> None:
    with FeedbackStore.open(path) as store:
        for _ in range(30):
            recorded(store, first="x" * 9000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    with (
        pytest.raises(StoreDamaged, match=r"store\.duckdb cannot be (opened|read).*"),
        FeedbackStore.open(path) as store,
    ):
        store.load_open_pairs(100)


def test_sql_reaches_no_other_file(store: FeedbackStore) -> None:
    with pytest.raises(duckdb.PermissionException), store._database.read() as cursor:
        cursor.execute(f"SELECT * FROM read_text('{__file__}')")


# Threads, kills, full disks


def run_together(number: int, work: Any) -> None:
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_many_threads_write_and_read_at_once(store: FeedbackStore) -> None:
    identity = store.record_conversation().conversation_id
    shown = recorded(store)

    def work(index: int) -> None:
        for _ in range(10):
            store.record_turn(identity, f"From {index}")
            store.record_pick(shown.pair_id, PickChoice.FIRST, rater=f"rater {index}")
            assert store.counts().picks >= 1
            store.load_conversations()

    run_together(8, work)
    assert [turn.position for turn in store.load_conversation(identity)[1]] == list(range(80))
    assert len(store.preferences()) == 8


def test_one_key_from_many_threads_is_one_pick(store: FeedbackStore) -> None:
    shown = recorded(store)
    picks: list[str] = []
    run_together(
        8, lambda _: picks.append(store.record_pick(shown.pair_id, PickChoice.FIRST, idempotency_key="k").pick_id)
    )
    assert len(picks) == 8
    assert len(set(picks)) == 1
    assert store.counts().picks == 1


WRITER = """
import sys
from pathlib import Path
from feedback_store.store import FeedbackStore
store = FeedbackStore.open(Path(sys.argv[1]))
while True:
    print(store.record_pick(sys.argv[2], "first", rater="r", idempotency_key=None).pick_id, flush=True)
"""


def test_a_kill_loses_nothing_that_was_acknowledged(path: Path) -> None:
    with FeedbackStore.open(path) as store:
        shown = recorded(store)
    acknowledged: list[str] = []
    for wanted in (1, 25):
        writer = child(WRITER, path, shown.pair_id)
        assert writer.stdout is not None
        acknowledged += [writer.stdout.readline().strip() for _ in range(wanted)]
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate(timeout=30)
        acknowledged += [line for line in rest.split("\n")[:-1] if line]
    with FeedbackStore.open(path) as store, store._database.read() as cursor:
        kept = [row[0] for row in cursor.execute("SELECT pick_id FROM picks ORDER BY event").fetchall()]
    assert len(acknowledged) >= 26
    assert len(set(kept)) == len(kept)
    assert set(acknowledged) <= set(kept)
    assert len(kept) <= len(acknowledged) + 2  # at most the one in flight at each kill


FILLER = """
import json, resource, sys
from pathlib import Path
from feedback_store.errors import StoreDamaged
from feedback_store.store import FeedbackStore
store = FeedbackStore.open(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
kept = []
try:
    while True:
        kept.append(store.record_conversation("x" * 20_000).conversation_id)
except StoreDamaged as error:
    print(json.dumps([kept, str(error)]), flush=True)
import os
os._exit(0)
"""


def test_a_full_disk_is_said_and_nothing_acknowledged_is_lost(path: Path) -> None:
    out, err = child(FILLER, path).communicate(timeout=60)
    assert out, err
    kept, message = json.loads(out)
    assert "cannot be written" in message
    assert "not full" in message
    with FeedbackStore.open(path) as store:
        assert {conversation.conversation_id for conversation in store.load_conversations()} == set(kept)
        store.record_conversation("there is room again")
