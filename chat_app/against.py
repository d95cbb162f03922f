"""What speaks against making a version the champion, in a sentence with its numbers. Pure.

    its verdict, its guards, its live trials, the watch → Known → against: a sentence, or None
                                                            └──→ note: what the history says beside a promotion

Where it sits: `Operations` asks it wherever a version becomes the champion or is shown to people. Where something
speaks against it, a promotion or a rollback by a person needs `force` with a reason, both of which stand in the
history; one by the policy is never forced. A trial and a version served beside make no champion: there it is only said.

What does: it was judged worse; a guard or a doubt kept it out; its evaluation is missing or damaged; a live trial found
it worse; the watch took it back. *Not enough evidence* does not: people may promote such a version, and the history
says that the evidence was not enough. Going back by itself is free: it leads to what a person chose before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a version. `judgement`: the trainer's, None for the base, which nobody has judged.

    `taken_back`, `lost_trial`: sentences on why, None where that is not so.
    """

    version: str
    judgement: Mapping[str, Any] | None
    taken_back: str | None = None
    lost_trial: str | None = None

    @property
    def against(self) -> str | None:
        """What speaks against it as the champion; None where nothing does."""
        said = [sentence for sentence in (self._judged_worse(), *self._found_worse()) if sentence]
        return " ".join(said) or None

    @property
    def note(self) -> str | None:
        """What the history says of the evidence; None where that spoke for the version, or there was none to have."""
        if self.against is not None:
            return f"Against the evidence: {self.against}"
        if self.judgement is not None and self.judgement["decision"] == "keep":
            return f"The evidence was not enough: {self._counted()}."
        return None

    def _judged_worse(self) -> str | None:
        found = self.judgement
        if found is None:
            return None
        if found["decision"] is None:
            return f"The evaluation of {self.version} is missing or damaged ({found['damage']})."
        problems = " ".join(found["problems"])
        if found["decision"] == "reject":
            return f"{self.version} was judged worse: {self._counted()}. {problems}".strip()
        return f"{self.version} failed a check of its evaluation ({self._counted()}): {problems}" if problems else None

    def _found_worse(self) -> tuple[str | None, str | None]:
        lost = None if self.lost_trial is None else f"{self.version} was found worse in a live trial: {self.lost_trial}"
        back = (
            None if self.taken_back is None else f"{self.version} answered once and was taken back: {self.taken_back}"
        )
        return lost, back

    def _counted(self) -> str:
        assert self.judgement is not None
        wins, ties, losses = (int(self.judgement[key]) for key in ("wins", "ties", "losses"))
        counted = [_number(wins, "win", "wins"), _number(losses, "loss", "losses")]
        if ties:
            counted.append(_number(ties, "tie", "ties"))
        pairs = wins + ties + losses
        return f"{', '.join(counted)} on {_number(pairs, 'held-out pair', 'held-out pairs')}"


def is_reason(text: str) -> bool:
    """Whether somebody who reads the history later finds a word in it."""
    return any(character.isalnum() for character in text)


def _number(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
