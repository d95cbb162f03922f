"""Versions that seem better, on the real store, slot and trainer with the scripted engine: proposed, promoted by
themselves, dismissed, approved by somebody else; over restarts, once each. (The rules: test_policy.py.)
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from house import until
from made_run import evaluation_of, made_run
from server import Server, environment, serving
from symbol_gguf import build_symbol_gguf, publish_symbol_version
from test_baking_watch import ask
from test_operations import served
from test_trials import until_it_ends
from typer.testing import CliRunner

from chat_app.__main__ import open_store
from chat_app.cli import app
from chat_app.operations import Operations, Refused
from chat_app.serving.scripted_engine import Fault, build_scripted_engine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from chat_app.ui.admin import AdminPage, next_step
from chat_app.ui.proposals import proposal_cards
from feedback_store.errors import NotFound, StoreError
from feedback_store.store import FeedbackStore
from trainer import schedule
from trainer.errors import TrainerError
from trainer.verdict import decide


def judged(
    data_dir: Path, number: int, *, champion: str = "v0", by: str = "ann", wins: int = 30, practice: str | None = None
) -> None:
    """A finished run that made v`number`; with 30 wins of 32 its verdict is `promote`."""
    version = f"v{number}"
    if not (data_dir / "versions" / version).exists():
        publish_symbol_version(data_dir / "versions", number, "symbols", canaries=False)
    if practice is not None:
        manifest = data_dir / "versions" / version / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "practice": practice}))
    run = made_run(data_dir / "runs", f"run_20261122-231500_{number:04x}", requested_by=by, practice=practice)
    verdict = decide(evaluation_of(wins, 0, 32 - wins, version, champion), champion, version)
    run.note(version=version, candidate=version, champion=champion, verdict=verdict.as_dict())


@contextmanager
def house(data_dir: Path, policy: str, **given: Any) -> Iterator[tuple[Operations, FeedbackStore]]:
    """The operations on a data directory; `faults` are those of the scripted engine."""
    faults = given.pop("faults", {})
    values = {f"ZLOOP_{name.upper()}": str(value) for name, value in {**given, "policy": policy}.items()}
    settings = load_settings({"ZLOOP_DATA_DIR": str(data_dir), "ZLOOP_ENGINE": "scripted", **values})
    with open_store(settings) as store:
        slot = ModelSlot(partial(build_scripted_engine, faults=faults))
        yield Operations(settings, store, TrainerRoom(settings, store), slot, schedule.is_due), store


def in_turn(operations: Operations, *work: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Do these one after the other while the champion is served."""

    async def all_of_it() -> list[Any]:
        return [await one() for one in work]

    results: list[Any] = served(operations, all_of_it)
    return results


