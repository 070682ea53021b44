"""One grammar of socket names: whoever is given one takes or refuses the same, for the same reason.

Two differences are declared.  The order of Postfix is for the commands, not for ``setconn``.  And
a filter can listen on what nobody can connect to: an inherited descriptor, and any free port.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import milter
import pytest

WAIT = 60.0
PATH = "/no-such-directory/"


def path_of(size: int) -> str:
    return PATH + "x" * (size - len(PATH))


LONGEST = milter._MAX_SOCKET_PATH

#: Taken by all.
TAKEN = [
    f"{PATH}s",
    f"unix:{PATH}s",
    f"local:{PATH}s",
    f"UNIX:{PATH}s",
    f":{PATH}s",
    f"unix:{PATH}a:b@c",
    path_of(LONGEST - 1),
    path_of(LONGEST),
    "inet:1",
    "inet:1@127.0.0.1",
    "inet:1@[127.0.0.1]",
    "INET:1@127.0.0.1",
    "inet:tcpmux@127.0.0.1",
    "inet:65535@127.0.0.1",
    "inet6:1",
    "inet6:1@[::1]",
    "inet6:1@::1",
]
#: Taken by all but config: what it prints has to stand in the files of an MTA.
NOT_IN_FILES = [f"{PATH}a b", f"{PATH}\udcff", " s", "s", "unix:a/b"]
#: Taken by the commands, and told by the others how it is written there.
POSTFIX = {
    "inet:127.0.0.1:1": "inet:1@127.0.0.1",
    "inet:127.0.0.1:tcpmux": "inet:tcpmux@127.0.0.1",
    "inet:[::1]:1": "inet6:1@[::1]",
    "inet6:[::1]:1": "inet6:1@[::1]",
    "inet:[127.0.0.1]:1": "inet:1@[127.0.0.1]",
}
#: Taken by those who listen.
LISTENERS = {
    "fd:3": "descriptor",
    "inet:0": "port 0",
    "inet:0@127.0.0.1": "port 0",
    "inet6:0@[::1]": "port 0",
}
#: Refused by all, and why.
REFUSED = {
    "": "the path is missing",
    ":": "the path is missing",
    "unix:": "the path is missing",
    "local:": "the path is missing",
    "a/b:c": "a path that holds ':' is written unix:PATH",
    f"{PATH}a:b": "a path that holds ':' is written unix:PATH",
    "tcp:1@127.0.0.1": "unknown scheme",
    "http://x": "unknown scheme",
    " inet:1": "unknown scheme",
    f"{PATH}a\0b": "must not hold NUL",
    f"{PATH}\ud800": "cannot be encoded as a path",
    "inet:": "the port is missing",
    "inet:@127.0.0.1": "the port is missing",
    "inet:127.0.0.1:": "the port is missing",
    "inet::1": "the host before the port is missing",
    "inet:99@": "the host after '@' is missing",
    "inet6:99@": "the host after '@' is missing",
    "inet:99@[]": "the host after '@' is missing",
    "inet6:99@[::1": "the ']' after the host is missing",
    "inet6:99@[::1]x": "the ']' after the host is missing",
    "inet:[::1:25": "the ']' after the host is missing",
    "inet:65536": "the port must be a number up to 65535, or the name of a service",
    "inet:127.0.0.1:65536": "the port must be a number up to 65535, or the name of a service",
    "inet:000001": "the port must be a number up to 65535, or the name of a service",
    "inet:8x@127.0.0.1": "the port must be a number up to 65535, or the name of a service",
    "inet: 1": "the port must be a number up to 65535, or the name of a service",
    "inet:1 ": "the port must be a number up to 65535, or the name of a service",
    "inet:[::1]": "the port must be a number up to 65535, or the name of a service",
    "inet:1@ 127.0.0.1": "the host must not hold a blank, '@' or a bracket",
    "inet:1@127.0.0.1\n": "the host must not hold a blank, '@' or a bracket",
    "inet:1@a@b": "the host must not hold a blank, '@' or a bracket",
    "inet:1@[::1]": "an IPv6 address is written inet6:PORT@[ADDRESS]",
    "inet:1@::1": "an IPv6 address is written inet6:PORT@[ADDRESS]",
    "inet:1@127.0.0.1:2": "an IPv6 address is written inet6:PORT@[ADDRESS]",
    "inet:::1:25": "an IPv6 address stands in brackets",
    "fd:": "fd: needs the number of a descriptor",
    "fd:x": "fd: needs the number of a descriptor",
    "fd:-1": "fd: needs the number of a descriptor",
    "fd:12345678901": "fd: needs the number of a descriptor",
}
#: Refused by all, though setconn leaves it to opensocket, as it takes a look at the system.
TOO_LONG = [path_of(LONGEST + 1), path_of(LONGEST + 2), "unix:" + path_of(4000)]

COMMANDS = ("run", "check", "send", "config")
CONNECTING = ("check", "send", "config", "mta")

#: Asks everybody; what was refused has a message.
ASK = """
import contextlib, errno, io, json, sys
import milter
from Milter.__main__ import main
from Milter.mta import MTA, MTAError

