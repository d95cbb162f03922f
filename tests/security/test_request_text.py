"""The one check of every text of a request: what is no JSON, no Unicode or too much is refused with its place."""

import json
import tracemalloc
from pathlib import Path

import pytest

from chat_app.request_text import (
    LONGEST_TEXT,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_ITEMS,
    BadText,
    check_json,
    check_path,
)

CORPUS = Path(__file__).parents[3] / "shared" / "cases" / "corpora" / "json_parsing"
needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="JSONTestSuite is not in ../shared/cases/corpora")


def refused(body: bytes) -> BadText:
    with pytest.raises(BadText) as caught:
        check_json(body)
    return caught.value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        "",
        "é🏳️‍🌈\u202e\u200f\ufeff\u0001",
        {"": [{}]},
        -0.0,
        MAX_INTEGER,
        -MAX_INTEGER,
        1.7e308,
        "x" * LONGEST_TEXT,
    ],
)
def test_what_is_json_and_unicode_comes_back_as_it_is(value: object) -> None:
    assert check_json(json.dumps(value).encode()) == value
    assert check_json(json.dumps(value, ensure_ascii=False).encode()) == value


def test_both_halves_of_a_pair_are_one_character() -> None:
    assert check_json(rb'"\ud83d\ude00"') == "😀"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1] x", "not JSON"),
        (b'["a\nb"]', "not JSON"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e400]", "too large"),
        (b"[-1e400]", "too large"),
        (b"[9223372036854775808]", "too large"),
        (b"[" + b"9" * 100_000 + b"]", "too large"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": 1, "\\u0061": 2}', "stands twice"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "NUL|not JSON"),
        (b'["\xed\xa0\x80"]', "not UTF-8"),
        (b'["\xc0\x80"]', "not UTF-8"),
        (b"[" * 10_000, "deeper"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper"),
        (b"[" + b"[]," * MAX_ITEMS + b"[]]", "items"),
        (b"[" + b"0," * MAX_ITEMS + b"0]", "items"),
        (b'["' + b"x" * (LONGEST_TEXT + 1) + b'"]', "100,001 characters"),
        (b'{"' + b"x" * 300 + b'": 1}', "300 characters"),
    ],
)
def test_a_body_that_is_no_json_of_ours_is_refused_with_a_sentence(body: bytes, word: str) -> None:
    message = refused(body).message
    assert any(one in message for one in word.split("|")), message
    assert message.endswith(".")
    assert len(message) < 300


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (rb'{"messages": [{"content": "a"}, {"content": "\ud800"}]}', "messages.1.content"),
        (rb'{"messages": [{"content": "\udfff"}]}', "messages.0.content"),
        (rb'{"reasons": ["x", "a\u0000b"]}', "reasons.1"),
        (rb'{"a": {"\ud800": 1}}', "a"),
        (rb'{"b": {"x\u0000": 1}}', "b"),
    ],
)
def test_a_refusal_names_the_place(body: bytes, place: str) -> None:
    error = refused(body)
    assert error.param == place
    error.message.encode()  # can be sent


def test_commas_and_brackets_in_a_text_are_no_items() -> None:
    text = "[{," * (LONGEST_TEXT // 3)
    assert check_json(json.dumps([text] * 20).encode()) == [text] * 20


@pytest.mark.parametrize("body", [b'"' + b'\\"' * 2_000_000, b'["' + b"\\" * 4_000_001, b'"' * 4_000_000])
def test_quotes_without_an_end_take_no_longer_than_others(body: bytes) -> None:
    refused(body)  # a pattern that goes back would need hours


def test_what_is_refused_for_its_numbers_is_never_built() -> None:
    body = b"[" + b"{}," * 5_000_000 + b"{}]"
    tracemalloc.start()
    try:
        assert "items" in refused(body).message
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


def test_depth_up_to_the_limit_is_allowed() -> None:
    assert check_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (b"/v1/runs/%00", b""),
        (b"/v1/runs/%ff", b""),
        (b"/v1/runs/%ed%a0%80", b""),
        (b"/v1/runs/%", b""),
        (b"/v1/runs/%zz", b""),
        (b"/v1/runs/%0a", b""),
        (b"/" + b"x" * 5_000, b""),
        (b"/v1/export", b"format=%00"),
        (b"/v1/export", b"format=%ff"),
        (b"/v1/export", b"%00=1"),
        (b"/v1/export", b"format=100%"),
        (b"/v1/export", b"x=" + b"y" * 10_000),
        (b"/v1/export", b"a=1&" * 200),
    ],
)
def test_a_path_or_query_that_no_route_can_mean_is_refused(path: bytes, query: bytes) -> None:
    with pytest.raises(BadText):
        check_path(path, query)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (b"/", b""),
        (b"/v1/runs/%C3%A9%F0%9F%98%80", b""),
        (b"/gradio_api/file=/tmp/a%20b+c.png", b""),
        (b"/gradio_api/queue/data", b"session_hash=ab12&x"),
        (b"/v1/export", b"format=trl&note=a+b%0A"),
    ],
)
def test_other_paths_pass(path: bytes, query: bytes) -> None:
    check_path(path, query)


@needs_corpus
def test_every_file_that_must_parse_parses() -> None:
    for path in sorted(CORPUS.glob("y_*.json")):
        if "duplicated_key" in path.name or ("null" in path.name and "escape" in path.name):
            assert "not JSON" not in refused(path.read_bytes()).message  # it is, and holds what no field can
        else:
            check_json(path.read_bytes())


@needs_corpus
def test_every_file_that_must_not_parse_is_refused() -> None:
    found = sorted(CORPUS.glob("n_*.json"))
    assert found
    for path in found:
        assert refused(path.read_bytes()).message, path.name


@needs_corpus
def test_the_others_are_taken_or_refused_and_nothing_else() -> None:
    for path in sorted(CORPUS.glob("i_*.json")):
        try:
            check_json(path.read_bytes())
        except BadText as error:
            error.message.encode()
