"""When a cycle is due."""

import pytest

from trainer.schedule import is_due


@pytest.mark.parametrize(
    ("new", "every", "active", "due"),
    [
        (50, 50, False, True),
        (51, 50, False, True),
        (49, 50, False, False),
        (50, 50, True, False),
        (999, 0, False, False),
    ],
)
def test_due_after_enough_new_preferences_and_never_beside_another(
    new: int, every: int, active: bool, due: bool
) -> None:
    assert is_due(new, every, active) is due


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="every=-1"):
        is_due(1, -1, False)
