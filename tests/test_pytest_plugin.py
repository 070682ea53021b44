"""The pytest plugin, as projects use it: each test runs a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import Milter
from Milter.mta import MTA, Client, Stage, Verdict
from Milter.pytest_plugin import MilterApp, changes

pytest_plugins = ["pytester"]

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

FILTER = """
import Milter, pytest
from Milter.mta import AddHeader, Message, SmtpReply, Verdict

class Hello(Milter.Base):
    def envrcpt(self, to, *params):
        if "nobody" in to:
            self.setreply("550", "5.1.1", "Never heard of them")
            return Milter.REJECT
        return Milter.CONTINUE

    def eom(self):
        print("said hello")
        self.addheader("X-Hello", "world")
        self.chgheader("Subject", 1, "changed")
        self.addrcpt("<carol@example.org>")
        self.replacebody(b"new body\\r\\n")
        self.quarantine("look at it")
        return Milter.CONTINUE

MESSAGE = b"Subject: hi\\r\\nTo: bob@example.org\\r\\n\\r\\nold body\\r\\n"

def send(mta, *recipients):
    return mta.send(MESSAGE, recipients=recipients or ["bob@example.org"])
"""


class Stamp(Milter.Base):
    """Says in which process it runs; for the tests that start it directly."""

    def eom(self) -> int:
        self.addheader("X-Stamp", "stamped")
        return Milter.CONTINUE


@pytest.fixture
def run(pytester: pytest.Pytester):
    """Runs pytest on a file with FILTER and the tests given, without this project's settings."""

    def start(tests: str, *arguments: str, files: dict[str, str] | None = None):
        for name, text in (files or {}).items():
            path = pytester.path / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)
        (pytester.path / "test_it.py").write_text(FILTER + tests)
        return pytester.runpytest_subprocess(
            "--strict-markers", "-p", "no:cacheprovider", *arguments, timeout=100
        )

    return start


# --- in use --------------------------------------------------------------------------------------


@pytest.mark.milter_app(filter=Stamp)
def test_the_marked_filter_is_asked(mta: MTA):
    result = mta.send(b"Subject: hi\r\n\r\n", recipients=["bob@example.org"])
    assert result.message["X-Stamp"] == "stamped"
    assert changes(result) == ["CONTINUE at end of message", "+ X-Stamp: stamped"]


@pytest.mark.parametrize("socket", ["unix", "inet"])
def test_a_class_on_a_free_socket(milter_app, socket):
    one, two = milter_app(Stamp, socket=socket), milter_app(Stamp, socket=socket)
    assert one.socket != two.socket
    assert one.socket.startswith(f"{socket}:")
    for app in (one, two):
        with app.mta() as mta:
            assert "X-Stamp" in mta.send(b"\r\n", recipients=["bob@example.org"]).message
    assert one.stop() == 0
    assert two.process.poll() is None


@pytest.mark.milter_app(EXAMPLES / "stamp_header.py", "--log-level", "debug")
def test_an_example_is_asked(mta: MTA):
    result = mta.send(
        b"Subject: hi\r\n\r\n",
        recipients=["bob@example.org"],
        client=Client("mail.example.org", "192.0.2.25", 25),
    )
    assert result.message["X-Connection-Facts"].startswith('client-name="mail.example.org"')


@pytest.mark.milter_app(
    EXAMPLES / "reject_policy.py", "--socket", "{socket}", str(EXAMPLES / "policy.table")
)
def test_a_script_gets_its_own_arguments(mta: MTA):
    reply = mta.connect_info("mail.example.org", "203.0.113.9")
    assert (reply.stage, reply.verdict) == (Stage.CONNECT, Verdict.CONTINUE)


def test_output_can_be_waited_for(milter_app):
    app = milter_app(EXAMPLES / "stamp_header.py")
    with app.mta() as mta:
        mta.send(b"\r\n", recipients=["bob@example.org"])
    assert "stamped mail from" in app.wait_for_output("stamped mail")
    assert "stamped mail from" in app.output
    with pytest.raises(TimeoutError, match="without 2 line"):
        app.wait_for_output("stamped mail", count=2, timeout=0.01)


def test_workers_are_stopped_with_the_filter():
    with MilterApp(Stamp, "--workers", "2") as app, app.mta() as mta:
        assert "X-Stamp" in mta.send(b"\r\n", recipients=["bob@example.org"]).message
    assert app.process.returncode == 0
    assert not Path(app.socket.partition(":")[2]).parent.exists()


# --- forms of a filter ---------------------------------------------------------------------------


def test_a_class_of_the_test_file(run):
    done = run(
        """
@pytest.mark.milter_app(filter=Hello)
def test_it(mta):
    result = send(mta)
    assert result.message.get_all("X-Hello") == ["world"]
    assert send(mta).verdict is Verdict.CONTINUE
"""
    )
    done.assert_outcomes(passed=1)


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_a_class_of_a_test_file_in_a_directory(run, mode):
    done = run(
        "",
        f"--import-mode={mode}",
        files={
            "tests/test_deep.py": FILTER
            + "@pytest.mark.milter_app(filter=Hello)\n"
            + "def test_it(mta):\n    assert send(mta).accepted\n"
        },
    )
    done.assert_outcomes(passed=1)


