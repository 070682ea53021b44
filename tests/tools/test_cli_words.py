"""What the commands and the test tools say to those who meant something else."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from support.process import WAIT, python_command

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
