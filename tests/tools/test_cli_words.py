"""What the commands and the test tools say to those who meant something else."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from support.process import WAIT, python_command

from Milter.__main__ import main
from Milter._cli.common import FilterSocket
from Milter.mta import MTA


def milter(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python_command(), "-m", "Milter", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def test_a_number_is_no_socket() -> None:
    with pytest.raises(ValueError) as caught:
        FilterSocket.parse("8891")
    assert str(caught.value) == (
        "socket '8891': write inet:8891 for a port, unix:8891 for a path, "
        "or fd:8891 for an inherited socket"
    )


def test_an_mta_of_an_address() -> None:
    with pytest.raises(TypeError) as caught:
        MTA(cast(Any, "unix:/a"))
    assert str(caught.value) == (
        "MTA takes a connected socket, not 'unix:/a': use MTA.connect(address)"
    )


def test_a_message_that_is_text(run_filter: Any) -> None:
    with run_filter("stamp").mta() as mta, pytest.raises(TypeError) as caught:
        mta.send("Subject: a", recipients=["a@b"])
    assert str(caught.value) == "message must be bytes or a Message, not str: encode it"


def test_an_unknown_option_shows_the_usage_of_its_command(tmp_path: Path) -> None:
    done = milter(tmp_path, "check", "unix:/a", "--bogus")
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m Milter check [-h]")
    assert done.stderr.endswith("python -m Milter check: error: unrecognized arguments: --bogus\n")


def test_the_version(tmp_path: Path) -> None:
    done = milter(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("pymilter 1.")


def test_another_directory(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "well.py").write_text("import Milter\nclass A(Milter.Base): pass\n")
    done = milter(tmp_path, "run", "well:A", "--chdir", "there", "--check")
    assert (done.returncode, done.stdout) == (0, "well:A can serve.\n")
    done = milter(tmp_path, "run", "well:A", "--chdir", "gone", "--check")
    assert done.returncode == 2
    assert "--chdir 'gone': No such file or directory" in done.stderr


def test_a_health_check(run_filter: Any, tmp_path: Path) -> None:
    filter_ = run_filter("stamp")
    done = milter(tmp_path, "check", filter_.socket, "--quiet", "--wait", str(WAIT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = milter(tmp_path, "check", f"{filter_.socket}.gone", "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot connect" in done.stderr


def test_a_health_check_of_a_filter_that_hangs(directory: Path) -> None:
    """Somebody listens, and the kernel takes the connection; that is no filter that answers."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{directory}/s")
        silent.listen()
        done = milter(directory, "check", f"{directory}/s", "--quiet", "--timeout", "0.2")
        assert (done.returncode, done.stdout) == (1, "")
        assert "at negotiation: no answer within 0.2 s" in done.stderr
        done = milter(directory, "check", f"{directory}/s", "--json", "--timeout", "0.2")
        found = json.loads(done.stdout)
    assert (found["answers"], found["kind"], found["status"]) == (False, "timeout", 1)


