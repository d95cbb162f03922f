"""FeedbackStore: what people said, kept in one DuckDB file. The only opener of that file.

    chat → record_conversation, record_turn, record_candidate, record_answer     judge → record_rating, record_edit
    compare → record_pair, record_pick         learn → training_rows, unpaired, record_import, record_practice
    serve → record_promotion, champion     care → record_learning, erase, back_up, query, statistics
    trial → record_trial, trial_votes, record_trial_end, comparisons
    trust → record_quarantine, standing, rater_tallies, load_pairs_to_rate

Events are only ever added: a later pick, answer or title supersedes an earlier one, nothing is changed in place.
A ``rater`` is given as an id or a label, and kept and given back as the id (``people.py``).
``record_*`` returns when its one transaction is on disk. Raises the errors of ``errors.py``: ``NotFound`` and
``Conflict`` for ids, ``InvalidRecord`` for values, ``StoreDamaged`` when the disk fails.
Not here: which rows a snapshot takes (``mixing.py``).
"""

# ruff: noqa: S608 - only our own column and table names are put into SQL; values are always parameters
from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from feedback_store import evidence, gold, proposals, quarantine, records, rows, trials
from feedback_store.agreement import Vote
from feedback_store.backup import Backup, back_up, list_backups, prune
from feedback_store.database import Cursor, Database
from feedback_store.erasure import Erasure, erase, set_learning
from feedback_store.errors import Conflict, InvalidRecord, NotFound
from feedback_store.importers import PreferenceSource
from feedback_store.importers.pairs import Choices
from feedback_store.imports import add_preferences, import_preferences, load_imports
from feedback_store.people import ensure_people, load_labels, load_raters, require_person
from feedback_store.picks import record_first_picks, record_picks
from feedback_store.preferences import HELD_OUT, preference_of, preference_of_edit, split_of
from feedback_store.query import QueryResult, run_query
from feedback_store.rater_tallies import RaterTally, load_tallies
from feedback_store.records import (
    BASE_VERSION,
    FORWARD,
    GOLD,
    Candidate,
    Comparisons,
    Conversation,
    Counts,
    Edit,
    ImportResult,
    Message,
    Pair,
    Pick,
    PickChoice,
    Preference,
    Promotion,
    Proposal,
    Quarantine,
    Rating,
    Trial,
    TrialVote,
    Turn,
    UnpairedPreference,
    new_id,
)
from feedback_store.reliability import GoldAnswers
from feedback_store.selection import Standing
from feedback_store.statistics import Statistics, counts, statistics
from feedback_store.tables import preference_of_row
from feedback_store.teaching import (
    Untaught,
    may_be_learned,
    pick_teaches,
    why_edit_teaches_nothing,
    why_pick_teaches_nothing,
    why_rating_teaches_nothing,
)

_CANDIDATE = rows.columns(rows.CANDIDATE_COLUMNS, "candidates")
_FIRST, _SECOND = rows.columns(rows.CANDIDATE_COLUMNS, "first"), rows.columns(rows.CANDIDATE_COLUMNS, "second")
_PAIR = f"{rows.columns(rows.PAIR_COLUMNS, 'pairs')}, {_FIRST}, {_SECOND}"
_PAIRS = """pairs JOIN candidates AS first ON first.candidate_id = pairs.first_candidate_id
    JOIN candidates AS second ON second.candidate_id = pairs.second_candidate_id"""
_CONVERSATIONS = """
    SELECT conversation_id, coalesce(title, ''), created_at, greatest(created_at, asked_at, answered_at) AS updated_at
    FROM conversations
    LEFT JOIN (SELECT conversation_id, arg_max(title, event) AS title FROM titles GROUP BY ALL) USING (conversation_id)
    LEFT JOIN (SELECT turns.conversation_id, max(turns.created_at) AS asked_at, max(answers.created_at) AS answered_at
               FROM turns LEFT JOIN answers USING (turn_id) GROUP BY ALL) USING (conversation_id)"""


