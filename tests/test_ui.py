"""The words and numbers of the pages: what the bar, the overview and the verdict card say. (Clicks: tests/browser.)"""

from typing import Any

import pytest

from chat_app.operations import Status
from chat_app.ui.admin import AdminPage, _recipe_choices, next_step, overview, run_card, versions_table
from chat_app.ui.preflight import preflight_sentences
from chat_app.ui.schedule import schedule_table
from chat_app.ui.theme import badge, navigation
from feedback_store.records import Counts

RUN: dict[str, Any] = {
    "run_id": "run_1", "state": "finished", "step": 4, "total_steps": 4, "eta_s": None, "recipe": "dpo-lora",
    "practice": None, "num_processes": 1, "version": "v1", "champion": "v0", "error": None, "evaluation_progress": None,
    "metrics": {"loss": 0.69, "rewards/margins": 0.01, "rewards/accuracies": 0.5},
    "verdict": {"decision": "keep", "reasons": ["22 wins, 6 ties, 12 losses on 40 held-out pairs."]},
    "evaluation": {"wins": 22, "ties": 6, "losses": 12, "pairs": 40},
}  # fmt: skip


def status(**changes: Any) -> Status:
    counts = Counts(1, 2, 5, 4, {"pick": 3, "trl": 884}, {}, 788, 99)
    values = {"champion": "v0", "serving": "v0", "problem": None, "new_preferences": 14, "retrain_every": 50}
    return Status(**{**values, "counts": counts, **changes})


def test_the_badge_says_who_answers_and_how_far_the_next_retrain_is() -> None:
    assert badge(status()) == "v0 · 14 of 50 picks"
    assert badge(status(retrain_every=0)) == "v0 · 14 new picks"
    assert "not ready" in badge(status(serving=None))


def test_the_bar_marks_the_page_one_is_on() -> None:
    assert '<a href="/admin/" aria-current=page>Admin</a>' in navigation("Admin", status())


def test_a_pause_is_said_once_on_every_page() -> None:
    assert "zl-banner" not in navigation("Chat", status(problem="v3 could not be loaded"))
    shown = navigation("Chat", status(serving=None, problem="The model is learning (run_1).", is_paused=True))
    assert '<p class="zl-banner" role="status">The model is learning (run_1).</p>' in shown
    paused = status(serving=None, problem="The model is learning (run_1).", is_paused=True)
    assert "zl-banner" not in navigation("Admin", paused)
    assert "The model is learning (run_1)." in overview(paused, None)


def test_the_schedule_says_what_comes_and_why_what_was_skipped() -> None:
    decision = {
        "at": "2026-11-23T02:00:03+00:00", "trigger": "cron", "started": False, "sentence": "Skipped: <quiet> hours.",
    }  # fmt: skip
    state = {"outlook": "The next run starts at noon.", "changed_by": "ann", "decisions": [decision]}
    shown = schedule_table(state)
    assert "The next run starts at noon." in shown
    assert "Changed by ann." in shown
    assert (
        "<td>2026-11-23 02:00</td><td>by the clock</td><td>skipped</td><td>Skipped: &lt;quiet&gt; hours.</td>" in shown
    )
    assert "Nothing was decided yet." in schedule_table({**state, "decisions": []})


def test_the_line_beside_the_button_says_time_memory_and_what_stands_in_the_way() -> None:
    found = {
        "sentence": "About 12 min, 1.9 GB of memory.", "warning": None, "refusal": None,
        "estimate": {"basis": "Learned from the last run."},
    }  # fmt: skip
    assert "About 12 min, 1.9 GB of memory.<br><small>Learned from the last run." in preflight_sentences(found)
    assert "<b>Near the limit.</b>" in preflight_sentences({**found, "warning": "Near the limit."})
    assert preflight_sentences({**found, "refusal": "Too large."}) == "<p><b>Too large.</b></p>"


def test_a_run_shows_what_was_expected_and_what_it_took() -> None:
    said = {"total_s": 700.0, "memory_bytes": 1.9e9, "actual": {"total_s": 730.0, "memory_bytes": 2.04e9}}
    assert "expected 12 min and 1.9 GB, took 12 min and 2.0 GB" in run_card({**RUN, "preflight": said})
    waiting = {**said, "actual": {"total_s": None, "memory_bytes": None}}
    assert "expected 12 min and 1.9 GB<" in run_card({**RUN, "preflight": waiting})


def test_the_overview_counts_what_there_is() -> None:
    shown = overview(status(), None)
    assert "All is well: v0 answers." in shown
    assert "3 from your people, 884 imported" in shown
    assert "The champion v3 could not be loaded" in overview(
        status(problem="The champion v3 could not be loaded"), None
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "training"}, "watch run_1"),
        ({"state": "failed", "version": None}, "why the last run failed"),
        ({"verdict": {"decision": "promote", "reasons": []}}, "promote v1"),
        ({"verdict": {"decision": "reject", "reasons": []}}, "v1 is worse"),
        ({}, "collect more picks"),
    ],
)
def test_there_is_always_one_next_step(changes: dict[str, Any], said: str) -> None:
    assert said in next_step(status(), {**RUN, **changes})


def test_a_version_that_was_taken_back_is_shown_and_not_proposed_again() -> None:
    taken_back = status(watch="v1 was taken back after 23 requests: 9 of 23 answers failed.", taken_back=("v1",))
    better = {**RUN, "verdict": {"decision": "promote", "reasons": []}}
    assert "keep v0; v1 answered once and was taken back" in next_step(taken_back, better)
    assert "v1 was taken back after 23 requests" in overview(taken_back, None)
    assert AdminPage._promote_button(better, taken_back).value == "Promote v1 anyway"
    assert AdminPage._promote_button(better, status()).value == "Promote v1"


def test_the_verdict_card_draws_the_shares_and_says_the_reasons() -> None:
    card = run_card(RUN)
    assert 'class="wins" style="width:55.0%"' in card
    assert 'class="ties" style="width:15.0%"' in card
    assert "not enough evidence" in card
    assert "22 wins, 6 ties, 12 losses on 40 held-out pairs." in card


def test_a_training_run_shows_its_progress_and_time_left() -> None:
    card = run_card({**RUN, "state": "training", "step": 1, "eta_s": 150.0, "verdict": None, "evaluation": None})
    assert "step 1 of 4 · about 2 min left" in card
    assert "width:25%" in card


def test_a_practice_is_marked_and_what_failed_is_escaped() -> None:
    card = run_card({**RUN, "practice": "shorter", "state": "failed", "error": "<script>", "verdict": None})
    assert "practice: shorter" in card
    assert "<script>" not in card
    assert "&lt;script&gt;" in card


def test_the_newest_version_comes_first() -> None:
    rows = [
        {"version": name, "state": "candidate", "summary": "", "created_at": "2026-11-22T10:00:00"}
        for name in ("v0", "v1")
    ]
    table = versions_table(rows)
    assert table.index("v1") < table.index("v0")


def test_a_run_that_has_no_margins_is_shown_without_them() -> None:
    card = run_card({**RUN, "metrics": {"loss": 2.5}, "method": "sft", "tuning": "full"})
    assert "recipe dpo-lora (sft, full)" in card
    assert "loss 2.5000" in card
    assert "margins" not in card


def test_the_list_of_recipes_says_what_each_is_for() -> None:
    rows = [
        {"name": "kto", "about": "Learn from thumbs.", "error": None},
        {"name": "wrong", "about": "", "error": "unknown key"},
    ]
    assert _recipe_choices(rows) == [("kto: Learn from thumbs.", "kto")]
