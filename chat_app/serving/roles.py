"""Which message a chat template does not take: templates refuse orders of roles, and do not say where.

Where it sits: the engines ask here once a template has refused a conversation, so that a client reads which message it
is. Nothing is rendered while all is well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from feedback_store.records import Message

Reads = Callable[[Sequence[Message]], Awaitable[bool]]


async def first_refused(messages: Sequence[Message], reads: Reads) -> int | None:
    """The index of the message where a conversation becomes one that `reads` refuses; None where it reads all of it.

    `reads` is asked about ten times for a thousand messages: what begins with a refused beginning counts as refused.
    """
    if await reads(messages):
        return None
    taken, refused = 0, len(messages)
    while refused - taken > 1:
        middle = (taken + refused) // 2
        if await reads(_asking(messages[:middle])):
            taken = middle
        else:
            refused = middle
    return refused - 1


def _asking(beginning: Sequence[Message]) -> Sequence[Message]:
    """A beginning that can be answered: some servers do not render an answer at the end, they go on with it."""
    return beginning if beginning[-1]["role"] == "user" else [*beginning, Message(role="user", content="Hello")]
