"""The socket's directory, where access control lists say who may write: runmilter, run."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lifecycle.test_socket_setup import FILTER, accepted, connect, refused, root_only
from support.process import WAIT, python_command

from Milter import _acl
from Milter._socket_setup import Access, UnsafeError

Run = Callable[..., Any]

NOBODY = pwd.getpwnam("nobody")
DAEMON = grp.getgrnam("daemon")
NO_ID = 0xFFFFFFFF
_KINDS = {"u": (0x01, 0x02), "g": (0x04, 0x08), "m": (0x10, 0x10), "o": (0x20, 0x20)}


def encoded(*entries: str) -> bytes:
    """The list as the kernel keeps it, of entries such as ``u:1000:rwx`` and ``m::r-x``."""
    words = []
    for entry in entries:
        kind, number, rights = entry.split(":")
        own, named = _KINDS[kind]
        bits = sum(bit for bit, char in zip((4, 2, 1), rights) if char != "-")
        words.append((named if number else own, bits, int(number) if number else NO_ID))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *word) for word in sorted(words))


def give(place: Path, *entries: str, default: bool = False) -> None:
    """Give a directory these entries, and those of mode 0755 that they do not replace."""
    found = {entry.rpartition(":")[0]: entry for entry in ("u::rwx", "g::r-x", "o::r-x", *entries)}
    found.setdefault("m:", "m::rwx")
    os.setxattr(place, _acl.DEFAULT if default else _acl.ACCESS, encoded(*found.values()))


@pytest.fixture(autouse=True)
def _lists_are_there(directory: Path) -> None:
    if not hasattr(os, "setxattr"):
        pytest.skip("POSIX access control lists are read on Linux only")
    try:
        give(directory)
        os.removexattr(directory, _acl.ACCESS)
        directory.chmod(0o755)
    except OSError as exc:
        if exc.errno != errno.ENOTSUP:
            raise
        pytest.skip(f"the file system of {directory} has no access control lists")


USER = f"u:{NOBODY.pw_uid}"
GROUP = f"g:{DAEMON.gr_gid}"


@pytest.mark.parametrize(
    ("entries", "who"),
    [
        ([f"{USER}:rwx"], "the user nobody"),
        ([f"{USER}:-w-"], "the user nobody"),
        ([f"{USER}:rwx", "m::rw-"], "the user nobody"),
        (["u:54321:rwx"], "the user uid 54321"),
        ([f"{GROUP}:rwx"], "the group daemon"),
        (["u:0:rwx", f"{GROUP}:r-x", f"{USER}:rwx"], "the user nobody"),
        (["o::rwx"], "everybody"),
    ],
)
def test_a_list_that_lets_others_write(directory: Path, entries: list[str], who: str) -> None:
    give(directory, *entries)
    assert f"{who} may write to the socket's directory {directory}" in refused(directory)


@pytest.mark.parametrize(
    "entries",
    [
        [f"{USER}:r-x"],
        [f"{USER}:rwx", "m::r-x"],
        [f"{GROUP}:rwx", f"{USER}:rwx", "m::---"],
        ["u:0:rwx", "g:0:rwx"],
        [f"u:{os.geteuid()}:rwx"],
        # The mode says 0775 then: that is the mask, for entries that may not write.
        [f"{USER}:r-x", "g::r-x", "m::rwx"],
    ],
)
def test_a_list_that_lets_nobody_else_write(directory: Path, entries: list[str]) -> None:
    give(directory, *entries)
    accepted(directory)


@root_only
def test_the_group_that_owns_it(directory: Path) -> None:
    os.chown(directory, 0, DAEMON.gr_gid)
    give(directory, "u:0:rwx", "g::rwx")
    assert "the group daemon may write" in refused(directory)
    accepted(directory, socket_group="daemon")
    give(directory, "u:0:rwx", "g::rwx", "m::r-x")
    accepted(directory)


@root_only
def test_those_it_is_meant_for_may_write(directory: Path) -> None:
    give(directory, f"{USER}:rwx", f"{GROUP}:rwx")
    accepted(directory, user="nobody", socket_group="daemon")
    assert "the group daemon" in refused(directory, user="nobody")
    assert "the user nobody" in refused(directory, socket_group="daemon")


def test_a_directory_above(directory: Path) -> None:
    below = directory / "below"
    below.mkdir()
    give(directory, f"{USER}:rwx")
    message = refused(below)
    assert f"the user nobody may write to {directory} (owner" in message
    assert f"setfacl -x u:{NOBODY.pw_uid} {directory}" in message
    directory.chmod(0o1775)  # the sticky bit; with a list, 7 is the mask
    accepted(below)
    give(directory, f"{GROUP}:rwx")
    directory.chmod(0o775)
    assert f"setfacl -x g:{DAEMON.gr_gid} {directory}" in refused(below)
    directory.chmod(0o755)
    accepted(below)


@root_only
def test_the_owning_group_of_a_directory_above(directory: Path) -> None:
    below = directory / "below"
    below.mkdir()
    os.chown(directory, 0, DAEMON.gr_gid)
    give(directory, f"{USER}:r-x", "g::rwx")
    assert f"setfacl -m g::r-x {directory}" in refused(below)


def test_what_a_symbolic_link_leads_through(directory: Path) -> None:
    (directory / "real" / "below").mkdir(parents=True)
    (directory / "to").symlink_to("real/below")
    accepted(directory / "to")
    give(directory / "real", f"{USER}:rwx")
    assert f"the user nobody may write to {directory}/real" in refused(directory / "to")


# --- default lists -------------------------------------------------------------------------------


def test_a_default_list_that_opens_what_is_made_there(directory: Path) -> None:
    for entry, who in ((f"{USER}:rwx", "the user nobody"), (f"{GROUP}:rw-", "the group daemon")):
        give(directory, entry, default=True)
        message = refused(directory)
        assert f"{who} may write to what is made in the socket's directory {directory}" in message
        assert f"setfacl -k {directory}" in message


@pytest.mark.parametrize("entries", [[f"{USER}:r-x"], [f"{USER}:rwx", "m::r-x"], ["g::rwx"]])
def test_a_default_list_that_opens_nothing(directory: Path, entries: list[str]) -> None:
    give(directory, *entries, default=True)
    accepted(directory)


def test_a_default_list_above_is_for_what_is_not_there_yet(directory: Path) -> None:
    below = directory / "below"
    below.mkdir()
    give(directory, f"{USER}:rwx", default=True)
    accepted(below)
    (directory / "later").mkdir()
    assert "the user nobody may write to the socket's directory" in refused(directory / "later")


@pytest.fixture
def serve(run_filter: Run, directory: Path) -> Run:
    def start(options: str) -> Any:
        return run_filter(None, options, source=FILTER, socket=f"unix:{directory}/s")

    return start


@pytest.mark.parametrize(
    "entries", [["g::---", "m::---"], [f"{USER}:rw-", "m::r--"], ["u::r--", f"{USER}:r--"]]
)
def test_the_socket_has_no_list_but_its_mode(
    serve: Run, directory: Path, entries: list[str]
) -> None:
    """What it inherits would be in force again once its mode lets the group in."""
    give(directory, *entries, default=True)
    filter_ = serve("{'socket_mode': 0o660}")
    connect(filter_)
    assert stat.S_IMODE((directory / "s").stat().st_mode) == 0o660
    with pytest.raises(OSError, match="No data"):
        os.getxattr(directory / "s", _acl.ACCESS)
    assert filter_.stop() == 0


CONNECT = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
print(socket.socket(socket.AF_UNIX).connect_ex(sys.argv[1]))
"""