class FeedbackStore:
    """The store of one data directory; safe to use from any thread. Close it to let go of the file.

    Who makes a snapshot of its rows holds ``freezing`` meanwhile, so that nobody is erased between the two.
    """

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self.freezing = threading.Lock()
        self._ids: dict[str, str] = {}
        self._learn_ids()

    @classmethod
    def open(cls, path: Path, clock: Callable[[], datetime] = records.now) -> FeedbackStore:
        """Open or create the database at ``path`` and bring its schema up to date.

        Raises ``StoreBusy`` while another process has it open, ``StoreDamaged`` and ``StoreTooNew``.
        """
        return cls(Database.open(path, rows.stored_time(clock())), clock)

    def close(self) -> None:
        """Finish what is in progress and let go of the file. Closing twice is fine."""
        self._database.close()

    def __enter__(self) -> FeedbackStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Who is who

    def person_id(self, name: str) -> str:
        """The id of a person by their id or label. ``NotFound``."""
        with self._database.read() as cursor:
            return require_person(cursor, name).person_id

    def record_person(self, label: str) -> str:
        """The id of the person with this label, who has one from now on."""
        with self._database.write() as cursor:
            person_id = ensure_people(cursor, [label])[label]
        self._ids[label] = person_id
        return person_id

    def labels(self) -> dict[str, str]:
        """Every label by the person's id."""
        with self._database.read() as cursor:
            return load_labels(cursor)

    def _id(self, rater: str) -> str:
        return self._ids.get(rater, rater)

    def _learn_ids(self) -> None:
        self._ids = {label: person_id for person_id, label in self.labels().items()}

    # Conversations, turns, answers

    def record_conversation(self, title: str = "", *, rater: str = "local") -> Conversation:
        """Begin a conversation of a person."""
        moment = self._clock()
        conversation = Conversation(new_id("conv"), title, moment, moment)
        with self._database.write() as cursor:
            _insert(cursor, "conversations", conversation.conversation_id, rows.stored_time(moment), self._id(rater))
            _add_title(cursor, conversation.conversation_id, title, moment)
        return conversation

    def rename_conversation(self, conversation_id: str, title: str) -> Conversation:
        """Give a conversation another title; this is no activity."""
        with self._database.write() as cursor:
            found = _load_conversation(cursor, conversation_id)
            renamed = Conversation(conversation_id, title, found.created_at, found.updated_at)
            _add_title(cursor, conversation_id, title, self._clock())
        return renamed

    def load_conversations(self, limit: int = 200) -> list[Conversation]:
        """The conversations, newest activity first."""
        with self._database.read() as cursor:
            found = cursor.execute(f"{_CONVERSATIONS} ORDER BY updated_at DESC LIMIT ?", [limit]).fetchall()
        return [_conversation(row) for row in found]

    def load_conversation(self, conversation_id: str) -> tuple[Conversation, tuple[Turn, ...]]:
        """A conversation and its turns in order, each with its latest answer."""
        with self._database.read() as cursor:
            conversation = _load_conversation(cursor, conversation_id)
            found = cursor.execute(
                f"""SELECT turns.turn_id, turns.position, turns.text, turns.created_at,
                    coalesce(generations.left_out, 0), {_CANDIDATE}
                FROM turns LEFT JOIN (
                    SELECT turn_id, arg_max(candidate_id, event) AS candidate_id FROM answers GROUP BY ALL
                ) AS latest USING (turn_id) LEFT JOIN candidates ON candidates.candidate_id = latest.candidate_id
                LEFT JOIN generations ON generations.candidate_id = latest.candidate_id
                WHERE turns.conversation_id = ? ORDER BY turns.position""",
                [conversation_id],
            ).fetchall()
        return conversation, tuple(_turn(conversation_id, row) for row in found)

    def record_turn(self, conversation_id: str, text: str) -> Turn:
        """Add what a person wrote as the next turn of a conversation."""
        with self._database.write() as cursor:
            _require(cursor, "conversation", conversation_id)
            position = cursor.execute(
                "SELECT coalesce(max(position) + 1, 0) FROM turns WHERE conversation_id = ?", [conversation_id]
            ).fetchall()[0][0]
            turn = Turn(new_id("turn"), conversation_id, position, text, None, self._clock())
            _insert(cursor, "turns", turn.turn_id, conversation_id, position, text, rows.stored_time(turn.created_at))
        return turn

    def record_answer(self, turn_id: str, candidate_id: str) -> None:
        """Make a candidate the answer of a turn. The latest one counts: a retry or a pick records another."""
        with self._database.write() as cursor:
            _require(cursor, "turn", turn_id)
            _require(cursor, "candidate", candidate_id)
            cursor.execute(
                "INSERT INTO answers (turn_id, candidate_id, created_at) VALUES (?, ?, ?)",
                [turn_id, candidate_id, rows.stored_time(self._clock())],
            )

    def record_preset(self, conversation_id: str, preset: str | None) -> None:
        """Choose a preset by its name for a conversation's next answers, None for none; the latest choice counts."""
        with self._database.write() as cursor:
            _require(cursor, "conversation", conversation_id)
            cursor.execute(
                "INSERT INTO preset_choices (conversation_id, preset, created_at) VALUES (?, ?, ?)",
                [conversation_id, preset, rows.stored_time(self._clock())],
            )

    def load_preset(self, conversation_id: str) -> str | None:
        """The name of the preset a conversation has now, None where it has none."""
        with self._database.read() as cursor:
            found = cursor.execute(
                "SELECT preset FROM preset_choices WHERE conversation_id = ? ORDER BY event DESC LIMIT 1",
                [conversation_id],
            ).fetchall()
        return None if not found else found[0][0]

    # Candidates, pairs, picks

    def record_candidate(
        self,
        candidate: Candidate,
        prompt: Sequence[Message] | None = None,
        *,
        turn_id: str | None = None,
        rater: str = "local",
        left_out: int = 0,
    ) -> None:
        """Keep a generated answer, and what it answered. ``Conflict`` where its id is taken.

        Without the prompt a later edit or rating of it teaches nothing. ``left_out``: how many of the oldest messages
        are not in the prompt, for want of room.
        """
        with self._database.write() as cursor:
            _insert(cursor, "candidates", *rows.stored_candidate(candidate))
            if prompt is not None:
                _add_generation(cursor, candidate, prompt, turn_id, self._id(rater), left_out=left_out)

    def load_candidate(self, candidate_id: str) -> Candidate:
        with self._database.read() as cursor:
            found = cursor.execute(
                f"SELECT {_CANDIDATE} FROM candidates WHERE candidate_id = ?", [candidate_id]
            ).fetchall()
        if not found:
            raise NotFound("candidate", candidate_id)
        return rows.loaded_candidate(found[0])

    def load_recent_answers(self, version: str, limit: int) -> list[tuple[Candidate, str | None]]:
        """The last answers of a version that nobody stopped, newest first, each with its last rating.

        Only those that were drawn as the product draws them: what a request chose itself says nothing of the version.
        """
        with self._database.read() as cursor:
            found = cursor.execute(
                f"""WITH recent AS (SELECT {_CANDIDATE} FROM candidates
                    WHERE version = ? AND finish_reason <> 'cancelled' AND (sampling -> '$.by_request') IS NULL
                        AND coalesce((sampling ->> '$.stop'), '[]') = '[]' ORDER BY created_at DESC LIMIT ?)
                SELECT recent.*, rated.rating FROM recent LEFT JOIN (
                    SELECT candidate_id, arg_max(rating, event) AS rating FROM ratings GROUP BY candidate_id
                ) AS rated USING (candidate_id) ORDER BY recent.created_at DESC""",
                [version, limit],
            ).fetchall()
        return [(rows.loaded_candidate(row[:-1]), row[-1]) for row in found]

    def load_left_out(self, candidate_id: str) -> int:
        """How many of the oldest messages an answer was written without."""
        with self._database.read() as cursor:
            found = cursor.execute("SELECT left_out FROM generations WHERE candidate_id = ?", [candidate_id]).fetchall()
        return 0 if not found else int(found[0][0])

    def record_pair(self, pair: Pair, *, left_out: int = 0) -> None:
        """Keep a pair, and its two candidates where they are not kept yet, in one transaction."""
        rater = self._id(pair.rater)
        with self._database.write() as cursor:
            if pair.turn_id is not None:
                _require(cursor, "turn", pair.turn_id)
            for candidate in (pair.first, pair.second):
                if not _exists(cursor, "candidate", candidate.candidate_id):
                    _insert(cursor, "candidates", *rows.stored_candidate(candidate))
                    _add_generation(cursor, candidate, pair.prompt, pair.turn_id, rater, left_out=left_out)
            cursor.execute(
                "INSERT INTO pairs (pair_id, prompt, split, first_candidate_id, second_candidate_id, turn_id, rater, "
                "created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    pair.pair_id,
                    rows.stored_prompt(pair.prompt),
                    split_of(pair.prompt),
                    pair.first.candidate_id,
                    pair.second.candidate_id,
                    pair.turn_id,
                    rater,
                    rows.stored_time(pair.created_at),
                ],
            )

    def load_pair(self, pair_id: str) -> Pair:
        with self._database.read() as cursor:
            return _load_pair(cursor, pair_id)

    def load_open_pairs(self, limit: int = 50) -> list[Pair]:
        """The pairs that nobody has picked, or only skipped; newest first."""
        with self._database.read() as cursor:
            found = cursor.execute(
                f"""SELECT {_PAIR} FROM {_PAIRS}
                WHERE pairs.pair_id NOT IN (SELECT pair_id FROM standing_picks WHERE pick <> 'skip')
                ORDER BY pairs.event DESC LIMIT ?""",
                [limit],
            ).fetchall()
        return [rows.loaded_pair(row) for row in found]

    def load_waiting_pair(self, turn_id: str) -> Pair | None:
        """The newest pair of a turn, where nobody has said a word on it and no later answer took its place."""
        with self._database.read() as cursor:
            found = cursor.execute(
                f"""SELECT {_PAIR} FROM {_PAIRS}
                WHERE pairs.turn_id = ? AND pairs.pair_id NOT IN (SELECT pair_id FROM picks)
                AND pairs.event > (SELECT coalesce(max(event), 0) FROM answers WHERE turn_id = ?)
                ORDER BY pairs.event DESC LIMIT 1""",
                [turn_id, turn_id],
            ).fetchall()
        return rows.loaded_pair(found[0]) if found else None

    def record_pick(
        self,
        pair_id: str,
        pick: PickChoice,
        *,
        reasons: Sequence[str] = (),
        comment: str | None = None,
        rater: str = "local",
        idempotency_key: str | None = None,
    ) -> Pick:
        """Keep a person's word on a pair; it supersedes an earlier one of the same rater.

        The same ``idempotency_key`` again gives back the first pick and keeps nothing new; with another pair,
        pick or rater it is a ``Conflict``.
        """
        word = Pick(
            new_id("pick"), pair_id, _choice(pick), tuple(reasons), comment, self._id(rater), idempotency_key,
            self._clock(),
        )  # fmt: skip
        return self._database.submit(record_picks, word)

    def record_first_pick(
        self, pair_id: str, pick: PickChoice, *, reasons: Sequence[str] = (), rater: str = "local"
    ) -> tuple[Pick, bool]:
        """Keep a rater's first word on a pair; where one stands that one is given back, and False."""
        word = Pick(new_id("pick"), pair_id, _choice(pick), tuple(reasons), None, self._id(rater), None, self._clock())
        kept = self._database.submit(record_first_picks, word)
        return kept, kept.pick_id == word.pick_id

    def pick_preference(self, pick: Pick) -> Preference | None:
        """The training row that a snapshot of now would hold for a pick, or None where it teaches nothing."""
        return preference_of(pick, self.load_pair(pick.pair_id)) if self.why_untaught(pick) is None else None

    def why_untaught(self, said: Pick | Edit | Rating) -> Untaught | None:
        """Why a word of a person teaches nothing as things stand; None where it does (see ``teaching.py``)."""
        with self._database.read() as cursor:
            if isinstance(said, Pick):
                return why_pick_teaches_nothing(cursor, said)
            if isinstance(said, Edit):
                return why_edit_teaches_nothing(cursor, said)
            return why_rating_teaches_nothing(cursor, said)

    def record_rating(
        self,
        candidate_id: str,
        rating: str,
        *,
        comment: str | None = None,
        rater: str = "local",
        idempotency_key: str | None = None,
    ) -> Rating:
        """Keep a thumb, ``up`` or ``down``, on an answer. The same key again keeps nothing new, as for a pick."""
        rater = self._id(rater)
        event = Rating(new_id("rating"), candidate_id, rating, comment, rater, self._clock())
        with self._database.write() as cursor:
            _require(cursor, "candidate", candidate_id)
            earlier = _earlier_event(cursor, "rating", idempotency_key)
            if earlier is not None:
                _require_same(idempotency_key, earlier[1:5], (candidate_id, rating, comment, rater))
                return Rating(earlier[0], candidate_id, rating, comment, rater, rows.loaded_time(earlier[5]))
            if idempotency_key is not None:
                _insert(cursor, "event_keys", idempotency_key, event.rating_id)
            cursor.execute(
                "INSERT INTO ratings (rating_id, candidate_id, rating, comment, rater, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [event.rating_id, candidate_id, rating, comment, rater, rows.stored_time(event.created_at)],
            )
        return event

    def record_edit(
        self, candidate_id: str, text: str, *, rater: str = "local", idempotency_key: str | None = None
    ) -> Edit:
        """Keep a person's rewrite of an answer. The same key again keeps nothing new, as for a pick."""
        rater = self._id(rater)
        event = Edit(new_id("edit"), candidate_id, text, rater, self._clock())
        with self._database.write() as cursor:
            _require(cursor, "candidate", candidate_id)
            earlier = _earlier_event(cursor, "edit", idempotency_key)
            if earlier is not None:
                _require_same(idempotency_key, earlier[1:4], (candidate_id, text, rater))
                return Edit(earlier[0], candidate_id, text, rater, rows.loaded_time(earlier[4]))
            if idempotency_key is not None:
                _insert(cursor, "event_keys", idempotency_key, event.edit_id)
            cursor.execute(
                "INSERT INTO edits (edit_id, candidate_id, text, rater, part, created_at) VALUES (?, ?, ?, ?, ?, ?)",
                [event.edit_id, candidate_id, text, rater, _part(cursor, event), rows.stored_time(event.created_at)],
            )
        return event

    def judges(self, edit: Edit) -> bool:
        """Whether the prompt of an edit is held out: then versions are judged by it, and none learns from it."""
        with self._database.read() as cursor:
            found = cursor.execute("SELECT 1 FROM edits WHERE edit_id = ? AND part = ?", [edit.edit_id, HELD_OUT])
            return bool(found.fetchall())

    # Preferences

    def record_import(
        self,
        path_or_hub_id: str,
        format: str = "auto",  # noqa: A002 - the word of the public interface
        on_progress: Callable[[PreferenceSource], None] | None = None,
        choices: Choices | None = None,
    ) -> ImportResult:
        """Take in a file or a hub data set of preferences: all of it, or nothing (see ``imports.py``).

        ``on_progress`` hears of the source after every batch. Raises ``BadImport``.
        """
        result = import_preferences(
            self._database,
            path_or_hub_id,
            format,
            choices=choices or Choices(),
            moment=self._clock(),
            on_progress=on_progress,
        )
        self._learn_ids()
        return result

    def load_imports(self, limit: int = 100) -> list[tuple[ImportResult, datetime]]:
        """The imports, newest first, each with its time."""
        with self._database.read() as cursor:
            return load_imports(cursor, limit)

    def record_practice(self, preferences: Sequence[Preference]) -> int:
        """Keep practice rows, apart from the real ones; how many were new. Doing it twice changes nothing."""
        for preference in preferences:
            if preference.practice is None:
                raise InvalidRecord("Preference", "practice", None, "a taste where practice rows are recorded")
        with self._database.write(bulk=True) as cursor:
            return add_preferences(cursor, preferences)

    def training_rows(self, practice: str | None = None) -> pa.Table:
        """The preferences to train on as a table of ``tables.ROWS`` (see ``evidence.training_rows``)."""
        with self._database.read() as cursor:
            return evidence.training_rows(cursor, practice)

    def preferences(self, practice: str | None = None) -> list[Preference]:
        """The same as records."""
        return [preference_of_row(row) for row in self.training_rows(practice).to_pylist()]

    def unpaired(self) -> list[UnpairedPreference]:
        """The labelled answers to train on: thumbs, both bad, imports."""
        with self._database.read() as cursor:
            return evidence.unpaired_rows(cursor)

    def votes(self) -> list[Vote]:
        """Every standing word that compares two answers, imported ones too (for ``agreement.py``)."""
        with self._database.read() as cursor:
            return evidence.votes(cursor)

    def judged(self, item: str) -> tuple[str, tuple[str, str]]:
        """What was asked, and the two answers, of an item of ``votes``."""
        with self._database.read() as cursor:
            return evidence.judged(cursor, item)

    def picks_since(self, moment: datetime | None) -> int:
        """How many picks newer than ``moment`` (of all for None) teach, by ``teaching.pick_teaches``."""
        with self._database.read() as cursor:
            found = cursor.execute(
                f"SELECT count(*) FROM standing_picks AS picks WHERE {pick_teaches('picks')} "
                "AND created_at > coalesce(?, TIMESTAMP '-infinity')",
                [None if moment is None else rows.stored_time(moment)],
            ).fetchall()
        return int(found[0][0])

    def counts(self) -> Counts:
        """How much the store holds, practice apart from the rest."""
        with self._database.read() as cursor:
            return counts(cursor)

    def statistics(self) -> Statistics:
        """How people judge, for the admin page."""
        with self._database.read() as cursor:
            return statistics(cursor)

    # Privacy, backups, questions

    def record_learning(self, scope: str, subject: str, learn: bool, *, by: str) -> None:
        """Say whether a ``conversation`` or a ``rater`` may teach; the latest word counts."""
        with self._database.write() as cursor:
            set_learning(cursor, scope, subject, learn, by=by, moment=self._clock())
        self._learn_ids()

    def learns_from(self, scope: str, subject: str) -> bool:
        """Whether a conversation or a rater may teach; nobody has to ask for it."""
        with self._database.read() as cursor:
            about = self._id(subject) if scope == "rater" else subject
            said_no = cursor.execute("SELECT 1 FROM refusals WHERE scope = ? AND subject = ?", [scope, about])
            return not said_no.fetchall()

    def erase(self, rater: str, data_dir: Path) -> Erasure:
        """Remove a person's words everywhere below the data directory (see ``erasure.erase``)."""
        with self.freezing:
            erased = erase(self._database, data_dir, rater, self._clock())
        self._learn_ids()
        return erased

    def back_up(self, reason: str, keep_days: int, keep_last: int = 3) -> Backup:
        """Copy the store into ``backups/`` while it works, then remove backups that are past their time."""
        moment = self._clock()
        made = back_up(self._database, self._backups, moment, reason)
        prune(self._backups, keep_days, keep_last, moment)
        return made

    def backups(self) -> list[Backup]:
        """The backups there are, newest first."""
        return list_backups(self._backups)

    def query(self, sql: str, *, limit_s: float) -> QueryResult:
        """Answer one SELECT, read-only (see ``query.run_query``)."""
        return run_query(self._database, sql, limit_s=limit_s)

    def check(self) -> None:
        """Raise ``StoreDamaged`` where nothing can be kept just now."""
        self._database.check()

    @property
    def _backups(self) -> Path:
        return self._database.path.parent / "backups"

    # On whom one can rely

    def record_quarantine(self, rater: str, quarantined: bool, *, reason: str, by: str) -> None:
        """Put a rater into quarantine, or lift it (see ``quarantine.py``). ``NotFound``, ``Conflict``."""
        with self._database.write() as cursor:
            person = require_person(cursor, rater)
            word = Quarantine(person.person_id, reason, by, self._clock())
            quarantine.record_quarantine(cursor, word, person.label, quarantined=quarantined)

    def quarantines(self) -> list[Quarantine]:
        """Who is in quarantine, by id."""
        with self._database.read() as cursor:
            return quarantine.load_quarantines(cursor)

    def raters(self) -> list[str]:
        """Everybody who said something or was imported, by id."""
        with self._database.read() as cursor:
            return sorted(load_raters(cursor))

    def standing(self) -> Standing:
        """What a snapshot asks about raters: who is in quarantine, and how each did on gold pairs."""
        with self._database.read() as cursor:
            in_quarantine = frozenset(one.rater for one in quarantine.load_quarantines(cursor))
            return Standing(in_quarantine, gold.gold_answers(cursor))

    def rater_tallies(self) -> dict[str, RaterTally]:
        """What each rater did, counted."""
        with self._database.read() as cursor:
            return load_tallies(cursor)

    def gold_results(self) -> dict[str, GoldAnswers]:
        """How raters did on each gold pair, by its id."""
        with self._database.read() as cursor:
            return gold.gold_results(cursor)

    def gold_seen_by(self, rater: str) -> set[str]:
        """The ids of the gold pairs a rater has said a word on."""
        with self._database.read() as cursor:
            return gold.seen_by(cursor, self._id(rater))

    def load_pairs_to_rate(self, rater: str, limit: int = 50) -> list[Pair]:
        """Pairs with whole answers, free to learn from, that a rater has said no word on: those others judged first."""
        with self._database.read() as cursor:
            found = cursor.execute(
                f"""SELECT {_PAIR} FROM {_PAIRS}
                WHERE pairs.pair_id NOT IN (SELECT pair_id FROM picks WHERE rater = ?) AND first.version <> '{GOLD}'
                AND first.finish_reason = 'stop' AND second.finish_reason = 'stop'
                AND trim(first.text) <> trim(second.text) AND {may_be_learned("pairs")}
                ORDER BY pairs.pair_id IN (SELECT pair_id FROM picks WHERE pick <> 'skip') DESC, pairs.event DESC
                LIMIT ?""",
                [self._id(rater), limit],
            ).fetchall()
        return [rows.loaded_pair(row) for row in found]

    # Promotions

    def record_promotion(
        self,
        version: str,
        *,
        kind: str,
        reason: str,
        by: str,
        evaluation: Mapping[str, object] | None = None,
    ) -> Promotion:
        """Make ``version`` the champion: ``kind`` is promote or auto; rollback or auto-rollback to ``rollback_target``.

        ``Conflict`` for the champion of now, and for a rollback to any other version than the target.
        """
        with self._database.write() as cursor:
            champions = _champions(_load_promotions(cursor))
            promotion = Promotion(version, champions[-1], kind, reason, by, evaluation, self._clock())
            if kind not in FORWARD and champions[-2:-1] != [version]:
                target = champions[-2] if len(champions) > 1 else "nothing"
                raise Conflict(
                    f"A rollback from {champions[-1]} leads to {target}, not to {version}. Promote it instead."
                )
            if version == champions[-1]:
                raise Conflict(f"{version} is the champion already. There is nothing to do.")
            _insert_promotion(cursor, promotion)
        return promotion

    def load_promotions(self) -> list[Promotion]:
        """Every promotion and rollback, oldest first."""
        with self._database.read() as cursor:
            return _load_promotions(cursor)

    def champion(self) -> str:
        """The version to serve: ``v0``, the base, before the first promotion."""
        return _champions(self.load_promotions())[-1]

    def rollback_target(self) -> str | None:
        """The version a rollback leads to, None where the base is the champion and nothing was before it."""
        champions = _champions(self.load_promotions())
        return champions[-2] if len(champions) > 1 else None

    # Proposals

    def record_proposal(
        self, source_id: str, *, source: str, version: str, champion: str, outcome: str, sentence: str, reason: str = ""
    ) -> None:
        """Keep what followed from a run's verdict or a trial, once (see ``proposals.py``). ``Conflict``."""
        with self._database.write() as cursor:
            proposals.record_proposal(
                cursor,
                Proposal(source_id, source, version, champion, outcome, sentence, reason, self._clock()),
            )

    def load_proposals(self) -> list[Proposal]:
        """Everything that was considered, newest first, and what became of it."""
        with self._database.read() as cursor:
            return proposals.load_proposals(cursor, _champions(_load_promotions(cursor))[-1])

    def dismiss(self, version: str, *, by: str, reason: str = "") -> None:
        """Dismiss every open proposal of a version. ``NotFound``."""
        with self._database.write() as cursor:
            known = proposals.load_proposals(cursor, _champions(_load_promotions(cursor))[-1])
            found = [one for one in known if one.is_open and one.version == version]
            if not found:
                raise NotFound("open proposal of", version)
            proposals.record_dismissal(cursor, found, reason, by, self._clock())

    # Live trials

    def record_trial(
        self, challenger: str, *, share: float, rules: Mapping[str, object], by: str, reason: str = ""
    ) -> Trial:
        """Begin a live trial of ``challenger`` against the champion of now. ``Conflict`` while another one runs."""
        with self._database.write() as cursor:
            champion = _champions(_load_promotions(cursor))[-1]
            trial = Trial(new_id("trial"), challenger, champion, share, rules, by, reason, self._clock())
            trials.record_trial(cursor, trial)
        return trial

    def record_trial_end(
        self, trial_id: str, state: str, *, reason: str, evidence: Mapping[str, object], by: str
    ) -> Trial:
        """End a trial with what its votes were. ``Conflict`` where it has ended already."""
        with self._database.write() as cursor:
            ended = replace(
                trials.load_trial(cursor, trial_id), state=state, ended_reason=reason, evidence=evidence, ended_by=by,
                ended_at=self._clock(),
            )  # fmt: skip
            trials.record_end(cursor, ended)
        return ended

    def load_trials(self) -> list[Trial]:
        """Every trial, newest first."""
        with self._database.read() as cursor:
            return trials.load_trials(cursor)

    def trial(self, trial_id: str) -> Trial:
        """One trial. ``NotFound``."""
        with self._database.read() as cursor:
            return trials.load_trial(cursor, trial_id)

    def running_trial(self) -> Trial | None:
        """The trial that goes on, if there is one."""
        with self._database.read() as cursor:
            running = trials.load_trials(cursor, running=True)
        return running[0] if running else None

    def trial_votes(self, trial_id: str) -> list[TrialVote]:
        """The votes of a trial in order: one blind word a pair (see ``trials.py``)."""
        with self._database.read() as cursor:
            return trials.load_votes(cursor, trial_id)

    def comparisons(self) -> list[Comparisons]:
        """Every blind word on a pair, counted by the versions shown first and second."""
        with self._database.read() as cursor:
            return trials.comparisons(cursor)


