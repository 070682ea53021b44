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

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

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


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (Stamp(), "filter is an object of Stamp: give the class, milter_app(Stamp)"),
        (dict, "filter dict is no filter class, which must be derived from Milter.Base"),
        (
            None,
            (
                "filter None is neither a class nor a function, module:Class, the path of a script "
                "(.py) or the name of a module"
            ),
        ),
    ],
    ids=["object", "other class", "nothing"],
)
def test_what_was_meant_is_said(milter_app, wrong, complaint):
    with pytest.raises(TypeError) as caught:
        milter_app(wrong)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("takes", ["", "\n    def __init__(self, *any): pass"], ids=["none", "any"])
def test_a_class_that_stands_alone_in_the_marker(run, takes):
    """pytest marks it; the test is then an object of it, or an exception."""
    done = run(
        f"class Other(Milter.Base):\n    pass{takes}\n"
        "@pytest.mark.milter_app(Other)\ndef test_it(mta):\n    pass\n"
    )
    done.assert_outcomes(errors=1)
    said = "@pytest.mark.milter_app(Other) marks Other itself, and no test: name it, "
    done.stdout.fnmatch_lines([said + "@pytest.mark.milter_app(filter=Other)"])


def test_a_function_that_stands_alone_in_the_marker(run):
    done = run(
        "from Milter import mailfilter\n"
        "@mailfilter.filter\ndef judge(mail):\n    mail.headers\n"
        "@pytest.mark.milter_app(judge)\ndef test_it(mta):\n    pass\n"
    )
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*(judge) marks judge itself, and no test: name it, *"])


def test_a_marker_without_a_filter(run):
    done = run("@pytest.mark.milter_app\ndef test_it(mta):\n    pass\n")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*needs a filter: mark the test with*"])


def test_a_filter_that_does_not_start_says_why(milter_app):
    with pytest.raises(RuntimeError, match=r"(?s)status 2 before it listened.*no module 'nowhere'"):
        milter_app("nowhere:Filter")


def test_a_recorded_session_is_a_test(run):
    """As the documentation has it: the file beside the test, and what it should answer."""
    recording = (
        "milter-recording 1\n"
        "mta 0.1 negotiate \\0\\0\\0\\x06\\0\\0\\x01\\xff\\0\\0\\0\\0\n"
        "filter 0.1 negotiate \\0\\0\\0\\x06\\0\\0\\x01\\xff\\0\\0\\x007\n"
        "mta 0.1 rcpt <nobody@example.org>\\0\n"
        "filter 0.2 reply 550 5.1.1 Never heard of them\\0\n"
        "mta 0.3 quit\n"
        "filter 0.4 closes\n"
    )
    done = run(
        """
def test_as_recorded(milter_app):
    assert milter_app(Hello).replay("case.milter").difference is None

def test_as_it_should_be(milter_app):
    replayed = milter_app(Hello).replay("case.milter")
    assert replayed.replies[-1].verdict is Verdict.REJECT
    assert replayed.replies[-1].smtp.code == 550

def test_otherwise(milter_app):
    assert milter_app(Other).replay("case.milter").difference is None

class Other(Hello):
    def envrcpt(self, to, *params):
        return Milter.CONTINUE
""",
        files={"case.milter": recording},
    )
    done.assert_outcomes(passed=2, failed=1)
    done.stdout.fnmatch_lines(
        ["*Difference(line=5, *recorded='reply: 550 5.1.1 Never heard of them', now='continue'*"]
    )


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
            "  550 5.1.1 Never heard of them",
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


