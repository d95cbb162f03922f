"""The live trial on the real store, slot and trainer, with the scripted engine: drawn, voted, decided, stopped."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest
from server import environment, serving
from symbol_gguf import build_symbol_gguf, publish_symbol_version, symbol_of
from typer.testing import CliRunner

from chat_app.__main__ import open_store
from chat_app.cli import app
from chat_app.operations import Operations, Refused
from chat_app.serving.engine import EngineError
from chat_app.serving.llama_engine import build_llama_engine
from chat_app.serving.scripted_engine import Fault, build_scripted_engine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from chat_app.ui.trial import TrialSection
from feedback_store.errors import Conflict, InvalidRecord, NotFound
from feedback_store.records import Message, Pair, PickChoice
from feedback_store.store import FeedbackStore
from trainer import schedule
from trainer.errors import VersionNotFound

ASK = [Message(role="user", content="Which one?")]
FIRST, SECOND = PickChoice.FIRST, PickChoice.SECOND


@contextmanager
def house(
    data_dir: Path, faults: Mapping[str, Fault] | None = None, **settings: object
) -> Iterator[tuple[Operations, FeedbackStore]]:
    """The operations on a data directory with v1 and v2 published; faults are those of the scripted engine."""
    if not (data_dir / "versions").exists():
        for number in (1, 2):
            publish_symbol_version(data_dir / "versions", number, "symbols")
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in settings.items()}
    chosen = load_settings({"ZLOOP_DATA_DIR": str(data_dir), "ZLOOP_ENGINE": "scripted", **values})
    with open_store(chosen) as store:
        slot = ModelSlot(partial(build_scripted_engine, faults=faults or {}))
        yield Operations(chosen, store, TrainerRoom(chosen, store), slot, schedule.is_due), store


def served(operations: Operations, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work` while the champion is being served."""

    async def all_of_it() -> Any:
        await operations.start_serving()
        try:
            return await work()
        finally:
            await operations.close()

    return asyncio.run(all_of_it())


async def pair_of(operations: Operations) -> Pair:
    return (await operations.answers.make_pair(ASK, operations.sampling()))[0]


def side_of(pair: Pair, version: str) -> PickChoice:
    assert {pair.first.version, pair.second.version} == {"v0", "v1"}
    return FIRST if pair.first.version == version else SECOND


async def vote_for(operations: Operations, version: str) -> Pair:
    pair = await pair_of(operations)
    await asyncio.to_thread(operations.record_pick, pair.pair_id, side_of(pair, version))
    return pair


async def until_it_ends(operations: Operations, winner: str, at_most: int = 30) -> int:
    for votes in range(1, at_most + 1):
        await vote_for(operations, winner)
        if operations.trials.challenger() is None:
            return votes
    raise AssertionError(f"no end after {at_most} votes")


def states(operations: Operations) -> dict[str, str]:
    return {row["version"]: row["state"] for row in operations.version_rows()}


@pytest.mark.parametrize(("winner", "state"), [("v1", "better"), ("v0", "worse")])
def test_votes_end_a_trial_and_its_challenger_is_released(tmp_path: Path, winner: str, state: str) -> None:
    with house(tmp_path) as (operations, store):

        async def run() -> int:
            begun = await operations.trials.start("v1", share=1, reason="the verdict said keep")
            assert (begun["state"], begun["champion"], begun["votes"]["wins"]) == ("running", "v0", 0)
            assert states(operations) == {"v0": "champion", "v1": "challenger", "v2": "candidate"}
            assert operations.served_versions() == ("v0", "v1")
            votes = await until_it_ends(operations, winner)
            for _ in range(100):
                if operations.served_versions() == ("v0",):
                    return votes
                await asyncio.sleep(0.01)
            raise AssertionError(f"still served: {operations.served_versions()}")

        votes = served(operations, run)
        assert 8 <= votes <= 16
        (ended,) = operations.trials.trials()
        assert ended["state"] == state
        assert ended["votes"] == {
            "wins": votes if winner == "v1" else 0,
            "ties": 0,
            "losses": 0 if winner == "v1" else votes,
        }
        assert f"v1 is {state} than v0" in ended["ended_reason"]
        assert ended["shown_first"]["wins"] + ended["shown_second"]["wins"] == ended["votes"]["wins"]
        assert operations.champion() == "v0"  # nobody but a person promotes
        assert states(operations)["v1"] == "candidate"
        assert store.load_promotions() == []


