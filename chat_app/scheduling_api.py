"""The HTTP routes of when runs start by themselves, and of what one would take.

Where it sits: at the edge, beside `api.py`, which mounts them. A route checks the body and calls one method of
`Scheduling` or `Operations`.
"""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from chat_app.data_api import Name, Strict
from chat_app.fields import RecipeName, Taste
from chat_app.operations import RATER, Operations

Text = Annotated[str | None, Field(max_length=200)]


class PreflightBody(Strict):
    """As for a run."""

    recipe: RecipeName | None = None
    max_steps: Annotated[int | None, Field(ge=1)] = None
    num_processes: Annotated[int | None, Field(ge=1)] = None
    practice: Taste | None = None
    without: Annotated[list[Name], Field(max_length=1_000)] | None = None


class ScheduleBody(Strict):
    """Keys that are left out stay as they are; null: no cron, no quiet hours. `reset` goes back to the settings."""

    cron: Text = None
    every: Annotated[int, Field(ge=0)] = 0
    at_least: Annotated[int, Field(ge=0)] = 1
    quiet: Text = None
    time_zone: Annotated[str, Field(min_length=1, max_length=200)] = "UTC"
    reset: bool = False


def scheduling_routes(operations: Operations) -> APIRouter:
    """The routes under `/v1`."""
    router = APIRouter(prefix="/v1", tags=["schedule"])

    @router.get("/schedule")
    def schedule() -> dict[str, Any]:
        """When the next run starts by itself, and what was decided lately, skips with their reasons."""
        return operations.scheduling.state()

    @router.put("/schedule")
    def change(body: ScheduleBody) -> dict[str, Any]:
        """Change the schedule for good; 422 with what is allowed, and then nothing has changed."""
        if body.reset:
            return operations.scheduling.reset()
        changes = {key: getattr(body, key) for key in body.model_fields_set - {"reset"}}
        return operations.scheduling.change(changes, by=RATER) if changes else operations.scheduling.state()

    @router.post("/preflight")
    def preflight(body: PreflightBody | None = None) -> dict[str, Any]:
        """What a run would take in time and memory, and why it would be refused; nothing is started."""
        body = body or PreflightBody()
        return operations.preflight(
            recipe=body.recipe,
            max_steps=body.max_steps,
            num_processes=body.num_processes,
            practice_taste=body.practice,
            without=body.without,
        )

    return router
