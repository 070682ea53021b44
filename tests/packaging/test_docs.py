"""The documentation: its examples run, its links lead somewhere, no public name is missing."""

from __future__ import annotations

import ast
import configparser
import doctest
import inspect
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import milter
import pytest
from support.documents import (
    ALL_MODULES,
    DOCS,
    DOCUMENTS,
    PAGES,
    REFERENCE,
    ROOT,
    SECONDS,
    blocks,
    commands,
    docstring_examples,
)

import Milter
from Milter.pytest_plugin import changes

#: What is public in a package of ``Milter`` is found in the package itself.
MODULES = [
    module
    for module in ALL_MODULES
    if "._" not in module.__name__ and module.__name__.count(".") < 2
]


def cases(language: str) -> list:
    """Each example in a language, with the page that it stands on."""
    return [
        pytest.param(page, block, id=f"{page.stem}-{number}")
        for page in DOCUMENTS
        for number, block in enumerate(blocks(page, language))
    ]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What Python does with these arguments."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


# --- examples in Python --------------------------------------------------------------------------


def has_tests(block: str) -> bool:
    return "\ndef test_" in block


def hello() -> str:
    """The tutorial's filter, which other pages use."""
    return next(block for block in blocks(DOCS / "tutorial.md") if not has_tests(block))


def passes(tests: dict[str, str], directory: Path) -> None:
    """Each test in these files passes, in a pytest that knows nothing but the plugin."""
    for name, text in tests.items():
        (directory / name).write_text(text, encoding="utf-8")
    wanted = sum(text.count("\ndef test_") for text in tests.values())
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", cwd=directory)
    assert re.search(rf"^{wanted} passed", done.stdout, re.MULTILINE), done.stdout + done.stderr


def started(code: str, milter_app, directory: Path):
    """A program that calls runmilter, and listens on a socket of the test instead."""
    code = re.sub(r'"(unix|inet):[^"\n]*"', '__import__("sys").argv[1]', code)
    (directory / "example.py").write_text(code, encoding="utf-8")
    return milter_app(directory / "example.py", "{socket}", cwd=directory)


def serves(code: str, milter_app, directory: Path) -> None:
    """It serves a message."""
    with started(code, milter_app, directory).mta() as mta:
        assert mta.send(b"Subject: x\r\n\r\nBody.\r\n", recipients=["bob@example.org"]).accepted


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if any(map(has_tests, blocks(page)))])
def test_the_examples_with_tests_pass(page, tmp_path):
    tests = {
        f"test_{number}.py": block for number, block in enumerate(blocks(page)) if has_tests(block)
    }
    passes({"hello.py": hello(), **tests}, tmp_path)


@pytest.mark.parametrize(
    ("page", "block"), [case for case in cases("python") if not has_tests(case.values[1])]
)
def test_the_other_examples_serve(page, block, milter_app, tmp_path, monkeypatch):
    if any(call in block for call in ("runmilter(", "mailfilter.run(", "Milter.serve(")):
        serves(block, milter_app, tmp_path)
        return
    (tmp_path / "example.py").write_text(block, encoding="utf-8")
    form = r"^(?:class (?=\w+\(Milter\.Base)|@mailfilter\.filter\ndef )(\w+)"
    (name,) = re.findall(form, block, re.MULTILINE)
    monkeypatch.syspath_prepend(tmp_path)
    with milter_app(f"example:{name}").mta() as mta:
        result = mta.send(b"Subject: x\r\n\r\nBody.\r\n", recipients=["bob@example.org"])
    assert changes(result)[1:] in (
        ["+ X-Hello: world"],
        ["- Subject: x", "+ Subject: [hello] x"],
    )


def coroutine_example(what: str) -> str:
    """The example of the page about coroutines that has this in it."""
    (found,) = (block for block in blocks(DOCS / "coroutines.md") if what in block)
    return found


