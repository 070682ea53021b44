"""``python -m Milter run --check``: what is wrong with a filter class, or looks so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.process import WAIT, Filter, python_command

from Milter._cli.inspection import inspect_filter

HEAD = "import Milter\n\nclass Looked(Milter.Base):\n"


def found(directory: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> list[str]:
    """What is found in a class of that body, which begins in line 4."""
    indented = "".join(f"    {line}\n" for line in body.splitlines())
    (directory / "looked.py").write_text(f"{HEAD}{indented}")
    monkeypatch.syspath_prepend(str(directory))
    sys.modules.pop("looked", None)
    module = __import__("looked")
    return [str(each).replace(f"{directory}/", "") for each in inspect_filter(module.Looked)]


CALLED = "cannot be called as it will be, with"
GENERATOR = (
    "has a yield, so that calling it returns a generator and runs nothing of it: "
    "write it without yield"
)
#: A decorator that makes a plain method of whatever it gets.
RUNS = (
    "def runs(function):\n"
    "    import functools\n"
    "    @functools.wraps(function)\n"
    "    def method(self, *args): return 0\n"
    "    return method\n"
)
NEVER = "is no callback and is never called: did you mean"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def eon(self): pass", f"warning: Looked.eon {NEVER} eom?"),
        ("def helo(self, name): pass", f"warning: Looked.helo {NEVER} hello?"),
        ("def env_from(self, *a): pass", f"warning: Looked.env_from {NEVER} envfrom?"),
        ("def on_header(self, *a): pass", f"warning: Looked.on_header {NEVER} header?"),
        ("def conect(self, *a): pass", f"warning: Looked.conect {NEVER} connect?"),
        (
            "def envfrom(self, sender): pass",
            (
                f"error: Looked.envfrom {CALLED} 1 argument and any number of ESMTP parameters: "
                "write def envfrom(self, sender, *params)"
            ),
        ),
        (
            "def header(self, name): pass",
            f"error: Looked.header {CALLED} 2 arguments: write def header(self, name, value)",
        ),
        (
            "def eom(): pass",
            f"error: Looked.eom {CALLED} 0 arguments: write def eom(self)",
        ),
        (
            "@Milter.noreply\ndef hello(self): pass",
            f"error: Looked.hello {CALLED} 1 argument: write def hello(self, hostname)",
        ),
        (
            "async def negotiate(self, opts): pass",
            (
                "error: Looked.negotiate is async, but the MTA waits for its answer before all "
                "else: write it without async"
            ),
        ),
        ("async def envfrom(self, *a): yield 0", f"error: Looked.envfrom {GENERATOR}"),
        ("@Milter.noreply\nasync def eoh(self): yield 0", f"error: Looked.eoh {GENERATOR}"),
        ("def close(self): yield 0", f"error: Looked.close {GENERATOR}"),
        (
            "@Milter.decode('bytes')\ndef body(self, chunk): pass",
            "error: @decode on Looked.body does nothing: it is for envfrom, envrcpt and header",
        ),
        (
            "seen = []\ndef eoh(self): self.seen.append(1)",
            (
                "warning: Looked.seen is changed by a method, but all connections and messages "
                "share it, as it belongs to the class: set self.seen in envfrom, which begins each "
                "message"
            ),
        ),
    ],
)
def test_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    line = 5 if body.startswith("seen") else 4
    assert found(tmp_path, monkeypatch, body) == [f"looked.py:{line}: {said}"]


@pytest.mark.parametrize(
    "body",
    [
        "def envfrom(self, *args): pass",
        "@staticmethod\ndef eom(): pass",
        "@classmethod\ndef body(cls, chunk): pass",
        "def header(self, name, value, more=None): pass",
        # A generator within, one that may be awaited, and what a decorator makes of one.
        "async def eom(self):\n    async def lines(): yield 1\n    return 0",
        "import types\n@types.coroutine\ndef eom(self): yield",
        f"{RUNS}@runs\nasync def eom(self): yield",
        # Methods that the class itself calls, has beside the callback, or keeps for itself.
        "def eom(self): return self.eon()\ndef eon(self): pass",
        "def header(self, name, value): pass\ndef headers(self): pass",
        "def _eon(self): pass",
        "def log(self): pass\ndef read(self): pass\ndef data_of(self): pass\ndef send(self): pass",
        # State of the connection, and tables that nobody changes.
        "seen = []\ndef envfrom(self, *a):\n    self.seen = []\n    self.seen.append(1)",
        "table = {}\ndef eom(self): return self.table.get('a')",
    ],
)
def test_what_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    assert found(tmp_path, monkeypatch, body) == []


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python_command(), "-m", "Milter", "run", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def test_check_does_not_serve_and_says_so_by_its_status(tmp_path: Path) -> None:
    (tmp_path / "looked.py").write_text(f"{HEAD}    def eon(self): pass\n")
    (tmp_path / "well.py").write_text(f"{HEAD}    def eom(self): pass\n")
    done = run(tmp_path, "looked:Looked", "--check")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == (f"{tmp_path}/looked.py:4: warning: Looked.eon {NEVER} eom?\n")
    done = run(tmp_path, "well:Looked", "--check")
    assert (done.returncode, done.stdout) == (0, "well:Looked can serve.\n")


def test_a_start_warns_of_it(directory: Path) -> None:
    (directory / "looked.py").write_text(f"{HEAD}    def eon(self): pass\n")
    words = [*python_command(), "-m", "Milter", "run", f"{directory}/looked.py:Looked"]
    filter_ = Filter(
        ["env", "-C", str(directory), *words, "--socket", f"unix:{directory}/s"],
        f"unix:{directory}/s",
        {},
    )
    try:
        line = filter_.wait_for("did you mean")
        assert f"WARNING milter.run: {directory}/looked.py:4: Looked.eon {NEVER} eom?" in line
        with filter_.mta() as mta:
            mta.send(b"Subject: a\r\n\r\nb\r\n", recipients=["r@example.com"])
        assert filter_.stop() == 0
    finally:
        filter_.kill()


@pytest.mark.parametrize(
    "call",
    ["Milter.runmilter('a', 'inet:0@127.0.0.1')", "from Milter import runmilter as r; r('a', '')"],
)
@pytest.mark.parametrize("caught", [False, True])
def test_a_module_that_serves_when_it_is_imported(tmp_path: Path, call: str, caught: bool) -> None:
    text = f"try:\n    {call}\nexcept Exception:\n    pass\n" if caught else f"\n{call}\n"
    (tmp_path / "serves.py").write_text(f"import Milter\n{text}\nclass A(Milter.Base): pass\n")
    done = run(tmp_path, "serves:A", "--check")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m Milter run: error: the module 'serves' calls runmilter when it is imported "
        f'({tmp_path}/serves.py, line 3): put that under if __name__ == "__main__":\n'
    )


@pytest.mark.parametrize(
    ("decorator", "said"),
    [
        ("noreply", "@noreply applied to non-optional method: helper (optional are connect, "),
        ("nocallback", "@nocallback applied to non-optional method: helper (optional are "),
        ("symlist('i')", "@symlist applied to non-symlist method: helper (macro stages are "),
    ],
)
def test_a_decorator_on_what_is_no_callback(tmp_path: Path, decorator: str, said: str) -> None:
    text = f"{HEAD}    @Milter.{decorator}\n    def helper(self): pass\n"
    (tmp_path / "looked.py").write_text(text)
    done = run(tmp_path, "looked:Looked", "--check")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"python -m Milter run: error: cannot import 'looked': ValueError: {said}"
    )
    line = 4 if sys.version_info >= (3, 10) else 5  # the decorator's, or that of what it decorates
    assert done.stderr.endswith(f" ({tmp_path}/looked.py, line {line})\n")
