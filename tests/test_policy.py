"""What follows from a verdict or a won trial: every combination of settings and situation, and who may promote."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from chat_app.policy import OWN_NAMES, Evidence, Situation, Step, decide, objection, person

VERDICT = Evidence("verdict", "run_1", "v4", "v3", "22 wins of 30.", datetime(2026, 11, 23, tzinfo=UTC))
TRIAL = replace(VERDICT, source="trial", source_id="trial_1")
QUIET = Situation(champion="v3")
DOUBTS = {
    "taken back": replace(QUIET, taken_back="v4 was taken back after 8 requests."),
    "another champion": replace(QUIET, champion="v5"),
    "practised": replace(QUIET, is_practised=True),
    "a trial": replace(QUIET, challenger="v6"),
}
WAITS = {"watched": replace(QUIET, watched="v3"), "not serving": replace(QUIET, is_serving=False)}
NOTHING_TO_DO = {"champion": replace(QUIET, champion="v4"), "promoted since": replace(QUIET, was_promoted=True)}


@pytest.mark.parametrize("evidence", [VERDICT, TRIAL], ids=["verdict", "trial"])
@pytest.mark.parametrize("approval", ["off", "other"])
@pytest.mark.parametrize("name", [*DOUBTS, *WAITS, *NOTHING_TO_DO, "quiet"])
def test_every_combination(evidence: Evidence, approval: str, name: str) -> None:
    now = {**DOUBTS, **WAITS, **NOTHING_TO_DO, "quiet": QUIET}[name]
    steps = {policy: decide(policy, approval, evidence, now).step for policy in ("manual", "propose", "auto")}  # type: ignore[arg-type]
    if name in NOTHING_TO_DO:
        assert set(steps.values()) == {Step.LEAVE}
        return
    assert steps["manual"] is (Step.LEAVE if evidence.source == "verdict" else Step.PROPOSE)
    assert steps["propose"] is Step.PROPOSE
    if name in WAITS:
        assert steps["auto"] is Step.WAIT
    elif name in DOUBTS or approval == "other":
        assert steps["auto"] is Step.PROPOSE
    else:
        assert steps["auto"] is Step.PROMOTE


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("taken back", "v4 answered once and was taken back. v4 was taken back after 8 requests."),
        ("another champion", "v4 was compared with v3, and v5 is the champion now."),
        ("practised", "v4 practised a taste on prepared pairs."),
        ("a trial", "v6 is on live trial, which a promotion of v4 would end."),
    ],
)
def test_a_doubt_is_said_with_the_proposal_and_in_place_of_a_promotion(name: str, said: str) -> None:
    assert decide("propose", "off", VERDICT, DOUBTS[name]).reason == said
    assert decide("auto", "off", VERDICT, DOUBTS[name]).reason == f"It is not promoted by itself: {said}"


def test_a_promotion_is_for_the_reason_of_its_evidence_and_a_plain_proposal_needs_none() -> None:
    assert decide("auto", "off", VERDICT, QUIET).reason == "22 wins of 30."
    assert decide("propose", "off", VERDICT, QUIET).reason == ""
    assert "ZLOOP_APPROVAL=other" in decide("auto", "other", VERDICT, QUIET).reason


def test_what_waits_for_a_watched_champion_is_not_yet_judged_by_it() -> None:
    """The new champion may be taken back, and then the verdict compares with the champion again."""
    outcome = decide("auto", "off", VERDICT, Situation(champion="v5", watched="v5"))
    assert (outcome.step, outcome.reason) == (Step.WAIT, "v5 is being watched: v4 waits until that is over.")


@pytest.mark.parametrize(
    ("started_by", "by", "status"),
    [
        ("ann", "ben", None),
        ("ann", "ann", 403),
        ("Ann ", "aNN", 403),
        ("ann", None, 400),
        ("schedule", "ben", None),
        ("local", "ben", None),
        (None, "ben", None),
        (None, None, 400),
    ],
)
def test_somebody_else_promotes(started_by: str | None, by: str | None, status: int | None) -> None:
    refusal = objection("v4", started_by, by)
    assert (refusal and refusal[0]) == status
    if status == 403:
        assert refusal is not None
        assert f"{started_by} started the run that made v4, so {by} cannot promote it" in refusal[1]


def test_a_trial_does_not_stand_in_its_own_way_while_it_is_being_closed() -> None:
    now = replace(QUIET, challenger="v4")
    assert decide("auto", "off", TRIAL, now).step is Step.PROMOTE
    assert decide("auto", "off", VERDICT, now).step is Step.PROPOSE  # people are still voting on it


def test_names_of_the_programs_own_are_nobodys() -> None:
    assert person(" ann ") == "ann"
    assert person("  ") is person(None) is None
    for name in OWN_NAMES:
        with pytest.raises(ValueError, match="name of the program's own"):
            person(name.upper())
