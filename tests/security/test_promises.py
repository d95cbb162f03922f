"""What was promised to a person holds: "it does not teach" is true of the sentence, the number, the trigger and the
snapshot alike; no version becomes the champion against its verdict without a person's reason, by whichever way; the
preflight counts every stage of a recipe.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import tiny_model
from made_run import evaluation_of
from server import environment, serving
from symbol_gguf import build_symbol_gguf, publish_symbol_version
from test_operations import house, last, served
from test_proposals import house as proposing_house
from typer.testing import CliRunner

from chat_app.cli import app
from chat_app.operations import Operations, Refused
from chat_app.serving.engine import NoRoom
from chat_app.serving.slot import ModelSlot
from chat_app.ui.admin import AdminPage
from feedback_store.durable import sha256_of
from feedback_store.erasure import Erasure
from feedback_store.errors import NotEnoughPreferences, StoreError
from feedback_store.gold import GoldPair
from feedback_store.mixing import Mix
from feedback_store.preferences import HELD_OUT, TRAIN
from feedback_store.records import Candidate, Message, Pair, Pick, PickChoice, new_id
from feedback_store.selection import select
from feedback_store.snapshots import freeze
from feedback_store.store import FeedbackStore
from trainer.cycle import Plan, plan_run
from trainer.errors import TrainerError
from trainer.preflight import Policy, Preflight, parts_of, preflight
from trainer.recipe import load_recipe
from trainer.runs import summary
from trainer.usage import together
from trainer.verdict import decide

NOW = datetime(2026, 11, 23, tzinfo=UTC)
RATERS = ("local", "ann", "ben", "cleo")


# --- a pick that teaches ---------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb") as opened:
        yield opened


def asked(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def answer(text: str, finish_reason: str = "stop") -> Candidate:
    return Candidate(new_id("cand"), "v0", text, finish_reason, {}, None, 1.0, NOW)


def a_pair(
    store: FeedbackStore, text: str, *, conversation: str | None = None, rater: str = "local", kind: str = "whole"
) -> Pair:
    """A pair that waits; `kind`: whole, cut, equal, empty or gold."""
    turn_id = None if conversation is None else store.record_turn(conversation, text).turn_id
    first, second = {
        "whole": (answer(f"{text}: one"), answer(f"{text}: another")),
        "cut": (answer(f"{text}: one"), answer(f"{text}: another", "length")),
        "equal": (answer(f"{text}: one"), answer(f"{text}: one\n")),
        "empty": (answer(f"{text}: one"), answer(" ")),
        "gold": (answer(""), answer("")),
    }[kind]
    if kind == "gold":
        pair = GoldPair(asked(text), f"{text}: right", f"{text}: wrong", "").as_pair(NOW, right_first=True)
    else:
        pair = Pair(new_id("pair"), asked(text), first, second, turn_id, rater, NOW)
    store.record_pair(pair)
    return pair


def snapshot_picks(store: FeedbackStore) -> set[str]:
    """The picks that a snapshot of now is made of, by the code that makes snapshots, with the standing of raters."""
    try:
        parts = select(
            store.training_rows(), None, Mix(), (), store.unpaired(), standing=store.standing(), redact=False
        ).parts
    except NotEnoughPreferences:  # nothing to train on: what is left are held-out rows
        rows = store.training_rows().to_pylist()
        quarantined = store.standing().quarantined
        return {row["pick_id"] for row in rows if row["pick_id"] and row["rater"] not in quarantined}
    return {row for part in (TRAIN, HELD_OUT) for row in parts[part]["pick_id"].to_pylist() if row}


def agreed(store: FeedbackStore, picks: list[Pick]) -> int:
    """The number that all tell of these picks, after making sure that all tell the same."""
    frozen = snapshot_picks(store)
    taught = {pick.pick_id for pick in picks if store.pick_preference(pick) is not None}
    assert taught == frozen
    assert store.picks_since(None) == len(frozen)
    counts = store.counts()
    assert counts.preferences["pick"] == len(frozen)
    assert store.statistics().counts == counts
    rows = {row["preference_id"] for row in store.training_rows().to_pylist() if row["pick_id"] in frozen}
    told = {found.preference_id for pick in picks if (found := store.pick_preference(pick)) is not None}
    assert told == rows
    return len(frozen)


def test_a_conversation_marked_later_lowers_the_counts_and_unmarking_raises_them(store: FeedbackStore) -> None:
    conversation = store.record_conversation("private").conversation_id
    picks = [
        store.record_pick(a_pair(store, f"private {n}", conversation=conversation).pair_id, PickChoice.FIRST)
        for n in range(3)
    ]
    picks.append(store.record_pick(a_pair(store, "public").pair_id, PickChoice.SECOND))
    assert agreed(store, picks) == 4
    store.record_learning("conversation", conversation, False, by="local")
    assert agreed(store, picks) == 1
    store.record_learning("conversation", conversation, True, by="local")
    assert agreed(store, picks) == 4


@pytest.mark.parametrize("kind", ["cut", "equal", "empty", "gold"])
def test_answers_that_cannot_teach_are_counted_nowhere(store: FeedbackStore, kind: str) -> None:
    picks = [store.record_pick(a_pair(store, kind, kind=kind).pair_id, PickChoice.FIRST)]
    assert agreed(store, picks) == 0


@pytest.mark.parametrize("who", ["rater", "asker", "quarantine", "erased"])
def test_a_person_who_must_not_teach_is_counted_nowhere(store: FeedbackStore, tmp_path: Path, who: str) -> None:
    pairs = [a_pair(store, f"question {n}", rater="ann") for n in range(4)]
    picks = [
        store.record_pick(pair.pair_id, PickChoice.FIRST, rater=rater)
        for pair, rater in zip(pairs, ("ben", "ben", "cleo", "cleo"), strict=True)
    ]
    assert agreed(store, picks) == 4
    if who == "rater":
        store.record_learning("rater", "ben", False, by="ben")
    elif who == "asker":
        store.record_learning("rater", "ann", False, by="ann")
    elif who == "quarantine":
        store.record_quarantine("ben", True, reason="picks the first", by="admin")
    else:
        erased: Erasure = store.erase("ben", tmp_path)
        assert erased.counts
        picks = picks[2:]
    assert agreed(store, picks) == (0 if who == "asker" else 2)
    if who == "quarantine":
        store.record_quarantine("ben", False, reason="a misunderstanding", by="admin")
        assert agreed(store, picks) == 4


def test_edits_and_imports_of_who_must_not_teach_are_not_counted_as_rows(store: FeedbackStore, tmp_path: Path) -> None:
    conversation = store.record_conversation("edited").conversation_id
    for n in range(2):
        turn = store.record_turn(conversation, f"edit {n}")
        kept = answer("as it was")
        store.record_candidate(kept, asked(f"edit {n}"), turn_id=turn.turn_id)
        store.record_edit(kept.candidate_id, f"better {n}", rater="ann")
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(
            f'{{"prompt": "import {n}", "chosen": "good {n}", "rejected": "bad {n}", "rater": "ben"}}\n'
            for n in range(3)
        )
    )
    assert store.record_import(str(path)).imported == 3

    def rows() -> tuple[int, int]:
        taken = [row["rater"] for row in store.training_rows().to_pylist()]
        taken = [rater for rater in taken if rater not in store.standing().quarantined]
        counts = store.counts()
        assert counts.train + counts.held_out == len(taken)
        assert sum(counts.preferences.values()) == len(taken)
        return counts.preferences["edit"], len(taken)

    edits, taken = rows()
    assert edits == 2
    named = {row["rater"] for row in store.training_rows().to_pylist()}
    store.record_learning("conversation", conversation, False, by="local")
    assert rows() == (0, taken - 2)
    store.record_learning("conversation", conversation, True, by="local")
    store.record_quarantine("ann", True, reason="odd", by="admin")
    assert rows() == (0, taken - 2)
    if "ben" in named:
        store.record_learning("rater", "ben", False, by="ben")
        assert rows() == (0, taken - 5)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_picked_marked_and_set_aside_every_number_says_the_same(store: FeedbackStore, seed: int) -> None:
    dice = random.Random(seed)
    conversations = [store.record_conversation(f"conversation {n}").conversation_id for n in range(3)]
    kinds = ["whole"] * 6 + ["cut", "equal", "gold"]
    pairs = [
        a_pair(
            store, f"question {seed} {number}", conversation=dice.choice([None, *conversations]),
            rater=dice.choice(RATERS), kind=dice.choice(kinds),
        )
        for number in range(14)
    ]  # fmt: skip
    # One rater a pair: two on the same answers may contradict each other, and that is the mix's matter.
    judge = {pair.pair_id: dice.choice(RATERS) for pair in pairs}
    picks: list[Pick] = []
    numbers = []
    marked: list[tuple[str, str]] = []

    def mark(what: str, whom: str, *, apart: bool) -> None:
        if what == "quarantine":
            store.record_quarantine(whom, apart, reason="a test", by="admin")
        else:
            store.record_learning(what, whom, not apart, by="local")

    for number in range(36):
        step = "pick" if number < 8 else dice.choice(["pick", "pick", "mark"])
        if step == "pick":
            pair_id = dice.choice(pairs).pair_id
            pick = dice.choice([PickChoice.FIRST, PickChoice.SECOND, PickChoice.FIRST, *PickChoice])
            picks.append(store.record_pick(pair_id, pick, rater=judge[pair_id]))
        elif marked and dice.random() < 0.6:
            mark(*marked.pop(dice.randrange(len(marked))), apart=False)
        else:
            what = dice.choice(["conversation", "rater", "quarantine"])
            whom = dice.choice(conversations if what == "conversation" else sorted({pick.rater for pick in picks}))
            if (what, whom) not in marked:
                mark(what, whom, apart=True)
                marked.append((what, whom))
        numbers.append(agreed(store, picks))
    assert len(set(numbers)) > 3, "the test moved nothing"
    assert any(later < earlier for earlier, later in pairwise(numbers)), "nothing was ever taken back"


def test_after_a_pick_the_page_says_that_it_does_not_teach_and_why(tmp_path: Path) -> None:
    with house(tmp_path, retrain_every=2) as (operations, store):

        async def pairs() -> list[Pair]:
            made = []
            turn = operations.begin_turn(None, "Private question")
            operations.data.record_learning("conversation", turn.conversation_id, False)
            for number in range(3):
                turn = operations.begin_turn(turn.conversation_id, f"Private question {number}")
                made.append((await last(operations.compare(turn))).pair)
            return made

        outcomes = [operations.record_pick(pair.pair_id, PickChoice.SECOND) for pair in served(operations, pairs)]
        for outcome in outcomes:
            assert (outcome.preference_id, outcome.new_preferences, outcome.run_started) == (None, 0, None)
            assert "this conversation is not learned from" in outcome.sentence
            assert "does not teach" in outcome.sentence
            assert not re.search(r"\d+ of \d+|collected", outcome.sentence), "no number that it moved nothing of"
        assert operations.runs() == [], "no retrain is due"
        status = operations.status()
        assert (status.new_preferences, status.counts.train + status.counts.held_out) == (0, 0)
        assert status.counts.picks == 3, "they are kept"
        answers = [turn.answer for turn in operations.turns(operations.conversations()[0].conversation_id)]
        kept = next(one for one in answers if one is not None)
        edited = operations.record_edit(kept.candidate_id, "A better one.")
        assert "does not teach" in operations.sentence_of(edited)
        rated = operations.record_rating(kept.candidate_id, "up")
        assert "does not teach" in operations.sentence_of(rated)
        assert [store.preferences(), store.unpaired(), list(operations.data.export_lines("trl"))] == [[], [], []]
        assert list(operations.data.export_lines("kto")) == []

        conversation_id = operations.conversations()[0].conversation_id
        operations.data.record_learning("conversation", conversation_id, True)
        assert operations.status().new_preferences == 3
        assert "your version teaches" in operations.sentence_of(edited)
        assert operations.sentence_of(rated).startswith("Thank you")


def test_over_http_a_rater_who_opted_out_or_is_set_aside_is_told_so_and_counts_nowhere(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted", retrain_every=50) as server:

        def picked(text: str) -> dict[str, Any]:
            pair = server.pair(text)
            found: dict[str, Any] = server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": "first"})
            return found

        first = picked("Question 1")
        assert (first["preference_id"] is not None, first["new_preferences"]) == (True, 1)
        server.post("/v1/learning", {"scope": "rater", "subject": "local", "learn": False})
        refused = picked("Question 2")
        assert (refused["preference_id"], refused["new_preferences"]) == (None, 0)
        assert "nothing of yours is learned from" in refused["message"]
        assert server.get("/v1/schedule")["new_preferences"] == 0
        assert server.get("/v1/statistics")["counts"]["train"] == 0
        server.post("/v1/learning", {"scope": "rater", "subject": "local", "learn": True})
        server.post("/v1/quarantine", {"rater": "local", "reason": "a test"})
        apart = picked("Question 3")
        assert (apart["preference_id"], apart["new_preferences"]) == (None, 0)
        assert "quarantine" in apart["message"]
        answer_id = server.chat("Question 4")["id"]
        edit = server.post("/v1/edits", {"candidate_id": answer_id, "text": "Better."})
        assert "does not teach" in edit["message"]
        server.post("/v1/quarantine", {"rater": "local", "lift": True})
        assert server.get("/v1/schedule")["new_preferences"] == 3


def test_a_choice_says_what_it_cannot_undo() -> None:
    from chat_app.pairs import sentence_after_choice, sentence_after_edit

    assert sentence_after_choice(teach=False, begun=False) == "Nothing of this conversation will teach."
    assert "keeps what it learned" in sentence_after_choice(teach=False, begun=True)
    assert "held out, so new versions are judged by it" in sentence_after_edit(None, judges=True)


# --- promotion against the evidence ----------------------------------------------------------------------------------


def published(data_dir: Path, number: int, wins: int, ties: int, losses: int, **more: Any) -> str:
    """v`number` with these counts and the verdict that follows; `more` goes into its evaluation.json."""
    version = publish_symbol_version(data_dir / "versions", number, "symbols", canaries=False)
    evaluation = {**evaluation_of(wins, ties, losses, version, "v0"), **more}
    manifest = data_dir / "versions" / version / "manifest.json"
    described = json.loads(manifest.read_text())
    described["evaluation"] = {**summary(evaluation), "champion": "v0"}
    described["verdict"] = decide(evaluation, "v0", version).as_dict()
    path = manifest.parent / "evaluation.json"
    path.write_text(json.dumps(evaluation))
    described["files"]["evaluation.json"] = sha256_of(path)
    manifest.write_text(json.dumps(described))
    return version


def rewrite(data_dir: Path, version: str, **changes: Any) -> None:
    """Change the manifest of a version."""
    manifest = data_dir / "versions" / version / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_symbol_gguf(tmp_path / "symbols.gguf")


def test_a_version_judged_worse_needs_a_reason_by_every_way(tmp_path: Path, base: Path) -> None:
    published(tmp_path, 1, 3, 8, 29)
    published(tmp_path, 2, 30, 0, 2)
    with serving(tmp_path, engine="scripted", model=base, baking="off") as server:

        def champion() -> str:
            found: str = server.get("/v1/versions")["champion"]
            return found

        for body in (None, {}, {"reason": "I like it"}, {"maintenance": True}, {"bake": False}, {"force": False},
                     {"by": "ann", "reason": "because"}):  # fmt: skip
            status, refusal = server.refused("/v1/versions/v1/promote", body)
            assert status == 409
            assert "3 wins, 29 losses, 8 ties on 40 held-out pairs" in refusal["error"]["message"]
            assert "force" in refusal["error"]["message"]
        for reason in ("", "   ", "\n\t", "\u200b\u200b", "…", "\u00a0"):
            assert server.refused("/v1/versions/v1/promote", {"force": True, "reason": reason})[0] == 422
        assert server.refused("/v1/versions/v1/promote", {"force": True})[0] == 422
        assert server.refused("/v1/rollback", {"force": True})[0] == 422
        assert "judged worse" in server.post("/v1/versions/v1/serve")["warning"]
        assert server.post("/v1/versions/v2/serve")["warning"] is None
        trial = server.post("/v1/trials", {"version": "v1", "share": 1})
        assert "judged worse" in trial["warning"]
        assert server.refused("/v1/versions/v1/promote")[0] == 409, "a trial makes no champion"
        server.post(f"/v1/trials/{trial['trial_id']}/stop")
        assert (champion(), server.get("/v1/versions")["history"]) == ("v0", [])

        server.post("/v1/versions/v1/promote", {"force": True, "reason": "A demonstration for the board."})
        newest = server.get("/v1/versions")["history"][0]
        assert (newest["version"], newest["kind"], newest["forced"]) == ("v1", "promote", True)
        assert newest["reason"] == "A demonstration for the board."
        assert "3 wins, 29 losses" in newest["note"]

        server.post("/v1/versions/v2/promote", {})
        assert server.get("/v1/versions")["history"][0]["note"] is None, "nothing speaks against it"
        status, refusal = server.refused("/v1/rollback")
        assert (status, champion()) == (409, "v2")
        assert "3 wins, 29 losses" in refusal["error"]["message"]
        assert server.refused("/v1/rollback", {"maintenance": True})[0] == 409
        server.post("/v1/rollback", {"force": True, "reason": "Once more."})
        newest = server.get("/v1/versions")["history"][0]
        assert (newest["kind"], newest["forced"], newest["reason"]) == (
            "rollback",
            True,
            "rolled back from v2: Once more.",
        )
        server.post("/v1/rollback")
        assert champion() == "v0", "the base needs no reason"


@pytest.mark.parametrize("with_server", [True, False])
def test_the_command_line_asks_for_force_and_a_reason_too(tmp_path: Path, base: Path, with_server: bool) -> None:
    published(tmp_path, 1, 3, 0, 29)
    given: dict[str, object] = {"engine": "scripted", "model": base}

    def zloop(*words: str) -> tuple[int, str]:
        ran = CliRunner().invoke(app, list(words), env=environment(tmp_path, **given))
        return ran.exit_code, ran.output + ran.stderr

    with serving(tmp_path, **given) if with_server else nullcontext():  # type: ignore[arg-type]
        for words in (("promote", "v1"), ("promote", "v1", "--reason", "why not"), ("promote", "v1", "--maintenance")):
            code, said = zloop(*words)
            assert code == 1
            assert "3 wins, 29 losses on 32 held-out pairs" in said
            assert 'zloop promote v1 --force --reason "…"' in said
        code, said = zloop("promote", "v1", "--force")
        assert (code, "needs a reason" in said) == (1, True)
        assert zloop("promote", "v1", "--force", "--reason", " ")[0] == 1
        assert zloop("promote", "v1", "--force", "--reason", "To see what people say")[0] == 0
        code, said = zloop("versions")
        assert code == 0
        assert "(promote, forced, by local): To see what people say" in said
        assert "3 wins, 29 losses" in said


def test_not_enough_evidence_needs_no_force_and_the_history_says_so(tmp_path: Path, base: Path) -> None:
    published(tmp_path, 1, 5, 0, 2)
    with serving(tmp_path, engine="scripted", model=base) as server:
        assert server.post("/v1/versions/v1/promote", {"reason": "try it"})["champion"] == "v1"
        newest = server.get("/v1/versions")["history"][0]
        assert (newest["forced"], newest["reason"]) == (False, "try it")
        assert newest["note"] == "The evidence was not enough: 5 wins, 2 losses on 7 held-out pairs."
        assert server.post("/v1/rollback")["champion"] == "v0"


DOUBT = [
    {"rater": "ann", "pairs": 20, "share": 0.7, "wins": 20, "losses": 0, "wins_without": 1, "losses_without": 5},
    {"rater": "ben", "pairs": 8, "share": 0.3, "wins": 1, "losses": 5, "wins_without": 20, "losses_without": 0},
]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("reject", "v1 was judged worse: 3 wins, 29 losses"),
        ("a guard", "it forgot how to write"),
        ("a doubt", "70% of the pairs are one person's"),
        ("no verdict", "missing or damaged"),
        ("an unknown verdict", "missing or damaged"),
        ("no evaluation", "missing or damaged"),
        ("a broken number", "missing or damaged"),
        ("other numbers", "missing or damaged"),
        ("a better verdict than its numbers", "v1 was judged worse"),
        ("no evaluation.json", "missing or damaged"),
        ("a broken evaluation.json", "missing or damaged"),
        ("taken back", "v1 answered once and was taken back"),
        ("a lost trial", "v1 was found worse in a live trial"),
    ],
)
def test_all_that_speaks_against_a_version(tmp_path: Path, base: Path, what: str, says: str) -> None:
    prose = {"champion_nats": 3.0, "candidate_nats": 4.0}
    more: dict[str, dict[str, Any]] = {"a guard": {"prose": prose}, "a doubt": {"raters": DOUBT}}
    worse = what in ("reject", "a better verdict than its numbers")
    published(tmp_path, 1, *((3, 0, 29) if worse else (30, 0, 2)), **more.get(what, {}))
    evaluation = tmp_path / "versions" / "v1" / "evaluation.json"
    files = json.loads((evaluation.parent / "manifest.json").read_text())["files"]
    counted = {"champion": "v0", "wins": 30, "ties": 0, "losses": 2, "pairs": 32}
    changes: dict[str, dict[str, Any]] = {
        "no verdict": {"verdict": {}},
        "an unknown verdict": {"verdict": {"decision": "certainly", "reasons": []}},
        "no evaluation": {"evaluation": {}},
        "a broken number": {"evaluation": {**counted, "wins": "30"}},
        "other numbers": {"evaluation": {**counted, "wins": 31}},
        "a better verdict than its numbers": {"verdict": {"decision": "promote", "reasons": ["made up"]}},
        "no evaluation.json": {"files": {name: sha for name, sha in files.items() if name != evaluation.name}},
    }
    rewrite(tmp_path, "v1", **changes.get(what, {}))
    if what == "no evaluation.json":
        evaluation.unlink()
    if what == "a broken evaluation.json":
        evaluation.write_text("{")
        rewrite(tmp_path, "v1", files={**files, evaluation.name: sha256_of(evaluation)})
    with proposing_house(tmp_path, "manual", model=base) as (operations, store):
        if what == "taken back":
            store.record_promotion("v1", kind="promote", reason="", by="local")
            store.record_promotion("v0", kind="auto-rollback", reason="9 of 23 answers failed.", by="baking")
        if what == "a lost trial":
            trial = store.record_trial("v1", share=1.0, rules={}, by="local")
            store.record_trial_end(trial.trial_id, "worse", reason="2 wins, 20 losses.", evidence={}, by="local")
            later = store.record_trial("v1", share=1.0, rules={}, by="local")
            store.record_trial_end(later.trial_id, "stopped", reason="Stopped.", evidence={}, by="local")
        before = len(store.load_promotions())

        async def promote() -> None:
            with pytest.raises(Refused) as refused:
                await operations.promote("v1", reason="I want it")
            assert says in str(refused.value)
            assert (store.champion(), len(store.load_promotions())) == ("v0", before)
            row = next(row for row in operations.version_rows() if row["version"] == "v1")
            assert row["summary"], "the list of versions still shows it"
            assert await operations.promote("v1", reason="I want it", force=True) == ("v1", "v0")
            newest = operations.history()[0]
            assert (newest["forced"], newest["reason"]) == (True, "I want it")
            assert says in newest["note"]

        served(operations, promote)


@pytest.mark.parametrize("policy", ["auto", "propose"])
def test_the_policy_forces_nothing_even_after_a_won_trial(tmp_path: Path, base: Path, policy: str) -> None:
    published(tmp_path, 1, 3, 0, 29)
    with proposing_house(tmp_path, policy, model=base) as (operations, store):
        trial = store.record_trial("v1", share=1.0, rules={}, by="local")
        store.record_trial_end(trial.trial_id, "better", reason="20 wins of 22.", evidence={}, by="local")

        async def look() -> None:
            await operations.proposals.look()
            (proposal,) = operations.proposals.open()
            assert proposal.version == "v1"
            assert "3 wins, 29 losses" in proposal.reason
            assert store.champion() == "v0"
            page = admin_page(operations)
            opened = await page.promote_proposed("v1")
            assert opened[page.force.box].visible is True
            assert store.champion() == "v0"

        served(operations, look)


def admin_page(operations: Operations) -> AdminPage:
    with gr.Blocks(analytics_enabled=False) as blocks:
        return AdminPage(operations, blocks, (Refused, TrainerError, StoreError))


def test_the_page_opens_a_second_step_with_the_verdict_and_keeps_the_reason(tmp_path: Path, base: Path) -> None:
    published(tmp_path, 1, 3, 0, 29)
    published(tmp_path, 2, 30, 0, 2)
    with proposing_house(tmp_path, "manual", model=base, baking="off") as (operations, store):

        async def click() -> None:
            page = admin_page(operations)
            opened = await page.promote_version("v1")
            assert opened[page.force.box].visible is True
            assert "3 wins, 29 losses" in opened[page.force.said]
            assert store.champion() == "v0"
            asked = opened[page.force.asked]
            for blank in ("", "  ", "\u200b"):
                assert await page.go_against(asked, blank) != {}
                assert store.champion() == "v0"
            assert page.leave_it()[page.force.box].visible is False
            done = await page.go_against(asked, "For the demonstration")
            assert done[page.force.box].visible is False
            assert (store.champion(), operations.history()[0]["reason"]) == ("v1", "For the demonstration")
            shown = done[page.history]
            assert "forced" in shown
            assert "3 wins, 29 losses" in shown

            await page.promote_version("v2")
            back = await page.roll_back()
            assert back[page.force.box].visible is True
            assert store.champion() == "v2"
            await page.go_against(back[page.force.asked], "Back to it")
            assert store.champion() == "v1"
            await page.roll_back()
            assert store.champion() == "v0"
            # What there was no room for is repeated with all that was asked: without force it is refused again.
            assert (await page.swap_in_turn(("v1", "", "no", False)))[page.force.box].visible is True
            assert store.champion() == "v0"
            await page.swap_in_turn(("v1", "", "once more", True))
            assert operations.history()[0]["reason"] == "once more"

        served(operations, click)


def test_without_room_for_two_force_and_reason_are_carried_along(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(tmp_path, 1, 3, 0, 29)
    with proposing_house(tmp_path, "manual", model=base) as (operations, store):

        async def click() -> None:
            page = admin_page(operations)
            swap, slot = ModelSlot.swap, operations.answers.slot

            async def no_room(self: ModelSlot, served_version: Any, commit: Any, *, maintenance: bool) -> None:
                if not maintenance:
                    raise NoRoom("two models need 2 GB")
                await swap(self, served_version, commit, maintenance=maintenance)

            monkeypatch.setattr(ModelSlot, "swap", no_room)
            assert slot.is_ready
            offered = await page.go_against(("v1", ""), "It must be seen")
            assert offered[page.maintenance].visible is True
            assert store.champion() == "v0"
            await page.swap_in_turn(offered[page.without_room])
            assert (store.champion(), operations.history()[0]["reason"]) == ("v1", "It must be seen")
            assert operations.history()[0]["forced"] is True

        served(operations, click)


def test_going_back_by_itself_is_free_and_says_what_it_went_back_to(tmp_path: Path, base: Path) -> None:
    published(tmp_path, 1, 3, 0, 29)
    published(tmp_path, 2, 30, 0, 2)
    with proposing_house(tmp_path, "manual", model=base) as (operations, store):

        async def back() -> None:
            await operations.promote("v1", force=True, reason="a demonstration")
            await operations.promote("v2")
            assert await operations._take_back("v2", "9 of 23 answers failed.")
            newest = operations.history()[0]
            assert (store.champion(), newest["kind"], newest["forced"]) == ("v1", "auto-rollback", False)
            assert "3 wins, 29 losses" in newest["note"]

        served(operations, back)


def test_roll_back_undoes_a_practice_by_one_press(tmp_path: Path, base: Path) -> None:
    published(tmp_path, 1, 30, 0, 2)
    rewrite(tmp_path, "v1", practice="shorter")
    with proposing_house(tmp_path, "manual", model=base) as (operations, store):

        async def there_and_back() -> None:
            await operations.promote("v1")
            await operations.rollback()
            assert (store.champion(), operations.served_versions()[0]) == ("v0", "v0")

        served(operations, there_and_back)


# --- the preflight counts every stage --------------------------------------------------------------------------------


def checked(recipe: str, tmp_path: Path, *, max_steps: int | None = None, **changes: Any) -> tuple[Plan, Preflight]:
    chosen = replace(load_recipe(recipe), **changes)
    learns = tiny_model.made_up_preferences(60)
    plan = Plan(chosen, max_steps, 1, 0, None, "cpu", "local")
    snapshot = freeze(learns, tmp_path / "snapshots", None)
    found = preflight(
        plan, parts_of(snapshot), tiny_model.shared_tiny(), tmp_path / "models", runs=[], room=None,
        policy=Policy.AUTO, is_serving=False, cores=2,
    )  # fmt: skip
    assert plan_run(plan, snapshot, tiny_model.shared_tiny(), tmp_path).as_body()["total_steps"] == (
        chosen.planned_steps(snapshot.train_rows, max_steps)
    )
    return plan, found


@pytest.mark.parametrize("max_steps", [None, 3])
@pytest.mark.parametrize("changes", [{}, {"sft_epochs": 3}, {"epochs": 2}, {"batch_size": 16}])
def test_both_stages_are_counted(tmp_path: Path, max_steps: int | None, changes: dict[str, int]) -> None:
    plan, both = checked("sft-then-dpo", tmp_path, max_steps=max_steps, **changes)
    first, second = plan.recipe.stages()
    rows = freeze(tiny_model.made_up_preferences(60), tmp_path / "snapshots", None).train_rows
    assert both.work is not None
    assert both.estimate is not None
    assert both.as_dict()["steps"] == plan.recipe.planned_steps(rows, max_steps)
    assert both.as_dict()["steps"] == first.total_steps(rows, max_steps) + second.total_steps(rows, max_steps)
    same = {key: value for key, value in changes.items() if key != "sft_epochs"}
    _, imitating = checked("sft", tmp_path, max_steps=max_steps, **{**same, "epochs": first.epochs})
    _, preferring = checked(
        "dpo-lora", tmp_path, max_steps=max_steps, **{**same, "micro_batch_size": 1, "epochs": second.epochs}
    )
    assert imitating.work is not None
    assert preferring.work is not None
    assert both.work.pairs == imitating.work.pairs + preferring.work.pairs
    assert both.work.tokens == imitating.work.tokens + preferring.work.tokens
    assert imitating.estimate is not None
    assert preferring.estimate is not None
    assert both.estimate.training_s == pytest.approx(
        imitating.estimate.training_s + preferring.estimate.training_s, abs=0.01
    )
    assert both.estimate.loading_s == pytest.approx(
        imitating.estimate.loading_s + preferring.estimate.loading_s, abs=0.2
    )
    assert both.estimate.memory_bytes >= max(imitating.estimate.memory_bytes, preferring.estimate.memory_bytes)
    assert both.estimate.evaluation_s == pytest.approx(preferring.estimate.evaluation_s), "judged once"


@pytest.mark.parametrize("recipe", ["dpo-lora", "sft", "dpo-full", "practice"])
def test_every_recipe_counts_the_steps_it_plans(tmp_path: Path, recipe: str) -> None:
    plan, found = checked(recipe, tmp_path)
    rows = freeze(tiny_model.made_up_preferences(60), tmp_path / "snapshots", None).train_rows
    assert found.as_dict()["steps"] == plan.recipe.planned_steps(rows)


def test_what_the_other_recipes_left_out_is_counted_or_said(tmp_path: Path) -> None:
    _, preferring = checked("dpo-lora", tmp_path)
    _, imitating = checked("sft", tmp_path)
    assert preferring.work is not None
    assert imitating.work is not None
    assert imitating.work.tokens < preferring.work.tokens, "only the chosen answer is read"
    assert imitating.work.held_out_tokens == preferring.work.held_out_tokens, "but judged on whole pairs"
    _, often = checked("dpo-lora", tmp_path, eval_every_steps=1)
    assert often.estimate is not None
    assert preferring.estimate is not None
    assert often.estimate.training_s > preferring.estimate.training_s, "validation takes time"
    plan = Plan(load_recipe("sft"), None, 1, 0, None, "cpu", "local", dialogues={"files": {"a.jsonl": ""}})
    snapshot = freeze(tiny_model.made_up_preferences(60), tmp_path / "snapshots", None)
    found = preflight(
        plan, parts_of(snapshot), tiny_model.shared_tiny(), tmp_path / "models", runs=[], room=None,
        policy=Policy.AUTO, is_serving=False, cores=2,
    )  # fmt: skip
    assert "dialogues in files come on top" in found.sentence


def test_what_lies_between_two_stages_is_loading() -> None:
    def stage(began: float, ended: float, loading_s: float) -> dict[str, Any]:
        return {
            "peak_memory_bytes": 1, "peak_device_memory_bytes": None, "loading_s": loading_s, "training_s": 5.0,
            "training_began": began, "ended": ended,
        }  # fmt: skip

    assert together([stage(10, 15, 10), stage(27, 32, 27)])["loading_s"] == 22
    assert together([stage(10, 15, 10), stage(5000, 5005, 20)])["loading_s"] == 30, "a day between is no loading"
