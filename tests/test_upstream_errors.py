"""What the refusals of model servers mean, in their own words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chat_app.serving.engine import ContextOverflow, EngineBroken, EngineBusy, EngineError, EngineRefused
from chat_app.serving.stop_cut import StopCut
from chat_app.serving.upstream_errors import ModelGone, broken_off, refusal, retry_after_s


def refused(status: int, body: object, headers: dict[str, str] | None = None) -> EngineError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return refusal("the server", status, headers or {}, raw)


TOO_LONG: list[tuple[int, Any, int, int]] = [
    # vLLM, newest wording first
    (
        400,
        "This model's maximum context length is 8192 tokens. However, you requested 512 output tokens and your prompt "
        "contains 9739 input tokens, for a total of 10251 tokens. Please reduce the length of the input prompt.",
        9739,
        8192,
    ),
    (
        400,
        "This model's maximum context length is 16384 tokens. However, you requested 8192 output tokens and your "
        "prompt contains at least 8193 input tokens, for a total of at least 16385 tokens.",
        8193,
        16384,
    ),
    (400, "You passed 5000 input tokens and requested 96 output tokens. However, the model's context length is only "
          "4096 tokens, resulting in a maximum input length of 4000 tokens.", 5000, 4096),
    (400, "This model's maximum context length is 4096 tokens. However, you requested 4172 tokens (2124 in the "
          "messages, 2048 in the completion). Please reduce the length of the messages or completion.", 2124, 4096),
    (400, "The decoder prompt (length 9000) is longer than the maximum model length of 4096.", 9000, 4096),
    # OpenAI
    (400, "This model's maximum context length is 128000 tokens. However, your messages resulted in 130009 tokens.",
     130009, 128000),
    # TGI
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2000 `inputs` tokens and "
          "100 `max_new_tokens`", 2000, 2048),
    (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 1500", 1500, 1024),
    # llama-server
    (400, "request (9000 tokens) exceeds the available context size (8192 tokens), try increasing it", 9000, 8192),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message", "prompt_tokens", "limit"), TOO_LONG)
@pytest.mark.parametrize("shape", ["nested", "flat", "text"])
def test_too_long_is_found_with_its_numbers(
    status: int, message: str, prompt_tokens: int, limit: int, shape: str
) -> None:
    body = {
        "nested": {"error": {"message": message, "type": "BadRequestError", "code": status}},
        "flat": {"object": "error", "message": message},
        "text": {"error": message, "error_type": "validation"},
    }[shape]
    error = refused(status, body)
    assert isinstance(error, ContextOverflow)
    assert (error.prompt_tokens, error.limit) == (prompt_tokens, limit)


def test_llama_server_names_the_numbers_itself() -> None:
    error = refused(400, {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 900, "n_ctx": 512}})
    assert isinstance(error, ContextOverflow)
    assert (error.prompt_tokens, error.limit) == (900, 512)
    inside = broken_off("the server", {"type": "exceed_context_size_error", "n_prompt_tokens": 900, "n_ctx": 512})
    assert isinstance(inside, ContextOverflow)


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (401, {"error": "no"}, EngineRefused, "refused our key (401): set ZLOOP_REMOTE_KEY to one it knows"),
        (404, {"detail": "Not Found"}, ModelGone, "no such model or route (404): Not Found"),
        (424, {"error": "Request failed during generation", "error_type": "generation"}, EngineRefused, "during gene"),
        (500, b"<html>\n  Bad\n gateway</html>", EngineBroken, "failed (500): <html> Bad gateway</html>"),
        (502, b"\xff\xfe", EngineBroken, "failed (502)"),
        (400, {"error": None}, EngineRefused, "refused the request (400): no reason given"),
        (400, [1], EngineRefused, "(400): [1]"),
        (400, {"error": {"message": "x" * 5000}}, EngineRefused, "xxx…"),
    ],
)
def test_each_status_is_one_line(status: int, body: object, kind: type[EngineError], message: str) -> None:
    error = refused(status, body)
    assert type(error) is kind
    assert message in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize(
    ("given", "expected_s"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("99999", 120.0),
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2026 07:00:00 GMT", 0.0),
        ("soon", 5.0),
        ("-3", 5.0),
        ("", 5.0),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_long(given: str, expected_s: float) -> None:
    assert retry_after_s({"retry-after": given}, now=1792567680.0) == expected_s


def test_busy_says_when() -> None:
    error = refused(503, {"error": "overloaded"}, {"retry-after": "3"})
    assert isinstance(error, EngineBusy)
    assert error.retry_after_s == 3.0


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one. two", (".",), "one"),
        ("abcabd", ("abd",), "abc"),
        ("say <|end|> now", ("<|end|>", "END"), "say "),
        ("nothing <|en", ("<|end|>",), "nothing <|en"),
        ("aaab", ("aab",), "a"),
        ("plain", (), "plain"),
    ],
)
def test_a_text_is_cut_at_its_first_stop_however_it_comes(
    text: str, stops: tuple[str, ...], shown: str, size: int
) -> None:
    cut, seen = StopCut(stops), ""
    for start in range(0, len(text), size):
        if not cut.is_found:
            seen += cut.cut(text[start : start + size])
        assert not any(stop in seen for stop in stops)
    assert seen + cut.rest() == shown
