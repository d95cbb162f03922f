"""The HTTP routes of watching: a run's lines, log and report; whether it is worth retraining yet.

Where it sits: at the edge, beside `api.py`, which mounts them. A route calls one method of `WatchingOperations`.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from chat_app.fields import PathId
from chat_app.watching import MAX_LOG_LINES, WatchingOperations

# A report needs its own styles and nothing else: no script, no image, no form, no frame around it.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; sandbox"


def watching_routes(watching: WatchingOperations) -> APIRouter:
    """Every route of watching."""
    router = APIRouter(prefix="/v1", tags=["watching"])

    @router.get("/runs/{run_id}/metrics")
    def metrics(run_id: PathId, since: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        """The lines of every step after `since`; those with `eval/…` are validations."""
        return {"run_id": run_id, "lines": watching.metrics(run_id, since)}

    @router.get("/runs/{run_id}/log")
    def log(run_id: PathId, lines: Annotated[int, Query(ge=1, le=MAX_LOG_LINES)] = 100) -> dict[str, Any]:
        """The last lines of what the run's processes print."""
        return {"run_id": run_id, "lines": watching.log(run_id, lines)}

    @router.get("/runs/{run_id}/report", response_class=HTMLResponse)
    def report(run_id: PathId) -> HTMLResponse:
        """The report of a run that has ended: a page that stands alone."""
        return HTMLResponse(watching.report(run_id), headers={"Content-Security-Policy": REPORT_POLICY})

    @router.get("/evaluations/{evaluation_id}/report", response_class=HTMLResponse)
    def evaluation_report(evaluation_id: PathId) -> HTMLResponse:
        """The report of an evaluation or a benchmark: a page that stands alone."""
        page = watching.evaluation_report(evaluation_id)
        return HTMLResponse(page, headers={"Content-Security-Policy": REPORT_POLICY})

    @router.get("/worth")
    def worth() -> dict[str, Any]:
        """What a retrain now is expected to gain, with an 80% interval, and how many more preferences would help."""
        return watching.worth()

    return router
