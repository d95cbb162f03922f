"""Kind 6, connections: idle, slow and many of them leave the server answering others, and its log short."""

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server import Server, serving

HEAD = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"
GENEROUS_S = 60.0


FILES = 1_024


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that may open as many files as a usual machine lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
    with serving(tmp_path / "data", engine="scripted") as running:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * FILES)), hard))
        try:
            yield running
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for one in made:
        one.close()


def connect(server: Server, made: list[socket.socket]) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    one = socket.create_connection((host, int(port)), timeout=GENEROUS_S)
    made.append(one)
    return one


def is_closed(one: socket.socket, within_s: float) -> bool:
    """Whether the server hangs up in time."""
    one.settimeout(within_s)
    try:
        return one.recv(65_536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_idle_and_slow_connections_do_not_keep_others_out(server: Server, connections: list[socket.socket]) -> None:
    before = len(server.log.read_text().splitlines())
    for _ in range(1_000):
        connect(server, connections)
    slow = [connect(server, connections) for _ in range(200)]
    for one in slow:
        with contextlib.suppress(OSError):
            one.sendall(HEAD)
    for _ in range(20):  # each on a connection of its own
        assert httpx.get(f"{server.url}/livez", timeout=GENEROUS_S).is_success
    assert len(server.log.read_text().splitlines()) - before <= 10


def test_a_head_that_never_ends_is_not_waited_for(server: Server, connections: list[socket.socket]) -> None:
    """A byte now and then used to keep it open for ever."""
    one = connect(server, connections)
    one.sendall(HEAD)
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.5):
                one.sendall(b"X-A: 1\r\n")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert is_closed(one, GENEROUS_S)
    finally:
        stop.set()
        dripping.join()


def test_a_connection_without_a_request_is_closed(server: Server, connections: list[socket.socket]) -> None:
    assert is_closed(connect(server, connections), GENEROUS_S)


def test_a_body_that_never_ends_is_not_waited_for(server: Server, connections: list[socket.socket]) -> None:
    one = connect(server, connections)
    one.sendall(b"POST /v1/picks HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{")  # fmt: skip
    one.settimeout(GENEROUS_S)
    assert one.recv(4_096).startswith(b"HTTP/1.1 408")


def test_a_connection_serves_one_request_after_the_other(server: Server) -> None:
    """The deadline is for the head of a request, not for the connection."""
    with httpx.Client(base_url=server.url, timeout=GENEROUS_S) as http:
        for _ in range(3):
            assert http.get("/livez").is_success
            time.sleep(0.1)


def test_broken_requests_do_not_fill_the_log(server: Server, connections: list[socket.socket]) -> None:
    before = len(server.log.read_text().splitlines())
    for _ in range(200):
        one = connect(server, connections)
        one.sendall(b"\x00\x01broken\r\n\r\n")
        assert b"400" in one.recv(4_096)
        one.close()
    for _ in range(200):
        server.http.post("/v1/picks", json={}, headers={"Origin": "http://evil.example"})
        server.http.get("/livez", headers={"Connection": "upgrade", "Upgrade": "websocket"})
    assert len(server.log.read_text().splitlines()) - before <= 30


def test_one_address_may_ask_so_often(server: Server) -> None:
    """Heavy routes are bounded by the minute: the rest is 429 with Retry-After, and nothing is done."""
    answers = [server.http.post("/v1/preflight", json={"recipe": "none"}) for _ in range(700)]
    refused = [one for one in answers if one.status_code == 429]
    assert len(refused) >= 700 - 2 * 300  # a minute may turn over in between
    assert all(int(one.headers["Retry-After"]) > 0 for one in refused)
    assert server.get("/v1/versions")  # other routes are open
