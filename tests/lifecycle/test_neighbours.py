"""What starting and stopping a filter leaves alone: files, sockets and processes beside it."""

from __future__ import annotations

import os
import signal

from Milter.mta import Verdict

SCRIPT = """
import fcntl, os, signal, socket, subprocess, sys, threading
import milter

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

milter.register("neighbour")
milter.setconn(sys.argv[1])
"""

LOCK = (
    SCRIPT
    + """
path = sys.argv[2]
file = open(path, "w")
fcntl.lockf(file, fcntl.LOCK_EX)
left, right = socket.socketpair()
milter.opensocket(True)
say("open")
milter.main()
probe = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
taken = subprocess.run([sys.executable, "-c", probe, path], stderr=subprocess.DEVNULL)
say("lock held", taken.returncode != 0)
right.sendall(b"x")
say("socketpair works", left.recv(1) == b"x")
"""
)

FORK = (
    SCRIPT
    + """
def handler(*_):
    child = os.fork()
    if child == 0:
        sys.exit(0)
    os.waitpid(child, 0)
    say("child is gone")

signal.signal(signal.SIGUSR1, handler)
milter.opensocket(True)
milter.main()
say("main returned")
"""
)

TWICE = (
    SCRIPT
    + """
milter.opensocket(True)
outcomes = []
barrier = threading.Barrier(2)

def run():
    barrier.wait()
    try:
        milter.main()
        outcomes.append("returned")
    except milter.error as error:
        outcomes.append("refused")
        milter.stop()

threads = [threading.Thread(target=run) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
say(*sorted(outcomes))
"""
)

STOPPED_FIRST = (
    SCRIPT
    + """
milter.opensocket(True)
milter.stop()
milter.main()
host, port = "127.0.0.1", int(sys.argv[2])
with socket.socket() as client:
    say("connect", client.connect_ex((host, port)) != 0)
"""
)


def test_locks_and_sockets_of_the_application_survive_a_stop(run_filter, directory):
    filter_ = run_filter(None, str(directory / "lock"), source=LOCK)
    filter_.mta().close()
    assert filter_.stop() == 0
    assert "lock held True" in filter_.output
    assert "socketpair works True" in filter_.output


def test_a_handler_may_fork_while_the_filter_runs(run_filter):
    filter_ = run_filter(source=FORK)
    with filter_.mta() as mta:
        os.kill(filter_.pid, signal.SIGUSR1)
        filter_.wait_for("child is gone")
        result = mta.send(b"Subject: x\r\n\r\nbody\r\n", sender="a@b.c", recipients=["d@e.f"])
        assert result.verdict in (Verdict.CONTINUE, Verdict.ACCEPT)
    filter_.mta().close()
    assert filter_.stop() == 0
    assert filter_.output.count("main returned") == 1


def test_of_two_threads_in_main_one_is_refused(run_filter):
    filter_ = run_filter(source=TWICE)
    assert filter_.wait() == 0
    assert "refused returned" in filter_.output


def test_stop_before_main_ends_the_listening_socket_too(run_filter, free_port):
    port = free_port()
    filter_ = run_filter(None, str(port), source=STOPPED_FIRST, socket=f"inet:{port}@127.0.0.1")
    assert filter_.wait() == 0
    assert "connect True" in filter_.output
