"""What LibreChat exports: a conversation with the thumbs on its messages.

The JSON export of a conversation (menu of the conversation, Export, json) is one object ``{conversationId, endpoint,
title, exportAt, branches, recursive, options?, messages: […]}``, or with ``messagesTree`` whose messages have their
``children`` inside (Export with "recursive"). Seen in repository danny-avila/LibreChat:
client/src/hooks/Conversations/useExportConversation.ts and hooks/Messages/useBuildMessageTree.ts (commit 00b3bc3); a
message is that of packages/data-schemas/src/schema/message.ts (commit 0198a2b): ``{messageId, parentMessageId,
isCreatedByUser, text or content parts, model, error, unfinished, finish_reason, feedback: {rating: "thumbsUp" or
"thumbsDown", tag, text}}``. No export of a running LibreChat was at hand.

A row is a conversation, a single file has one; a list of them, or one a line, is read as well. A thumb makes a labelled
answer, two answers to one message with opposite thumbs make a pair; for that, export with all branches. The rater is
the message's or the conversation's ``user``, where an export has it (the one from the page leaves it out). The
instruction of the conversation (``options.promptPrefix`` or ``options.system``) goes before the prompt.
Not read: the CSV, text and Markdown exports, which drop the thumbs; a dump of single messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from feedback_store.importers.pairs import Choices, Item, Skip, read_rater
from feedback_store.importers.sources import Row
from feedback_store.importers.threads import Chat, ChatMessage

NAME = "librechat"
WHY = "it is a LibreChat conversation: its messages have a messageId and isCreatedByUser"

_THUMBS = {"thumbsUp": True, "thumbsDown": False}


def matches(row: Row) -> bool:
    """Whether a row is a conversation with LibreChat's messages."""
    messages = _top(row)
    return bool(messages) and all("messageId" in message and "isCreatedByUser" in message for message in messages)


def read(row: Row, _choices: Choices) -> Item | Sequence[Item]:
    """What the thumbs of a conversation say."""
    messages = list(_flat(_top(row)))
    if not messages:
        return Skip("malformed")
    raters = (read_rater(one.get("user")) for one in (*messages, row))
    options = row.get("options")
    system = options.get("promptPrefix") or options.get("system") if isinstance(options, dict) else None
    chat = Chat(map(_message, messages), system)
    return chat.judgements(next((rater for rater in raters if rater), None), are_compared=False)


def _top(row: Row) -> list[dict[str, Any]]:
    listed = row.get("messages") or row.get("messagesTree")
    return [message for message in listed if isinstance(message, dict)] if isinstance(listed, list) else []


def _flat(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages with those nested in them; without recursion, for a long chat nests deeply."""
    waiting = messages[::-1]
    while waiting:
        message = waiting.pop()
        yield message
        children = message.get("children")
        if isinstance(children, list):
            waiting += [child for child in children[::-1] if isinstance(child, dict)]


def _message(message: dict[str, Any]) -> ChatMessage:
    feedback, parent = message.get("feedback"), message.get("parentMessageId")
    return ChatMessage(
        message_id=str(message.get("messageId")),
        parent_id=None if parent is None else str(parent),
        role="user" if message.get("isCreatedByUser") else "assistant",
        text=_text(message),
        model=message.get("model"),
        rating=_THUMBS.get(str(feedback.get("rating"))) if isinstance(feedback, dict) else None,
        is_complete=not (message.get("error") or message.get("unfinished") or message.get("finish_reason") == "length"),
    )


def _text(message: dict[str, Any]) -> str:
    """What was said: ``text``, or the text parts of ``content`` (thoughts and tool calls are other parts)."""
    text, parts = message.get("text"), message.get("content")
    if isinstance(text, str) and text.strip():
        return text
    return "\n\n".join(filter(None, map(_part, parts))) if isinstance(parts, list) else ""


def _part(part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        return ""
    text = part.get("text")
    if isinstance(text, dict):
        text = text.get("value")
    return text if isinstance(text, str) else ""