def test_importing_it_imports_little(tmp_path):
    code = (
        "import sys, pytest; before = set(sys.modules); import Milter.pytest_plugin\n"
        "heavy = {'Milter.mta', 'Milter.testctx', 'mime', 'asyncio', 'email', 'ipaddress'}\n"
        "print(*heavy & (set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # so that what is installed is imported
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "\n"


# --- in the process of the tests -----------------------------------------------------------------

PROCESS = """
import os
from Milter import mailfilter

class Where(Milter.Base):
    def eom(self):
        self.addheader("X-Process", str(os.getpid()))
        return Milter.CONTINUE

@mailfilter.filter
def where(mail):
    mail.headers.add("X-Process", str(os.getpid()))

def process(mta):
    return int(mta.send(b"\\r\\n", recipients=["bob@example.org"]).message["X-Process"])
"""


def test_a_filter_can_run_in_the_process_of_the_tests(run):
    result = run(
        PROCESS
        + """
@pytest.mark.milter_app(filter=Where, in_process=True)
def test_marked(mta):
    assert process(mta) == os.getpid()

@pytest.mark.milter_app(filter=where, in_process=True)
def test_function(mta):
    assert process(mta) == os.getpid()

@pytest.mark.milter_app(filter=Where)
def test_the_others_are_processes(mta):
    assert process(mta) != os.getpid()

def test_one_after_the_other(milter_app):
    factory = Milter.factory
    for socket in ("inet", "unix"):
        app = milter_app(Where, in_process=True, socket=socket)
        assert (app.pid, app.output) == (os.getpid(), "")
        with app.mta() as mta:
            assert process(mta) == os.getpid()
        assert app.stop() == 0
        assert Milter.factory is factory

def test_one_at_a_time(milter_app):
    milter_app(Where, in_process=True)
    with pytest.raises(RuntimeError, match="Where serves in this process: one filter at a time"):
        milter_app(where, in_process=True)

@pytest.mark.parametrize(
    ("arguments", "options", "complaint"),
    [
        ([Where, "--workers", "2"], {}, "in_process: '--workers', '2': is for a filter that is a"),
        ([Where], {"cwd": "/"}, "in_process: cwd=: is for a filter that is a process"),
        (["x.py"], {}, "filter 'x.py': in this process only a class or function can"),
        (["nowhere:X"], {}, "filter 'nowhere:X': "),
    ],
)
def test_what_only_a_process_can(milter_app, arguments, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        milter_app(*arguments, in_process=True, **options)

def test_output_is_that_of_the_tests(milter_app):
    with pytest.raises(RuntimeError, match="use capfd or caplog"):
        milter_app(Where, in_process=True).wait_for_output("x", timeout=1)

@pytest.mark.parametrize("number", range(3))
@pytest.mark.milter_app(filter=Where, in_process=True)
def test_again(mta, number):
    assert process(mta) == os.getpid()
"""
    )
    result.assert_outcomes(passed=13)


def test_all_filters_that_can_run_in_the_process_of_the_tests(run):
    result = run(
        PROCESS
        + """
@pytest.mark.milter_app(filter=Where)
def test_marked(mta):
    assert process(mta) == os.getpid()

def test_two_and_one_with_options(milter_app):
    with milter_app(Where).mta() as mta:
        assert process(mta) == os.getpid()
    for more in (milter_app(Where), milter_app(where, "--log-level", "debug")):
        with more.mta() as mta:
            assert process(mta) != os.getpid()
""",
        "--milter-in-process",
    )
    result.assert_outcomes(passed=2)


def test_an_exception_is_in_the_report(run):
    result = run(
        """
class Broken(Milter.Base):
    def eom(self):
        raise ValueError("of the filter")

@pytest.mark.milter_app(filter=Broken, in_process=True)
def test_it(mta):
    assert send(mta).accepted
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*What the filter did Broken*", "TEMPFAIL at end of message"])
    result.stdout.fnmatch_lines_random(
        ["*exception in the eom callback*", "*ValueError: of the filter"]
    )


def test_debuggers_and_coverage_see_the_callbacks(run):
    """Which set a function for all threads, as threading.Thread takes it."""
    result = run(
        """
import sys, threading

class Traced(Milter.Base):
    def eom(self):
        self.addheader("X-Traced", str(sys.gettrace() is trace))
        self.addheader("X-Profiled", str(sys.getprofile() is profile))
        return Milter.CONTINUE

seen = []

def trace(frame, event, argument):
    seen.append(frame.f_code.co_name)

def profile(frame, event, argument):
    pass

@pytest.fixture
def traced():
    threading.settrace(trace)
    threading.setprofile(profile)
    yield
    threading.settrace(None)
    threading.setprofile(None)

@pytest.mark.milter_app(filter=Traced, in_process=True)
def test_it(traced, mta):
    result = send(mta)
    assert result.message["X-Traced"] == result.message["X-Profiled"] == "True"
    assert "eom" in seen
"""
    )
    result.assert_outcomes(passed=1)


def test_a_breakpoint_stops_within_a_callback(pytester: pytest.Pytester):
    pytester.makepyfile(
        FILTER.replace('print("said hello")', "breakpoint()")
        + """
@pytest.mark.milter_app(filter=Hello, in_process=True)
def test_it(mta):
    assert send(mta).message["X-Hello"] == "world"
"""
    )
    result = pytester.run(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
        stdin=b"p 'in a ' + self.__class__.__name__\ncontinue\n",
        timeout=100,
    )
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*(Pdb) *'in a Hello'*"])
