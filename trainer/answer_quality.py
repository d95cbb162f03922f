"""What can be seen of answers without a judge: length, repetition, emptiness, refusal, language. Pure.

`evaluate.py` describes the answers of both versions with it, `guards.py` compares the descriptions.
Not covered: whether an answer is right. A language is told from at least `LANGUAGE_CHARACTERS` characters of prose.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

GRAM = 4
LANGUAGE_CHARACTERS = 40
SURE = 0.9

# How refusals begin, in the manner of the keyword lists of Zou et al., 2023, appendix B.
_REFUSAL = re.compile(
    r"""^\W*(?:
        (?:i(?:'m|\ am)\ (?:very\ |so\ |really\ )?sorry|sorry|apologies|unfortunately|as\ an\ ai)\b
            [^.!?]{0,60}?\b(?:can(?:no|')?t|unable|not\ able|won't|do\ not|don't)\b
        |i\ (?:can(?:no|')t|can\ not|am\ unable\ to|am\ not\ able\ to|won't\ be\ able\ to|must\ decline)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: `tokens` generated, `finished` where the model ended it itself."""

    question: str
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Description:
    """What a version's answers are like. All but `answers`, `words` and `repetition` are numbers of answers."""

    answers: int
    words: float  # median
    repetition: float  # mean
    empty: int
    unfinished: int
    refusals: int
    other_language: int

    def as_dict(self) -> dict[str, Any]:
        """As evaluation.json keeps it."""
        return asdict(self)


def describe(answers: Sequence[Answer]) -> Description:
    """The description of one version's answers. Raises ValueError for none."""
    if not answers:
        raise ValueError("describe() needs at least one answer")
    return Description(
        answers=len(answers),
        words=float(statistics.median(len(answer.text.split()) for answer in answers)),
        repetition=statistics.fmean(repetition(answer.text) for answer in answers),
        empty=sum(is_empty(answer.text) for answer in answers),
        unfinished=sum(not answer.finished for answer in answers),
        refusals=sum(is_refusal(answer.text) for answer in answers),
        other_language=sum(changes_language(answer) for answer in answers),
    )


def is_empty(text: str) -> bool:
    """True for an answer without a letter or a digit."""
    return not any(character.isalnum() for character in text)


def repetition(text: str) -> float:
    """The part of the runs of four words that stood there before, 0 to 1: seq-rep-4 of Welleck et al., 2020."""
    words = text.lower().split()
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """True where the answer begins by declining, in English."""
    return _REFUSAL.match(text) is not None


def changes_language(answer: Answer) -> bool:
    """True where question and answer are surely in different languages."""
    asked, answered = language(answer.question), language(answer.text)
    return asked is not None and answered is not None and asked != answered


def language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, None where it is too short or not sure."""
    prose = re.sub(r"```.*?(?:```|$)", " ", text, flags=re.DOTALL)
    if sum(character.isalpha() for character in prose) < LANGUAGE_CHARACTERS:
        return None
    code, probability = _identifier().classify(prose)
    return str(code) if probability >= SURE else None


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
