"""Gold pairs, quarantine and the list of raters on the real store, trainer and API, with the scripted engine."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from server import environment
from symbol_gguf import publish_symbol_version
from typer.testing import CliRunner

from chat_app.__main__ import open_store
from chat_app.api import create_api
from chat_app.cli import app
from chat_app.operations import Operations
from chat_app.serving.scripted_engine import build_scripted_engine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from chat_app.ui.rate import RatePage
from chat_app.ui.raters import raters_shown
from feedback_store.errors import BadGoldPairs, Conflict, NotFound
from feedback_store.gold import FILE, load_gold
from feedback_store.mixing import Mix
from feedback_store.preferences import TRAIN, split_of
from feedback_store.records import GOLD, Candidate, Message, Pair, PickChoice, new_id
from feedback_store.snapshots import freeze, load_preferences, load_snapshot, verify
from feedback_store.store import FeedbackStore
from trainer import schedule
from trainer.sequential import Rules

FIRST, SECOND = PickChoice.FIRST, PickChoice.SECOND
_TICKS = count()


def clock() -> datetime:
    return datetime(2026, 11, 23, tzinfo=UTC) + timedelta(seconds=next(_TICKS))


def ask(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def trained_prompts(number: int) -> list[str]:
    """Prompts of the train part."""
    found = (text for n in count() if split_of(ask(text := f"What is number {n}?")) == TRAIN)
    return list(islice(found, number))


def answer(text: str, version: str = "v0") -> Candidate:
    return Candidate(new_id("cand"), version, text, "stop", {}, 1, 5.0, clock())


def pair_of(store: FeedbackStore, prompt: str, rater: str = "local", versions: tuple[str, str] = ("v0", "v0")) -> Pair:
    """A pair whose better answer, by the convention of these tests, is the first one."""
    good, bad = (answer(f"{word} {prompt}", version) for word, version in zip(("good", "bad"), versions, strict=True))
    pair = Pair(new_id("pair"), ask(prompt), good, bad, None, rater, clock())
    store.record_pair(pair)
    return pair


def write_gold(data_dir: Path, number: int) -> None:
    data_dir.mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": f"Gold {n}?", "chosen": f"right {n}", "rejected": f"wrong {n}"} for n in range(number)]
    (data_dir / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path / "store.duckdb", clock) as opened:
        yield opened


@contextmanager
def house(data_dir: Path, **settings: object) -> Iterator[tuple[Operations, FeedbackStore]]:
    """The operations; the trainer's thread is not started, so a run stays queued."""
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    chosen = load_settings({"ZLOOP_DATA_DIR": str(data_dir), "ZLOOP_ENGINE": "scripted", **values})
    with open_store(chosen) as store:
        slot = ModelSlot(partial(build_scripted_engine, delay_s=0.0))
        yield Operations(chosen, store, TrainerRoom(chosen, store), slot, schedule.is_due), store


def crowd(store: FeedbackStore, prompts: int = 30) -> None:
    """Four honest raters, one who always says the opposite and one who takes the first place, on the same pairs."""
    for number, prompt in enumerate(trained_prompts(prompts)):
        one, other = answer(f"good {prompt}"), answer(f"bad {prompt}")
        shown = (one, other) if number % 2 else (other, one)
        pair = Pair(new_id("pair"), ask(prompt), *shown, None, "asker", clock())
        store.record_pair(pair)
        right = FIRST if number % 2 else SECOND
        for rater in ("ann", "bob", "cid", "dan"):
            store.record_pick(pair.pair_id, right, rater=rater)
        store.record_pick(pair.pair_id, SECOND if right is FIRST else FIRST, rater="eve")
        store.record_pick(pair.pair_id, FIRST, rater="hurried")


# Gold pairs


def test_a_gold_pair_looks_like_any_other_and_teaches_nothing(tmp_path: Path) -> None:
    write_gold(tmp_path, 3)
    with house(tmp_path) as (operations, store):
        seen = []
        while (pair := operations.raters.next_pair()) is not None:
            seen.append(pair.prompt[-1]["content"])
            right = FIRST if pair.first.text.startswith("right") else SECOND
            outcome = operations.record_pick(pair.pair_id, right if len(seen) < 3 else PickChoice.TIE)
            assert outcome.sentence == "Saved, thank you."
            assert outcome.preference_id is None
        assert sorted(seen) == ["Gold 0?", "Gold 1?", "Gold 2?"]  # each once
        assert store.standing().gold[store.person_id("local")] == (2, 2)  # the tie decided nothing
        assert store.training_rows().num_rows == 0
        assert store.unpaired() == []
        assert store.votes() == []
        assert store.comparisons() == []
        assert store.picks_since(None) == 0
        by_prompt = {row["prompt"]: (row["right"], row["answered"]) for row in operations.raters.gold()["pairs"]}
        assert sorted(by_prompt.values()) == [(0, 0), (1, 1), (1, 1)]


