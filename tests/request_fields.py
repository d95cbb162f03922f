"""Test support: every text field of every route, found in /openapi.json, and a request that puts a text into it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

HEADERS = {"content-type": "application/json"}
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Field:
    """A place for a text: in the body, in the path or in the query of a route."""

    method: str
    path: str
    where: str
    place: Place
    schema: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.where} {'.'.join(map(str, self.place))}"


@dataclass(frozen=True)
class Request:
    """What is sent; `body` is bytes, so that it may be no JSON."""

    method: str
    path: str
    body: bytes | None


class Routes:
    """The operations of an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def operations(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        for path, operations in self._document["paths"].items():
            for method, operation in operations.items():
                yield method.upper(), path, operation

    def text_fields(self) -> Iterator[Field]:
        """Every text field; one that has only a few words to choose from too."""
        for method, path, operation in self.operations():
            for parameter in operation.get("parameters", ()):
                # A number in a path or a query is text until it is read.
                yield Field(method, path, parameter["in"], (parameter["name"],), parameter["schema"])
            for place, schema in self._texts(self._body(operation), ()):
                yield Field(method, path, "body", place, schema)

    def lists(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Every list of a body, with its route."""
        for method, path, operation in self.operations():
            yield from ((f"{method} {path}", one) for one in self._lists(self._body(operation)))

    def request(self, field: Field, text: str) -> Request:
        """A request that is well-formed but for `text` in the place of `field`."""
        operation = self._document["paths"][field.path][field.method.lower()]
        path, query = field.path, ""
        for parameter in operation.get("parameters", ()):
            is_meant = field.where == parameter["in"] and field.place == (parameter["name"],)
            value = quote(text if is_meant else "v0", safe="", errors="surrogatepass")
            if parameter["in"] == "path":
                path = path.replace(f"{{{parameter['name']}}}", value)
            elif is_meant:
                query = f"?{parameter['name']}={value}"
        schema = self._body(operation)
        place = field.place if field.where == "body" else None
        body = None if schema is None else json.dumps(self._built(schema, place, text)).encode()
        return Request(field.method, path + query, body)

    def with_body(self, method: str, path: str, body: bytes) -> Request:
        """A request to a route with these bytes as its body."""
        return Request(method, path.replace("{", "").replace("}", ""), body)

    def _body(self, operation: Mapping[str, Any]) -> Mapping[str, Any] | None:
        found = operation.get("requestBody")
        schema: Mapping[str, Any] | None = None if found is None else found["content"]["application/json"]["schema"]
        return schema

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        if "$ref" in schema:
            return self._document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]  # type: ignore[no-any-return]
        return schema

    def _texts(self, schema: Mapping[str, Any] | None, place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
        if schema is None:
            return
        schema = self._resolved(schema)
        for one in schema.get("anyOf", ()):
            yield from self._texts(one, place)
        if schema.get("type") == "string":
            yield place, schema
        elif schema.get("type") == "array":
            yield from self._texts(schema["items"], (*place, 0))
        for name, one in schema.get("properties", {}).items():
            yield from self._texts(one, (*place, name))

    def _lists(self, schema: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
        schema = {} if schema is None else self._resolved(schema)
        if schema.get("type") == "array":
            yield schema
            yield from self._lists(schema["items"])
        for one in (*schema.get("anyOf", ()), *schema.get("properties", {}).values()):
            yield from self._lists(one)

    def _built(self, schema: Mapping[str, Any], place: Place | None, text: str) -> Any:
        """A value with what is required, and `text` at `place` (None: nowhere)."""
        schema = self._resolved(schema)
        if place == ():
            return text
        if "anyOf" in schema:
            options = schema["anyOf"]
            fitting = [one for one in options if place is not None and self._has(one, place)]
            return self._built((fitting or options)[0], place, text)
        kind = schema.get("type")
        if kind == "object":
            wanted = set(schema.get("required", ())) | ({place[0]} if place else set())
            return {
                name: self._built(schema["properties"][name], place[1:] if place and place[0] == name else None, text)
                for name in schema.get("properties", {})
                if name in wanted
            }
        if kind == "array":
            return [self._built(schema["items"], place[1:] if place else None, text)]
        if "enum" in schema:
            return schema["enum"][-1]
        return {"string": "v0", "integer": 1, "number": 1.0, "boolean": False}.get(str(kind))

    def _has(self, schema: Mapping[str, Any], place: Place) -> bool:
        return any(found[: len(place)] == place for found, _ in self._texts(schema, ()))