@root_only
def test_others_cannot_connect_by_an_inherited_list(serve: Run, directory: Path) -> None:
    give(directory, f"{USER}:rw-", "m::r--", default=True)
    connect(serve("{'socket_mode': 0o660}"))
    done = subprocess.run(
        [*python_command(), "-c", CONNECT, f"{directory}/s", str(NOBODY.pw_uid)],
        capture_output=True, text=True, timeout=WAIT, check=True,
    )  # fmt: skip
    assert done.stdout == f"{errno.EACCES}\n"


def test_without_options_it_is_a_warning(serve: Run, directory: Path) -> None:
    give(directory, f"{USER}:rwx")
    filter_ = serve("{}")
    connect(filter_)
    assert filter_.wait_for("the user nobody may write").startswith("WARNING")


# --- lists of other kinds ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"\2\0\0", b"\3\0\0\0", b"\2\0\0\0\1"])
def test_a_list_of_an_unknown_form_is_not_trusted(
    directory: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    directory.chmod(0o775)
    monkeypatch.setattr(os, "getxattr", lambda *args: data)
    with pytest.raises(UnsafeError, match="its access control list is of an unknown form"):
        Access(f"unix:{directory}/s", socket_mode=0o600, socket_group=0).check_directory()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENODATA, errno.ENOSYS])