def test_gold_pairs_called_both_bad_are_no_labelled_answers(tmp_path: Path, store: FeedbackStore) -> None:
    write_gold(tmp_path, 1)
    (gold,) = load_gold(tmp_path / FILE)
    pair = gold.as_pair(clock(), right_first=True)
    store.record_pair(pair)
    store.record_pick(pair.pair_id, PickChoice.BOTH_BAD, rater="ann")
    store.record_rating(pair.first.candidate_id, "up", rater="ann")
    store.record_edit(pair.first.candidate_id, "better", rater="ann")
    assert store.unpaired() == []
    assert store.training_rows().num_rows == 0


def test_pairs_of_others_come_before_open_ones_and_gold_is_mixed_in(tmp_path: Path) -> None:
    write_gold(tmp_path, 30)
    with house(tmp_path, gold_share=0.5) as (operations, store):
        others = [pair_of(store, f"Prompt {number}", rater="ann") for number in range(8)]
        for pair in others[:5]:
            store.record_pick(pair.pair_id, FIRST, rater="ann")
        assert [one.pair_id for one in store.load_pairs_to_rate("local")][:5] == [one.pair_id for one in others[4::-1]]
        assert others[0].pair_id not in [one.pair_id for one in store.load_pairs_to_rate("ann")]
        golds = sum(one.rater == GOLD for one in (operations.raters.next_pair() for _ in range(30)) if one is not None)
        assert 3 < golds < 27


def test_what_may_not_be_learned_from_is_not_shown_to_others(store: FeedbackStore) -> None:
    pair_of(store, "private", rater="ann")
    store.record_learning("rater", "ann", False, by="ann")
    assert store.load_pairs_to_rate("bob") == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', r"line 2 is no gold pair \(identical\)"),
        ('{"prompt": "a", "chosen": "b"}', r"line 2 is no gold pair \(empty\)"),
        ("[]", "line 2 is no gold pair"),
    ],
)
def test_a_bad_line_of_the_gold_file_is_named(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / FILE).write_text(f'{{"prompt": "q", "chosen": "a", "rejected": "b", "note": "why"}}\n{line}\n\n')
    with pytest.raises(BadGoldPairs, match=why):
        load_gold(tmp_path / FILE)


# Quarantine


def test_quarantine_keeps_the_words_and_teaches_nothing_of_them(tmp_path: Path, store: FeedbackStore) -> None:
    for prompt in trained_prompts(4):
        pair = pair_of(store, prompt)
        store.record_pick(pair.pair_id, FIRST, rater="ann")
        store.record_pick(pair.pair_id, SECOND, rater="eve")
    assert store.picks_since(None) == 8
    store.record_quarantine("eve", True, reason="says the opposite", by="local")
    assert store.picks_since(None) == 4
    (found,) = store.quarantines()
    assert (found.rater, found.reason, found.by) == ("eve", "says the opposite", "local")
    frozen = freeze(store.training_rows(), tmp_path / "snapshots", None, Mix(), standing=store.standing())
    # With eve's words every pair would be contradicted on both sides.
    assert {row.rater for row in load_preferences(frozen.train_path)} == {"ann"}
    assert frozen.left_out == {"quarantined": 4}
    manifest = json.loads((frozen.directory / "manifest.json").read_text())
    assert manifest["raters_left_out"] == {"quarantined": {"eve": 4}}
    assert store.counts().picks == 8
    store.record_quarantine("eve", False, reason="", by="local")
    assert store.quarantines() == []
    assert store.picks_since(None) == 8


def test_quarantine_is_refused_where_it_changes_nothing(store: FeedbackStore) -> None:
    store.record_pick(pair_of(store, "x").pair_id, FIRST, rater="eve")
    with pytest.raises(NotFound, match="'nobody'"):
        store.record_quarantine("nobody", True, reason="", by="local")
    with pytest.raises(Conflict, match="not in quarantine"):
        store.record_quarantine("eve", False, reason="", by="local")
    store.record_quarantine("eve", True, reason="", by="local")
    with pytest.raises(Conflict, match="already"):
        store.record_quarantine("eve", True, reason="", by="local")


