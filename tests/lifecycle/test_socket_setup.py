"""runmilter's socket_mode, socket_group, user and group: who may connect, and who serves."""

from __future__ import annotations

import ast
import contextlib
import grp
import os
import pwd
import re
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import milter
import pytest
from support.lifecycle import as_root
from support.process import WAIT, python_command

from Milter._socket_setup import Access, UnsafeError

Run = Callable[..., Any]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

#: runmilter with the options that are given as a Python expression; who we are at each step.
FILTER = """
import logging, os, sys
import Milter, milter

logging.basicConfig(format="%(levelname)s %(message)s")

def ids():
    return os.getresuid(), os.getresgid(), sorted(os.getgroups())

class Seen(Milter.Base):
    def connect(self, *args):
        print("serves as", ids(), flush=True)
        return Milter.CONTINUE

open_socket = milter.opensocket

def open_and_look(remove):
    open_socket(remove)
    if not sys.argv[1].startswith("inet"):
        made = os.stat(sys.argv[1].partition(":")[2])
        print(f"made with {made.st_mode & 0o777:04o}", flush=True)

def tell_of(call):
    def tell(path, *args, **options):
        def look(when):
            made = os.stat(path)
            print(f"{when} {call.__name__}: {made.st_mode & 0o777:04o} {made.st_uid} {made.st_gid}",
                  flush=True)

        look("before")
        call(path, *args, **options)
        look("after")
    return tell

milter.opensocket = open_and_look
os.chown, os.chmod = tell_of(os.chown), tell_of(os.chmod)
Milter.factory = Seen
options = eval(sys.argv[2])
try:
    Milter.runmilter("seen", sys.argv[1], **options)
except (Milter.error, RuntimeError) as exc:
    print("refused:", type(exc).__name__, exc, flush=True)
    sys.exit(3)
"""


@pytest.fixture
def serve(run_filter: Run, directory: Path) -> Run:
    """A filter with these options, in a directory that everybody may enter."""
    directory.chmod(0o755)

    def start(options: str, where: str = "") -> Any:
        return run_filter(None, options, source=FILTER, socket=where or f"unix:{directory}/s")

    return start


def connect(filter_: Any) -> None:
    with filter_.mta() as mta:
        mta.connect_info("client.example", "127.0.0.1", 1)


def ids_of(filter_: Any) -> tuple[tuple[int, ...], tuple[int, ...], list[int]]:
    connect(filter_)
    line = filter_.wait_for("serves as ").partition("as ")[2]
    found: tuple[tuple[int, ...], tuple[int, ...], list[int]] = ast.literal_eval(line)
    return found


# --- the socket --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ("{'socket_mode': 0o600}", 0o600),
        ("{'socket_mode': 0o666}", 0o666),
        ("{'socket_mode': 0o660, 'socket_group': os.getgid()}", 0o660),
        ("{'socket_group': os.getgid()}", 0o660),
        ("{'user': os.getuid()}", 0o660),
    ],
)
def test_the_mode_comes_after_the_socket_is_closed_to_others(
    serve: Run, directory: Path, options: str, mode: int
) -> None:
    filter_ = serve(options)
    connect(filter_)
    assert filter_.wait_for("made with") == "made with 0600"
    assert stat.S_IMODE((directory / "s").stat().st_mode) == mode
    assert filter_.stop() == 0
    assert ("every user of this machine can connect" in filter_.output) == (mode == 0o666)
    assert not (directory / "s").exists()


def test_without_these_options_the_umask_says_the_mode(serve: Run, directory: Path) -> None:
    filter_ = serve("os.umask(0o027) and {}")
    connect(filter_)
    assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o750


def test_the_umask_is_put_back(serve: Run, directory: Path) -> None:
    filter_ = serve(
        "{'socket_mode': 0o600, 'worker_init': lambda: print(f'umask {os.umask(0):04o}', "
        "flush=True)} if os.umask(0o022) is not None else None"
    )
    assert filter_.wait_for("umask") == "umask 0022"