def test_where_there_are_no_lists_the_mode_says_it_all(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "getxattr", fail)
    accepted(directory)
    directory.chmod(0o777)
    assert "everybody may write" in refused(directory)


def test_a_system_whose_lists_are_not_known(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "getxattr")
    monkeypatch.delattr(os, "removexattr")
    accepted(directory)
    _acl.remove(str(directory))


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="the program acl is not installed")
def test_the_lists_of_these_tests_are_those_of_setfacl(directory: Path) -> None:
    give(directory, f"{USER}:rwx", f"{GROUP}:r-x", "m::rw-")
    ours = os.getxattr(directory, _acl.ACCESS)
    os.removexattr(directory, _acl.ACCESS)
    directory.chmod(0o755)
    subprocess.run(
        ["setfacl", "-m", "u:nobody:rwx,g:daemon:r-x,m::rw-", str(directory)],
        check=True, timeout=WAIT,
    )  # fmt: skip
    assert os.getxattr(directory, _acl.ACCESS) == ours
    assert "the user nobody may write" in refused(directory)


# --- a socket that would be left behind ----------------------------------------------------------


@pytest.fixture
def roots(directory: Path) -> Iterator[Path]:
    """A directory of root's that everybody may enter."""
    directory.chmod(0o755)
    yield directory


@root_only
@pytest.mark.parametrize("more", ["", ", 'workers': 2"])
def test_a_socket_that_cannot_be_removed_is_told_of(serve: Run, roots: Path, more: str) -> None:
    filter_ = serve(f"{{'user': 'nobody'{more}}}")
    connect(filter_)
    line = filter_.wait_for("left behind")
    assert line.startswith(
        f"WARNING the socket {roots}/s will be left behind when the filter stops"
    )
    assert f"nobody may not write to {roots}" in line
    assert f"install -d -o nobody -m 0750 {roots}/s" in line
    assert filter_.stop() == 0
    assert (roots / "s").exists()


@root_only
@pytest.mark.parametrize("way", ["owner", "list", "sticky"])
def test_one_that_can_be_removed_is_not(serve: Run, roots: Path, way: str) -> None:
    if way == "owner":
        os.chown(roots, NOBODY.pw_uid, -1)
    elif way == "list":
        give(roots, f"{USER}:rwx")
    else:
        os.chown(roots, -1, NOBODY.pw_gid)
        roots.chmod(0o1775)
    filter_ = serve("{'user': 'nobody'}")
    connect(filter_)
    assert filter_.stop() == 0
    assert "left behind" not in filter_.output
    assert not (roots / "s").exists()


def test_who_is_not_told(serve: Run, directory: Path) -> None:
    filter_ = serve("{}")
    connect(filter_)
    assert filter_.stop() == 0
    assert "left behind" not in filter_.output


@root_only
def test_the_command_line_says_it_too(run_filter: Run, roots: Path, tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text("import Milter\nclass Hello(Milter.Base): pass\n")
    source = (
        f"import os, sys; os.chdir({os.fspath(tmp_path)!r}); sys.path.insert(0, '')\n"
        "from Milter.__main__ import main\n"
        "sys.exit(main(['run', 'hello:Hello', '--user', 'nobody', '--socket', sys.argv[1]]))\n"
    )
    filter_ = run_filter(source=source, socket=f"unix:{roots}/s")
    filter_.wait_for("serves on")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{roots}/s")
    assert "will be left behind when the filter stops, as nobody may not write to" in filter_.output
    assert filter_.stop() == 0