def test_thumbs_and_both_bad_of_a_rater_in_quarantine_stay_out_too(tmp_path: Path, store: FeedbackStore) -> None:
    for number, prompt in enumerate(trained_prompts(6)):
        pair = pair_of(store, prompt)
        store.record_rating(pair.first.candidate_id, "up", rater="eve" if number % 2 else "ann")
    store.record_quarantine("eve", True, reason="", by="local")
    frozen = freeze(
        store.training_rows(), tmp_path / "snapshots", None, Mix(learns_from="ratings"), ratings=store.unpaired(),
        standing=store.standing(),
    )  # fmt: skip
    assert frozen.rated_rows == 3
    assert frozen.left_out == {"quarantined": 3}


def test_votes_cast_in_quarantine_stand_apart_and_earlier_ones_stay(store: FeedbackStore) -> None:
    trial = store.record_trial("v1", share=1.0, rules={}, by="local")
    for number, state in enumerate((None, True, False)):
        if state is not None:
            store.record_quarantine("eve", state, reason="", by="local")
        for rater in ("eve", "ann"):
            pair = pair_of(store, f"{number} {rater}", versions=("v1", "v0"))
            store.record_pick(pair.pair_id, FIRST, rater=rater)
    votes = store.trial_votes(trial.trial_id)
    assert [(vote.rater, vote.is_apart) for vote in votes] == [
        ("eve", False), ("ann", False), ("eve", True), ("ann", False), ("eve", False), ("ann", False),
    ]  # fmt: skip
    assert store.comparisons()[0].first == 6
    store.record_quarantine("eve", True, reason="", by="local")
    assert store.comparisons()[0].first == 3  # strengths leave out whoever is in quarantine now
    assert store.trial_votes(trial.trial_id) == votes


def test_a_trial_counts_votes_of_quarantine_apart(tmp_path: Path) -> None:
    publish_symbol_version(tmp_path / "versions", 1, "symbols")
    with house(tmp_path) as (operations, store):
        trial = store.record_trial("v1", share=1.0, rules=asdict(Rules()), by="local")
        for prompt, rater in (("before", "ann"), ("during", "ann"), ("other", "eve")):
            if prompt == "during":
                store.record_quarantine("ann", True, reason="", by="local")
            store.record_pick(pair_of(store, prompt, versions=("v1", "v0")).pair_id, FIRST, rater=rater)
        evidence = operations.trials._evidence(trial)
        assert evidence["votes"] == {"wins": 2, "ties": 0, "losses": 0}
        assert evidence["by_quarantined"] == {"wins": 1, "ties": 0, "losses": 0}


def test_erasing_a_rater_leaves_no_trace_of_the_quarantine(tmp_path: Path, store: FeedbackStore) -> None:
    data_dir = tmp_path
    for prompt in trained_prompts(3):
        store.record_pick(pair_of(store, prompt).pair_id, FIRST, rater="ann")
        store.record_pick(pair_of(store, f"{prompt} again").pair_id, SECOND, rater="eve.x1")
    store.record_quarantine("eve.x1", True, reason="eve.x1 turns everything round", by="ann")
    store.record_quarantine("ann", True, reason="as eve.x1 does", by="eve.x1")
    store.record_quarantine("ann", False, reason="", by="ann")
    mix = Mix(without=("eve.x1",))
    frozen = freeze(store.training_rows(), data_dir / "snapshots", None, mix)  # holds ann's rows, names eve.x1
    assert "eve.x1" in (frozen.directory / "manifest.json").read_text()
    backup = store.back_up("before", 30).path
    store.erase("eve.x1", data_dir)
    assert store.quarantines() == []
    rows = store.query('SELECT rater, reason, "by" FROM quarantines ORDER BY event', limit_s=5).rows
    assert [row[0] for row in rows] == ["ann", "ann"]
    assert "eve" not in json.dumps(rows)
    assert "eve.x1" not in (frozen.directory / "manifest.json").read_text()
    verify(load_snapshot(frozen.directory))
    for path in (backup, data_dir / "store.duckdb"):
        assert b"eve.x1" not in path.read_bytes()


def test_erasing_who_answered_gold_pairs_leaves_the_gold_pairs(tmp_path: Path, store: FeedbackStore) -> None:
    write_gold(tmp_path, 2)
    before = (tmp_path / FILE).read_text()
    for gold in load_gold(tmp_path / FILE):
        pair = gold.as_pair(clock(), right_first=True)
        store.record_pair(pair)
        store.record_pick(pair.pair_id, FIRST, rater="eve.x1", comment="because")
    store.erase("eve.x1", tmp_path)
    assert store.standing().gold == {}
    assert (tmp_path / FILE).read_text() == before