@pytest.fixture
def reputation():
    """The port of an HTTP server whose answer is 5, and comes in two segments."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            # Who takes the head for all of the answer hangs up.
            if not select.select([self.connection], [], [], 0.5)[0]:
                self.wfile.write(b"5")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_example_that_asks_an_http_service_reads_all_of_the_answer(
    milter_app, tmp_path, reputation
):
    code = coroutine_example("SERVICE = ").replace("8010", str(reputation))
    with started(code, milter_app, tmp_path).mta() as mta:
        result = mta.send(b"Subject: x\r\n\r\n", recipients=["bob@example.org"])
    assert "+ X-Reputation: 5" in changes(result)


def test_the_example_with_a_status_page_shows_it_and_ends(milter_app, tmp_path, free_port):
    port = free_port()
    code = coroutine_example("Milter.serve(").replace("9802", str(port))
    app = started(code, milter_app, tmp_path)
    with app.mta() as mta:
        assert mta.send(b"Subject: x\r\n\r\n", recipients=["bob@example.org"]).accepted
    with socket.create_connection(("127.0.0.1", port), SECONDS):  # who never asks does no harm
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SECONDS) as page:
            assert page.read() == b"1 messages\n"
        app.finish()
    assert "Traceback" not in app.output


@pytest.mark.parametrize("module", ALL_MODULES, ids=lambda module: module.__name__)
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


_FILTER = """
import Milter
from Milter.test import TestBase
from Milter.testctx import TestCtx

class MyMilter(Milter.Base):
    def eom(self):
        self.addheader("X-Seen-By", self.getsymval("{auth_authen}"))
        return Milter.ACCEPT
"""
_APP = """
import Milter, pytest
from Milter.pytest_plugin import MilterApp

class Hello(Milter.Base):
    pass
"""
_POLICY = """
from types import SimpleNamespace
from Milter.policy import MTAPolicy

sender, conf = "ann@example.com", SimpleNamespace(access_file=None)
"""
_TEST = """
def test_it(app):
    assert app.pid
"""

_SESSION = """
from Milter.mta import commands
from Milter.mta.session import Session

session, what_came_in = Session(), bytes([0, 0, 0, 1]) + b"c"
"""

#: What each example in a docstring takes for granted, and what is left to do with it.
AROUND = {
    "Milter": ("", ""),
    "Milter._app": (_APP, _TEST),
    "Milter.metrics": ("import Milter\n", ""),
    "Milter.mta.session": (_SESSION, "assert event.verdict.name == 'CONTINUE'\n"),
    "Milter.policy": (_POLICY, ""),
    "Milter.pytest_plugin": ("", ""),
    "Milter.test": (_FILTER, ""),
    "Milter.testctx": (_FILTER, ""),
}


def test_every_module_with_examples_is_known():
    assert {case.values[0] for case in docstring_examples()} == set(AROUND)


@pytest.mark.parametrize(("module", "block"), docstring_examples())
def test_the_examples_in_docstrings_run(module, block, milter_app, tmp_path):
    before, after = AROUND[module]
    code = before + block + after
    if "serve_prometheus(" in code:
        pytest.importorskip("prometheus_client")
        code = code.replace("9801", "0")
    if has_tests(code):
        passes({"test_example.py": code}, tmp_path)
    elif "runmilter(" in code:
        serves(code, milter_app, tmp_path)
    else:
        (tmp_path / "message.eml").write_bytes(b"Subject: x\n\nBody.\n")
        (tmp_path / "test").mkdir()
        done = python("-W", "error", "-c", code, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


# --- examples for the shell and for systemd ------------------------------------------------------


def options_of(command: str) -> set[str]:
    """The long options of a command of ``python -m Milter``."""
    done = python("-m", "Milter", command, "--help", cwd=ROOT / "tests")
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", done.stdout)) - {"--help"}


@pytest.mark.parametrize(("page", "block"), cases("sh"))
def test_the_shell_accepts_the_commands(page, block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=SECONDS)
    for command in commands(block):
        given = {word.partition("=")[0] for word in command if word.startswith("--")}
        assert given <= options_of(command[0])
    named = set(re.findall(r"^scripts/([\w-]+)", block, re.MULTILINE))
    assert named <= {path.name for path in (ROOT / "scripts").iterdir()}


@pytest.mark.parametrize("name", ["postfix", "sendmail"])
def test_the_configuration_shown_is_what_is_printed(name, tmp_path):
    (tmp_path / "hello.py").write_text(hello(), encoding="utf-8")
    page = DOCS / f"{name}.md"
    (command,) = (
        found for block in blocks(page, "sh") for found in commands(block) if found[0] == "config"
    )
    done = python("-m", "Milter", *command, cwd=tmp_path)
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines(True) if line.strip() and line[0] != "#"]
    printed = "".join(line for line in lines if not line.startswith("dnl"))
    assert printed in blocks(page, "")


def verify(unit: Path) -> str:
    """What systemd has to say against a unit."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.stderr


