"""Control text: what a person types never becomes a control token or a role marker of the model that reads it.

    tokens of the tokenizer, literals of the chat template ─► control_markers ─► neutralise(text, markers)

Where it sits: served prompts (`chat_app/prompts.py`) and training rows (`trainer/tokens.py`) both pass through
``neutralise``, so that a model is trained on the tokens it is served. The stored text stays as it was typed.

A marker is broken by a word joiner after its first character: invisible to people, another token sequence to the
model. Full-width letters, capitals and invisible characters do not hide a marker. Not covered: tokenizers that delete
word joiners (BERT's and NFKC_Casefold's normalisers; no chat model is known to have one), and words without any
punctuation that a template uses as roles: they are ordinary words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from feedback_store.records import Message

BREAK = "\u2060"  # word joiner: survives NFKC, and no tokenizer takes it for white space
FAMILIES = {
    "ChatML": ("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>"),
    "Zephyr, Phi-3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>"),
    "Llama-2, Mistral": (
        "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
        "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    ),
    "Llama-3": (
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        "<|eom_id|>", "<|python_tag|>",
    ),
    "Gemma": ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
    "DeepSeek": ("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "Command-R": (
        "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
    ),
}  # fmt: skip
FLOOR = frozenset(marker for markers in FAMILIES.values() for marker in markers)
"""The markers of the known families. They are broken for every model, and all there is where an engine cannot tell."""

_SENTINELS = tuple(f"Sentinel{place}" for place in ("Aqz", "Bqz", "Cqz", "Dqz"))
_SYSTEM, _ASKED, _ANSWERED, _ASKED_AGAIN = _SENTINELS
PROBES: tuple[tuple[Message, ...], ...] = tuple(
    (
        *opening,
        Message(role="user", content=_ASKED),
        Message(role="assistant", content=_ANSWERED),
        Message(role="user", content=_ASKED_AGAIN),
    )
    for opening in ((Message(role="system", content=_SYSTEM),), ())
)
"""Conversations to render with a chat template (generation prompt included): what is not theirs is the template's.
Some templates refuse the first one, which has a system message."""

_BRACKETED = re.compile(r"<+[^<>\[\]\n]+>+|\[+[^<>\[\]\n]+\]+|\{+[^{}\n]+\}+")
_REMEMBERED = 50_000  # characters
_LONGEST_WORDING = 5  # words of a role marker without brackets ("### Response:"); what is longer is prose


def control_markers(
    control_tokens: Iterable[str], other_tokens: Iterable[str] = (), rendered: Iterable[str] = ()
) -> frozenset[str]:
    """What must be broken for one model, the floor included.

    ``control_tokens`` are the tokenizer's special tokens, ``other_tokens`` its further added ones, where only what
    looks like a marker counts (others are runs of spaces and words); ``rendered`` are the ``PROBES`` as its chat
    template renders them.
    """
    tokens = {*control_tokens, *filter(_looks_like_a_marker, other_tokens)}
    literals = {marker for text in rendered for marker in _template_markers(text, tokens)}
    return FLOOR | {marker for marker in tokens | literals if len(marker.strip()) > 1}


def tokenizer_markers(tokenizer: Any) -> frozenset[str]:
    """``control_markers`` of a Hugging Face tokenizer with its chat template."""
    added = tokenizer.added_tokens_decoder.values()
    return control_markers(
        {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)},
        (token.content for token in added),
        filter(None, (_rendered(tokenizer, probe) for probe in PROBES)),
    )


def _rendered(tokenizer: Any, probe: Sequence[Message]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(list(probe), tokenize=False, add_generation_prompt=True))
    except Exception:  # noqa: BLE001 - a template may refuse a role in any way it likes, or not exist
        return None


def neutralise(text: str, markers: frozenset[str]) -> str:
    """The text with every marker in it broken; the same object where there is none. Doing it twice changes nothing.

    Takes time in proportion to the text, for a given set of markers.
    """
    pattern = _pattern(markers)
    folded = text.lower() if text.isascii() else text.translate(_FOLD)
    found = [match.start() for match in pattern.finditer(folded)]
    if not found:
        return text
    if not text.isascii():
        origins = [index for index, character in enumerate(text) for _ in _FOLD[ord(character)]]
        found = [origins[index] for index in found]
    pieces = []
    done = 0
    for index in found:
        if text[index + 1 : index + 2] != BREAK and index + 1 > done:
            pieces += [text[done : index + 1], BREAK]
            done = index + 1
    return "".join([*pieces, text[done:]]) if pieces else text


def neutralised(messages: Iterable[Message], markers: frozenset[str]) -> list[Message]:
    """The messages with every content neutralised; roles and contents, nothing else a message may carry."""
    return [Message(role=one["role"], content=neutralise(one["content"], markers)) for one in messages]


def _template_markers(rendered: str, tokens: Iterable[str]) -> Iterable[str]:
    """The role markers among what a template adds around the sentinels, without the tokenizer's own tokens."""
    literals = rendered
    for known in (*_SENTINELS, *sorted(tokens, key=len, reverse=True)):
        literals = literals.replace(known, "\n") if known.strip() else literals
    yield from _BRACKETED.findall(literals)
    for line in _BRACKETED.sub("\n", literals).splitlines():
        wording = line.strip()
        is_a_date = any(character.isdigit() for character in wording)
        if len(wording.split()) <= _LONGEST_WORDING and _looks_like_a_marker(wording) and not is_a_date:
            yield wording


def _looks_like_a_marker(text: str) -> bool:
    """It has letters and punctuation; words, runs of spaces and rules of dashes do not."""
    letters = any(character.isalnum() for character in text)
    return letters and not all(character.isalnum() or character.isspace() for character in text)


class _Fold(dict[int, str]):
    """Character code → how it is compared: NFKC, lower case, no invisible characters. Learns what is common."""

    def __missing__(self, code: int) -> str:
        compared = unicodedata.normalize("NFKC", chr(code)).casefold().replace("▁", " ")  # SentencePiece's space
        folded = "".join(one for one in compared if not _is_invisible(one))
        if len(self) < _REMEMBERED:
            self[code] = folded
        return folded


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f" or character == "\u034f"


_FOLD: Mapping[int, str] = _Fold()


@lru_cache(maxsize=16)
def _pattern(markers: frozenset[str]) -> re.Pattern[str]:
    """Finds every place where a marker begins in folded text, those inside other markers too."""
    folded = {marker.translate(_FOLD).strip() for marker in markers}
    begins: dict[str, set[str]] = {}
    for marker in folded:
        if len(marker) > 1:
            begins.setdefault(marker[0], set()).add(marker[1:])
    if not begins:
        return re.compile(r"(?!)")
    return re.compile("|".join(f"{re.escape(first)}(?={_trie(rests)})" for first, rests in sorted(begins.items())))


def _trie(texts: set[str]) -> str:
    """An expression for the beginning of any of the texts that looks at each character once."""
    if "" in texts:
        return ""
    branches: dict[str, set[str]] = {}
    for text in texts:
        branches.setdefault(text[0], set()).add(text[1:])
    return "(?:" + "|".join(re.escape(first) + _trie(rests) for first, rests in sorted(branches.items())) + ")"