# Weights and retraining without


def test_weights_by_agreement_are_in_rows_and_manifest_and_the_same_every_time(
    tmp_path: Path, store: FeedbackStore
) -> None:
    crowd(store)
    for number, prompt in enumerate(trained_prompts(60)[30:]):
        store.record_pick(pair_of(store, prompt).pair_id, FIRST, rater="eve" if number % 2 else "ann")
    mix = Mix(rater_weights="agreement")
    frozen = freeze(store.training_rows(), tmp_path / "one", None, mix, standing=store.standing())
    rows = load_preferences(frozen.train_path)
    weights = json.loads((frozen.directory / "manifest.json").read_text())["rater_weights"]
    assert weights["eve"]["weight"] == 0
    assert weights["eve"]["is_inverted"]
    assert weights["ann"] == {
        "accuracy": weights["ann"]["accuracy"], "weight": 1.0, "shared": 30, "gold_right": 0, "gold_answered": 0,
        "is_inverted": False,
    }  # fmt: skip
    assert "eve" not in {row.rater for row in rows}
    assert frozen.left_out["rater_weight"] == 45  # not only where others contradict her
    assert {row.weight for row in rows if row.rater == "hurried"} == {weights["hurried"]["weight"]}
    assert 0 < weights["hurried"]["weight"] < 0.5
    again = freeze(store.training_rows().slice(0), tmp_path / "two", None, mix, standing=store.standing())
    for name in ("train.parquet", "held_out.parquet", "manifest.json"):
        assert (frozen.directory / name).read_bytes() == (again.directory / name).read_bytes()
    plain = freeze(store.training_rows(), tmp_path / "three", None, Mix(), standing=store.standing())
    assert plain.hash != frozen.hash
    assert {row.weight for row in load_preferences(plain.train_path)} == {1.0}


