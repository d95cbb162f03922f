"""The HTTP routes of proposals: versions that seem better and wait for a person's word.

Where it sits: at the edge, beside `api.py`, which mounts them. Promoting a proposal is promoting its version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from chat_app.data_api import Strict
from chat_app.fields import PathId

if TYPE_CHECKING:
    from chat_app.operations import Operations


class DismissBody(Strict):
    reason: Annotated[str, Field(max_length=2_000)] = ""
    by: Annotated[str | None, Field(max_length=256)] = None


def proposal_routes(operations: Operations) -> APIRouter:
    """The routes, to be mounted by `api.create_api`."""
    router = APIRouter(prefix="/v1", tags=["proposals"])

    @router.get("/proposals")
    def proposals() -> dict[str, Any]:
        """The policy, which versions are proposed or wait, with what speaks for them, and what became of the others."""
        return operations.proposals.as_body()

    @router.post("/proposals/{version}/dismiss")
    def dismiss(version: PathId, body: DismissBody | None = None) -> dict[str, Any]:
        """Propose a version no longer, for good; a live trial that it wins may. 404 where it is not proposed."""
        body = body or DismissBody()
        operations.dismiss(version, reason=body.reason, by=body.by)
        return operations.proposals.as_body()

    return router