def settled(server: Server) -> None:
    """Wait until everything new was considered."""
    deadline = time.monotonic() + 20
    while any(row["state"] == "waiting" for row in server.get("/v1/proposals")["proposals"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def proposed(operations: Operations) -> dict[str, str]:
    return {row["version"]: row["reason"] for row in operations.proposals.current() if row["state"] == "open"}


def test_auto_promotes_what_was_judged_while_no_server_ran_once_and_watches_it(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    judged(tmp_path, 2, wins=16)  # not enough evidence
    with house(tmp_path, "auto") as (operations, store):

        async def work() -> None:
            assert not await operations.proposals.look()
            assert operations.baking.watched() == operations.served_versions()[0] == "v1"
            assert not await operations.proposals.look()

        served(operations, work)
        (promotion,) = store.load_promotions()
        assert (promotion.version, promotion.kind, promotion.by) == ("v1", "auto", "policy")
        assert promotion.reason.startswith("30 wins, 0 ties, 2 losses on 32 held-out pairs.")
        assert [one.state for one in store.load_proposals()] == ["promoted"]
    with house(tmp_path, "auto") as (operations, store):
        in_turn(operations, operations.rollback, operations.proposals.look)
        assert operations.champion() == "v0"  # a person went back: that is not undone
        assert [one.kind for one in store.load_promotions()] == ["auto", "rollback"]


def test_many_looks_at_once_promote_once(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "auto") as (operations, store):

        async def work() -> None:
            async def look() -> None:
                with suppress(Exception):  # one that comes second finds that it was kept
                    await operations.proposals.look()

            await asyncio.gather(*(look() for _ in range(5)))

        served(operations, work)
        assert [one.kind for one in store.load_promotions()] == ["auto"]
        assert len(store.load_proposals()) == 1


def test_a_promotion_that_could_not_be_kept_as_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "auto") as (operations, store), monkeypatch.context() as patch:
        patch.setattr(store, "record_proposal", None)  # as if the server was killed in between
        with pytest.raises(TypeError):
            in_turn(operations, operations.proposals.look)
    with house(tmp_path, "auto") as (operations, store):
        in_turn(operations, operations.rollback, operations.proposals.look)
        assert [one.kind for one in store.load_promotions()] == ["auto", "rollback"]
        assert [one.state for one in store.load_proposals()] == ["left"]


def test_a_version_that_was_taken_back_is_never_promoted_by_itself_again(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "auto", faults={"v1": Fault.EMPTY}) as (operations, store):

        async def work() -> None:
            await ask(operations, 30)
            await operations.proposals.look()
            await ask(operations, 8)
            await until("it is taken back", lambda: operations.champion() == "v0")
            assert not await operations.proposals.look()

        served(operations, work)
        assert [one.kind for one in store.load_promotions()] == ["auto", "auto-rollback"]
        (why,) = operations.baking.taken_back().values()
    with house(tmp_path, "auto") as (operations, _):

        async def trial() -> None:  # whoever wants it anyway may try it; people decide then
            await operations.trials.start("v1", share=1)
            await until_it_ends(operations, "v1")
            await operations.proposals.look()

        served(operations, trial)
        assert operations.champion() == "v0"
        assert proposed(operations) == {
            "v1": f"It is not promoted by itself: v1 answered once and was taken back. {why}"
        }


def test_auto_waits_while_a_champion_is_watched(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "auto", baking_requests=5, baking_s=0) as (operations, store):

        async def work() -> None:
            await operations.proposals.look()
            judged(tmp_path, 2, champion="v1")
            assert await operations.proposals.look()
            (row,) = operations.proposals.current()
            assert (row["version"], row["state"]) == ("v2", "waiting")
            assert row["reason"] == "v1 is being watched: v2 waits until that is over."
            await ask(operations, 5)
            await until("v1 is kept", lambda: operations.baking.watched() is None)
            assert not await operations.proposals.look()

        served(operations, work)
        assert [one.version for one in store.load_promotions()] == ["v1", "v2"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (Fault.FAILS_TO_START, "It could not be promoted by itself:"),
        (Fault.NO_ROOM, "There is no room for two models"),
        ("practised", "v1 practised a taste on prepared pairs."),
        ("overtaken", "v1 was compared with v0, and v2 is the champion now."),
    ],
)
def test_what_auto_may_or_can_not_do_becomes_a_proposal(tmp_path: Path, how: Fault | str, said: str) -> None:
    judged(tmp_path, 1, practice="shorter" if how == "practised" else None)
    judged(tmp_path, 2, wins=16)
    faults = {"v1": how} if isinstance(how, Fault) else {}
    with house(tmp_path, "auto", faults=faults, baking="off") as (operations, store):
        look = operations.proposals.look
        before = [lambda: operations.promote("v2")] if how == "overtaken" else []
        assert in_turn(operations, *before, look, look)[-2:] == [False, False]
        assert operations.champion() == ("v2" if how == "overtaken" else "v0")
        assert [one.kind for one in store.load_promotions()] == ["promote"] * len(before)
        assert said in proposed(operations)["v1"]


def test_a_trial_that_ends_better_is_promoted_by_itself_as_soon_as_it_ends(tmp_path: Path) -> None:
    judged(tmp_path, 1, wins=16)
    with house(tmp_path, "auto") as (operations, store):

        async def work() -> None:
            watching = asyncio.create_task(operations.proposals.watch())
            await operations.trials.start("v1", share=1)
            await until_it_ends(operations, "v1")
            await until("it is the champion", lambda: operations.champion() == "v1")
            watching.cancel()

        served(operations, work)
        (promotion,) = store.load_promotions()
        assert (promotion.kind, promotion.reason) == ("auto", operations.trials.trials()[0]["ended_reason"])


def test_manual_leaves_a_verdict_for_good_and_still_proposes_what_won_a_trial(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "manual") as (operations, _):

        async def work() -> None:
            await operations.proposals.look()
            assert operations.proposals.current() == []
            await operations.trials.start("v1", share=1)
            await until_it_ends(operations, "v1")
            await operations.proposals.look()

        served(operations, work)
        assert proposed(operations) == {"v1": ""}
        operations.dismiss("v1", by="ann", reason="not yet")
    with house(tmp_path, "auto") as (operations, store):  # another policy looks at what is new only
        in_turn(operations, operations.proposals.look)
        assert proposed(operations) == {}
        assert store.load_promotions() == []
        (ended,) = operations.proposals.as_body()["ended"]
        assert (ended["state"], ended["dismissed_by"], ended["dismissed_reason"]) == ("dismissed", "ann", "not yet")
        with pytest.raises(NotFound, match="no open proposal of 'v1'"):
            operations.dismiss("v1")


def test_another_champion_ends_a_proposal_and_its_own_promotion_too(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    judged(tmp_path, 2)
    with house(tmp_path, "propose") as (operations, store):

        async def work() -> None:
            await operations.proposals.look()
            assert proposed(operations) == {"v1": "", "v2": ""}
            assert "promote or dismiss v" in next_step(operations.status(), None)
            await operations.promote("v2")
            assert proposed(operations) == {}
            assert {one.version: one.state for one in store.load_proposals()} == {"v1": "overtaken", "v2": "promoted"}
            await operations.rollback()

        served(operations, work)
        assert proposed(operations) == {"v1": ""}  # it was compared with v0, which answers again


def test_a_person_who_is_erased_leaves_no_name_in_a_dismissal(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "propose") as (operations, store):
        in_turn(operations, operations.proposals.look)
        operations.dismiss("v1", by="ann", reason="ann said so")
        operations.data.erase("ann")
        (kept,) = store.load_proposals()
        assert (kept.ended_by, kept.ended_reason, kept.state) == ("erased", "erased", "dismissed")


def test_the_page_shows_promotes_and_dismisses(tmp_path: Path) -> None:
    judged(tmp_path, 1)
    with house(tmp_path, "propose", approval="other") as (operations, store):

        async def work() -> None:
            with gr.Blocks() as blocks:
                page = AdminPage(operations, blocks, (Refused, TrainerError, StoreError))
            section = page.proposals
            assert section.by.visible
            seen = page.look()
            assert "It is considered as soon as a server runs." in seen[section.shown]
            assert not seen[section.promote].visible
            await operations.proposals.look()
            seen = page.look_again(seen[page.seen])
            assert seen[section.promote].value == "Promote v1"
            assert "30 wins, 0 ties, 2 losses" in seen[section.shown]
            assert "Its run was started by ann." in seen[section.shown]
            refused = await page.promote_proposed("v1", "ann")
            assert "ann started the run that made v1, so ann cannot promote it" in refused[section.message]
            assert "say who you are" in (await page.promote_latest(""))[page.message]
            assert "say who you are" in page.start_practice("shorter")[page.message]
            done = await page.promote_proposed("v1", "ben")
            assert "v1 answers from now on" in done[section.message]
            assert not done[section.promote].visible
            assert store.load_promotions()[0].reason.startswith("30 wins")
            assert "no open proposal of" in page.dismiss_proposed("v1")[section.message]
            assert "v0 answers again" in (await page.roll_back())[page.message]  # needs nobody's approval
            judged(tmp_path, 2)
            await operations.proposals.look()
            assert "not proposed any more" in page.dismiss_proposed("v2", "ben")[section.message]
            assert page.look()[section.shown] == ""

        served(operations, work)
        assert store.load_promotions()[0].by == store.person_id("ben")


def test_a_card_escapes_what_it_shows() -> None:
    row = {
        "version": "v1", "champion": "v0", "state": "open", "source": "trial", "source_id": "trial_1",
        "sentence": "<b>", "reason": "<i>", "at": "2026-11-23T10:00:00+00:00", "started_by": "<script>",
    }  # fmt: skip
    shown = proposal_cards([row, {**row, "version": "v0"}, {**row, "state": "waiting"}])
    assert "<script>" not in shown
    assert "<b>v0</b>. &lt;b&gt; &lt;i&gt;" in shown
    assert ">waits<" in shown


def test_routes_and_commands_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_symbol_gguf(tmp_path / "symbols.gguf")
    given = {"engine": "scripted", "model": base, "policy": "propose", "approval": "other"}
    monkeypatch.setattr("os.environ", environment(tmp_path, **given))
    judged(tmp_path, 1)
    judged(tmp_path, 2, by="schedule")

    def zloop(*arguments: str) -> str:
        return CliRunner().invoke(app, arguments).output

    assert "It waits: It is considered as soon as a server runs." in zloop("proposals")
    with serving(tmp_path, **given) as server:
        settled(server)
        told = zloop("proposals")
        assert "Policy: propose. Approval by another person: other." in told
        assert "v1 against v0 (verdict): 30 wins, 0 ties, 2 losses" in told
        assert "Follow it: zloop promote v1" in told
        assert "say who you are" in zloop("promote", "v1")
        status, body = server.refused("/v1/versions/v1/promote", {"by": "ann"})
        assert (status, body["error"]["type"]) == (403, "forbidden")
        assert server.refused("/v1/versions/v1/promote", {})[0] == 400
        assert server.refused("/v1/versions/v1/promote", {"by": "schedule"})[0] == 400
        assert server.refused("/v1/runs", {"practice": "shorter"})[0] == 400
        assert server.refused("/v1/proposals/v7/dismiss", {})[0] == 404
        assert "The champion is v2 now" in zloop("promote", "v2", "--by", "ann")  # the schedule started its run
        assert server.post("/v1/rollback")["champion"] == "v0"
        judged(tmp_path, 3)
    with serving(tmp_path, **given) as server:
        settled(server)
        found = server.get("/v1/proposals")
        assert {row["version"] for row in found["proposals"]} == {"v1", "v3"}
        assert {row["version"]: row["state"] for row in found["ended"]} == {"v2": "promoted"}
        assert "v3 is not proposed any more." in zloop("dismiss", "v3", "--by", "ben", "--reason", "too short")
    with serving(tmp_path, **{**given, "policy": "auto"}) as server:
        assert [row["version"] for row in server.get("/v1/proposals")["proposals"]] == ["v1"]
        assert server.get("/v1/versions")["champion"] == "v0"
