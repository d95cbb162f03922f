"""A chat with branches, and what the thumbs in it say about its answers.

    messages of an export --ChatMessage--> Chat --judgement--> pairs and labels

Open WebUI and LibreChat both keep a tree: every message names the one before it, and a question that was asked again
or sent to several models has several answers. A thumb alone makes a labelled answer. Where another answer to the same
question has the opposite thumb, the two make a pair instead: each judgement counts once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from feedback_store.importers.pairs import Item, Skip, read_label, read_pair, read_versions
from feedback_store.records import Message


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat. ``rating`` is True for a thumb up, False for a thumb down, None for no thumb.

    ``is_complete`` is False for an answer that broke off; such an answer teaches nothing.
    """

    message_id: str
    parent_id: str | None
    role: str
    text: str
    model: object
    rating: bool | None
    is_complete: bool


class Chat:
    """The messages of one chat; ``system`` is the instruction it ran under, if any."""

    def __init__(self, messages: Iterable[ChatMessage], system: object = None) -> None:
        self.messages = {message.message_id: message for message in messages}
        self._system = system.strip() if isinstance(system, str) else ""

    def judgement(self, message: ChatMessage, rating: bool, rater: str | None, *, are_compared: bool) -> list[Item]:
        """What ``rating`` on an answer says.

        ``are_compared``: a thumb also sets the answer above (up) or below (down) those of other models that have no
        thumb of their own.
        """
        if message.role != "assistant" or not message.is_complete:
            return [Skip("malformed")]
        prompt = self._prompt(message)
        others = [other for other in self._siblings(message) if _is_rival(message, rating, other, are_compared)]
        if not others:
            return [read_label(prompt, message.text, rating, rater=rater, versions=read_versions(message.model))]
        couples = [(message, other) if rating else (other, message) for other in others]
        return [
            read_pair(prompt, good.text, bad.text, rater=rater, versions=read_versions(good.model, bad.model))
            for good, bad in couples
        ]

    def judgements(self, rater: str | None, *, are_compared: bool) -> list[Item]:
        """What all the thumbs in the chat say; ``unlabelled`` where there is none."""
        items: list[Item] = []
        for message in self.messages.values():
            if message.rating is not None:
                found = self.judgement(message, message.rating, rater, are_compared=are_compared)
                items += [item for item in found if isinstance(item, Skip) or item not in items]
        return items or [Skip("unlabelled")]

    def _siblings(self, message: ChatMessage) -> list[ChatMessage]:
        return [
            other
            for other in self.messages.values()
            if other.parent_id == message.parent_id and other is not message and other.role == "assistant"
        ]

    def _prompt(self, answer: ChatMessage) -> list[Message]:
        """The messages that lead to an answer, the oldest first."""
        path: list[Message] = []
        seen = {answer.message_id}
        parent = self.messages.get(answer.parent_id or "")
        while parent is not None and parent.message_id not in seen:
            seen.add(parent.message_id)
            path.append(Message(role=parent.role, content=parent.text))
            parent = self.messages.get(parent.parent_id or "")
        if self._system:
            path.append(Message(role="system", content=self._system))
        return path[::-1]


def _is_rival(message: ChatMessage, rating: bool, other: ChatMessage, are_compared: bool) -> bool:
    if not other.is_complete:
        return False
    if other.rating is not None:
        return other.rating is not rating
    return are_compared and other.model != message.model
