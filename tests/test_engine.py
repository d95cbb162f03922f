"""The port's records refuse what no engine can use."""

from __future__ import annotations

import math

import pytest

from chat_app.serving.engine import (
    MAX_SEED,
    BadMessages,
    BadSampling,
    ContextOverflow,
    Crowded,
    EngineBroken,
    EngineBusy,
    EngineError,
    EngineRefused,
    EngineTimeout,
    Sampling,
    is_its_fault,
)


def test_defaults_are_valid_and_recorded_without_the_seed() -> None:
    assert Sampling(seed=7, stop=("\n",)).as_record() == {
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 1024,
        "stop": ["\n"],
    }


def test_limits_are_allowed() -> None:
    assert Sampling(temperature=0, top_p=1, max_tokens=1, seed=0).seed == 0
    assert Sampling(temperature=2, top_p=1e-6, seed=MAX_SEED).seed == MAX_SEED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.inf),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", "7"),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
    ],
)
def test_a_bad_value_is_named_with_its_limits(name: str, value: object) -> None:
    with pytest.raises(BadSampling, match=rf"{name} is .*must be"):
        Sampling(**{name: value})  # type: ignore[arg-type]


def test_context_overflow_says_the_numbers() -> None:
    error = ContextOverflow(9031, 8192)
    assert isinstance(error, EngineError)
    assert (error.prompt_tokens, error.limit) == (9031, 8192)
    assert "9031" in str(error)
    assert "8192" in str(error)


@pytest.mark.parametrize(
    ("error", "on_own_terms", "expected"),
    [
        (EngineBroken("it broke"), True, True),
        (EngineBroken("it broke"), False, True),
        (EngineTimeout("nothing came"), True, True),
        (EngineTimeout("nothing came"), False, False),
        (EngineTimeout("too long", by_length=True), True, False),
        (EngineRefused("no"), True, True),
        (BadMessages("v0", "no", ["user"]), True, False),
        (BadSampling("no"), True, False),
        (ContextOverflow(9031, 8192), True, False),
        (EngineBusy("later", 1.0), True, False),
        (Crowded("no room"), True, False),
    ],
)
def test_what_its_client_is_to_blame_for_says_nothing_of_a_version(
    error: EngineError, on_own_terms: bool, expected: bool
) -> None:
    assert is_its_fault(error, on_own_terms=on_own_terms) is expected


def test_a_refused_message_is_named_with_its_place_and_all_roles() -> None:
    error = BadMessages("v0", "they must alternate", ["user", "user"], 1)
    assert str(error) == (
        "messages[1] (user, after user) is refused by the chat template of v0 (roles: user, user): they must alternate"
    )
    assert "messages[0] (user, first)" in str(error.at(0, ["user"]))
    assert "and 88 more" in str(error.at(None, ["user"] * 100))
