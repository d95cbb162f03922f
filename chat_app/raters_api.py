"""The HTTP routes of raters: rate a pair, the list of raters, quarantine, gold pairs.

Where it sits: at the edge, beside `api.py`, which mounts them. A route checks the body and calls one method of
`RaterOperations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from chat_app.data_api import Name, Strict

if TYPE_CHECKING:
    from chat_app.operations import Operations


class QuarantineBody(Strict):
    rater: Name
    lift: bool = False
    reason: Annotated[str, Field(max_length=2_000)] = ""


class EmptyBody(Strict):
    """An empty body."""


def raters_routes(operations: Operations) -> APIRouter:
    """The routes, to be mounted by `api.create_api`."""
    router = APIRouter(prefix="/v1", tags=["raters"])

    @router.post("/rate")
    def rate(_: EmptyBody | None = None) -> dict[str, Any]:
        """A pair to judge, blind; `pair_id` is null where none is left. Settle it with POST /v1/picks, `reveal` false.

        It is one that others judged, one that nobody did, or now and then a gold pair; nothing in it tells which.
        """
        pair = operations.raters.next_pair()
        if pair is None:
            return {"pair_id": None, "messages": [], "candidates": []}
        return {
            "pair_id": pair.pair_id,
            "messages": list(pair.prompt),
            "candidates": [{"candidate_id": one.candidate_id, "text": one.text} for one in (pair.first, pair.second)],
        }

    @router.get("/raters")
    def raters() -> dict[str, Any]:
        """Everybody: picks, agreement, gold pairs, places, speed, share of the next snapshot, what looks suspicious."""
        return operations.raters.raters()

    @router.post("/quarantine")
    def quarantine(body: QuarantineBody) -> dict[str, Any]:
        """From now on nothing of a rater enters a snapshot, a trial or the strengths; with `lift`, it does again."""
        return operations.raters.quarantine(body.rater, lift=body.lift, reason=body.reason)

    @router.get("/gold")
    def gold() -> dict[str, Any]:
        """The gold pairs, and how raters did on each."""
        return operations.raters.gold()

    return router