def ini_cases(kind: str) -> list:
    """The ini blocks that are a unit, a drop-in, or variables for milter@.service."""

    def kind_of(block: str) -> str:
        return "unit" if "[Unit]" in block else "drop-in" if "[" in block else "variables"

    return [case for case in cases("ini") if kind_of(case.values[1]) == kind]


@pytest.mark.parametrize(("page", "block"), ini_cases("variables"))
def test_variables_are_those_that_the_service_reads(page, block):
    unit = (ROOT / "debian" / "python3-milter.milter@.service").read_text("utf-8")
    given = dict(line.split("=", 1) for line in block.splitlines())
    assert set(given) <= set(re.findall(r"\$\{?([A-Z]+)", unit))
    words = shlex.split(given.get("OPTIONS", ""))
    assert {word for word in words if word.startswith("--")} <= options_of("run")


@pytest.mark.parametrize(("page", "block"), ini_cases("drop-in"))
def test_drop_ins_are_for_the_units(page, block, tmp_path):
    # Each belongs to the other, so that both have to be there.
    for kind in ("service", "socket"):
        shipped = ROOT / "debian" / f"python3-milter.milter@.{kind}"
        shutil.copyfile(shipped, tmp_path / f"milter@hello.{kind}")
    unit = tmp_path / f"milter@hello.{'socket' if '[Socket]' in block else 'service'}"
    unit.write_text(unit.read_text("utf-8") + "\n" + block, encoding="utf-8")
    if shutil.which("systemd-analyze"):
        assert "milter@hello" not in verify(unit)


@pytest.mark.parametrize(("page", "block"), ini_cases("unit"))
def test_the_units_are_units_whose_command_serves(page, block, milter_app, tmp_path):
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str
    unit.read_string(block)
    assert set(unit) == {"DEFAULT", "Unit", "Service", "Install"}
    service = unit["Service"]
    interpreter, *command = shlex.split(service["ExecStart"])
    assert interpreter == f"{service['WorkingDirectory']}/bin/python"
    if shutil.which("systemd-analyze"):
        file = tmp_path / "hello.service"
        file.write_text(block.replace(interpreter, sys.executable))
        assert "hello.service" not in verify(file)
    (tmp_path / "hello.py").write_text(hello(), encoding="utf-8")
    assert command[:3] == ["-m", "Milter", "run"]
    options = command[4:]
    options[options.index("--socket") + 1] = "{socket}"
    if "--group" in options:
        where = options.index("--group")
        del options[where : where + 2]
    script = tmp_path / "serve.py"
    script.write_text("import sys\nfrom Milter.__main__ import main\nsys.exit(main())\n")
    app = milter_app(script, "run", command[3], *options, cwd=tmp_path)
    with app.mta() as mta:
        assert mta.send(b"Subject: x\r\n\r\n", recipients=["bob@example.org"]).accepted


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "config", "check", "send", "record"])
def test_every_option_is_in_the_reference_and_in_the_manual_page(command):
    options = options_of(command)
    assert len(options) > 2
    page = (REFERENCE / "command-line.md").read_text("utf-8")
    section = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert options == set(re.findall(r"^\| `(--[a-z-]+)", section[1], re.MULTILINE))
    manual = (DOCS / "pymilter.1").read_text("utf-8").replace("\\-", "-")
    section = re.search(rf"^\.SS {command}\n(.*?)(?=^\.S[SH] )", manual, re.MULTILINE | re.DOTALL)
    assert options <= set(re.findall(r"\\fB(--[a-z-]+)", section[1]))


# --- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_contents():
    listed = {
        (index.parent / line).with_suffix(".md")
        for index in (DOCS / "index.md", REFERENCE / "index.md", REFERENCE / "library.md")
        for toc in re.findall(r"```{toctree}\n(.*?)```", index.read_text("utf-8"), re.DOTALL)
        for line in toc.split()
        if re.fullmatch(r"[a-z-]+(/[a-z0-9-]+)?", line)
    }
    assert {*listed, DOCS / "index.md"} >= set(PAGES)


# --- docstrings ----------------------------------------------------------------------------------


def source(module) -> str:
    return Path(module.__file__).read_text("utf-8") if module is not milter else ""


def places_of(module) -> list:
    """The modules in which a package may define what it gives to its users, or the module."""
    if module is Milter or not hasattr(module, "__path__"):
        return ALL_MODULES if module is Milter else [module]
    return [each for each in ALL_MODULES if f"{each.__name__}.".startswith(f"{module.__name__}.")]


