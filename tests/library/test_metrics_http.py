"""The exporter of Milter.metrics: whatever clients do, it takes nothing that mail needs."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.lifecycle import wait_until
from support.process import WAIT

from Milter import _metrics_http, metrics

Run = Callable[..., Any]
pytest.importorskip("prometheus_client")

GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[metrics.PrometheusServer]:
    """An exporter that gives clients one second."""
    monkeypatch.setattr(_metrics_http, "SECONDS", 1.0)
    made = metrics.serve_prometheus(0)
    yield made
    made.close()
    assert "milter-metrics" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def patient() -> Iterator[metrics.PrometheusServer]:
    """An exporter that gives clients all the time that they have outside of tests."""
    made = metrics.serve_prometheus(0)
    yield made
    made.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=WAIT)


def rest(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while found := client.recv(65536):
            data += found
    return bytes(data)


def ask(port: int, request: bytes) -> bytes:
    with connect(port) as client:
        client.sendall(request)
        return rest(client)


def scraped(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT) as answer:
        data: bytes = answer.read()
    assert b"milter_connections_total" in data
    return data


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads Linux' /proc")


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        GET,
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /metrics HTTP/1.1\nHost: x\n\n",
        b"\r\n\r\n" + GET,
        b"GET http://x/metrics?name[]=a HTTP/1.1\r\n\r\n",
        GET + GET,
    ],
)
def test_requests_are_answered(server: Any, request_: bytes) -> None:
    head, _, body = ask(server.port, request_).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"text/plain" in head
    assert f"Content-Length: {len(body)}".encode() in head


def test_head_has_no_body(server: Any) -> None:
    head, end, body = ask(server.port, GET.replace(b"GET", b"HEAD")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert (end, body) == (b"\r\n\r\n", b"")


def test_what_prometheus_asks_for_is_given(server: Any) -> None:
    accept = b"Accept: application/openmetrics-text;version=1.0.0\r\nAccept-Encoding: gzip\r\n\r\n"
    answer = ask(server.port, GET.removesuffix(b"\r\n") + accept)
    assert b"openmetrics-text" in answer
    assert b"Content-Encoding: gzip" in answer
    assert b"\x1f\x8b" in answer


def test_a_request_in_pieces(server: Any) -> None:
    with connect(server.port) as client:
        for byte in GET:
            client.sendall(bytes([byte]))
        assert b"milter_connections_total" in rest(client)


def test_who_has_come_before_it_leaves_is_answered() -> None:
    mine, theirs = socket.socketpair()
    listener = _metrics_http.listen(("127.0.0.1", 0), socket.AF_INET, share=False)
    server = _metrics_http.Server(listener, metrics._application(), theirs)
    thread = threading.Thread(target=server.serve)
    with connect(server.port) as client:  # nobody has accepted it yet
        mine.close()
        thread.start()
        client.sendall(GET)
        assert rest(client).startswith(b"HTTP/1.0 200 OK\r\n")
    thread.join(WAIT)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        connect(server.port)


def test_half_closed_clients_get_their_answer(server: Any) -> None:
    with connect(server.port) as client:
        client.sendall(GET)
        client.shutdown(socket.SHUT_WR)
        assert b"milter_connections_total" in rest(client)


def test_icons_that_browsers_ask_for(server: Any) -> None:
    assert ask(server.port, b"GET /favicon.ico HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 200 ")


# --- what is hostile -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"400"),
        (b"GET  / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/2.0\r\n\r\n", b"400"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"400"),
        (b"EHLO x\r\n\r\n", b"400"),
        (b"\0" * 100 + b"\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n" + b"x" * 300000, b"405"),
        (b"__class__ / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET //[ HTTP/1.1\r\n\r\n", b"200"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /?" + b"a=b&" * 4000 + b" HTTP/1.1\r\n\r\n", b"200"),
        (b"GET /?name[]=%ff%00&name[]= HTTP/1.1\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n:\r\n \r\nAccept\r\n\xff: \xff\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nAccept: \xff\0;,;=;\r\nAccept-Encoding: ;q=\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text;version=x;=\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.x\r\n\r\n", b"200"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 3000 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000_000, b"431"),
        (b"A" * 70000, b"431"),
    ],
)  # fmt: skip
def test_odd_requests_are_answered_and_not_told_of(
    server: Any, capfd: pytest.CaptureFixture[str], caplog: Any, request_: bytes, status: bytes
) -> None:
    with connect(server.port) as client:
        with contextlib.suppress(ConnectionError):  # the server need not read it all
            client.sendall(request_)
        answer = rest(client)
    assert answer.startswith(b"HTTP/1.0 " + status) or (not answer and len(request_) > 10**6)
    scraped(server.port)
    server.close()
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_clients_that_send_nothing_are_given_up(server: Any) -> None:
    with connect(server.port) as client:
        begin = time.monotonic()
        assert rest(client) == b""
        assert time.monotonic() - begin >= 0.9


def test_a_request_that_comes_slowly_gets_no_more_time(server: Any) -> None:
    """Each byte would begin a new time-out where only waiting is bounded."""
    with connect(server.port) as client:
        client.settimeout(0.05)
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begin < WAIT:
                client.sendall(b"X")
                with contextlib.suppress(TimeoutError, socket.timeout):
                    if client.recv(100) == b"":
                        break
        assert time.monotonic() - begin < WAIT


def test_empty_lines_are_no_request(server: Any) -> None:
    with connect(server.port) as client, contextlib.suppress(ConnectionError):
        begin = time.monotonic()
        client.settimeout(0.05)
        while time.monotonic() - begin < WAIT:
            client.sendall(b"\r\n" * 20000)
            with contextlib.suppress(TimeoutError, socket.timeout):
                assert client.recv(100) == b""
                return
        raise AssertionError("it still waits")


@linux
def test_idle_clients_take_few_descriptors_and_no_threads(patient: Any) -> None:
    threads, before = threading.active_count(), descriptors()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(patient.port)) for _ in range(60)]
        for client in idle[::2]:
            client.sendall(b"GET / HT")
        scraped(patient.port)  # and it is served at once nevertheless
        # Half of what is open belongs to this end.
        assert descriptors() - before - len(idle) <= _metrics_http.MAX_CONNECTIONS
        assert threading.active_count() == threads
    wait_until(lambda: descriptors() == before, "connections stay open")


def test_who_has_waited_longest_goes_first(patient: Any) -> None:
    with contextlib.ExitStack() as stack:
        waiting = []
        for _ in range(_metrics_http.MAX_CONNECTIONS + 2):
            waiting.append(stack.enter_context(connect(patient.port)))
            scraped(patient.port)  # has been seen by then
        assert rest(waiting[0]) == rest(waiting[1]) == b""
        waiting[-1].sendall(GET)
        assert b"milter_connections_total" in rest(waiting[-1])


def test_clients_that_do_not_read_are_given_up(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is larger than what the system takes for them."""
    asked = threading.Event()

    def answer(*_: object) -> bytes:
        asked.set()
        return b"x" * 50_000_000

    monkeypatch.setattr(_metrics_http.Server, "_answer", answer)
    with connect(server.port) as client:
        client.sendall(GET)
        assert asked.wait(WAIT)  # its second has begun
        monkeypatch.undo()
        monkeypatch.setattr(_metrics_http, "SECONDS", 60.0)
        scraped(server.port)
        wait_until(lambda: not server._server._clients, "it still waits")
        assert len(rest(client)) < 50_000_000


