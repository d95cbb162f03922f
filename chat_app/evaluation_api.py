"""The HTTP routes of judging: held-out pairs, benchmarks, with training against without.

Where it sits: at the edge, beside `api.py`, which mounts them. Each takes minutes, in a child of the trainer's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from chat_app.data_api import Strict
from chat_app.fields import Id

if TYPE_CHECKING:
    from chat_app.operations import Operations


class EvaluationBody(Strict):
    version: Id
    against: Id | None = None


class BenchmarkBody(Strict):
    benchmark: Annotated[str, Field(min_length=1, max_length=4096)]
    version: Id
    against: Id | None = None
    limit: Annotated[int | None, Field(ge=1)] = None
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 512


class ComparisonBody(Strict):
    versions: list[Id] = Field(min_length=1, max_length=16)


def evaluation_routes(operations: Operations) -> APIRouter:
    """The routes, to be mounted by `api.create_api`."""
    router = APIRouter(prefix="/v1", tags=["loop"])

    @router.post("/evaluations")
    def evaluations(body: EvaluationBody) -> dict[str, Any]:
        """Compare two versions on the held-out pairs of the first one's snapshot. Takes minutes."""
        return operations.evaluate(body.version, body.against)

    @router.post("/benchmarks")
    def benchmarks(body: BenchmarkBody) -> dict[str, Any]:
        """Have a version answer a benchmark, and a judge mark or compare the answers. Takes minutes."""
        return operations.benchmark(
            body.benchmark, body.version, body.against, limit=body.limit, max_tokens=body.max_tokens
        )

    @router.post("/comparisons")
    def comparisons(body: ComparisonBody) -> dict[str, Any]:
        """Judge each version against the base on the same held-out pairs. Takes minutes for each."""
        return operations.compare_with_base(body.versions)

    return router
