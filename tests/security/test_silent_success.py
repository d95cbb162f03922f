"""What a chat request asks for and does not get is refused by its name; what asks for nothing is taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from server import Server, serving

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

IGNORED_BEFORE: list[tuple[str, Any]] = [
    ("n", 2),
    ("n", 0),
    ("n", True),
    ("n", "1"),
    ("n", [1]),
    ("best_of", 3),
    ("stream_options", {"include_usage": True}),
    ("stream_options", {"include_obfuscation": False}),
    ("logprobs", True),
    ("logprobs", 5),
    ("top_logprobs", 5),
    ("logit_bias", {"50256": -100}),
    ("presence_penalty", 0.1),
    ("frequency_penalty", -2),
    ("tools", [TOOL]),
    ("tools", {}),
    ("tool_choice", "auto"),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("parallel_tool_calls", True),
    ("functions", [{"name": "f"}]),
    ("function_call", "auto"),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
    ("response_format", "text"),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("prediction", {"type": "content", "content": "Hello"}),
    ("reasoning_effort", "high"),
    ("verbosity", "low"),
    ("web_search_options", {}),
    ("top_k", 1),
    ("min_p", 0.5),
    ("repetition_penalty", 1.5),
    ("guided_json", {}),
    ("temprature", 0),
    ("N", 2),
    ("max_token", None),
    ("", 1),
]

NEUTRAL: list[dict[str, Any]] = [
    {"n": 1, "stream_options": None, "logprobs": False, "tools": [], "tool_choice": "none", "top_logprobs": None},
    {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "functions": [], "function_call": "none"},
    {
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "reasoning_effort": None,
        "parallel_tool_calls": None,
    },
    {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k", "user": "ada"},
    {"stream": None, "stop": None, "seed": None, "max_tokens": None, "temperature": None, "model": None},
    {"max_tokens": 5, "max_completion_tokens": 5},
]

MESSAGES: list[tuple[list[dict[str, Any]], str]] = [
    ([{"role": "user", "content": "Hello", "name": "ada"}], "messages.0.name"),
    ([{"role": "tool", "content": "4", "tool_call_id": "x"}, *HELLO], "messages.0.role"),
    ([{"role": "function", "name": "f", "content": "4"}, *HELLO], "messages.0.role"),
    ([*HELLO, {"role": "assistant", "content": "x", "tool_calls": [{"id": "x"}]}, *HELLO], "messages.1.tool_calls"),
    ([*HELLO, {"role": "assistant", "content": "x", "prefix": True}, *HELLO], "messages.1.prefix"),
    ([*HELLO, {"role": "assistant", "content": "x", "refusal": "No."}, *HELLO], "messages.1.refusal"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0"),
    (
        [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "input_audio", "input_audio": {}}]}],
        "messages.0.content.1",
    ),
    ([{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]}], "messages.0.content.0"),
    ([{"role": "user", "content": ["Hello"]}], "messages.0.content.0"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("silent"), engine="scripted") as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("key", "value"), IGNORED_BEFORE, ids=str)
def test_a_key_that_is_not_honoured_is_refused_by_its_name(server: Server, key: str, value: Any, stream: bool) -> None:
    status, body = server.refused(CHAT, {"messages": HELLO, "stream": stream, key: value})
    assert status == 400
    assert key in body["error"]["message"]
    assert body["error"].get("param", "") == key


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_a_value_that_asks_for_nothing_is_taken(server: Server, more: dict[str, Any]) -> None:
    assert server.chat("Hello", **more)["choices"][0]["message"]["content"].startswith("This is v0")


@pytest.mark.parametrize("route", [CHAT, "/v1/pairs"])
@pytest.mark.parametrize(("messages", "param"), MESSAGES, ids=str)
def test_what_of_a_message_is_not_read_is_refused(
    server: Server, messages: list[dict[str, Any]], param: str, route: str
) -> None:
    status, body = server.refused(route, {"messages": messages})
    assert (status, body["error"]["param"]) == (400, param)


def test_parts_of_text_and_the_newer_name_of_system_are_read(server: Server) -> None:
    parts = [{"type": "text", "text": "One boat"}, {"type": "text", "text": "two boats"}]
    echoed = {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": "Be kind."}, *HELLO, echoed, {"role": "user", "content": parts}]
    answer = server.post(CHAT, {"messages": messages})
    assert "You asked: One boat two boats" in answer["choices"][0]["message"]["content"]
    stored = server.post("/v1/query", {"sql": "SELECT prompt FROM generations ORDER BY event DESC LIMIT 1"})["rows"]
    assert [(one["role"], one["content"]) for one in stored[0][0]] == [
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Yes."),
        ("user", "One boat\ntwo boats"),
    ]


def test_two_names_of_one_limit_must_agree(server: Server) -> None:
    status, body = server.refused(CHAT, {"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6})
    assert (status, body["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("wanted", [0, -1, 1_000_001, 2**62])
def test_a_limit_outside_its_bounds_is_refused_not_clamped(server: Server, wanted: int) -> None:
    for key in ("max_tokens", "max_completion_tokens"):
        status, body = server.refused(CHAT, {"messages": HELLO, key: wanted})
        assert (status, "from 1 to 1000000" in body["error"]["message"]) == (400, True)


@pytest.mark.parametrize("body", [[], "text", 5, [HELLO], {"messages": "Hello"}, {"messages": [5]}], ids=str)
def test_a_body_of_another_shape_is_invalid(server: Server, body: Any) -> None:
    answer = server.http.post(CHAT, json=body)
    assert answer.status_code == 422, answer.text