def test_the_challenger_is_shown_in_its_share_of_the_pairs_only(tmp_path: Path) -> None:
    with house(tmp_path, trial_share=0.3) as (operations, _):

        async def run() -> list[bool]:
            assert (await operations.trials.start("v1"))["share"] == 0.3
            pairs = [await pair_of(operations) for _ in range(3)]
            assert all({pair.first.version, pair.second.version} <= {"v0", "v1"} for pair in pairs)
            return [operations.trials.drawn("v0") == "v1" for _ in range(2000)]

        drawn = served(operations, run)
        assert 0.25 < sum(drawn) / len(drawn) < 0.35
        assert operations.trials.drawn("v2") is None  # not the champion it is on trial against


def test_both_orders_are_shown(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def run() -> set[str]:
            await operations.trials.start("v1", share=1)
            return {(await pair_of(operations)).first.version for _ in range(30)}

        assert served(operations, run) == {"v0", "v1"}


def test_a_pair_is_one_vote_the_first_blind_word(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):

        async def run() -> Any:
            before = await pair_of(operations)
            trial = await operations.trials.start("v1", share=1)
            pairs = [await pair_of(operations) for _ in range(4)]
            operations.record_pick(before.pair_id, FIRST)  # of the champion with itself
            changed, told, tied, skipped = pairs
            operations.record_pick(changed.pair_id, side_of(changed, "v1"))
            operations.record_pick(changed.pair_id, side_of(changed, "v0"))  # a changed mind: the versions were shown
            store.record_pick(told.pair_id, side_of(told, "v0"), rater="ann")
            store.record_pick(told.pair_id, side_of(told, "v1"), rater="ben")
            operations.record_pick(tied.pair_id, PickChoice.BOTH_BAD)
            operations.record_pick(skipped.pair_id, PickChoice.SKIP)
            operations.record_pick(skipped.pair_id, FIRST)  # a skip showed the versions too
            return operations.trials.trial(trial["trial_id"])

        trial = served(operations, run)
        assert trial["votes"] == {"wins": 1, "ties": 1, "losses": 1}
        assert trial["by_who_trained_it"] is None  # its snapshot is not there: nobody knows


def test_votes_of_those_who_trained_it_count_and_are_shown_apart(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        manifest = '{"parts": {"train": {"raters": {"ann": 3}}}}'
        (tmp_path / "snapshots" / "made-up").mkdir(parents=True)
        (tmp_path / "snapshots" / "made-up" / "manifest.json").write_text(manifest)

        async def run() -> Any:
            trial = await operations.trials.start("v1", share=1)
            for rater, version in (("ann", "v1"), ("ann", "v1"), ("ben", "v0")):
                pair = await pair_of(operations)
                store.record_pick(pair.pair_id, side_of(pair, version), rater=rater)
            return operations.trials.trial(trial["trial_id"])

        trial = served(operations, run)
        assert trial["votes"] == {"wins": 2, "ties": 0, "losses": 1}
        assert trial["by_who_trained_it"] == {"wins": 2, "ties": 0, "losses": 0}
        assert trial["by_others"] == {"wins": 0, "ties": 0, "losses": 1}


def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def begin() -> None:
            await operations.trials.start("v1", share=1)
            for _ in range(3):
                await vote_for(operations, "v1")

        served(operations, begin)
    with house(tmp_path) as (operations, _):

        async def go_on() -> int:
            assert operations.served_versions() == ("v0", "v1")
            return await until_it_ends(operations, "v1")

        served(operations, go_on)
        (ended,) = operations.trials.trials()
        assert ended["state"] == "better"
        assert ended["votes"]["wins"] > 3
    with house(tmp_path) as (operations, _):
        assert served(operations, operations.answers.settled) is None
        assert operations.served_versions() == ()
        assert operations.trials.challenger() is None


def test_a_later_trial_of_the_same_two_begins_at_nothing(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def run() -> Any:
            first = await operations.trials.start("v1", share=1)
            pair = await vote_for(operations, "v1")
            stopped = await operations.trials.stop(first["trial_id"])
            assert (stopped["state"], stopped["ended_reason"]) == ("stopped", "Stopped by a person.")
            second = await operations.trials.start("v1", share=1)
            await asyncio.to_thread(operations.record_pick, pair.pair_id, side_of(pair, "v0"))
            with pytest.raises(Conflict, match="has ended already"):
                await operations.trials.stop(first["trial_id"])
            return operations.trials.trial(first["trial_id"]), operations.trials.trial(second["trial_id"])

        first, second = served(operations, run)
        assert (first["votes"]["wins"], second["votes"]["wins"], second["votes"]["losses"]) == (1, 0, 0)
        assert second["state"] == "running"


def test_a_challenger_that_keeps_breaking_ends_its_trial_and_every_pair_is_answered(tmp_path: Path) -> None:
    with house(tmp_path, {"v1": Fault.BREAKS_OFF}) as (operations, _):

        async def run() -> list[Pair]:
            await operations.trials.start("v1", share=1)
            return [await pair_of(operations) for _ in range(5)]

        pairs = served(operations, run)
        assert {version for pair in pairs for version in (pair.first.version, pair.second.version)} == {"v0"}
        assert all(answer.finish_reason == "stop" for pair in pairs for answer in (pair.first, pair.second))
        (ended,) = operations.trials.trials()
        assert ended["state"] == "failed"
        assert "v1 could not answer: 3 times in a row" in ended["ended_reason"]


def test_a_challenger_that_cannot_be_served_after_a_restart_ends_its_trial(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):
        served(operations, partial(operations.trials.start, "v1"))
    with house(tmp_path, {"v1": Fault.FAILS_TO_START}) as (operations, _):
        served(operations, operations.answers.settled)
        (ended,) = operations.trials.trials()
        assert ended["state"] == "failed"
        assert "v1 could not be served" in ended["ended_reason"]


def test_a_challenger_that_is_no_longer_served_is_served_again(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def run() -> list[set[str]]:
            await operations.trials.start("v1", share=1)
            await operations.answers.slot.release("v1")
            pairs = [await pair_of(operations) for _ in range(2)]
            return [{pair.first.version, pair.second.version} for pair in pairs]

        assert served(operations, run) == [{"v0"}, {"v0", "v1"}]
        assert operations.trials.challenger() == "v1"


def test_a_challenger_that_cannot_be_served_begins_no_trial(tmp_path: Path) -> None:
    with house(tmp_path, {"v1": Fault.FAILS_TO_START}) as (operations, store):

        async def run() -> None:
            with pytest.raises(EngineError):
                await operations.trials.start("v1")

        served(operations, run)
        assert store.load_trials() == []


def test_another_champion_ends_it_and_the_challengers_own_promotion_too(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def run() -> None:
            await operations.trials.start("v1")
            await operations.promote("v2")
            await operations.trials.start("v1")
            await operations.rollback()
            await operations.trials.start("v1")
            await operations.promote("v1")
            assert operations.served_versions()[0] == "v1"
            base = await operations.trials.start("v0", share=1)  # the base may be tried again
            pair = await pair_of(operations)
            assert {pair.first.version, pair.second.version} == {"v0", "v1"}
            await operations.trials.stop(base["trial_id"])

        served(operations, run)
        ended = operations.trials.trials()[1:]
        assert [one["state"] for one in ended] == ["promoted", "overtaken", "overtaken"]
        assert ended[1]["ended_reason"] == "v0 became the champion instead of v2."
        assert states(operations)["v1"] == "champion"


def test_what_cannot_be_is_refused_with_a_sentence(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):

        async def run() -> None:
            with pytest.raises(Conflict, match="v0 is the champion"):
                await operations.trials.start("v0")
            with pytest.raises(VersionNotFound):
                await operations.trials.start("v9")
            with pytest.raises(NotFound):
                await operations.trials.stop("trial_none")
            await operations.trials.start("v1")
            with pytest.raises(Conflict, match="v1 is on live trial against v0"):
                await operations.trials.start("v2")
            with pytest.raises(Refused, match="stop the trial"):
                await operations.release("v1")

        served(operations, run)
        with pytest.raises(InvalidRecord):
            store.record_trial("v0", share=0.5, rules={}, by="local")
        with pytest.raises(Conflict, match="one at a time"):
            store.record_trial("v2", share=0.5, rules={}, by="local")


def test_the_page_starts_stops_and_shows_the_end(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, _):

        async def run() -> None:
            with gr.Blocks() as page:  # in a running loop, where Gradio does not make loops that it leaves open
                section = TrialSection(operations, page, (Conflict, EngineError))
            assert "no version to try" in (await section.start_trial(None, 0.5))[section.message]
            begun = await section.start_trial("v1", 1)
            assert begun[section.message] == "v1 is shown against v0 in 100% of the pairs from now on."
            assert begun[section.start].interactive is False
            assert begun[section.version].choices == [("v2", "v2")]
            assert "v1 is on live trial" in (await section.start_trial("v2", 1))[section.message]
            seen = begun[section.seen]
            assert section.look_again(seen) == {section.seen: seen}
            await vote_for(operations, "v1")
            voted = section.look_again(seen)
            assert set(voted) == {section.shown, section.seen}
            assert "1 win, 0 ties, 0 losses" in voted[section.shown]
            assert "stopped" in (await section.stop_trial())[section.message]
            await section.start_trial("v1", 1)
            await until_it_ends(operations, "v1")
            assert "better" in section.look_again(seen)[section.shown]

        served(operations, run)
        assert operations.champion() == "v0"  # proposing it is test_proposals.py's


def test_half_of_the_bet_leans_on_an_evaluation_against_this_champion_only(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        room = TrainerRoom(operations.settings, store)
        leaning, plain = (room.trial_rules("v1", champion, 70)["weights"] for champion in ("v0", "v2"))
        assert len(set(plain)) == 1
        assert leaning[-1] > leaning[0]
        assert room.trial_rules("v1", "v0", 70)["max_votes"] == 70


def test_a_person_who_is_erased_leaves_no_name_in_a_trial(tmp_path: Path) -> None:
    with house(tmp_path) as (operations, store):
        served(operations, partial(operations.trials.start, "v1", reason="local said so"))
        trial = store.load_trials()[0]
        store.record_trial_end(trial.trial_id, "stopped", reason="enough", evidence={}, by="local")
        operations.data.erase("local")
        erased = store.load_trials()[0]
        assert (erased.by, erased.reason, erased.ended_by, erased.ended_reason) == ("erased",) * 4


def test_routes_and_commands_do_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        publish_symbol_version(tmp_path / "versions", number, "symbols")
    base = build_symbol_gguf(tmp_path / "symbols.gguf")
    monkeypatch.setattr("os.environ", environment(tmp_path, model=base))

    def zloop(*arguments: str) -> str:
        return CliRunner().invoke(app, arguments).output

    with serving(tmp_path, engine="scripted", model=base) as server:
        assert "No live trial runs." in zloop("trial", "stop")
        assert "v1 is shown against v0 in 100% of the pairs" in zloop("trial", "start", "v1", "--share", "1")
        (running,) = server.get("/v1/trials")["trials"]
        assert {row["version"]: row["state"] for row in server.get("/v1/versions")["versions"]}["v1"] == "challenger"
        assert server.refused("/v1/trials", {"version": "v2"})[0] == 409
        assert server.refused("/v1/trials", {"version": "v1", "share": 0})[0] == 422
        assert server.refused("/v1/trials/trial_none/stop")[0] == 404
        for _ in range(3):
            pair = server.pair("Which one?")
            revealed = server.post("/v1/picks", {"pair_id": pair["pair_id"], "pick": "first"})["versions"]
            assert sorted(revealed) == ["v0", "v1"]
        trial = server.get(f"/v1/trials/{running['trial_id']}")
        assert sum(trial["votes"].values()) == 3
        assert f"{running['trial_id']}: running." in zloop("trial", "status")
        assert "Not enough evidence so far" in zloop("trial", "stop", running["trial_id"])
        assert json.loads(zloop("trial", "status", "--json"))["state"] == "stopped"
        strength = server.get("/v1/strength")
        assert strength["sentence"] == "v0 is the first champion: there is nothing before it to be better than."
        assert [row["votes"] for row in strength["versions"]] == [3, 3, 0]
        assert "v2                       cannot be compared" in zloop("strength")
    assert "No model is served here" in zloop("trial", "start", "v1")  # no server: nothing could show it


def test_with_real_engines_each_version_writes_its_own_side_also_after_its_process_died(tmp_path: Path) -> None:
    publish_symbol_version(tmp_path / "versions", 1, "symbols")
    base = build_symbol_gguf(tmp_path / "symbols.gguf")
    settings = load_settings({"ZLOOP_DATA_DIR": str(tmp_path), "ZLOOP_MODEL": str(base)})
    before = set(psutil.Process().children())
    with open_store(settings) as store:
        slot = ModelSlot(partial(build_llama_engine, log_dir=tmp_path / "logs"))
        operations = Operations(settings, store, TrainerRoom(settings, store), slot, schedule.is_due)
        sampling = operations.sampling(max_tokens=8, temperature=0)

        async def written() -> dict[str, str]:
            pair, _ = await operations.answers.make_pair(ASK, sampling)
            return {answer.version: answer.text for answer in (pair.first, pair.second)}

        async def run() -> None:
            champions = set(psutil.Process().children()) - before
            await operations.trials.start("v1", share=1)
            own = {"v0": symbol_of(0) * 8, "v1": symbol_of(1) * 8}
            assert await written() == own
            (challenger,) = set(psutil.Process().children()) - before - champions
            challenger.kill()
            challenger.wait()
            assert await written() == own  # started again by whoever needs it
            trial = operations.trials.trials()[0]
            await operations.trials.stop(trial["trial_id"])
            assert set(await written()) == {"v0"}

        served(operations, run)
    assert set(psutil.Process().children()) == before
