"""The HTTP routes of the data a team owns: imports, exports, statistics, privacy, backups.

Where it sits: at the edge, beside `api.py`, which mounts them. A route checks the body and calls one method of
`DataOperations`.
"""

from itertools import chain, islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from chat_app.data import DataOperations
from chat_app.fields import Flag
from feedback_store.importers.pairs import Choices

Name = Annotated[str, Field(min_length=1, max_length=500)]
Location = Annotated[str, Field(min_length=1, max_length=4_096)]
MEDIA_TYPES = {"trl": "application/x-ndjson", "kto": "application/x-ndjson", "csv": "text/csv"}
_LINES: dict[str, Any] = {media_type: {"schema": {"type": "string"}} for media_type in MEDIA_TYPES.values()}


class Strict(BaseModel):
    """A body that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid")


class Nothing(Strict):
    """An empty body."""


class ImportBody(Strict):
    """`rejected`, `score` and `seed` are about raw UltraFeedback only, which has four answers to each prompt."""

    source: Location
    format: Annotated[str, Field(max_length=60)] = "auto"
    rejected: Literal["random", "worst"] = "random"
    score: Literal["ratings", "overall_score"] = "ratings"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class DatasetBody(Strict):
    """`out` is a folder on the server's machine; `push` a data set on the hub, private unless `public`."""

    out: Location | None = None
    raters: Literal["keep", "hash", "drop"] = "hash"
    push: Name | None = None
    public: Flag = False


class LearningBody(Strict):
    scope: Literal["conversation", "rater"]
    subject: Name
    learn: Flag


class ErasureBody(Strict):
    rater: Name


class QueryBody(Strict):
    sql: Annotated[str, Field(min_length=1, max_length=100_000)]
    limit_s: Annotated[float, Field(gt=0, le=60)] = 10.0


def data_routes(data: DataOperations) -> APIRouter:
    """Every route of the data."""
    router = APIRouter(prefix="/v1", tags=["data"])

    @router.post("/imports")
    def import_(body: ImportBody) -> dict[str, Any]:
        """Import preferences from a file on the server or a hub id; all or nothing."""
        choices = Choices(rejected=body.rejected, score=body.score, seed=body.seed)
        result = data.import_preferences(body.source, body.format, choices)
        return {
            "import_id": result.import_id,
            "imported": result.imported,
            "unpaired": result.unpaired,
            "duplicates": result.duplicates,
            "skipped": dict(result.skipped),
            "examples": {reason: list(numbers) for reason, numbers in result.examples.items()},
            "format": result.format,
            "why": result.why,
        }

    @router.get("/imports")
    def imports() -> dict[str, Any]:
        """The import in progress, if there is one, and the earlier ones."""
        return data.imports()

    @router.get("/export", response_class=StreamingResponse, responses={200: {"content": _LINES}})
    def export(format: Literal["trl", "kto", "csv"] = "trl") -> StreamingResponse:  # noqa: A002 - the public name
        """Every real preference with where it comes from: TRL or KTO JSON lines, or CSV.

        What fails at its beginning has a status; what fails later cuts the connection, so that no part passes for all.
        """
        lines = data.export_lines(format)
        begun = list(islice(lines, 1))
        return StreamingResponse(chain(begun, lines), media_type=MEDIA_TYPES[format])

    @router.post("/datasets")
    def datasets(body: DatasetBody | None = None) -> dict[str, Any]:
        """Write a folder that `datasets` opens, with its card; push it to the hub where asked."""
        body = body or DatasetBody()
        written, url = data.export_dataset(body.out, raters=body.raters, push=body.push, private=not body.public)
        return {"directory": str(written.directory), "rows": dict(written.rows), "url": url}

    @router.get("/statistics")
    def statistics() -> dict[str, Any]:
        """How much there is and how people judge."""
        return data.statistics().as_dict()

    @router.get("/agreement")
    def agreement() -> dict[str, Any]:
        """How far raters agree on pairs that two of them judged, and where they contradict each other."""
        return data.agreement()

    @router.get("/redactions")
    def redactions() -> dict[str, Any]:
        """What a snapshot would hide, masked."""
        return data.redaction_preview()

    @router.post("/query")
    def query(body: QueryBody) -> dict[str, Any]:
        """One SELECT on the store, read-only, with a time limit."""
        return data.query(body.sql, body.limit_s)

    @router.post("/learning")
    def learning(body: LearningBody) -> dict[str, Any]:
        """Whether the words of a conversation or a person may teach."""
        data.record_learning(body.scope, body.subject, body.learn)
        return body.model_dump()

    @router.post("/erasures")
    def erasures(body: ErasureBody) -> dict[str, Any]:
        """Remove a person's words everywhere, for ever; names the versions that were trained on them."""
        return data.erase(body.rater)

    @router.post("/backups")
    def back_up(_: Nothing | None = None) -> dict[str, Any]:
        """Copy the store while it works."""
        return data.back_up()

    @router.get("/backups")
    def backups() -> dict[str, Any]:
        """The backups there are, newest first."""
        return {"backups": data.backups()}

    return router