def _champions(promotions: Sequence[Promotion]) -> list[str]:
    """The champions one on top of the other: a promotion puts one on, a rollback takes one off."""
    champions = [BASE_VERSION]
    for promotion in promotions:
        if promotion.kind in FORWARD:
            champions.append(promotion.version)
        else:
            champions.pop()
    return champions


def _choice(pick: str) -> PickChoice:
    try:
        return PickChoice(pick)
    except ValueError as error:
        raise InvalidRecord("Pick", "pick", pick, "one of " + ", ".join(PickChoice)) from error


def _insert(cursor: Cursor, table: str, *values: object) -> None:
    cursor.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", list(values))


def _exists(cursor: Cursor, kind: str, record_id: str) -> bool:
    return bool(cursor.execute(f"SELECT 1 FROM {kind}s WHERE {kind}_id = ?", [record_id]).fetchall())


def _require(cursor: Cursor, kind: str, record_id: str) -> None:
    if not _exists(cursor, kind, record_id):
        raise NotFound(kind, record_id)


def _add_generation(
    cursor: Cursor, candidate: Candidate, prompt: Sequence[Message], turn_id: str | None, rater: str, *, left_out: int
) -> None:
    cursor.execute(
        "INSERT INTO generations (candidate_id, prompt, split, turn_id, rater, created_at, left_out) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            candidate.candidate_id,
            rows.stored_prompt(prompt),
            split_of(prompt),
            turn_id,
            rater,
            rows.stored_time(candidate.created_at),
            left_out,
        ],
    )