def test_errors_of_check_are_json(directory: Path) -> None:
    for arguments, said in (
        (["8891"], "socket '8891': write inet:8891"),
        (["unix:/a", "--bogus"], "unrecognized arguments: --bogus"),
    ):
        done = milter(directory, "check", *arguments, "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["kind"], found["status"]) == (2, "arguments", 2)
        assert said in found["error"]
        assert said in done.stderr


SERVE = ["run", "well:A", "--socket", "unix:s"]
RUN = [*SERVE, "--check"]
SEND = ["send", "unix:s", "mail"]
RECORD = ["record", "--listen", "unix:s", "--filter", "unix:t", "--to", "d"]

#: What is not meant so, and the line that says what is: the option, the value and the rule.
NEAR_MISSES = [
    ([*SERVE, "--group", "no-such"], "--group 'no-such': there is no such group"),
    ([*SERVE, "--user", "no-such"], "--user 'no-such': there is no such user"),
    (
        [*SERVE, "--user", "root:no-such"],
        "--user 'root:no-such': group 'no-such': there is no such",
    ),
    # Of a variable that is not set: whoever asks for a user does not mean root.
    ([*RUN, "--user", ""], "--user '': write USER or USER:GROUP"),
    ([*RUN, "--user", ":mail"], "--user ':mail': write USER or USER:GROUP"),
    ([*RUN, "--group", ""], "--group '': the name is missing"),
    ([*RUN, "--engine", "nativ"], "--engine: must be 'libmilter' or 'native': 'nativ'"),
    ([*RUN, "--mode", "1777"], "--mode: invalid octal mode between 0 and 0777 value: '1777'"),
    ([*RUN, "--timeout", "-1"], "--timeout: invalid number of seconds from 0 to 86400 value: '-1'"),
    ([*RUN, "--workers", "two"], "--workers: invalid number from 0 to 512 value: 'two'"),
    ([*RUN, "--log-level", "warn"], "--log-level: invalid choice: 'warn' (choose from "),
    ([*RUN, "--chek"], "unrecognized arguments: --chek (did you mean --check?)"),
    ([*RUN, "--chdri=x"], "unrecognized arguments: --chdri=x (did you mean --chdir?)"),
    ([*RUN, "--check=1"], "--check: it takes no value such as '1'"),
    (
        ["send", "mail", "unix:s"],
        "'mail' is a file and no socket: SOCKET comes first, then MESSAGE",
    ),
    ([*SEND, "--client-addr", "1.2.3"], "--client-addr '1.2.3': write an IPv4 or IPv6 address, a "),
    (
        [*SEND, "--client-port", "65536"],
        "--client-port: invalid port from 0 to 65535 value: '65536'",
    ),
    ([*SEND, "--helo", "a\0b"], "--helo: "),
    ([*SEND, "--from", "a\0b"], "--from: "),
    ([*SEND, "--rejected-rcpt", "a@b", "no"], "--rejected-rcpt: rejected 'no': give an SMTP reply"),
    ([*SEND, "--macro", "i"], "--macro 'i': write NAME=VALUE or STAGE:NAME=VALUE"),
    ([*SEND, "--macro", "NO:i=1"], "--macro: macro stage 'NO' is none of CONNECT, HELO, MAIL"),
    (
        [*SEND, "--protocol-version", "7"],
        "--protocol-version: protocol version 7 is not between 2 and 6",
    ),
    ([*SEND, "--ignore", "Date"], "--ignore is for --replay"),
    ([*SEND, "--ignore-negotiation"], "--ignore-negotiation is for --replay"),
    ([*SEND, "--replay", "--output", "x"], "--output is for messages, not for --replay"),
    (
        [*SEND, "--connections", "0"],
        "--connections: invalid number of connections (1 to 1000) value",
    ),
    (
        ["check", "unix:s", "--wait", "1s"],
        "--wait: invalid number of seconds from 0 to 86400 value",
    ),
    (
        ["config", "postfix", "--name", "a", "--socket", "unix:/s", "--content-timeout", "5m"],
        "--content-timeout: invalid number of whole seconds from 1 to 86400 value: '5m'",
    ),
    ([*RECORD, "--listen", "8891"], "--listen: socket '8891': write inet:8891 for a port"),
    ([*RECORD, "--filter", "inet:0"], "--filter: socket 'inet:0': port 0 cannot be connected to"),
    ([*RECORD, "--filter", "unix:s"], "--listen and --filter are the same: unix:s"),
    ([*RECORD, "--max-size", "1k"], "--max-size: invalid size of at least 1000 bytes value: '1k'"),
]


@pytest.mark.parametrize(("arguments", "said"), NEAR_MISSES)
def test_near_misses(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "well.py").write_text("import Milter\nclass A(Milter.Base): pass\n")
    (tmp_path / "mail").write_text("Subject: a\n\nb\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        status = main(arguments)
    except SystemExit as exc:
        status = int(exc.code or 0)
    output = capsys.readouterr()
    last = output.err.splitlines()[-1]
    assert said in last
    assert last.startswith(f"python -m Milter {arguments[0]}: error: ")
    assert (status, output.out) == (2, "")