@root_only
def test_the_group_is_given_by_name(serve: Run, directory: Path) -> None:
    filter_ = serve("{'socket_group': 'daemon'}")
    connect(filter_)
    status = (directory / "s").stat()
    assert (status.st_uid, status.st_gid) == (0, grp.getgrnam("daemon").gr_gid)
    assert stat.S_IMODE(status.st_mode) == 0o660


@root_only
def test_there_is_no_moment_in_which_others_could_connect(serve: Run) -> None:
    """Owner and group change while nobody else has access, and the mode is the last to change."""
    filter_ = serve("{'user': 'nobody', 'socket_group': 'daemon', 'socket_mode': 0o660}")
    connect(filter_)
    final = f"{pwd.getpwnam('nobody').pw_uid} {grp.getgrnam('daemon').gr_gid}"
    filter_.wait_for("after chmod")
    told = [line for line in filter_.output.split("\n") if re.match("(before|after) ch", line)]
    assert told == [
        "before chown: 0600 0 0",
        f"after chown: 0600 {final}",
        f"before chmod: 0600 {final}",
        f"after chmod: 0660 {final}",
    ]


# --- giving up root ----------------------------------------------------------------------------


@root_only
@pytest.mark.parametrize("workers", [1, 2])
def test_root_is_given_up_for_good(serve: Run, directory: Path, workers: int) -> None:
    nobody = pwd.getpwnam("nobody")
    filter_ = serve(
        f"{{'user': 'nobody', 'socket_group': 'daemon', 'workers': {workers}, "
        "'worker_init': lambda: os.write(1, f'prepares as {ids()}\\n'.encode())}"
    )
    users, groups, others = ids_of(filter_)
    assert users == (nobody.pw_uid,) * 3
    assert groups == (nobody.pw_gid,) * 3
    assert set(others) == set(os.getgrouplist("nobody", nobody.pw_gid))
    assert 0 not in others
    prepared = filter_.wait_for("prepares as").partition("as ")[2]
    assert ast.literal_eval(prepared) == (users, groups, others)
    made = (directory / "s").stat()
    assert (made.st_uid, made.st_gid) == (nobody.pw_uid, grp.getgrnam("daemon").gr_gid)
    status = Path(f"/proc/{filter_.pid}/status").read_text()
    assert re.search(r"^CapPrm:\s*0+$", status, re.MULTILINE)
    assert filter_.stop() == 0
    assert "runs as root" not in filter_.all_output


@root_only
def test_every_thread_gives_up_root(serve: Run) -> None:
    filter_ = serve("{'user': 'nobody'}")
    connect(filter_)
    nobody = str(pwd.getpwnam("nobody").pw_uid)
    for task in Path(f"/proc/{filter_.pid}/task").iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # one of libmilter's that has ended meanwhile
        found = re.search(r"^Uid:(.*)$", status, re.MULTILINE)
        assert found and found[1].split() == [nobody] * 4


@root_only
def test_a_group_of_choice_and_users_that_are_in_no_list(serve: Run) -> None:
    filter_ = serve("{'user': 54321, 'group': 'daemon'}")
    gid = grp.getgrnam("daemon").gr_gid
    assert ids_of(filter_) == ((54321,) * 3, (gid,) * 3, [gid])


BACK = """
import os
real = os.setresuid
os.setresuid = lambda r, e, s: real(e, e, 0)
import Milter
try:
    Milter.runmilter("x", __import__("sys").argv[1], user="nobody")
except Milter.error as exc:
    print(exc)
print(os.path.exists(__import__("sys").argv[1][5:]))
"""


@as_root
def test_a_way_back_to_root_is_seen(directory: Path) -> None:
    directory.chmod(0o755)
    done = subprocess.run(
        [*python_command(), "-c", BACK, f"unix:{directory}/s"],
        capture_output=True, text=True, timeout=WAIT, check=True,
    )  # fmt: skip
    assert "became user 'nobody', but the way back to root is open" in done.stdout


@root_only
def test_a_user_whom_the_system_refuses(serve: Run, directory: Path) -> None:
    refusing = "setattr(os, 'setresuid', lambda *ids: (_ for _ in ()).throw(OSError(11, 'Busy')))"
    filter_ = serve(f"{refusing} or {{'user': 'nobody'}}")
    assert filter_.wait() == 3
    assert "cannot become user 'nobody': Busy; the filter does not go on as root" in filter_.output
    assert not (directory / "s").exists()