def _earlier_event(cursor: Cursor, kind: str, idempotency_key: str | None) -> rows.Row | None:
    """The rating or edit recorded under this key, if there is one: its id, candidate, words, rater and time."""
    if idempotency_key is None:
        return None
    words = {"rating": "rating, comment", "edit": "text"}[kind]
    keyed = cursor.execute("SELECT record_id FROM event_keys WHERE idempotency_key = ?", [idempotency_key]).fetchall()
    if not keyed:
        return None
    found = cursor.execute(
        f"SELECT {kind}_id, candidate_id, {words}, rater, created_at FROM {kind}s WHERE {kind}_id = ?", list(keyed[0])
    ).fetchall()
    if not found:
        raise Conflict(f"The idempotency key {idempotency_key!r} belongs to something else. Send a new key.")
    return found[0]


def _require_same(idempotency_key: str | None, earlier: Sequence[object], now: Sequence[object]) -> None:
    if tuple(earlier) != tuple(now):
        raise Conflict(
            f"The idempotency key {idempotency_key!r} belongs to other words on {earlier[0]}. "
            "Send a new key for a new event."
        )


def _part(cursor: Cursor, edit: Edit) -> str:
    """The part that the preference of an edit is in; empty where it teaches nothing."""
    found = cursor.execute(
        f"SELECT generations.prompt, {_CANDIDATE} FROM generations JOIN candidates USING (candidate_id) "
        "WHERE candidate_id = ?",
        [edit.candidate_id],
    ).fetchall()
    for prompt, *candidate in found:
        preference = preference_of_edit(edit, rows.loaded_candidate(candidate), rows.loaded_prompt(prompt))
        return "" if preference is None else split_of(preference.prompt)
    return ""


