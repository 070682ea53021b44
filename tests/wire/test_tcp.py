"""TCP: as fast as a unix socket, on every kind of address."""

from __future__ import annotations

import socket
import statistics
import time

import pytest
from support.lifecycle import MESSAGE, RECIPIENTS, end
from support.wire import session

from Milter.mta import MTA

MESSAGES = 200
ROUNDS = 5
DELAYED_ACK = 0.03  # seconds: below the 40 ms that an unsent acknowledgement costs


def times(mta, count=MESSAGES, changes=1):
    """How long each of so many messages takes, one after another, in seconds."""
    taken = []
    for _ in range(count):
        begin = time.perf_counter()
        result = mta.send(MESSAGE, recipients=RECIPIENTS)
        taken.append(time.perf_counter() - begin)
        assert len(result.modifications) == changes
    return taken


def waits_for_acknowledgements(mta, changes=1):
    """Whether nearly all messages take as long as an acknowledgement is put off.

    A busy machine makes many of them slow; of those that wait, a fifth is never quick.
    """
    return all(
        statistics.quantiles(times(mta, 15, changes), n=5)[0] >= DELAYED_ACK for _ in range(ROUNDS)
    )


def test_a_message_takes_as_long_over_tcp_as_over_a_unix_socket(
    run_filter, free_port, record_property
):
    by_unix = run_filter("stamp")
    by_tcp = run_filter("stamp", socket=f"inet:{free_port()}@127.0.0.1")
    ratios = []
    with by_unix.mta() as unix, by_tcp.mta() as tcp:
        times(unix, 10)
        times(tcp, 10)
        for _ in range(3):  # another process may have had the machine meanwhile
            medians = [statistics.median(times(mta)) for mta in (unix, tcp)]
            record_property("milliseconds over unix, TCP", [m * 1000 for m in medians])
            ratios.append(medians[1] / medians[0])
            if ratios[-1] < 2:
                break
    assert min(ratios) < 2, ratios


@pytest.mark.parametrize(
    ("listen", "connect"),
    [
        ("inet:{port}@127.0.0.1", "inet:{port}@127.0.0.1"),
        ("inet:{port}@localhost", "inet:{port}@127.0.0.1"),
        ("inet:{port}", "inet:{port}@127.0.0.1"),
        ("inet6:{port}@[::1]", "inet6:{port}@[::1]"),
        ("inet6:{port}", "inet6:{port}@[::1]"),
    ],
)
def test_no_kind_of_address_waits_for_acknowledgements(run_filter, free_port, listen, connect):
    port = free_port()
    filter_ = run_filter("stamp", socket=listen.format(port=port))
    # libmilter listens before the module learns of the socket: what comes in between is slow.
    MTA.connect(connect.format(port=port), wait_for=20, timeout=20).close()
    with MTA.connect(connect.format(port=port), timeout=20) as mta:
        assert not waits_for_acknowledgements(mta)
    with MTA.connect(connect.format(port=port), timeout=20) as mta:
        mta.greet()
        assert end(filter_) < 4  # not libmilter's five seconds
        mta.expect_close()
        mta.close()
    assert filter_.wait() == 0


def test_an_inherited_socket_does_not_wait_for_acknowledgements(run_filter, free_port):
    filter_ = run_filter("inherited_socket", "inet", socket=f"inet:{free_port()}@127.0.0.1")
    # The first may have come before the filter took the socket over, and so without its options.
    filter_.mta().close()
    with filter_.mta() as mta:
        assert not waits_for_acknowledgements(mta)


def test_many_changes_of_one_message_go_out_at_once(run_filter, free_port):
    filter_ = run_filter("lifecycle", socket=f"inet:{free_port()}@127.0.0.1")
    with filter_.mta() as mta:
        assert not waits_for_acknowledgements(mta, changes=4)


LOOK = """
import os, socket
for fd in range(3, 100):
    try:
        sock = socket.socket(fileno=os.dup(fd))
        sock.getpeername()
    except OSError:
        continue
    if sock.getsockname()[1] == PORT:  # not the filter's own connections to itself
        say(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0)
    sock.close()
"""


def test_a_host_that_has_vanished_is_noticed_in_the_end(run_filter, free_port):
    """The system asks after a connection on which nothing comes."""
    port = free_port()
    running = run_filter("scripted", socket=f"inet:{port}@127.0.0.1")
    with session(running, helo=LOOK.replace("PORT", str(port))) as each:
        each.reach("helo")
    assert set(each.said()) == {(True,)}
    assert running.stop() == 0


def test_a_connection_that_is_reset_harms_only_itself(run_filter, free_port):
    port = free_port()
    filter_ = run_filter("lifecycle", socket=f"inet:{port}@127.0.0.1")
    with filter_.mta() as survivor:
        survivor.greet()
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
        other = MTA(sock, timeout=20)
        other.greet()
        other.mail("<s@example.com>")
        other.close()
        filter_.wait_for("in close")
        assert survivor.send(MESSAGE, recipients=RECIPIENTS).message["X-Stamp"] == "before"
    assert filter_.stop() == 0
    assert "Traceback" not in filter_.output
