"""``python -m Milter config`` and ``python -m Milter check``."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.postfix import settle
from support.process import WAIT, python_command

from Milter._cli import postfix
from Milter._cli.common import FilterSocket

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


@pytest.mark.parametrize("text", ["", "unix:", "inet:", "inet:x@h", "fd:", "S="])
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
    place = postfix_has(tmp_path, "")
    text = config("postfix", where, *place, "--default-action=accept", "--content-timeout=60")
    assert (
        f"'smtpd_milters = {{ {shown}, {TIMES.replace('300s', '60s')}, default_action=accept }}'"
        in text
    )
    run_lines(text)
    assert settings(tmp_path)["non_smtpd_milters"] == "$smtpd_milters"


TIMES = "connect_timeout=10s, command_timeout=30s, content_timeout=300s"
OURS = f"{{ unix:hello/s, {TIMES}, default_action=tempfail }}"
SOCKET = "/var/spool/postfix/hello/s"
NEEDED = ["--queue-directory", "/var/spool/postfix"]


def postfix_has(directory: Path, text: str) -> list[str]:
    """Write a configuration of Postfix, and return the options that name it."""
    if not shutil.which("postconf"):
        pytest.skip("Postfix is not installed")
    # postconf -e refuses to write where others could exchange the file.
    directory.chmod(0o755)
    (directory / "main.cf").write_text(f"compatibility_level = 3.6\n{text}")
    settle(directory)
    (directory / "master.cf").write_text(
        "smtp inet n - n - - smtpd\nsubmission inet n - n - - smtpd\n  -o smtpd_milters=inet:a:1\n"
    )
    return ["--config-directory", str(directory), *NEEDED]


def settings(directory: Path) -> dict[str, str]:
    settle(directory)
    done = subprocess.run(
        ["postconf", "-c", str(directory), "-n"],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stderr == ""
    return dict(line.split(" = ", 1) for line in done.stdout.splitlines())


def run_lines(text: str) -> None:
    """Do what the lines say, but for the reload, as no Postfix runs."""
    script = text.replace("postfix reload", "")
    subprocess.run(["sh", "-ec", script], check=True, timeout=WAIT)


@pytest.mark.parametrize("apply", [False, True])
@pytest.mark.parametrize(
    ("before", "options", "smtp", "others"),
    [
        ("smtpd_milters = unix:d/s", [], f"unix:d/s, {OURS}", OURS),
        (
            (
                "smtpd_milters =\n  { inet:h:1, default_action=accept },\n  unix:d/s\n"
                "non_smtpd_milters = $smtpd_milters"
            ),
            ["--place", "first"],
            f"{OURS}, {{ inet:h:1, default_action=accept }}, unix:d/s",
            "$smtpd_milters",
        ),
        (
            "smtpd_milters = inet:1@h unix:d/s\nnon_smtpd_milters = unix:d/s",
            ["--place", "before:unix:/var/spool/postfix/d/s"],
            f"inet:1@h {OURS}, unix:d/s",
            f"{OURS}, unix:d/s",
        ),
        (
            "smtpd_milters = unix:e/s unix:d/s\nnon_smtpd_milters = unix:d/s",
            ["--place", "after:unix:e/s"],
            f"unix:e/s, {OURS} unix:d/s",
            f"unix:d/s, {OURS}",
        ),
        (
            f"smtpd_milters = unix:{SOCKET}, unix:d/s\nnon_smtpd_milters = unix:d/s",
            ["--smtp-only"],
            f"{OURS}, unix:d/s",
            "unix:d/s",
        ),
        (
            "mine = unix:hello/s, unix:d/s\nsmtpd_milters = $mine\nnon_smtpd_milters = $mine",
            [],
            "$mine",
            "$mine",
        ),
    ],
    ids=["last", "first", "before", "after", "its-own", "by-another-name"],
)
def test_filters_that_postfix_has_stay(
    tmp_path: Path, apply: bool, before: str, options: list[str], smtp: str, others: str
) -> None:
    place = [*postfix_has(tmp_path, before), *options]
    text = config("postfix", SOCKET, *place, *(["--apply"] if apply else []))
    if not apply:
        run_lines(text)
    values = settings(tmp_path)
    assert (values["smtpd_milters"], values["non_smtpd_milters"]) == (smtp, others)
    assert "# master.cf has a list of its own" in text or smtp == "$mine"
    if apply and smtp != "$mine":
        assert f"+smtpd_milters = {smtp}\n" in text
    # Done again, it changes nothing.
    again = config("postfix", SOCKET, *place, "--apply")
    assert "there is nothing to change" in again
    assert settings(tmp_path) == values


def test_postfix_is_asked_for_macros_beside_those_that_it_has(tmp_path: Path) -> None:
    place = postfix_has(tmp_path, "milter_mail_macros = i, {mine}")
    (tmp_path / "m.py").write_text(MODULE)
    config("postfix", "inet6:8891@[::1]", "m:Asks", *place, "--apply", cwd=tmp_path)
    values = settings(tmp_path)
    assert values["milter_mail_macros"] == "i, {mine} {auth_authen} {client_ptr}"
    assert values["milter_end_of_header_macros"] == "i {extra}"
    assert "milter_connect_macros" not in values
    assert "inet:[::1]:8891" in values["smtpd_milters"]


@pytest.mark.parametrize("place", ["after:unix:e/s", "middle", "before:", "last:x"])
def test_a_place_that_is_none(tmp_path: Path, place: str) -> None:
    options = postfix_has(tmp_path, "smtpd_milters = unix:d/s")
    words = ["--name", "hello", "--socket", SOCKET, *options, "--apply", "--place", place]
    done = milter("config", "postfix", *words)
    assert done.returncode == 2
    assert f"--place {place}: Postfix has no such filter, but unix:d/s" in done.stderr or (
        f"--place {place!r}: write first, last, before:SOCKET or after:SOCKET" in done.stderr
    )
    assert settings(tmp_path)["smtpd_milters"] == "unix:d/s"


def test_where_postfix_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines keep the filters of the machine where they will be run."""
    options = postfix_has(tmp_path, "smtpd_milters = unix:d/s")
    args = argparse.Namespace(
        mta="postfix",
        filter=None,
        name="hello",
        socket=SOCKET,
        apply=False,
        default_action="tempfail",
        connect_timeout=10,
        command_timeout=30,
        content_timeout=300,
        queue_directory=None,
        config_directory=None,
        place="last",
        smtp_only=False,
    )
    monkeypatch.setattr("Milter._cli.postfix.shutil.which", lambda *args, **kwargs: None)
    change = postfix.Change(args, FilterSocket.parse(SOCKET), None)
    monkeypatch.undo()
    monkeypatch.setenv("MAIL_CONFIG", options[1])
    run_lines("\n".join(change.lines()))
    run_lines("\n".join(change.lines()))
    values = settings(tmp_path)
    assert values["smtpd_milters"] == f"unix:d/s {OURS}"
    assert values["non_smtpd_milters"].strip() == OURS