UNPRIVILEGED = """
import os, sys
import Milter, Milter._socket_setup
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
for options in eval(sys.argv[2]):
    try:
        Milter.runmilter("x", sys.argv[1], **options)
    except Milter.error as exc:
        print(type(exc).__name__, exc)
"""


@as_root
def test_others_than_root_cannot_choose(directory: Path) -> None:
    directory.chmod(0o755)
    os.chown(directory, 65534, 65534)
    options = [
        {"user": "daemon"}, {"user": 65534, "group": "daemon"}, {"socket_group": "daemon"},
    ]  # fmt: skip
    done = subprocess.run(
        [*python_command(), "-c", UNPRIVILEGED, f"unix:{directory}/s", repr(options)],
        capture_output=True, text=True, timeout=WAIT, check=True,
    )  # fmt: skip
    user, group, socket_group = done.stdout.splitlines()
    assert user == "InvalidArgument user 'daemon': only root can become another user"
    assert group == "InvalidArgument group 'daemon': only root can choose its group"
    assert socket_group.startswith("error cannot give the socket")
    assert not (directory / "s").exists()


@root_only
def test_going_on_as_root_is_warned_of(serve: Run) -> None:
    assert serve("{}").wait_for("runs as root").startswith("WARNING")


@root_only
def test_it_is_warned_of_without_logging_too(run_filter: Run) -> None:
    source = "import sys, Milter; Milter.runmilter('x', sys.argv[1])"
    assert run_filter(source=source).wait_for("runs as root").startswith("the filter")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"socket_mode": 660}, r"socket_mode must be from 0 to 0o777, not 660 \(0o660 in octal"),
        ({"socket_mode": -1}, "socket_mode must be from 0 to 0o777, not -1"),
        ({"socket_mode": 0o1777}, "socket_mode must be from 0 to 0o777, not 1023"),
        ({"socket_group": "no-such-group"}, "socket_group 'no-such-group': there is no such"),
        ({"socket_group": -1}, "socket_group -1: there is no such"),
        ({"socket_group": 2**32 - 1}, "there is no such group"),
        ({"socket_group": "a\0b"}, "there is no such group"),
        ({"user": "no-such-user"}, "user 'no-such-user': there is no such user"),
        ({"user": "a\0b"}, "there is no such user"),
        ({"user": -1}, "user -1: there is no such user"),
        ({"user": 2**32 - 1}, "there is no such user"),
        ({"user": 10**30}, "there is no such user"),
        ({"user": 54321}, "user 54321 is not in the system's list of users: say which group="),
        ({"user": "root", "group": "no-such-group"}, "group 'no-such-group': there is no such"),
        ({"group": "daemon"}, "group needs user"),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(milter.InvalidArgument, match=words) as caught:
        Access("unix:/nowhere/s", **options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "options", [{"socket_mode": "0660"}, {"socket_mode": True}, {"socket_group": 1.0},
                {"user": b"root"}, {"user": True}, {"user": "root", "group": []}],
)  # fmt: skip
def test_values_of_the_wrong_type(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be"):
        Access("unix:/nowhere/s", **options)


@pytest.mark.parametrize("conn", ["inet:8891@127.0.0.1", "inet6:8891@[::1]", "fd:3"])
@pytest.mark.parametrize("name", ["socket_mode", "socket_group"])
def test_what_is_for_unix_sockets_only(conn: str, name: str) -> None:
    with pytest.raises(milter.InvalidArgument, match=f"{name} is for unix sockets, not for"):
        Access(conn, **{name: 0})


# --- the directory -----------------------------------------------------------------------------


def refused(where: Path, **options: Any) -> str:
    options.setdefault("socket_mode", 0o600)
    with pytest.raises(UnsafeError) as caught:
        Access(f"unix:{where}/s", **options).check_directory()
    return str(caught.value)


def accepted(where: Path, **options: Any) -> None:
    options.setdefault("socket_mode", 0o600)
    Access(f"unix:{where}/s", **options).check_directory()


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o2750])
def test_a_directory_of_ones_own(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    accepted(directory)


@pytest.mark.parametrize("mode", [0o757, 0o1777, 0o777])
def test_a_directory_that_everybody_may_write_to(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    message = refused(directory)
    assert "everybody may write to the socket's directory" in message
    owner = pwd.getpwuid(os.getuid()).pw_name
    assert f"{directory} (owner {owner}:" in message
    assert f"mode {mode:04o})" in message
    assert f"install -d -m 0750 {directory}/s" in message


@root_only
def test_a_directory_that_a_group_may_write_to(directory: Path) -> None:
    directory.chmod(0o775)
    daemon = grp.getgrnam("daemon").gr_gid
    os.chown(directory, 0, daemon)
    assert "the group daemon may write" in refused(directory)
    accepted(directory, socket_group="daemon")
    accepted(directory, user="nobody", group="daemon")
    (directory / "below").mkdir()
    assert f"chmod g-w {directory}" in refused(directory / "below")
    directory.chmod(0o1775)
    accepted(directory / "below")
    assert "the group daemon may write" in refused(directory)


def test_above_it_the_sticky_bit_is_enough(directory: Path) -> None:
    (directory / "below").mkdir()
    directory.chmod(0o1777)
    accepted(directory / "below")
    directory.chmod(0o777)
    assert f"chmod o-w {directory}" in refused(directory / "below")


@root_only
def test_directories_of_others(directory: Path) -> None:
    below = directory / "below"
    below.mkdir()
    nobody = pwd.getpwnam("nobody")
    for place in (directory, below):
        os.chown(place, nobody.pw_uid, -1)
        assert f"{place} (owner nobody:" in refused(below)
        accepted(below, user="nobody")
        os.chown(place, 0, -1)
    accepted(below)


def test_symbolic_links_are_followed(directory: Path) -> None:
    (directory / "real" / "below").mkdir(parents=True)
    (directory / "to").symlink_to("real/below")
    (directory / "again").symlink_to(directory / "to")
    accepted(directory / "again")
    accepted(directory / "again" / ".." / "below" / ".")
    (directory / "real" / "below").chmod(0o777)
    assert f"{directory}/real/below (owner" in refused(directory / "again")


@root_only
def test_what_a_link_leads_through_counts(directory: Path) -> None:
    theirs = directory / "theirs"
    (directory / "good").mkdir()
    theirs.mkdir()
    (theirs / "to").symlink_to(directory / "good")
    accepted(theirs / "to")
    os.chown(theirs, pwd.getpwnam("nobody").pw_uid, -1)
    assert f"{theirs} (owner nobody:" in refused(theirs / "to")


@root_only
def test_a_link_of_another_user_in_a_sticky_directory(directory: Path) -> None:
    (directory / "good").mkdir()
    directory.chmod(0o1777)
    (directory / "to").symlink_to("good")
    accepted(directory / "to")
    os.chown(directory / "to", pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
    assert "to (owner nobody:" in refused(directory / "to")


def test_links_without_end_and_other_dead_ends(directory: Path) -> None:
    (directory / "loop").symlink_to("loop")
    assert "too many symbolic links" in refused(directory / "loop")
    (directory / "file").write_text("")
    assert "is no directory" in refused(directory / "file")
    message = refused(directory / "none", socket_group=os.getgid())
    assert "No such file or directory" in message
    assert f"install -d -g {grp.getgrgid(os.getgid()).gr_name} -m 0750 {directory}/none" in message


def test_a_relative_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    Access("s", socket_mode=0o600).check_directory()
    directory.chmod(0o777)
    with pytest.raises(UnsafeError, match=str(directory)):
        Access("local:s", socket_mode=0o600).check_directory()


def test_runmilter_refuses_it(serve: Run, directory: Path) -> None:
    directory.chmod(0o777)
    filter_ = serve("{'socket_mode': 0o600}")
    assert filter_.wait() == 3
    assert f"refused: UnsafeError everybody may write to the socket's directory {directory}" in (
        filter_.output
    )
    assert not (directory / "s").exists()


def test_without_options_it_is_a_warning(serve: Run, directory: Path) -> None:
    directory.chmod(0o777)
    filter_ = serve("{}")
    connect(filter_)
    assert filter_.wait_for("everybody may write").startswith("WARNING")


def test_a_worker_init_that_fails_leaves_no_socket(serve: Run, directory: Path) -> None:
    filter_ = serve("{'worker_init': lambda: (_ for _ in ()).throw(RuntimeError('no database'))}")
    assert filter_.wait() == 3
    assert "no database" in filter_.output
    assert not (directory / "s").exists()


REPLACED = """
import os, socket, sys
import Milter, milter
open_socket = milter.opensocket
path = sys.argv[1][5:]
def open_and_replace(remove):
    open_socket(remove)
    os.rename(path, path + "x")
    {replace}
milter.opensocket = open_and_replace
try:
    Milter.runmilter("x", sys.argv[1], socket_mode=0o666)
except (Milter.error, OSError) as exc:
    print(type(exc).__name__, exc)
"""


@pytest.mark.parametrize(
    "replace",
    [
        "open(path, 'w')",
        "os.symlink(path + 'x', path)",
        "os.link(path + 'x', path)",
        "socket.socket(socket.AF_UNIX).bind(path); os.chmod(path, 0o755)",
    ],
    ids=["file", "symlink", "hard link", "another socket"],
)
def test_what_was_put_in_its_place_is_not_given_away(directory: Path, replace: str) -> None:
    done = subprocess.run(
        [*python_command(), "-W", "ignore", "-c", REPLACED.format(replace=replace),
         f"unix:{directory}/s"],
        capture_output=True, text=True, timeout=WAIT, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(("UnsafeError", "OSError")), done
    for each in directory.iterdir():
        assert stat.S_IMODE(each.lstat().st_mode) != 0o666 or each.is_symlink()


# --- TCP ---------------------------------------------------------------------------------------


def test_a_port_on_all_addresses_is_warned_of(serve: Run, free_port: Callable[[], int]) -> None:
    # 127.0.0.0/8 is ours alone; a name or address that is not loopback would be open to others.
    script = (
        "setattr(__import__('Milter._socket_setup')._socket_setup, '_is_loopback', lambda a: 0)"
    )
    filter_ = serve(f"{script} or {{}}", f"inet:{free_port()}@127.0.0.1")
    connect(filter_)
    line = filter_.wait_for("no authentication")
    assert line.startswith("WARNING")
    assert "whoever reaches the port" in line
    assert "firewall" in line


def test_a_port_of_this_machine_is_not(serve: Run, free_port: Callable[[], int]) -> None:
    filter_ = serve("{}", f"inet:{free_port()}@127.0.0.1")
    connect(filter_)
    assert filter_.stop() == 0
    assert "no authentication" not in filter_.output  # at level INFO


@pytest.mark.parametrize(
    ("kind", "where", "local"),
    [
        ("inet", "127.0.0.1", True),
        ("inet", "127.1.2.3", True),
        ("inet", "localhost", True),
        ("inet6", "::1", True),
        ("inet", "", False),
        ("inet6", "", False),
        ("inet", "0.0.0.0", False),
        ("inet", "192.0.2.1", False),
        ("inet6", "::", False),
        ("inet6", "2001:db8::1", False),
        ("inet6", "::ffff:127.0.0.1", True),
        ("inet", "no.such.host.invalid", False),
    ],
)
def test_which_listeners_are_local(kind: str, where: str, local: bool) -> None:
    from Milter import _socket_setup

    assert _socket_setup._is_local(kind, where) is local


def test_inherited_sockets_are_asked(directory: Path) -> None:
    from Milter import _socket_setup

    with socket.create_server(("127.0.0.1", 0)) as local:
        assert _socket_setup._is_local("fd", str(local.fileno())) is True
        assert local.getsockname()  # still open
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
        unix.bind(f"{directory}/s")
        assert _socket_setup._is_local("fd", str(unix.fileno())) is None
