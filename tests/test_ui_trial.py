"""What the trial section says: the card, the proposal, the plot. (Clicks: tests/browser.)"""

from typing import Any

import pytest

from chat_app.ui.trial import WORDS, proposal, strength_plot, strength_shown, trial_card
from feedback_store.records import TRIAL_ENDS, Comparisons
from trainer.strength import as_body, fit

COUNTED = {"wins": 1, "ties": 1, "losses": 2}
TRIAL: dict[str, Any] = {
    "trial_id": "trial_1", "state": "running", "challenger": "v4", "champion": "v3", "share": 0.5,
    "started_at": "2026-11-23T10:00:00+00:00", "ended_at": None, "ended_reason": "",
    "votes": {"wins": 22, "ties": 6, "losses": 12}, "sentence": "22 wins, 6 ties, 12 losses of v4 against v3.",
    "shown_first": COUNTED, "shown_second": COUNTED, "by_who_trained_it": COUNTED, "by_others": COUNTED,
}  # fmt: skip


def test_the_card_draws_the_votes_and_says_whose_they_are() -> None:
    card = trial_card(TRIAL)
    assert 'class="wins" style="width:55.0%"' in card
    assert "22 wins, 6 ties, 12 losses of v4 against v3." in card
    assert "50% of the pairs, since 2026-11-23 10:00" in card
    assert "By those whose preferences trained it: 1 win, 1 tie, 2 losses." in card
    assert "its snapshot is gone" in trial_card({**TRIAL, "by_who_trained_it": None, "by_others": None})


def test_an_end_says_why_first() -> None:
    ended = {**TRIAL, "state": "failed", "ended_at": "2026-11-23T11:00:00+00:00", "ended_reason": "v4 <died>"}
    card = trial_card(ended)
    assert card.index("v4 &lt;died&gt;") < card.index("22 wins, 6 ties")
    assert "until 2026-11-23 11:00" in card


def test_without_a_trial_it_says_what_one_is() -> None:
    assert "There was no live trial yet" in trial_card(None)


def test_every_state_has_a_word() -> None:
    assert set(WORDS) == {"running", *TRIAL_ENDS}


@pytest.mark.parametrize(
    ("trial", "champion", "proposed"),
    [
        ({**TRIAL, "state": "better"}, "v3", "v4"),
        ({**TRIAL, "state": "better"}, "v4", None),
        ({**TRIAL, "state": "better"}, "v2", None),
        ({**TRIAL, "state": "futile"}, "v3", None),
        (None, "v3", None),
    ],
)
def test_only_a_better_one_is_proposed_against_the_champion_it_beat(
    trial: dict[str, Any] | None, champion: str, proposed: str | None
) -> None:
    assert proposal(trial, champion) == proposed


def test_the_plot_marks_promotions_and_leaves_out_who_cannot_be_compared() -> None:
    counts = [Comparisons("v1", "v0", 60, 5, 35), Comparisons("v0", "v1", 38, 5, 57)]
    found = as_body(fit(counts, "v0", ["v0", "v1", "v2"]), "v1", {"v1": ["2026-11-23T10:00:00+00:00"]})
    shown = strength_shown(found)
    assert "Yes: v1, the champion, wins 62%" in shown
    assert "▲ 11-23" in shown
    assert shown.count("<circle") == 2
    assert shown.count('class="champion"') == 1
    assert "Cannot be compared, for want of picks: v2." in shown
    plot = strength_plot(found["versions"][:2], "v0")
    assert 'class="even"' in plot
    assert "v0: 50% (the reference)" in plot


def test_without_picks_there_is_a_sentence_and_no_plot() -> None:
    shown = strength_shown(as_body(fit([], "v0", ["v0", "v1"]), "v0", {}))
    assert "<svg" not in shown
    assert "first champion" in shown
