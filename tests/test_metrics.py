"""What Prometheus reads, over a real socket: the numbers follow from what happened, and no text is among them."""

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server import Server, serving

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("metrics"), engine="scripted", tokens_per_minute=200) as running:
        yield running


def scraped(server: Server) -> Samples:
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def test_answers_tokens_and_times_are_counted_by_version(server: Server) -> None:
    before = scraped(server)
    answer = server.chat("Tell me a secret", user="metrics")
    server.chat("Tell me more", user="metrics", max_tokens=3)
    server.pair("Which one?", user="pairs")
    after = scraped(server)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("zloop_answers_total", version="v0", finish_reason="stop", route="chat") == 1
    assert grown("zloop_answers_total", version="v0", finish_reason="length", route="chat") == 1
    assert grown("zloop_answers_total", version="v0", finish_reason="stop", route="pairs") == 2
    assert grown("zloop_first_token_seconds_count", version="v0") == 4
    written = grown("zloop_completion_tokens_total", version="v0")
    assert written > answer["usage"]["completion_tokens"] + 3
    assert grown("zloop_between_tokens_seconds_count", version="v0") == written - 4  # the scripted engine: words
    assert grown("zloop_prompt_tokens_total", version="v0") == 4 + 3 + 2 + 2
    assert grown("zloop_waiting_seconds_count") == 3


def test_a_scrape_says_what_is_served_and_how_the_house_is(server: Server) -> None:
    server.get("/readyz")
    now = scraped(server)
    assert value(now, "zloop_served_info", version="v0") == 1
    assert value(now, "zloop_answers_decoding") == value(now, "zloop_answers_waiting") == 0
    assert value(now, "zloop_store_ok") == 1
    assert value(now, "zloop_store_bytes") > 0
    assert value(now, "zloop_disk_free_bytes") > 0
    assert value(now, "zloop_engine_builds_total", outcome="ok") == 1
    assert value(now, "process_resident_memory_bytes") > 0


def test_no_text_and_no_user_is_among_the_metrics(server: Server) -> None:
    server.chat("An unmistakable question", user="somebody in particular")
    said = server.http.get("/metrics").text
    assert "unmistakable" not in said
    assert "particular" not in said


def test_a_user_s_spent_budget_is_429_with_a_time_and_is_counted(server: Server) -> None:
    refused = None
    for _ in range(50):
        refused = server.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "word " * 60}], "safety_identifier": "spender"},
        )
        if refused.is_error:
            break
    assert refused is not None
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "too_many"
    assert "200 tokens a minute" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert value(scraped(server), "zloop_refusals_total", reason="tokens") == 1
    assert server.chat("Hello", user="somebody else")["model"] == "v0"


def test_a_failed_promotion_counts_as_a_failed_swap(server: Server) -> None:
    assert server.refused("/v1/versions/v9/promote")[0] == 404
    now = scraped(server)
    assert value(now, "zloop_swaps_total", kind="promote", outcome="failed") == 1
    assert value(now, "zloop_swap_seconds_count") == 1
