"""``python -m Milter config`` and ``python -m Milter check``."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WAIT, python_command

from Milter._cli_common import FilterSocket

MODULE = """
import Milter

class Asks(Milter.Base):
    @Milter.symlist("i", "{auth_authen}", "{client_ptr}")
    def envfrom(self, sender, *params):
        return Milter.CONTINUE

    @Milter.symlist("i", "{extra}")
    def eoh(self):
        return Milter.CONTINUE

class Plain(Milter.Base):
    def eom(self):
        return Milter.ACCEPT
"""


# With -m, the working directory comes before the installed package.
HERE = Path(__file__).parent


def milter(*arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python_command(), "-m", "Milter", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def config(mta: str, where: str, *arguments: str, cwd: Path = HERE) -> str:
    done = milter("config", mta, "--name", "hello", "--socket", where, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- sockets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "libmilter", "postfix", "sendmail"),
    [
        ("unix:/a/b", "unix:/a/b", "unix:/a/b", "local:/a/b"),
        ("local:/a/b", "unix:/a/b", "unix:/a/b", "local:/a/b"),
        ("/a/b", "unix:/a/b", "unix:/a/b", "local:/a/b"),
        ("S=local:/a/b, F=T", "unix:/a/b", "unix:/a/b", "local:/a/b"),
        ("inet:1@h", "inet:1@h", "inet:h:1", "inet:1@h"),
        ("inet:h:1", "inet:1@h", "inet:h:1", "inet:1@h"),
        ("S=inet:1@h", "inet:1@h", "inet:h:1", "inet:1@h"),
        ("inet:1", "inet:1", "inet:127.0.0.1:1", "inet:1@127.0.0.1"),
        ("inet6:1", "inet6:1", "inet:[::1]:1", "inet6:1@[::1]"),
        ("inet6:1@[::1]", "inet6:1@[::1]", "inet:[::1]:1", "inet6:1@[::1]"),
        ("inet6:1@::1", "inet6:1@[::1]", "inet:[::1]:1", "inet6:1@[::1]"),
        ("inet:[::1]:1", "inet6:1@[::1]", "inet:[::1]:1", "inet6:1@[::1]"),
        ("inet6:1@h", "inet6:1@h", "inet:h:1", "inet6:1@h"),
    ],
)
def test_sockets_in_the_three_notations(
    text: str, libmilter: str, postfix: str, sendmail: str
) -> None:
    where = FilterSocket.parse(text)
    assert (where.libmilter, where.postfix, where.sendmail) == (libmilter, postfix, sendmail)


@pytest.mark.parametrize("text", ["", "unix:", "inet:", "inet:x@h", "inet:0@h", "fd:", "S="])
def test_no_sockets(text: str) -> None:
    with pytest.raises(ValueError, match="socket"):
        FilterSocket.parse(text)


# --- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("unix:/run/hello/s", "unix:/run/hello/s"),
        ("unix:/var/spool/postfix/hello/s", "unix:hello/s"),
        ("inet:8891@127.0.0.1", "inet:127.0.0.1:8891"),
        ("inet6:8891@[::1]", "inet:[::1]:8891"),
    ],
)
def test_main_cf(tmp_path: Path, where: str, shown: str) -> None:
    text = config("postfix", where, "--default-action", "accept", "--content-timeout", "60")
    expected = (
        f"{{ {shown}, connect_timeout=10s, command_timeout=30s, content_timeout=60s, "
        "default_action=accept }"
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert " ".join(" ".join(lines).split()) == (
        f"smtpd_milters = {expected} non_smtpd_milters = $smtpd_milters"
    )


def test_postfix_reads_main_cf(tmp_path: Path) -> None:
    if not shutil.which("postconf"):
        pytest.skip("Postfix is not installed")
    (tmp_path / "m.py").write_text(MODULE)
    text = config("postfix", "inet6:8891@[::1]", "m:Asks", cwd=tmp_path)
    (tmp_path / "main.cf").write_text(text)
    (tmp_path / "master.cf").write_text("")
    done = subprocess.run(
        ["postconf", "-c", str(tmp_path), "-n"],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stderr == ""
    values = dict(line.split(" = ", 1) for line in done.stdout.splitlines())
    assert values["milter_mail_macros"].split()[-1] == "{client_ptr}"
    assert values["milter_end_of_header_macros"] == "i {extra}"
    assert "milter_connect_macros" not in values
    assert "inet:[::1]:8891" in values["smtpd_milters"]


@pytest.mark.parametrize("action", ["accept", "reject", "tempfail"])
def test_sendmail_mc(action: str) -> None:
    text = config("sendmail", "unix:/run/hello/s", "--default-action", action)
    flags = {"accept": "", "reject": "F=R, ", "tempfail": "F=T, "}[action]
    assert text.splitlines()[-1] == (
        f"INPUT_MAIL_FILTER(`hello', `S=local:/run/hello/s, {flags}T=C:10s;S:30s;R:30s;E:300s')dnl"
    )


def test_sendmail_and_a_literal_ipv6_address() -> None:
    text = config("sendmail", "inet6:8891@[::1]")
    assert "S=inet6:8891@[::1]," in text
    assert "literal IPv6" in text
    assert "literal IPv6" not in config("sendmail", "inet6:8891@localhost6")


def test_m4_adds_the_macros_to_the_default(tmp_path: Path) -> None:
    if not shutil.which("m4"):
        pytest.skip("m4 is not installed")
    (tmp_path / "m.py").write_text(MODULE)
    text = config("sendmail", "unix:/run/hello/s", "m:Asks", cwd=tmp_path)
    before = (
        "define(`INPUT_MAIL_FILTER', `X$1, $2')dnl\n"
        "define(`confMILTER_MACROS_ENVFROM', ``i, {auth_authen}'')dnl\n"
    )
    after = "confMILTER_MACROS_ENVFROM\nconfMILTER_MACROS_EOH\n"
    # Twice, as two filters may ask for macros.
    done = subprocess.run(
        ["m4"],
        input=before + text + text + after,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stderr == ""
    *filters, envfrom, eoh = done.stdout.split("\n")[:-1]
    assert filters[0].startswith("Xhello, S=local:/run/hello/s, F=T, T=C:10s")
    assert envfrom == "i, {auth_authen}, {client_ptr}, {client_ptr}"
    assert eoh == "i, {extra}, i, {extra}"


def test_what_the_class_asks_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODULE)
    for mta, mark in (("postfix", "#"), ("sendmail", "dnl #")):
        lines = config(mta, "unix:/run/hello/s", "m:Asks", cwd=tmp_path).splitlines()
        assert f"{mark} Callbacks: envfrom eoh eom" in lines
        assert f"{mark} Macros for envfrom: i {{auth_authen}} {{client_ptr}}" in lines
    assert "macros" not in config("postfix", "unix:/run/hello/s", "m:Plain", cwd=tmp_path)


def test_the_class_may_stand_before_the_options(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODULE)
    words = ["--name", "hello", "--socket", "/run/hello/s"]
    first = milter("config", "postfix", "m:Asks", *words, cwd=tmp_path)
    assert first.stdout == config("postfix", "/run/hello/s", "m:Asks", cwd=tmp_path)
    both = milter("config", "postfix", "m:Asks", *words, "m:Plain", cwd=tmp_path)
    assert both.returncode == 2
    assert "unrecognized arguments: m:Plain" in both.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["postfix", "--name", "a'b", "--socket", "/a/b"],
        ["postfix", "--name", "a\nb", "--socket", "/a/b"],
        ["postfix", "--name", "a", "--socket", "unix:b"],
        ["postfix", "--name", "a", "--socket", "/a b"],
        ["sendmail", "--name", "a", "--socket", "/a')b"],
        ["sendmail", "--name", "a", "--socket", "fd:3"],
        ["sendmail", "--name", "a", "--socket", "/a/b", "--default-action", "quarantine"],
        ["sendmail", "no_such_module:X", "--name", "a", "--socket", "/a/b"],
    ],
)
def test_what_cannot_be_written_is_refused(arguments: list[str]) -> None:
    done = milter("config", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


# --- check ---------------------------------------------------------------------------------------

FILTER = """
import sys
import Milter

