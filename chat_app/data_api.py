"""The HTTP routes of the data a team owns: imports, exports, statistics, privacy, backups.

Where it sits: at the edge, beside `api.py`, which mounts them. A route checks the body and calls one method of
`DataOperations`.
"""

from collections.abc import Callable, Coroutine
from itertools import chain, islice
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import Match
from starlette.types import Scope

from chat_app.data import DataOperations
from chat_app.fields import Flag
from feedback_store.importers.pairs import Choices
from feedback_store.records import ImportResult

Name = Annotated[str, Field(min_length=1, max_length=500)]
Location = Annotated[str, Field(min_length=1, max_length=4_096)]
FORM = "multipart/form-data"
UPLOAD = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        **{name: {"type": "string"} for name in ("format", "rejected", "score", "seed")},
    },
}
MEDIA_TYPES = {"trl": "application/x-ndjson", "kto": "application/x-ndjson", "csv": "text/csv"}
_LINES: dict[str, Any] = {media_type: {"schema": {"type": "string"}} for media_type in MEDIA_TYPES.values()}


class Strict(BaseModel):
    """A body that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid")


class Nothing(Strict):
    """An empty body."""


class UploadOptions(Strict):
    """`rejected`, `score` and `seed` are about raw UltraFeedback only, which has four answers to each prompt."""

    format: Annotated[str, Field(max_length=60)] = "auto"
    rejected: Literal["random", "worst"] = "random"
    score: Literal["ratings", "overall_score"] = "ratings"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def choices(self) -> Choices:
        """What the store is told."""
        return Choices(rejected=self.rejected, score=self.score, seed=self.seed)


class UploadBody(UploadOptions):
    """An import of a file that is sent."""

    file: UploadFile


class ImportBody(UploadOptions):
    """An import by name: `source` is a file in a folder that is named for it, or a hub id."""

    source: Location


class DatasetBody(Strict):
    """`out` names a folder in `exports` of the data directory, `push` a data set on the hub (private or `public`)."""

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


def _imported(result: ImportResult) -> dict[str, Any]:
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


def _form_route(check: Callable[[], None]) -> type[APIRoute]:
    """A route for requests with a form alone. `check` may refuse one before its file is read."""

    class FormRoute(APIRoute):
        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            kind = next((value for name, value in scope.get("headers", ()) if name == b"content-type"), b"")
            return super().matches(scope) if kind.lower().startswith(FORM.encode()) else (Match.NONE, {})

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def limited(request: Request) -> Response:
                check()
                # Kept with the request, which is not parsed a second time: a thousand fields of 1 MB are the default.
                async with request.form(max_files=1, max_fields=8, max_part_size=10_000):
                    return await handle(request)

            return limited

    return FormRoute


def data_routes(data: DataOperations) -> APIRouter:
    """Every route of the data."""
    router = APIRouter(prefix="/v1", tags=["data"])

    @router.post("/imports", openapi_extra={"requestBody": {"content": {FORM: {"schema": UPLOAD}}}})
    def import_(body: ImportBody) -> dict[str, Any]:
        """Import preferences, all or nothing; one import at a time: 429 with Retry-After beside another.

        As JSON: `source` is a hub id, or a file in a folder that is named for it (ZLOOP_IMPORT_DIRS). As
        multipart/form-data: the file itself, as `file`, and perhaps `format`, `rejected`, `score`, `seed`.
        """
        return _imported(data.import_preferences(body.source, body.format, body.choices))

    def upload(sent: Annotated[UploadBody, Form()]) -> dict[str, Any]:
        return _imported(data.import_upload(sent.file.file, sent.file.filename, sent.format, sent.choices))

    # In front of the other: a request with a form is its own, and no other one is.
    uploads = _form_route(data.gates.importing.check if data else lambda: None)("/v1/imports", upload, methods=["POST"])
    uploads.include_in_schema = False
    router.routes.insert(0, uploads)

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
