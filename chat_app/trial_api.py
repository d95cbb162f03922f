"""The HTTP routes of live trials and of the strength of versions.

Where it sits: at the edge, beside `api.py`, which mounts them. A route checks the body and calls one method of
`TrialOperations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from chat_app.data_api import Strict
from chat_app.fields import Id, PathId

if TYPE_CHECKING:
    from chat_app.operations import Operations

MAX_VOTES = 100_000


class TrialBody(Strict):
    version: Id
    share: Annotated[float | None, Field(gt=0, le=1)] = None
    max_votes: Annotated[int | None, Field(ge=1, le=MAX_VOTES)] = None
    reason: Annotated[str, Field(max_length=2_000)] = ""


class NoBody(Strict):
    """An empty body."""


def trial_routes(operations: Operations) -> APIRouter:
    """The routes, to be mounted by `api.create_api`."""
    router = APIRouter(prefix="/v1", tags=["trials"])

    @router.post("/trials")
    async def start_trial(body: TrialBody) -> dict[str, Any]:
        """Show a version, blind, against the champion in a share of the pairs; 409 while another trial runs.

        `warning`: what speaks against the version. It makes no champion: that needs a promotion all the same.
        """
        begun = await operations.trials.start(
            body.version, share=body.share, max_votes=body.max_votes, reason=body.reason
        )
        return {**begun, "warning": await run_in_threadpool(operations.against, body.version)}

    @router.get("/trials")
    def trials() -> dict[str, Any]:
        """Every trial, the newest first."""
        return {"trials": operations.trials.trials()}

    @router.get("/trials/{trial_id}")
    def trial(trial_id: PathId) -> dict[str, Any]:
        """One trial: state, votes, interval, what they say in a sentence."""
        return operations.trials.trial(trial_id)

    @router.post("/trials/{trial_id}/stop")
    async def stop_trial(trial_id: PathId, _: NoBody | None = None) -> dict[str, Any]:
        """End a trial; the champion stays."""
        return await operations.trials.stop(trial_id)

    @router.get("/strength")
    def strength() -> dict[str, Any]:
        """The strength of every version from all blind picks, with intervals; is it getting better?"""
        return operations.strength()

    return router