class Checked(Milter.Base):
    @Milter.symlist("i", "{auth_authen}")
    def envfrom(self, sender, *params):
        return Milter.CONTINUE

    def close(self):
        print("in close", flush=True)
        return Milter.CONTINUE

Milter.factory = Checked
Milter.set_flags(Milter.ADDHDRS)
Milter.runmilter("checked", sys.argv[1])
"""


def test_check_a_filter(run_filter: Callable[..., Any]) -> None:
    filter_ = run_filter(source=FILTER)
    done = milter("check", filter_.socket, "--wait", str(WAIT))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"A filter answers on {filter_.socket}.\n")
    assert "  actions   ADDHDRS" in done.stdout
    assert "  macros    MAIL: i {auth_authen}" in done.stdout
    filter_.wait_for("in close")
    done = milter("check", filter_.socket.replace("unix", "S=local"), "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["answers"] is True
    assert said["negotiated"]["version"] == 6
    assert said["negotiated"]["macros"] == {"MAIL": ["i", "{auth_authen}"]}


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    words = [*python_command(), "-m", "Milter", "config", "postfix", "--name", "a"]
    with subprocess.Popen(
        [*words, "--socket", "/a/b"], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(WAIT) == 1


def test_check_nobody(unix_socket: Callable[[], str]) -> None:
    where = unix_socket()
    done = milter("check", where)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot connect" in done.stderr
    done = milter("check", where, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["answers"] is False


def test_check_a_name_over_ipv6() -> None:
    done = milter("check", "inet6:1@localhost")
    assert done.returncode == 1
    assert "inet6:1@" in done.stderr


def test_check_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mx.example.com ESMTP\r\n")
                while connection.recv(100):
                    pass

        thread = threading.Thread(target=greet)
        thread.start()
        done = milter("check", f"inet:127.0.0.1:{server.getsockname()[1]}", "--timeout", "5")
        thread.join(WAIT)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("where", ["x25:1", "fd:3", "inet:0@h"])
def test_check_wrong_arguments(where: str) -> None:
    assert milter("check", where).returncode == 2
