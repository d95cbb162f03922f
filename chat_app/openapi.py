"""/openapi.json: every status that a route can answer, each in the one shape of an error.

Where it sits: at the edge; `api.create_api` has it describe the finished application. Routes describe their successes
themselves. What the layers in front of the routes answer (another host or page, no JSON, too much, too often, too many
at once) holds of every route and stands here once.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from chat_app.error_shape import SCHEMA

_REFERENCE = {"$ref": "#/components/schemas/Error"}
_EVERYWHERE: Mapping[int, str] = {
    400: "The request names another host, or a value outside its limits.",
    403: "The request comes from another site, or this person may not do it.",
    404: "There is nothing of that name.",
    408: "The request did not arrive in time.",
    409: "It cannot be done as things stand; the sentence says why.",
    422: "Something in the request cannot be used; `param` says what.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "Something went wrong inside the server; its log says what.",
    503: "The model, the store or the disk cannot serve this just now; `Retry-After` says when to come back.",
}
_WITH_BODY: Mapping[int, str] = {
    413: "The body, or the conversation in it, is too long.",
    415: "The body is not application/json.",
}


def describe(app: FastAPI) -> None:
    """Have `app.openapi` name every status; what it says is made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            app.openapi_schema = _with_errors(found)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_errors(found: dict[str, Any]) -> dict[str, Any]:
    for operations in found["paths"].values():
        for method, operation in operations.items():
            own = {status: one for status, one in operation["responses"].items() if not _is_default(status, one)}
            operation["responses"] = dict(sorted({**_errors(method), **own}.items()))
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = dict(SCHEMA)
    return found


def _errors(method: str) -> dict[str, Any]:
    said = {**_EVERYWHERE, **({} if method == "get" else _WITH_BODY)}
    return {str(status): _response(description) for status, description in said.items()}


def _response(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _REFERENCE}}}


def _is_default(status: str, response: Mapping[str, Any]) -> bool:
    """FastAPI's own 422, whose shape no answer of ours has."""
    return status == "422" and "HTTPValidationError" in str(response)