def is_passed_on(module, value: object) -> bool:
    """Whether it is of another public module, or of none of ours: applications find it here too."""
    if inspect.ismodule(value):
        return True
    home = getattr(value, "__module__", None)
    ours = home in {each.__name__ for each in ALL_MODULES}
    private = ours and "._" in str(home)
    own = home == module.__name__
    return (inspect.isclass(value) or inspect.isroutine(value)) and not (own or private)


def public_names(module) -> list[str]:
    """What a module gives to its users: ``__all__``, or what it defines itself."""
    if module is milter:
        return [name for name in vars(milter) if not name.startswith("_")]
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not is_passed_on(module, getattr(module, name))]
    names = []
    for node in ast.parse(source(module)).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_") and name != "TYPE_CHECKING"]


def has_comment(text: str, name: str) -> bool:
    """Whether an assignment has a ``#:`` comment or is followed by a string, as Sphinx reads it."""
    assigned = rf"^ *{name}(?::[^=\n]+)?(?: = |$)"
    return bool(
        re.search(rf"^ *#: .*\n{assigned}", text, re.MULTILINE)
        or re.search(rf"{assigned}.*  #: .", text, re.MULTILINE)
        or re.search(rf'{assigned}(?:.*\n)(?:(?!^ *\w+ = ).*\n)*? *"""\S', text, re.MULTILINE)
    )


def is_described(docstring: str, name: str) -> bool:
    """Whether a class says of an attribute what it is."""
    forms = (f":ivar {name}:", f"*{name}*", f"``{name}``", f"`{name}`")
    return any(form in docstring for form in forms) or bool(
        re.search(rf"^\s*{name}: ", docstring, re.MULTILINE)
    )


def class_source(module, name: str) -> str:
    """The lines of a class, with the comments at their ends."""
    for place in places_of(module):
        text = source(place)
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return ""


def members(value: type) -> dict[str, object]:
    """The public members that a class defines, the fields of data classes included."""
    annotated = vars(value).get("__annotations__", {})
    if sys.version_info >= (3, 14):
        annotated = inspect.get_annotations(value, format=3)  # as far as names are known
    fields = dict.fromkeys(annotated)
    return {
        name: member
        for name, member in {**fields, **vars(value)}.items()
        if not name.startswith("_")
    }


def bare_members(module, name: str, value: type):
    """The public members of a class that nothing is said about, and the class itself."""
    docstring = vars(value).get("__doc__")  # that of a base class does not count
    if not docstring:
        yield name
        return
    text = class_source(sys.modules.get(value.__module__, module), name)
    for member, static in members(value).items():
        if inspect.isgetsetdescriptor(static):
            said = static.__doc__
        elif inspect.isroutine(static) or isinstance(static, property):
            said = getattr(static, "__func__", static).__doc__
        else:
            said = is_described(docstring, member) or has_comment(text, member)
        if not said:
            yield f"{name}.{member}"


def bare_names(module):
    """The public names of a module that nothing is said about."""
    constants = (REFERENCE / "milter-module.md").read_text("utf-8")
    for name in public_names(module):
        value = getattr(module, name)
        if module is Milter and hasattr(milter, name):
            continue  # the extension's
        if inspect.isclass(value):
            yield from bare_members(module, name, value)
        elif inspect.isroutine(value):
            said = value.__doc__
            if not said:
                yield name
        elif module is milter:
            if not re.search(rf"^\| `{name}` \| [^|\s]", constants, re.MULTILINE):
                yield name
        else:
            if not any(has_comment(source(place), name) for place in places_of(module)):
                yield name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    assert module.__doc__
    assert list(bare_names(module)) == []


def test_every_public_module_is_in_the_reference():
    text = "".join(page.read_text("utf-8") for page in REFERENCE.rglob("*.md"))
    for module in MODULES:
        assert f"automodule:: {module.__name__}\n" in text


def test_every_public_name_of_the_package_is_in_the_reference():
    text = (REFERENCE / "milter-package.md").read_text("utf-8")
    own = [name for name in Milter.__all__ if not hasattr(milter, name) and name != "milter"]
    assert [name for name in own if f"Milter.{name}" not in text] == []
    listed = re.findall(r"^   \.\. auto(?:method|attribute):: (\w+)$", text, re.MULTILINE)
    assert sorted(listed) == [name for name in dir(Milter.Base) if not name.startswith("_")]
