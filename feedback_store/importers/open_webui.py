"""What Open WebUI exports: its feedback history, and its chats with the thumbs in them.

* Feedback history (Admin, Evaluations, Feedbacks, Export; ``GET /api/v1/evaluations/feedbacks/all/export``): a list of
  ``{id, user_id, type: "rating", data: {rating: 1 or -1, model_id, sibling_model_ids, …}, meta: {message_id, chat_id,
  arena, …}, snapshot: {chat: {chat: {history: {messages: {id: message}}}}}}``. Seen in repository
  open-webui/open-webui: backend/open_webui/models/feedbacks.py (commit 83cbec6) and the component that fills it,
  src/lib/components/chat/Messages/ResponseMessage.svelte (commit d79ba4a).
* Chats (Settings, Data Controls, Export Chats): a list of ``{id, user_id, title, chat: {history: …}}``; a rated message
  has ``annotation: {rating: 1 or -1}`` (same component).

A message is ``{id, parentId, childrenIds, role, content, model, selectedModelId, done, error, annotation}``. A thumb
makes a labelled answer. Where other models answered the same message, a thumb up says that it was better than theirs
and a thumb down that it was worse, as in Open WebUI's own leaderboard (routers/evaluations.py): that makes pairs. The
rater is ``user_id``; ``chat.params.system`` goes before the prompt.
The thoughts of a model (``<details type="reasoning">``) are cut out of the text, as Open WebUI does before it sends a
history. Not read: the lists without ``snapshot`` (shared or CSV exports), where neither question nor answer stands;
attached files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from feedback_store.importers.pairs import Choices, Item, Skip, as_number, read_rater
from feedback_store.importers.sources import Row
from feedback_store.importers.threads import Chat, ChatMessage

NAME = "open_webui"
WHY = "its rows are Open WebUI feedback (data with a rating, meta, snapshot) or chats with their history"

_HIDDEN = re.compile(r'<details type="(?:reasoning|code_interpreter)".*?</details>\s*', re.DOTALL)


def matches(row: Row) -> bool:
    """Whether a row is feedback or a chat of Open WebUI."""
    return _is_feedback(row) or _is_chat(row)


def read(row: Row, _choices: Choices) -> Item | Sequence[Item]:
    """What the thumb of a feedback row, or all thumbs of a chat, say."""
    rater = read_rater(row.get("user_id"))
    if _is_feedback(row):
        return _read_feedback(row, rater)
    return _chat(row["chat"]).judgements(rater, are_compared=True) if _is_chat(row) else Skip("malformed")


def _is_feedback(row: Row) -> bool:
    data, meta = row.get("data"), row.get("meta")
    return isinstance(data, dict) and isinstance(meta, dict) and "rating" in data and "type" in row


def _is_chat(row: Row) -> bool:
    chat = row.get("chat")
    return isinstance(chat, dict) and isinstance(chat.get("history"), dict)


def _read_feedback(row: Row, rater: str | None) -> Item | Sequence[Item]:
    rating = _thumb(row["data"]["rating"])
    if rating is None:
        return Skip("unlabelled")
    snapshot = row.get("snapshot")
    kept = snapshot.get("chat") if isinstance(snapshot, dict) else None
    if not isinstance(kept, dict):
        return Skip("empty")
    inner = kept.get("chat")
    chat = _chat(inner if isinstance(inner, dict) else kept)
    answer = chat.messages.get(str(row["meta"].get("message_id")))
    return Skip("malformed") if answer is None else chat.judgement(answer, rating, rater, are_compared=True)


def _chat(chat: dict[str, Any]) -> Chat:
    history, params = chat.get("history"), chat.get("params")
    kept = history.get("messages") if isinstance(history, dict) else None
    messages = list(kept.values()) if isinstance(kept, dict) else chat.get("messages")
    system = params.get("system") if isinstance(params, dict) else None
    return Chat((_message(one) for one in messages or () if isinstance(one, dict)), system)


def _message(message: dict[str, Any]) -> ChatMessage:
    annotation, parent = message.get("annotation"), message.get("parentId")
    return ChatMessage(
        message_id=str(message.get("id")),
        parent_id=None if parent is None else str(parent),
        role=str(message.get("role")),
        text=_text(message.get("content")),
        model=message.get("selectedModelId") or message.get("model"),
        rating=_thumb(annotation.get("rating")) if isinstance(annotation, dict) else None,
        is_complete=not message.get("error") and message.get("done") is not False,
    )


def _text(content: object) -> str:
    if not isinstance(content, str):
        return ""
    return _HIDDEN.sub("", content) if "<details type=" in content else content


def _thumb(rating: object) -> bool | None:
    return {1.0: True, -1.0: False}.get(as_number(rating) or 0.0)
