"""Is a cycle due? Pure: counts in, yes or no out. The server asks it after each pick.

Not covered: hours of the day (they come with the schedule page).
"""

from __future__ import annotations


def is_due(new_preferences: int, every: int, active: bool) -> bool:
    """True when `every` new preferences have come in since the last run and no run is going on.

    `every` = 0 means: only when someone asks. Raises ValueError for negative numbers.
    """
    if every < 0 or new_preferences < 0:
        raise ValueError(f"is_due({new_preferences}, every={every}): both must be 0 or more")
    return every > 0 and not active and new_preferences >= every