def test_modules_and_scripts_of_the_project(run):
    program = (
        "import sys, Milter, hello\n"
        "Milter.factory = hello.Hello\n"
        "Milter.runmilter('program', sys.argv[sys.argv.index('--socket') + 1])\n"
    )
    done = run(
        """
@pytest.mark.parametrize("filter", ["hello:Hello", "program.py", "program", "class"])
def test_it(milter_app, filter):
    import hello
    with milter_app(hello.Hello if filter == "class" else filter).mta() as mta:
        assert send(mta).message["X-Hello"] == "there"
""",
        files={
            "hello.py": "import Milter\nclass Hello(Milter.Base):\n    def eom(self):\n"
            "        self.addheader('X-Hello', 'there')\n        return Milter.CONTINUE\n",
            "program.py": program,
        },
    )
    done.assert_outcomes(passed=4)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ("no such", "neither a class nor module:Class"),
        ("missing.py", "there is no such script"),
    ],
)
def test_what_is_no_filter_is_refused(milter_app, wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        milter_app(wrong)


def test_a_class_within_a_function_is_refused(milter_app):
    class Local(Milter.Base):
        pass

    with pytest.raises(ValueError, match="top level of a module"):
        milter_app(Local)


def test_a_filter_that_does_not_start_says_why(milter_app):
    with pytest.raises(RuntimeError, match=r"(?s)status 2 before it listened.*no module 'nowhere'"):
        milter_app("nowhere:Filter")


# --- failures ------------------------------------------------------------------------------------


def test_a_failure_shows_what_the_filter_did_and_said(run):
    done = run(
        """
@pytest.mark.milter_app(filter=Hello)
def test_it(mta):
    result = send(mta, "bob@example.org", "nobody@example.org")
    assert result.verdict is Verdict.REJECT
"""
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*What the filter did Hello*",
            "CONTINUE at end of message",
            "recipient refused: <nobody@example.org>",
            "- Subject: hi",
            "+ Subject: changed",
            "+ X-Hello: world",
            "add recipient <carol@example.org>",
            "quarantine: look at it",
            "new body:",
            "+ new body",
            "*Output of the filter Hello*",
            "said hello",
        ]
    )


def test_a_success_shows_nothing(run):
    done = run("@pytest.mark.milter_app(filter=Hello)\ndef test_it(mta):\n    send(mta)\n", "-rA")
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("*said hello*")


@pytest.mark.parametrize(
    ("assertion", "shown"),
    [
        (
            "result.message == Message.parse(MESSAGE + b'more')",
            ["*the messages differ:", "*- Subject: changed", "*+ Subject: hi", "*  To: bob*"],
        ),
        (
            "list(result.modifications[:1]) == [AddHeader(b'X-Hello', b'moon')]",
            ["*- add header X-Hello: world", "*+ add header X-Hello: moon"],
        ),
        ("'X-Other' in result.message", ["*no header 'X-Other' in*", "*X-Hello: world"]),
        (
            "result == send(mta, 'dave@example.org')",
            ["*the results differ:", "*- recipient: <bob@*", "*+ recipient: <dave@*"],
        ),
        (
            "send(mta, 'nobody@example.org').smtp == SmtpReply(550, '5.1.1', ('Gone',))",
            ["*the SMTP replies differ:", "*- 550 5.1.1 Never*", "*+ 550 5.1.1 Gone"],
        ),
    ],
    ids=["message", "modifications", "header", "result", "reply"],
)
def test_assertions_are_explained(run, assertion, shown):
    done = run(
        "@pytest.mark.milter_app(filter=Hello)\ndef test_it(mta):\n"
        f"    result = send(mta)\n    assert {assertion}\n"
    )
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["E *" + line[1:] if line[0] == "*" else line for line in shown])


def test_a_filter_that_dies_fails_its_test(run):
    done = run(
        """
class Dying(Milter.Base):
    def close(self):
        print("farewell", flush=True)
        import os; os._exit(3)

def test_it(milter_app):
    app = milter_app(Dying)
    with app.mta() as mta:
        send(mta)
    app.process.wait(20)
"""
    )
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["*Dying ended with status 3 before it was stopped*", "*farewell*"])


def test_what_a_filter_says_too_much_fails_its_test(run):
    """The fixture says QUIT at the end, and looks; where the test failed, it does not."""
    done = run(
        """
class Slow(Milter.Base):
    def eom(self):
        import os; os._exit(0)

@pytest.mark.milter_app(filter=Slow)
def test_it(mta):
    send(mta)
"""
    )
    done.assert_outcomes(failed=1, errors=1)
    done.stdout.fnmatch_lines(["*FilterClosed: at end of message*", "*status 0 before*"])


def test_without_a_filter_the_connection_says_what_it_needs(run):
    done = run("def test_it(mta):\n    pass\n")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*needs a filter: mark the test with*"])


def test_the_connection_goes_to_what_a_fixture_started(run):
    done = run(
        """
@pytest.fixture
def hello(milter_app):
    return milter_app(Hello)

@pytest.mark.usefixtures("hello")
def test_it(mta):
    assert send(mta).accepted
"""
    )
    done.assert_outcomes(passed=1)


# --- projects that do not use it -----------------------------------------------------------------


def test_other_projects_notice_nothing(pytester: pytest.Pytester):
    pytester.makepyfile(
        """
import sys

def test_it():
    assert not {"Milter.mta", "Milter.testctx", "mime"} & set(sys.modules)

def test_failing():
    assert [1, 2] == [1, 3]
"""
    )
    done = pytester.runpytest_subprocess("--strict-markers", "-W", "error", timeout=100)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.no_fnmatch_line("*filter*")


def test_importing_it_imports_little():
    code = (
        "import sys, pytest; before = set(sys.modules); import Milter.pytest_plugin\n"
        "heavy = {'Milter.mta', 'Milter.testctx', 'mime', 'asyncio', 'email', 'ipaddress'}\n"
        "print(*heavy & (set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "\n"