def setconn(name):
    milter.setconn(name)
    if "/no-such-directory/" in name:
        try:
            milter.opensocket(True)
        except milter.error as exc:
            if exc.__cause__.errno != errno.ENOENT:
                raise

def mta(name):
    with contextlib.suppress(MTAError):
        MTA.connect(name, timeout=5).close()

def command(taken, *arguments):
    def ask(name):
        said = io.StringIO()
        given = [each.replace("NAME", name) for each in arguments]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main(given)
        if not taken(status, said.getvalue()):
            assert status == 2, (status, said.getvalue())
            raise ValueError(said.getvalue())
    return ask

asked = {
    "setconn": setconn,
    "mta": mta,
    "run": command(lambda _, said: "no module 'no_such'" in said, "run", "no_such:F",
                   "--socket=NAME"),
    "check": command(lambda status, _: status == 1, "check", "--timeout=5", "NAME"),
    "send": command(lambda status, _: status == 1, "send", "--timeout=5", "NAME", sys.argv[1]),
    "config": command(lambda status, _: status == 0, "config", "postfix", "--name=n",
                      "--socket=NAME"),
}
milter.register("names")
answers = {}
for name in json.load(sys.stdin):
    for who, ask in asked.items():
        try:
            ask(name)
        except (ValueError, milter.error) as exc:
            answers.setdefault(name, {})[who] = str(exc)
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """For each name who refuses it, and with which words."""
    message = tmp_path_factory.mktemp("names") / "message"
    message.write_bytes(b"Subject: x\n\nx\n")
    names = [*TAKEN, *NOT_IN_FILES, *POSTFIX, *LISTENERS, *REFUSED, *TOO_LONG]
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(message)],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        cwd=Path(message).parent,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, str]] = json.loads(done.stdout)
    return {name: answers.get(name, {}) for name in names}


@pytest.mark.parametrize("name", TAKEN)
def test_all_take_it(refusals: dict[str, dict[str, str]], name: str) -> None:
    assert refusals[name] == {}


@pytest.mark.parametrize("name", NOT_IN_FILES)
def test_all_take_it_that_write_no_files_of_an_mta(
    refusals: dict[str, dict[str, str]], name: str
) -> None:
    assert set(refusals[name]) == {"config"}


@pytest.mark.parametrize("name", POSTFIX)
def test_commands_take_the_order_of_postfix(refusals: dict[str, dict[str, str]], name: str) -> None:
    assert set(refusals[name]) == {"setconn", "mta"}
    for said in refusals[name].values():
        assert f"the order of Postfix; it is written {POSTFIX[name]} here" in said


@pytest.mark.parametrize("name", LISTENERS)
def test_only_listeners_take_it(refusals: dict[str, dict[str, str]], name: str) -> None:
    assert set(refusals[name]) == set(CONNECTING)
    for who, said in refusals[name].items():
        assert LISTENERS[name] in said or who == "config"


@pytest.mark.parametrize("name", REFUSED)
def test_all_refuse_it(refusals: dict[str, dict[str, str]], name: str) -> None:
    assert set(refusals[name]) == {"setconn", "mta", *COMMANDS}
    for who, said in refusals[name].items():
        assert REFUSED[name] in said, who
        assert repr(name) in said, who
        assert "setconn: name: " in said if who == "setconn" else "socket " in said


@pytest.mark.parametrize("name", TOO_LONG, ids=len)
def test_all_refuse_what_is_too_long(refusals: dict[str, dict[str, str]], name: str) -> None:
    assert set(refusals[name]) == {"setconn", "mta", *COMMANDS}
    for who, said in refusals[name].items():
        wanted = "use a shorter path" if who == "setconn" else f"not be longer than {LONGEST} bytes"
        assert wanted in said, who


def test_a_service_is_looked_up_by_whoever_uses_it() -> None:
    name = "inet:no-such-service@127.0.0.1"
    assert milter._parse_socket(name) == ("inet", "127.0.0.1", "no-such-service")
    done = subprocess.run(
        [sys.executable, "-m", "Milter", "check", name],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2
    assert f"socket {name!r}: there is no TCP service of that name" in done.stderr


@pytest.mark.parametrize("name", ["inet:1@a..b", "inet:1@" + "x" * 64, "inet:1@\udcff"])
def test_a_host_that_cannot_be_one_is_not_reached(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "Milter", "check", name],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot connect to the filter" in done.stderr
