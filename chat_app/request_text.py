"""Whether the text of a request can be text of ours: its JSON, every word in it, its path, its query. Pure.

    body → check_json → the value, or BadText      path, query → check_path → nothing, or BadText

Where it sits: in front of every route; what passes here fails neither in the store nor in a file name nor when it is
shown again. JSON is RFC 8259 in UTF-8 and nothing beside it. Bounds on numbers of things are asked of the bytes, before
anything is built of them, so that no body becomes many times its size in memory. Not covered: what a field means and
how long it may be (the models of the routes), how large a body may be (whoever reads it from the socket).
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

LONGEST_TEXT = 100_000
LONGEST_KEY = 200
MAX_DEPTH = 64
MAX_ITEMS = 100_000
MAX_INTEGER = 2**63 - 1
LONGEST_PATH = 4_096
LONGEST_QUERY = 8_192
MAX_QUERY_FIELDS = 100
_SHOWN = 60
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # one that has no end goes on to the end: linear
_BRACKET = re.compile(rb"[\[\]{}]")
_HALF = re.compile("[\ud800-\udfff]")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class BadText(Exception):
    """`message` is a sentence for who sent it, `param` the place, such as `messages.3.content`."""

    def __init__(self, message: str, param: str | None = None, status: int = 422) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status


def check_json(body: bytes, longest: int = LONGEST_TEXT) -> Any:
    """The value of a JSON body. Raises BadText where it is none, or holds what no field can hold.

    `longest` bounds each text, in characters.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadText(f"The body is not UTF-8: byte {error.start} is {body[error.start]:#04x}. Send UTF-8.") from None
    if text.startswith("\ufeff"):
        raise BadText("The body begins with a byte order mark, which JSON does not have. Send it without.")
    _check_size(body)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_no)
    except json.JSONDecodeError as error:
        raise BadText(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}. Mend it."
        ) from None
    for place, one in _texts(value):
        check_text(one, ".".join(place), longest)
    return value


def check_text(text: str, place: str, longest: int = LONGEST_TEXT) -> None:
    """Raises BadText where `text` is no Unicode, holds the character NUL, or is longer than `longest` characters."""
    if len(text) > longest:
        raise BadText(f"{place or 'body'} has {len(text):,} characters; at most {longest:,} are allowed.", place)
    if "\x00" in text:
        raise BadText(f"{place or 'body'} holds the character NUL (U+0000). Send the text without it.", place)
    half = None if text.isascii() else _HALF.search(text)
    if half is not None:
        raise BadText(
            f"{place or 'body'} is no valid Unicode: character {half.start() + 1} is U+{ord(half[0]):04X}, half of a "
            "surrogate pair. Send both halves or neither.",
            place,
        )


def check_path(raw_path: bytes, query: bytes = b"") -> None:
    """Raises BadText for a path or a query string, as they stand in the request line, that no route can mean."""
    if len(raw_path) > LONGEST_PATH:
        raise BadText(f"The path has {len(raw_path):,} characters; at most {LONGEST_PATH:,} are allowed.")
    if len(query) > LONGEST_QUERY:
        raise BadText(f"The query has {len(query):,} characters; at most {LONGEST_QUERY:,} are allowed.")
    if query.count(b"&") >= MAX_QUERY_FIELDS:
        raise BadText(f"The query has more than {MAX_QUERY_FIELDS} fields. Send those of the route.")
    _check_escaped(raw_path, "The path")
    for field in query.replace(b"+", b" ").split(b"&"):
        name, _, value = field.partition(b"=")
        _check_escaped(name, "The name of a query field")
        _check_escaped(value, name.decode("ascii", "replace")[:_SHOWN], is_field=True)


def _check_escaped(raw: bytes, what: str, *, is_field: bool = False) -> None:
    param = what if is_field else None
    if _BROKEN_ESCAPE.search(raw):
        raise BadText(f"{what} holds a % without two hexadecimal digits behind it. Write a percent sign as %25.", param)
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise BadText(f"{what} is not UTF-8 once its %-escapes are read. Send UTF-8.", param) from None
    if any(character < " " or character == "\x7f" for character in text) and not is_field:
        raise BadText(f"{what} holds a control character. No address of this server has one.")
    if is_field:
        try:
            check_text(text, what)
        except BadText as error:
            raise BadText(error.message, param) from None


# --- before anything is built ----------------------------------------------------------------------------------------


def _check_size(body: bytes) -> None:
    """Numbers of items and of levels, counted in what is left of the body without its strings."""
    bones = _STRING.sub(b"", body)
    items = sum(bones.count(mark) for mark in (b",", b"[", b"{"))
    if items > MAX_ITEMS:
        raise BadText(f"The body has about {items:,} items; at most {MAX_ITEMS:,} are allowed.")
    depth = 0
    for bracket in _BRACKET.findall(bones):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise BadText(f"The body is nested deeper than {MAX_DEPTH} levels. No route takes such a body.")


# --- while it is built -----------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise BadText(f"The key {_shown(key)} stands twice in one object. Which one counts? Send one.")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > len(str(-MAX_INTEGER)) or abs(int(digits)) > MAX_INTEGER:
        raise BadText(f"The number {_shown(digits)} is too large: whole numbers go up to {MAX_INTEGER}.")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadText(f"The number {_shown(digits)} is too large: numbers go up to about 1.8e308.")
    return value


def _no(constant: str) -> NoReturn:
    raise BadText(f"The body is not JSON: {constant} is no number in JSON. Leave the key out, or send null.")


# --- once it is there ------------------------------------------------------------------------------------------------


def _texts(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text in a value with its place. Keys are checked on the way: a place is made of them."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _texts(one, (*place, str(index)))
    elif isinstance(value, dict):
        for key, one in value.items():
            _check_key(key, place)
            yield from _texts(one, (*place, key))


def _check_key(key: str, place: tuple[str, ...]) -> None:
    where = ".".join(place) or "body"
    try:
        check_text(key, f"A key in {where}", LONGEST_KEY)
    except BadText as error:
        raise BadText(error.message, ".".join(place) or None) from None


def _shown(text: str) -> str:
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    return ascii(cut)
