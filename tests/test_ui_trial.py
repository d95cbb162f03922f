"""What the trial section says: the card. (Clicks: tests/browser.)"""

from typing import Any

from chat_app.ui.trial import WORDS, trial_card
from feedback_store.records import TRIAL_ENDS

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