def test_a_run_without_a_rater_says_so_in_config_and_manifest(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        crowd(store, 12)
        with pytest.raises(NotFound, match="'mallory'"):
            operations.start_run(without=["mallory"])
        run = operations.start_run(recipe="dpo-lora", without=["eve", "hurried"])
        body = run.as_body()
        assert body["without"] == ["eve", "hurried"]
        frozen = load_snapshot(tmp_path / "snapshots" / body["snapshot"])
        assert frozen.left_out["without"] == 24
        assert {row.rater for row in load_preferences(frozen.train_path)} == {"ann", "bob", "cid", "dan"}
        manifest = json.loads((frozen.directory / "manifest.json").read_text())
        assert manifest["mix"]["without"] == ["eve", "hurried"]
        assert manifest["raters_left_out"] == {"without": {"eve": 12, "hurried": 12}}


# The list


def test_the_list_names_who_is_suspicious_and_does_nothing(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        crowd(store)
        found = operations.raters.raters()
        by_rater = {row["rater"]: row for row in found["raters"]}
        assert found["raters"][0]["rater"] in ("eve", "hurried")
        assert any("30 of 30 pairs" in sentence for sentence in by_rater["eve"]["suspicions"])
        assert any("30 of 30 picks took the first" in sentence for sentence in by_rater["hurried"]["suspicions"])
        assert by_rater["ann"]["suspicions"] == []
        assert by_rater["ann"]["agreement"]["count"] == by_rater["ann"]["agreement"]["of"] == 30
        assert by_rater["eve"]["weight"] == 0
        assert (
            "suspicious: eve, hurried; in quarantine: nobody" in found["sentence"]
            or "hurried, eve" in found["sentence"]
        )
        assert store.quarantines() == []
        shown = raters_shown(found)
        assert "30 of 30 picks took the first" in shown
        assert sum(row["next_share"] for row in found["raters"]) == pytest.approx(1)


def test_speed_is_timed_on_pairs_made_for_the_rater(store: FeedbackStore) -> None:
    for number in range(6):
        pair = pair_of(store, f"mine {number}", rater="ann")  # the clock ticks once a question
        store.record_pick(pair.pair_id, FIRST, rater="ann")
        store.record_pick(pair.pair_id, SECOND, rater="bob")
    tallies = store.rater_tallies()
    assert (tallies["ann"].timed, tallies["ann"].median_s, tallies["ann"].fast) == (6, 1.0, 6)
    assert (tallies["bob"].timed, tallies["bob"].median_s, tallies["bob"].second) == (0, None, 6)


# HTTP, commands, page


def over_http(operations: Operations, *calls: tuple[str, str, Mapping[str, Any] | None]) -> list[tuple[int, Any]]:
    async def all_of_them() -> list[tuple[int, Any]]:
        transport = httpx.ASGITransport(app=create_api(operations, {}))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            answers = [await http.request(method, path, json=body) for method, path, body in calls]
            return [(one.status_code, one.json()) for one in answers]

    return asyncio.run(all_of_them())


def test_rating_over_http_reveals_nothing(tmp_path: Path) -> None:
    write_gold(tmp_path, 1)
    with house(tmp_path, gold_share=0) as (operations, store):
        pair = pair_of(store, "Prompt", rater="ann")
        bodies = []
        for _ in range(2):
            ((_, shown),) = over_http(operations, ("POST", "/v1/rate", {}))
            pick = {"pair_id": shown["pair_id"], "pick": "first", "reveal": False}
            ((_, kept),) = over_http(operations, ("POST", "/v1/picks", pick))
            bodies.append((set(shown), [set(one) for one in shown["candidates"]], {**kept, "pick_id": None}))
        assert bodies[0] == bodies[1]  # one of them is gold
        assert store.standing().gold[store.person_id("local")].answered == 1
        assert {row["pair_id"] for row in store.training_rows().to_pylist() if "pair_id" in row} == set()
        assert store.training_rows()["rater"].to_pylist() == [store.person_id("local")]
        assert pair.pair_id not in [one.pair_id for one in store.load_pairs_to_rate("local")]
        assert over_http(operations, ("POST", "/v1/rate", {}))[0][1]["pair_id"] is None


def test_quarantine_and_the_list_over_http(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        crowd(store, 20)
        answers = over_http(
            operations,
            ("POST", "/v1/quarantine", {"rater": "eve", "reason": "contrary"}),
            ("POST", "/v1/quarantine", {"rater": "eve"}),
            ("POST", "/v1/quarantine", {"rater": "nobody"}),
            ("GET", "/v1/raters", None),
            ("POST", "/v1/snapshots", {}),
            ("POST", "/v1/preflight", {"without": ["nobody"]}),
            ("POST", "/v1/quarantine", {"rater": "eve", "lift": True}),
        )
        assert [status for status, _ in answers] == [200, 409, 404, 200, 200, 404, 200]
        (eve,) = [row for row in answers[3][1]["raters"] if row["rater"] == "eve"]
        assert (eve["state"], eve["reason"], eve["next_share"]) == ("quarantined", "contrary", 0)
        assert answers[4][1]["left_out"]["quarantined"] == 20


def test_the_commands_say_it_in_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gold(tmp_path, 2)
    with house(tmp_path) as (_, store):
        crowd(store)
    for name, value in environment(tmp_path, engine="scripted").items():
        monkeypatch.setenv(name, value)
    run = CliRunner()
    listed = run.invoke(app, ["raters"])
    assert "30 of 30 picks took the first answer" in listed.output
    done = run.invoke(app, ["quarantine", "eve", "--reason", "contrary"])
    assert "eve is in quarantine" in done.output
    assert "in quarantine since" in run.invoke(app, ["raters"]).output
    refused = run.invoke(app, ["quarantine", "eve"])
    assert refused.exit_code == 1
    assert "already" in refused.output
    assert "may teach again" in run.invoke(app, ["quarantine", "eve", "--lift"]).output
    assert "0 of 0    right: Gold 0?" in run.invoke(app, ["gold"]).output
    nobody = run.invoke(app, ["train", "--without", "mallory"])
    assert nobody.exit_code == 1
    assert "There is no rater 'mallory'" in nobody.output


def test_the_page_shows_a_pair_and_then_the_next(tmp_path: Path) -> None:
    write_gold(tmp_path, 1)

    async def rate(operations: Operations) -> None:
        with gr.Blocks() as blocks:  # in a running loop, where Gradio does not make loops that it leaves open
            page = RatePage(operations, blocks)
        shown = page.next_pair()
        assert "Gold 0?" in shown[page.asked]
        after = page.settle(FIRST, shown[page.pair])
        assert after[page.pair] == ""
        assert after[page.note].startswith("Saved, thank you. There is nothing to rate now")

    with house(tmp_path) as (operations, store):
        asyncio.run(rate(operations))
        assert store.standing().gold[store.person_id("local")].answered == 1