def _add_title(cursor: Cursor, conversation_id: str, title: str, moment: datetime) -> None:
    cursor.execute(
        "INSERT INTO titles (conversation_id, title, created_at) VALUES (?, ?, ?)",
        [conversation_id, title, rows.stored_time(moment)],
    )


def _conversation(row: rows.Row) -> Conversation:
    return Conversation(row[0], row[1], rows.loaded_time(row[2]), rows.loaded_time(row[3]))


def _load_conversation(cursor: Cursor, conversation_id: str) -> Conversation:
    found = cursor.execute(f"{_CONVERSATIONS} WHERE conversation_id = ?", [conversation_id]).fetchall()
    if not found:
        raise NotFound("conversation", conversation_id)
    return _conversation(found[0])


def _turn(conversation_id: str, row: rows.Row) -> Turn:
    (turn_id, position, text, created_at, left_out), candidate = row[:5], row[5:]
    answer = None if candidate[0] is None else rows.loaded_candidate(candidate)
    return Turn(turn_id, conversation_id, position, text, answer, rows.loaded_time(created_at), left_out)


def _load_pair(cursor: Cursor, pair_id: str) -> Pair:
    found = cursor.execute(f"SELECT {_PAIR} FROM {_PAIRS} WHERE pairs.pair_id = ?", [pair_id]).fetchall()
    if not found:
        raise NotFound("pair", pair_id)
    return rows.loaded_pair(found[0])


def _load_promotions(cursor: Cursor) -> list[Promotion]:
    found = cursor.execute(
        f"SELECT {rows.columns(rows.PROMOTION_COLUMNS, 'promotions')} FROM promotions ORDER BY event"
    ).fetchall()
    return [rows.loaded_promotion(row) for row in found]


def _insert_promotion(cursor: Cursor, promotion: Promotion) -> None:
    cursor.execute(
        'INSERT INTO promotions (version, previous, kind, reason, "by", evaluation, created_at) '
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            promotion.version,
            promotion.previous,
            promotion.kind,
            promotion.reason,
            promotion.by,
            None if promotion.evaluation is None else json.dumps(dict(promotion.evaluation)),
            rows.stored_time(promotion.created_at),
        ],
    )