@pytest.mark.parametrize(
    ("mta", "said"),
    [
        ("exim", "Exim has no milter client: let Postfix or sendmail take the mail"),
        ("opensmtpd", "OpenSMTPD has no milter client, only filters of its own kind"),
    ],
)
def test_mtas_without_a_milter_client(mta: str, said: str) -> None:
    done = milter("config", mta)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


MC = """\
dnl INPUT_MAIL_FILTER(`hello', `S=local:/old')dnl
INPUT_MAIL_FILTER(`dkim', `S=local:/run/dkim/s')dnl
MAILER_DEFINITIONS
MAILER(`local')dnl
"""


def test_sendmail_mc_is_changed_once_and_keeps_its_filters(tmp_path: Path) -> None:
    mc = tmp_path / "sendmail.mc"
    mc.write_text(MC)
    mc.chmod(0o640)
    words = ["--mc", str(mc)]
    shown = config("sendmail", "/run/hello/s", *words)
    assert f"dnl # Filters that {mc} has, and that stay: dkim" in shown
    assert mc.read_text() == MC
    changed = config("sendmail", "/run/hello/s", *words, "--apply")
    text = mc.read_text()
    line = "INPUT_MAIL_FILTER(`hello', `S=local:/run/hello/s, F=T, T=C:10s;S:30s;R:30s;E:300s')dnl"
    assert f"\n+{line}\n" in changed
    assert mc.stat().st_mode & 0o777 == 0o640
    assert [name for name in text.splitlines() if name in MC.splitlines()] == MC.splitlines()
    assert text.index("`dkim'") < text.index(line) < text.index("MAILER_DEFINITIONS")
    assert "nothing to change" in config("sendmail", "/run/hello/s", *words, "--apply")
    config("sendmail", "/run/hello/t", *words, "--apply")
    assert mc.read_text() == text.replace("/run/hello/s", "/run/hello/t")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("INPUT_MAIL_FILTER(`hello', `S=local:/a')dnl\nMAILER(`local')\n", "has a filter 'hello'"),
        ("MAILER(`local')dnl\ndefine(`confINPUT_MAIL_FILTERS', `dkim')dnl\n", "by hand"),
        ("dnl nothing\n", "no MAILER lines"),
    ],
)
def test_a_sendmail_mc_that_is_left_alone(tmp_path: Path, text: str, said: str) -> None:
    mc = tmp_path / "sendmail.mc"
    mc.write_text(text)
    words = ["--name", "hello", "--socket", "/run/hello/s", "--mc", str(mc), "--apply"]
    done = milter("config", "sendmail", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert mc.read_text() == text


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
