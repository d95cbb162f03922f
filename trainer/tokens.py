"""A pair as the model reads it: control text broken, then token ids by the base's chat template.

`job.py` trains on `as_read` and counts with `tokenise`, `evaluate.py` scores with `tokenise`; the chat breaks control
text the same way (`feedback_store/control_text.py`), so that a prompt has the same tokens where it is served.

The same cut as TRL's DPOTrainer makes, so that a pair is judged on the tokens it is trained on: the answer starts
where prompt and prompt + answer part, and ends with what the template puts after an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from feedback_store.control_text import neutralise, neutralised, tokenizer_markers
from feedback_store.records import Message, Preference, UnpairedPreference


@dataclass(frozen=True, slots=True)
class PairTokens:
    """Token ids of the prompt (generation prompt included) and of both answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def total(self) -> int:
        """Tokens of the pair with its prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@lru_cache(maxsize=2)
def markers(tokenizer: Any) -> frozenset[str]:
    """What must not stand in a text as it is; found out once for a tokenizer."""
    return tokenizer_markers(tokenizer)


def as_read(tokenizer: Any, preference: Preference) -> Preference:
    """The preference with control text broken in its prompt and in both answers."""
    broken = markers(tokenizer)
    return replace(
        preference,
        prompt=tuple(neutralised(preference.prompt, broken)),
        chosen=neutralise(preference.chosen, broken),
        rejected=neutralise(preference.rejected, broken),
    )


def answer_as_read(tokenizer: Any, rating: UnpairedPreference) -> UnpairedPreference:
    """The rated answer with control text broken in it and in its prompt."""
    broken = markers(tokenizer)
    return replace(
        rating,
        prompt=tuple(neutralised(rating.prompt, broken)),
        completion=neutralise(rating.completion, broken),
    )


def prompt_length(tokenizer: Any, prompt: Sequence[Message]) -> int:
    """Tokens of the prompt as it is read, generation prompt included."""
    return len(_ids(tokenizer, neutralised(prompt, markers(tokenizer)), add_generation_prompt=True))


def answer_spans(tokenizer: Any, dialogue: Sequence[Message]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a dialogue up to its last answer, control text broken, and where each answer begins and ends.

    An answer ends with what the template puts after it. One that the template writes otherwise once more is said after
    it (some drop the thoughts of earlier turns) has no span.
    """
    messages = neutralised(dialogue, markers(tokenizer))
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    ids = _ids(tokenizer, messages[: answers[-1] + 1])
    spans = []
    for index in answers:
        read = _ids(tokenizer, messages[:index], add_generation_prompt=True)
        said = _ids(tokenizer, messages[: index + 1])
        if ids[: len(said)] == said:
            spans.append((_common(read, said), len(said)))
    return ids, spans


def tokenise(tokenizer: Any, preference: Preference, max_length: int) -> PairTokens:
    """Token ids of one preference; answers are cut so that prompt + answer is `max_length` at most."""
    preference = as_read(tokenizer, preference)
    prompt = _ids(tokenizer, preference.prompt, add_generation_prompt=True)
    chosen = _ids(tokenizer, (*preference.prompt, Message(role="assistant", content=preference.chosen)))
    rejected = _ids(tokenizer, (*preference.prompt, Message(role="assistant", content=preference.rejected)))
    start = min(_common(prompt, chosen), _common(prompt, rejected))
    return PairTokens(prompt[:start], chosen[start:max_length], rejected[start:max_length])


def _ids(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
