"""OpenAI's chat body as clients send it: what is honoured, what does not matter here, and what is refused by its name.

Where it sits: the validators of `api.py` pass a body through here before anything looks at it. A key that changes what
a request means, and that is not honoured, is 400: to answer as if it were not there would be success without a word.
Its neutral value asks for nothing and is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from chat_app.operations import Refused

# They say who asks, or what OpenAI's own service does with a request; the answer is the same with them.
WITHOUT_MEANING = frozenset(
    {"metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "user", "safety_identifier"}
)

ONE_ANSWER = "ask once for each answer, or twice for a pair (POST /v1/pairs)"
NO_TOOLS = "tools are not supported"
TEXT_ONLY = "answers are plain text"
NOT_HONOURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), ONE_ANSWER),
    "best_of": ((1,), ONE_ANSWER),
    "stream_options": (({}, {"include_usage": False}), "a stream carries no usage; ask without `stream` for it"),
    "logprobs": ((False,), "log-probabilities are not given"),
    "top_logprobs": ((0,), "log-probabilities are not given"),
    "logit_bias": (({},), "the odds of single tokens cannot be changed"),
    "presence_penalty": ((0,), "repetition is not penalised"),
    "frequency_penalty": ((0,), "repetition is not penalised"),
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none",), NO_TOOLS),
    "parallel_tool_calls": ((), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none",), NO_TOOLS),
    "response_format": (({"type": "text"},), TEXT_ONLY),
    "modalities": ((["text"],), TEXT_ONLY),
    "audio": ((), TEXT_ONLY),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "the effort cannot be chosen"),
    "verbosity": ((), "the length is chosen by max_tokens or a preset"),
    "web_search_options": ((), "nothing is looked up"),
    "moderation": ((), "nothing is moderated"),
}
"""Key → the values beside null that ask for nothing, and what to know instead."""

_EMPTY_IN_A_MESSAGE = frozenset({"tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning_content"})
_ROLES_OF_TOOLS = ("tool", "function")


def honoured(body: Any, known: Collection[str]) -> Any:
    """The keys of a chat body that are `known` here and say something: null is as if left out.

    Raises Refused (400) for a key that would be ignored.
    """
    if not isinstance(body, Mapping):
        return body
    for key, value in body.items():
        if key in known or key in WITHOUT_MEANING:
            continue
        if key not in NOT_HONOURED:
            raise _unknown(key, known)  # a slip of the pen, or a meaning that would be ignored
        if value is not None:
            _require_neutral(key, value)
    limits = [body[key] for key in ("max_tokens", "max_completion_tokens") if body.get(key) is not None]
    if len(limits) == 2 and limits[0] != limits[1]:
        raise Refused(
            400,
            f"max_tokens is {_shown(limits[0])} and max_completion_tokens is {_shown(limits[1])}: they are two names "
            "of one limit. Send one of them.",
            param="max_tokens",
        )
    return {key: value for key, value in body.items() if key in known and value is not None}


def _require_neutral(key: str, value: Any) -> None:
    neutral, instead = NOT_HONOURED[key]
    if not any(_same(value, one) for one in neutral):
        taken = " or ".join(["null", *map(_shown, neutral)])
        raise Refused(400, f"{key} is {_shown(value)}: {instead}. Leave {key} out, or send {taken}.", param=key)


def _unknown(key: Any, known: Collection[str]) -> Refused:
    name = str(key)[:80]
    return Refused(
        400, f"{name!r} is no key of a chat request here. There are: {', '.join(sorted(known))}.", param=name
    )


def plain_messages(messages: Any) -> Any:
    """Messages of role and text. Raises Refused (400) for what of them would not be read.

    Parts of text are joined line by line, as model servers do; `developer` is OpenAI's newer name for `system`.
    """
    if not isinstance(messages, list):
        return messages
    return [_plain(message, f"messages.{index}") for index, message in enumerate(messages)]


def _plain(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    role, content = message.get("role"), message.get("content")
    if role in _ROLES_OF_TOOLS:
        raise Refused(400, f"{where}.role is {role!r}: {NO_TOOLS}. Leave such messages out.", param=f"{where}.role")
    for key, value in message.items():
        if key in ("role", "content") or (key in _EMPTY_IN_A_MESSAGE and value in (None, [])):
            continue
        if key == "name" and value is None:
            continue
        name = str(key)[:80]
        raise Refused(
            400,
            f"{where}.{name} is {_shown(value)}: of a message only role and content are read. Leave it out, or say it "
            "in the content.",
            param=f"{where}.{name}",
        )
    role = "system" if role == "developer" else role
    given = {"role": role} if "role" in message else {}
    return given | ({"content": _text(content, f"{where}.content")} if "content" in message else {})


def _text(content: Any, where: str) -> Any:
    """The text of a content that may come in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise Refused(
                400,
                f"{where}.{index} is {_shown(part)}: only parts of text are read, each "
                '{"type": "text", "text": "…"}. Images, sounds and files are not supported.',
                param=f"{where}.{index}",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and no truth value where a number is meant or the other way round."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