def test_a_large_answer_arrives(patient: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_metrics_http.Server, "_answer", lambda *args: b"x" * 20_000_000)
    assert len(ask(patient.port, GET)) == 20_000_000


class Failing:
    """A collector of an application, which fails."""

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        raise ValueError("no\ndatabase")


def test_a_collector_that_fails_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(Failing())  # type: ignore[arg-type]
    made = metrics.serve_prometheus(0, registry=registry)
    try:
        assert ask(made.port, GET).startswith(b"HTTP/1.0 500 ")
    finally:
        made.close()
    assert caplog.text.count("the counters cannot be shown") == 1
    assert r"ValueError: no\ndatabase" in caplog.text


FILTER = """
import resource, sys
import Milter, Milter.metrics

class Filter(Milter.Base):
    def eom(self):
        self.addheader("X-Seen", "yes")
        return Milter.CONTINUE

resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
Milter.factory = Filter
Milter.metrics.enable()
print("port", Milter.metrics.serve_prometheus(0).port, flush=True)
Milter.runmilter("filter", sys.argv[1])
"""


def test_mail_goes_on_while_the_exporter_is_attacked(run_filter: Run) -> None:
    filter_ = run_filter(source=FILTER)
    port = int(filter_.wait_for("port ").split()[1])
    with contextlib.ExitStack() as stack:
        for number in range(200):
            client = stack.enter_context(connect(port))
            client.sendall(
                (b"", b"GET", b"\0\xff\r\n\r\n", b"GET //[ HTTP/1.1\r\n\r\n")[number % 4]
            )
        for _ in range(3):
            with filter_.mta() as mta:
                result = mta.send(b"Subject: a\r\n\r\n", recipients=["b@example.org"])
            assert result.message["X-Seen"] == "yes"
        assert b"milter_messages_total 3.0" in scraped(port)
    assert filter_.stop() == 0
    assert "Traceback" not in filter_.output


@linux
def test_without_descriptors_it_waits_for_some(patient: Any) -> None:
    """It would take a processor's time where it tried again at once."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.socket())
        client.settimeout(WAIT)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    stack.callback(os.close, os.dup(0))
            client.connect(("127.0.0.1", patient.port))
            client.sendall(GET)
            wait_until(lambda: patient._server._accept_after, "it has not noticed")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert b"milter_connections_total" in rest(client)
