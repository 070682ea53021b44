"""The listening socket: what is opened, what is removed, and what an error says."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
from pathlib import Path

import pytest
from support.lifecycle import (
    MESSAGE,
    NOBODY,
    RECIPIENTS,
    USERS,
    as_root,
    at_once,
    end,
    path_of,
    wait_until,
)

from Milter.mta import parse_socket


@pytest.fixture
def opened(run_filter):
    """Starts a filter that says how the opening of its socket went."""
    return lambda name=None, *options: run_filter("opens_socket", *options, socket=name)


def works(filter_, where=None):
    with filter_.mta() if where is None else connect(where) as mta:
        assert mta.send(MESSAGE, recipients=RECIPIENTS).message["X-Stamp"] == "yes"


def connect(where):
    from Milter.mta import MTA

    return MTA.connect(where, wait_for=20, timeout=20)


def fails(filter_, *texts, stage="opensocket", code=None):
    """It ends with a milter.error that says all this, and the OSError behind it."""
    assert filter_.wait() == 2
    said = filter_.wait_for(f"{stage} failed:")
    for text in texts:
        assert str(text) in said
    assert " error" in filter_.wait_for("types:")
    if code is not None:
        assert filter_.wait_for("cause:").split()[-1] == str(code)
    return said


def listener(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


# --- the unix socket's life ------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["unix:", "local:", ":", ""])
def test_the_socket_is_there_as_soon_as_it_is_opened(opened, directory, scheme):
    path = directory / "s"
    filter_ = opened(f"{scheme}{path}")
    filter_.wait_for("open: True")
    works(filter_, f"unix:{path}")
    assert filter_.stop() == 0
    assert not path.exists()
    assert "main returned" in filter_.output


def test_main_opens_the_socket_itself(opened, directory):
    filter_ = opened(f"unix:{directory}/s", "--lazy")
    works(filter_)
    assert filter_.stop() == 0
    assert not (directory / "s").exists()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
def test_the_mode_that_the_application_gives_stays(opened, directory, mode):
    path = directory / "s"
    filter_ = opened(f"unix:{path}", "--mode", f"{mode:o}")
    works(filter_)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    works(filter_)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "closed"), [("077", 0o077), ("007", 0o007), ("027", 0o027)])
def test_the_umask_holds(opened, directory, umask, closed):
    path = directory / "s"
    filter_ = opened(f"unix:{path}", "--umask", umask)
    works(filter_)
    assert not stat.S_IMODE(path.stat().st_mode) & closed


def test_a_relative_path_is_removed_wherever_the_program_is_then(opened, directory):
    (directory / "elsewhere").mkdir()
    bystander = directory / "elsewhere" / "s"
    bystander.write_text("not a socket")
    filter_ = opened(
        "unix:s", "--start-in", str(directory), "--chdir", str(directory / "elsewhere")
    )
    works(filter_, f"unix:{directory}/s")
    assert filter_.stop() == 0
    assert not (directory / "s").exists()
    assert bystander.read_text() == "not a socket"


@as_root
def test_an_unprivileged_filter_removes_its_socket(opened, public):
    filter_ = opened(f"unix:{public}/s", "--uid", str(NOBODY))
    works(filter_)
    assert (public / "s").stat().st_uid == NOBODY
    assert filter_.stop() == 0
    assert not (public / "s").exists()


@pytest.mark.parametrize("user", USERS)
def test_a_socket_that_another_process_made_is_left_alone(opened, public, user):
    path = public / "s"
    filter_ = opened(f"unix:{path}", *user)
    works(filter_)
    path.unlink()
    with listener(path):
        before = path.stat().st_ino
        assert filter_.stop() == 0
        assert path.stat().st_ino == before


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("thing", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(opened, public, user, thing):
    path = public / "s"
    filter_ = opened(f"unix:{path}", *user)
    works(filter_)
    path.rename(public / "moved")
    if thing == "file":
        path.write_text("precious")
    elif thing == "directory":
        path.mkdir()
    else:
        path.symlink_to(public / "moved")
    assert filter_.stop() == 0
    assert path.is_symlink() if thing == "link" else path.exists()
    assert stat.S_ISSOCK((public / "moved").stat().st_mode)  # not what stands at the path


def test_a_socket_that_is_gone_already_is_no_error(opened, directory):
    filter_ = opened(f"unix:{directory}/s")
    works(filter_)
    (directory / "s").unlink()
    assert filter_.stop() == 0
    assert "Traceback" not in filter_.output


# --- what stood at the path before -----------------------------------------------------------


def test_rmsock_removes_a_socket_that_was_left_behind(opened, directory):
    listener(directory / "s").close()
    filter_ = opened(f"unix:{directory}/s")
    works(filter_)
    assert filter_.stop() == 0


def test_without_rmsock_a_socket_that_was_left_behind_is_an_error(opened, directory):
    path = directory / "s"
    listener(path).close()
    before = path.stat().st_ino
    filter_ = opened(f"unix:{path}", "--keep")
    said = fails(filter_, path, "opensocket(True)", code=errno.EADDRINUSE)
    assert os.strerror(errno.EADDRINUSE) in said
    assert path.stat().st_ino == before


def test_a_link_to_a_socket_is_left_alone(opened, directory):
    path, target = directory / "s", directory / "target"
    with listener(target):
        path.symlink_to(target)
        fails(opened(f"unix:{path}"), path)
        assert path.is_symlink()
        assert target.is_socket()


def test_without_rmsock_a_free_path_is_taken(opened, directory):
    filter_ = opened(f"unix:{directory}/s", "--keep")
    works(filter_)
    assert filter_.stop() == 0
    assert not (directory / "s").exists()


@pytest.mark.parametrize("options", [(), ("--keep",), ("--lazy",)])
@pytest.mark.parametrize("thing", ["file", "directory", "link", "fifo"])
def test_what_is_no_socket_is_never_removed(opened, directory, thing, options):
    path, target = directory / "s", directory / "target"
    target.write_text("precious")
    if thing == "file":
        path.write_text("precious")
    elif thing == "directory":
        path.mkdir()
    elif thing == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    before = path.lstat().st_ino
    filter_ = opened(f"unix:{path}", *options)
    stage = "main" if "--lazy" in options else "opensocket"
    fails(filter_, path, "left alone", stage=stage, code=errno.EEXIST)
    assert path.lstat().st_ino == before
    assert target.read_text() == "precious"


# --- paths that cannot be ------------------------------------------------------------------------


def test_a_directory_that_does_not_exist(opened, directory):
    path = directory / "none" / "s"
    fails(opened(f"unix:{path}"), path, "create the directory", code=errno.ENOENT)


def test_a_part_of_the_path_that_is_no_directory(opened, directory):
    (directory / "file").write_text("")
    path = directory / "file" / "s"
    fails(opened(f"unix:{path}"), path, "no directory", code=errno.ENOTDIR)


@as_root
def test_a_directory_that_the_user_may_not_write_to(opened, directory):
    directory.chmod(0o755)
    path = directory / "s"
    filter_ = opened(f"unix:{path}", "--uid", str(NOBODY))
    fails(filter_, path, "let the filter's user write", code=errno.EACCES)
    assert not path.exists()


@pytest.mark.parametrize("scheme", ["unix:", ""])
def test_a_path_that_is_too_long(opened, directory, scheme):
    path = directory / ("x" * 110)
    fails(opened(f"{scheme}{path}"), path, "shorter path", code=errno.ENAMETOOLONG)


def test_the_longest_path_that_is_not_too_long(opened, directory):
    path = directory / ("x" * (106 - len(str(directory)) - 1))
    assert len(str(path)) == 106
    filter_ = opened(f"unix:{path}")
    works(filter_)
    assert filter_.stop() == 0
    assert not path.exists()


def test_another_path_can_be_tried_after_a_failure(run_filter, directory):
    filter_ = run_filter("retries", socket=f"unix:{directory}/none/s")
    filter_.wait_for("failed")
    works(filter_, f"unix:{directory}/s")
    assert filter_.stop() == 0


# --- ports ----------------------------------------------------------------------------------


def test_a_port_in_use(opened):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        filter_ = opened(f"inet:{port}@127.0.0.1")
        fails(filter_, f"inet:{port}@127.0.0.1", "another process", code=errno.EADDRINUSE)


def test_a_port_whose_connections_have_just_ended_is_free(opened, free_port):
    name = f"inet:{free_port()}@127.0.0.1"
    for _ in range(2):
        filter_ = opened(name)
        works(filter_)
        with filter_.mta() as mta:
            mta.greet()
            assert end(filter_, signal.SIGKILL) < 5  # the port's connections are left to the system
            mta.close()


@as_root
def test_a_port_that_needs_privileges(opened):
    floor = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if floor < 2:
        pytest.skip("every port is free for all here")
    name = f"inet:{floor - 1}@127.0.0.1"
    fails(opened(name, "--uid", str(NOBODY)), name, "privileges", code=errno.EACCES)


def test_an_unknown_service(opened):
    fails(opened("inet:nosuchservice@127.0.0.1"), "nosuchservice", "service", code=errno.EINVAL)


def test_an_unknown_host(opened, free_port):
    name = f"inet:{free_port()}@host.invalid"
    said = fails(opened(name), name, code=errno.EADDRNOTAVAIL)
    assert len(said.rpartition(":")[2]) > 5  # the resolver's own words


@pytest.mark.parametrize(
    ("scheme", "address"),
    [("inet", "192.0.2.1"), ("inet6", "[2001:db8::1]"), ("inet", "[192.0.2.1]")],
)
def test_an_address_that_is_not_of_this_host(opened, free_port, scheme, address):
    name = f"{scheme}:{free_port()}@{address}"
    fails(opened(name), name, "this host has no such address", code=errno.EADDRNOTAVAIL)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("inet:127.0.0.1:8891", "inet:8891@127.0.0.1"),
        ("inet:localhost:8891", "inet:8891@localhost"),
        ("inet:[::1]:8891", "inet6:8891@[::1]"),
        ("inet6:[::1]:8891", "inet6:8891@[::1]"),
    ],
)
def test_the_order_of_postfix_is_refused(opened, wrong, right):
    filter_ = opened(wrong)
    fails(filter_, wrong, right, stage="setconn")
    assert "ValueError" in filter_.wait_for("types:")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("smtp:25@localhost", "unknown scheme"),
        ("unix:", "path is missing"),
        ("inet:@127.0.0.1", "port is missing"),
        ("inet:", "port is missing"),
        ("inet:70000@127.0.0.1", "65535"),
        ("inet:25x@127.0.0.1", "number"),
        ("inet:8891@", "host"),
        ("inet6:8891@[::1", "]"),
        ("fd:", "number"),
        ("fd:x", "number"),
        ("fd:1234567890", "number"),  # more than an int may hold: it would be another one's number
        ("fd:4294967299", "number"),
    ],
)
def test_what_is_no_address_is_refused(opened, wrong, why):
    filter_ = opened(wrong)
    fails(filter_, wrong, why, stage="setconn")
    assert "ValueError" in filter_.wait_for("types:")


# --- sockets that are open already ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "inet"])
def test_a_listening_socket_can_be_handed_over(run_filter, unix_socket, free_port, kind):
    name = unix_socket() if kind == "unix" else f"inet:{free_port()}@127.0.0.1"
    filter_ = run_filter("inherited_socket", kind, socket=name)
    works(filter_)
    with filter_.mta() as mta:
        mta.greet()
        assert at_once(end(filter_))
        mta.expect_close()
        mta.close()
    assert filter_.wait() == 0
    if kind == "unix":
        assert os.path.exists(path_of(name))  # it is not the filter's to remove


@pytest.mark.parametrize("kind", ["none", "file", "idle"])
def test_what_does_not_listen_is_no_socket_to_hand_over(run_filter, kind):
    filter_ = run_filter("inherited_socket", kind)
    assert filter_.wait() == 2
    said = filter_.wait_for("failed:")
    assert "fd:" in said
    assert "listening socket" in said
    assert "OSError" in said


# --- the limit of open files --------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "warned"), [(256, True), (1023, True), (1024, False)])
def test_a_low_limit_of_open_files_is_warned_about(opened, directory, limit, warned):
    filter_ = opened(f"unix:{directory}/s", "--files", str(limit))
    works(filter_)
    assert filter_.stop() == 0
    assert (f"limit of open files is {limit}" in filter_.output) == warned


def test_every_interface_listens_where_no_host_is_given(opened, free_port):
    port = free_port()
    filter_ = opened(f"inet:{port}")
    works(filter_, f"inet:{port}@127.0.0.1")
    works(filter_, f"inet:{port}@127.0.0.2")
    assert filter_.stop() == 0
    wait_until(lambda: not listens(f"inet:{port}@127.0.0.1"), "it still listens")


def listens(where):
    address = parse_socket(where)
    with socket.socket(address.family) as probe:
        return probe.connect_ex(address.address) == 0
