"""What the documentation tells to do, done as a user would: commands, and filters for more mail."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.documents import (
    DOCS,
    DOCUMENTS,
    ROOT,
    SECONDS,
    blocks,
    commands,
    docstring_examples,
)
from support.postfix import settle

from Milter.mta import MTA, Client
from Milter.pytest_plugin import MilterApp, changes

EXAMPLES = ROOT / "examples"

# --- several messages of a connection ------------------------------------------------------------

#: Whatever a filter could keep of it: text and parts, headers of all kinds, more than one piece.
RICH = (
    b"Received: from a by b\r\nX-Hello: forged\r\nX-First: forged\r\nFrom: ann@spam.example\r\n"
    b"To: bob@example.org\r\nSubject: hello\r\nSubject: again\r\nX-Seen-By: forged\r\n"
    b"X-Stamp: forged\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=iso-8859-1\r\n"
    b"Content-Transfer-Encoding: quoted-printable\r\n\r\nsee invoice.exe =E4\r\n"
    + b"x" * 70 * 1000
    + b"\r\n"
)
#: What has nothing of all that.
BARE = b"\r\n"

#: How the first message goes.
FIRST = ["to its end", "cut off", "without recipients", "refused"]

FAR = Client("mail.example.org", "203.0.113.9", 2525)

#: What counts since the filter began, and the queue id, which no two messages share.
DIFFERENT = re.compile(r'X-Recipients-So-Far: \d+$|queue-id="\w+"')


def filters_in(block: str) -> list[str]:
    """The classes and functions that are filters in an example, the last of them for functions."""
    found = [
        name
        for node in ast.parse(block).body
        for name in [getattr(node, "name", "") or ast.unparse(getattr(node, "targets", [node])[0])]
        if any(
            "mailfilter.filter" in ast.unparse(one) for one in getattr(node, "decorator_list", ())
        )
        or (isinstance(node, ast.Assign) and "mailfilter.chain(" in ast.unparse(node.value))
    ]
    return found[-1:] + [
        node.name
        for node in ast.parse(block).body
        if isinstance(node, ast.ClassDef)
        and "TestBase" not in map(ast.unparse, node.bases)
        and {"Milter.Base", "Milter.Milter", "MyMilter"} & set(map(ast.unparse, node.bases))
    ]


def documented() -> list[Any]:
    """Each filter of the documentation, with the example that it stands in."""
    pages = [
        (f"{page.stem}-{number}", block)
        for page in DOCUMENTS
        for number, block in enumerate(blocks(page))
    ]
    strings = [
        (f"{case.values[0]}-{number}", case.values[1])
        for number, case in enumerate(docstring_examples())
    ]
    return [
        pytest.param(block, name, id=f"{where}-{name}")
        for where, block in [*pages, *strings]
        for name in filters_in(block)
    ]


def first_message(mta: MTA, how: str) -> None:
    recipients = ["nobody@example.org", "bob@example.org", "joe@spam.example"]
    if how == "to its end":
        mta.send(RICH, sender="ann@example.com", recipients=recipients)
        return
    sender = "<joe@spam.example>" if how == "refused" else "<ann@example.com>"
    if not mta.mail(sender).verdict.goes_on:
        return
    if how == "cut off":
        for recipient in recipients:
            mta.rcpt(f"<{recipient}>")
        mta.header("Subject", "hello")
        mta.header("X-Hello", "forged")
        mta.eoh()
        mta.body(b"see invoice.exe\r\n")
    mta.abort()


def second_message(mta: MTA) -> list[str]:
    result = mta.send(BARE, sender="eve@example.com", recipients=["carl@example.net"])
    return [DIFFERENT.sub("…", line) for line in changes(result)]


def nothing_is_left(app: MilterApp) -> None:
    """A message is treated as it is on a connection of its own."""
    with app.mta() as mta:
        mta.greet(FAR)
        alone = second_message(mta)
    for how in FIRST:
        with app.mta() as mta:
            mta.greet(FAR)
            first_message(mta, how)
            assert second_message(mta) == alone, how
    app.finish()
    assert "Traceback" not in app.output
    assert "exception in" not in app.output


@pytest.mark.parametrize(("block", "name"), documented())
def test_filters_in_the_documentation_keep_nothing_of_the_message_before(
    milter_app: Callable[..., MilterApp],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: str,
    name: str,
) -> None:
    runs = re.search(r"^Milter\.runmilter\([^)]*\)\n?", block, re.MULTILINE)
    code = block.replace(runs[0], "") if runs else block
    if "worker_init=open_database" in block:
        code += "\nopen_database()\n"
    code = code.replace("timeout=5)", "timeout=0.1)")  # of look-ups, where nobody answers
    future = "from __future__ import annotations\n"
    imports = f"{future}import Milter\nimport sqlite3, threading\n"
    code = imports + code.replace(future, "")
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    nothing_is_left(milter_app(f"example:{name}", cwd=tmp_path))


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_the_examples_keep_nothing_of_the_message_before(
    milter_app: Callable[..., MilterApp], tmp_path: Path, name: str
) -> None:
    arguments = [str(EXAMPLES / "policy.table")] if name.startswith("reject_policy") else []
    nothing_is_left(milter_app(EXAMPLES / name, *arguments, cwd=tmp_path))


def test_a_filter_that_keeps_something_is_noticed(
    milter_app: Callable[..., MilterApp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "keeps.py").write_text(
        "import Milter\n"
        "class Keeps(Milter.Base):\n"
        "    subject = ''\n"
        "    def header(self, field, value):\n"
        "        self.subject = value\n"
        "        return Milter.CONTINUE\n"
        "    def eom(self):\n"
        "        self.addheader('X-Subject', self.subject + '.')\n"
        "        return Milter.CONTINUE\n"
    )
    app = milter_app("keeps:Keeps", cwd=tmp_path)
    with pytest.raises(AssertionError, match="to its end"):
        nothing_is_left(app)


# --- commands ------------------------------------------------------------------------------------


def shell_cases(pattern: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in DOCUMENTS
        for number, block in enumerate(blocks(page, "sh"))
        if re.search(pattern, block)
    ]


@pytest.mark.parametrize(
    "page",
    [*DOCUMENTS, ROOT / "debian" / "python3-milter.README.Debian"],
    ids=lambda page: page.name,
)
def test_nothing_is_appended_to_the_settings_of_an_mta(page: Path) -> None:
    """A second line ``smtpd_milters = …`` switches the filters of the first one off."""
    assert not re.search(r">>\s*\S*(main\.cf|sendmail\.mc)", page.read_text("utf-8"))


@pytest.fixture
def postfix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Runs a script beside a configuration of Postfix; returns the settings that it leaves."""
    if not shutil.which("postconf"):
        pytest.skip("Postfix is not installed")
    (tmp_path / "master.cf").write_text("")
    # postconf -e refuses to write where others could exchange the file.
    tmp_path.chmod(0o755)
    monkeypatch.setenv("MAIL_CONFIG", str(tmp_path))

    def run(script: str, before: str = "") -> dict[str, str]:
        if before or not (tmp_path / "main.cf").exists():
            (tmp_path / "main.cf").write_text(f"compatibility_level = 3.6\n{before}")
        settle(tmp_path)
        subprocess.run(["sh", "-ec", script], check=True, timeout=SECONDS)
        settle(tmp_path)
        done = subprocess.run(
            ["postconf", "-nx"], capture_output=True, text=True, check=True, timeout=SECONDS
        )
        assert done.stderr == ""
        return dict(line.split(" = ", 1) for line in done.stdout.splitlines() if " = " in line)

    return run


def adding(block: str) -> tuple[str, str]:
    """The part of a block that adds a filter to Postfix's lists, and how it names the filter."""
    found = re.search(r"^for list in smtpd_milters.*?^done\n", block, re.MULTILINE | re.DOTALL)
    assert found
    name = re.search(r"\*((?:unix|inet):\S+)\*\)", found[0])
    assert name
    return found[0], name[1]


ADDING = r"for list in smtpd_milters"


@pytest.mark.parametrize("block", shell_cases(ADDING))
def test_filters_that_postfix_has_already_stay(postfix: Any, block: str) -> None:
    script, name = adding(block)
    kept = "{ inet:127.0.0.1:8892, default_action=accept }, unix:dkim/s"
    values = postfix(script, f"smtpd_milters =\n    {kept}\nnon_smtpd_milters = unix:dkim/s\n")
    assert values["smtpd_milters"] == f"{kept} {name}"
    assert values["non_smtpd_milters"] == f"unix:dkim/s {name}"
    assert postfix(script) == values  # done again, it changes nothing


@pytest.mark.parametrize("block", shell_cases(ADDING))
def test_a_list_that_is_the_other_one_gets_no_second_entry(postfix: Any, block: str) -> None:
    script, name = adding(block)
    before = "smtpd_milters = unix:dkim/s\nnon_smtpd_milters = $smtpd_milters\n"
    values = postfix(script, before)
    assert values["smtpd_milters"] == values["non_smtpd_milters"] == f"unix:dkim/s {name}"
    assert postfix(script) == values


@pytest.mark.parametrize("block", shell_cases(ADDING))
def test_where_postfix_has_no_filters(postfix: Any, block: str) -> None:
    script, name = adding(block)
    values = postfix(script)
    assert values["smtpd_milters"].strip() == values["non_smtpd_milters"].strip() == name
    assert postfix(script) == values


def test_the_pages_that_add_a_filter_to_postfix() -> None:
    pages = {case.id.rpartition("-")[0] for case in shell_cases(ADDING)}
    assert pages == {"README", "tutorial", "guide", "postfix", "containers"}


@pytest.mark.parametrize("block", shell_cases(r"-m Milter run|examples/\S+\.py --socket"))
def test_no_socket_is_made_where_everybody_may_write(block: str) -> None:
    """``run`` refuses that, and others could put theirs there first."""
    for arguments in commands(block):
        where = " ".join(arguments)
        assert arguments[0] != "run" or not re.search(
            r"(/tmp|/var/tmp|/dev/shm|/run)/[^/ ]+$", where
        )
    assert "/tmp/" not in block


#: The blocks that begin with a filter, and ask it: what they need, beside what they say.
TRIED = {
    "guide": r"run shout:Shout",
    "README": r"examples/stamp_header\.py --socket",
}


@pytest.mark.parametrize("page", TRIED)
def test_trying_a_filter_by_hand_works_as_printed(
    page: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    (block,) = (each for each in blocks(path, "sh") if re.search(TRIED[page], each))
    shout = next(each for each in blocks(DOCS / "guide.md") if "class Shout(" in each)
    (tmp_path / "shout.py").write_text(shout, encoding="utf-8")
    shutil.copy(EXAMPLES / "message.eml", tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    # The port of the text may be taken here; else it is done word by word.
    script = re.sub(r"\binet:8891@", f"inet:{free_port()}@", block)
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    process = subprocess.Popen(
        ["bash", "-c", python + "set -m\n" + script],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        output = read_up_to(process, "Message")
    finally:
        end_session(process.pid)
        process.wait(SECONDS)
        assert process.stdout is not None
        process.stdout.close()
    assert "error:" not in output
    assert "Traceback" not in output
    assert "Verdict     continue (accepted)" in output
    assert "Modifications" in output


#: What a page's commands need of a machine that is not to be changed: users, services, the MTA's
#: reload. What is left runs as printed, below a directory that stands for the root.
MACHINE = """
set -eu
useradd() { :; }
systemctl() { echo "systemctl $*"; }
postfix() { echo "postfix $*"; }
runuser() { shift 3; "$@"; }
install() {
    local kept=()
    while [ "$#" -gt 0 ]; do
        case $1 in -o | -g) shift 2 ;; *) kept+=("$1"); shift ;; esac
    done
    command install "${kept[@]}"
}
python() { "$FILTERS/bin/python" "$@"; }
python3() { "$FILTERS/bin/python" "$@"; }
coverage() { "$FILTERS/bin/python" -m coverage "$@"; }
"""

#: The interpreter of the pages, without the options that only root can follow.
INTERPRETER = """#!/usr/bin/env bash
kept=()
while [ "$#" -gt 0 ]; do
    case $1 in --user | --group) shift 2 ;; *) kept+=("$1"); shift ;; esac
done
exec "{python}" "${{kept[@]}}"
"""

STARTED = "useradd"  # the block that starts the filter, on each page that has one

#: The pages, with their blocks that run here, in this order, and what is then printed.
PLAYED = {
    "README": ([r"^cat >/opt/filters", STARTED], "A filter answers on "),
    "tutorial": ([r"bin/pytest", STARTED], "2 passed"),
    "postfix": ([STARTED, r"Milter run", r"Milter config"], "postconf -e"),
    "sendmail": ([STARTED, r"Milter config"], "A filter answers on "),
    "service": ([r"^systemctl stop"], "systemctl stop milter@hello"),
    "troubleshooting": (
        [STARTED, r"^runuser|runuser -u", r"--trace", r"namei", r"--check"],
        "can serve",
    ),
    "debugging": ([r"--milter-in-process -k", r"--milter-in-process test_"], "hello.py"),
}


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that stands for the root, whose path leaves room for names of sockets."""
    with tempfile.TemporaryDirectory(prefix="root-") as name:
        filters = Path(name, "opt", "filters")
        (filters / "bin").mkdir(parents=True)
        (filters / "bin" / "python").write_text(INTERPRETER.format(python=sys.executable))
        (filters / "bin" / "pytest").write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -m pytest -p no:cacheprovider "$@"\n'
        )
        for program in (filters / "bin").iterdir():
            program.chmod(0o755)
        for directory in ("etc/mail/m4", "etc/milter", "var/spool/postfix", "run"):
            Path(name, directory).mkdir(parents=True)
        yield Path(name)


def without_waiting(block: str) -> str:
    """A block whose last command serves, and does so in the background."""
    serves = re.search(r"Milter run (?!.*--check)(?:[^\n&]|\\\n)*\Z", block.rstrip())
    return f"{block.rstrip()} &\n" if serves else block


@pytest.mark.parametrize("page", PLAYED)
def test_commands_of_a_page_run_as_printed(
    page: str, root: Path, free_port: Callable[[], int]
) -> None:
    wanted, printed = PLAYED[page]
    if "coverage" in page or page == "debugging":
        pytest.importorskip("coverage")
    if "namei" in wanted and not shutil.which("namei"):
        pytest.skip("namei is not installed")
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    shown = blocks(path, "sh")
    tutorial = blocks(DOCS / "tutorial.md", "sh")
    chosen = []
    for pattern in wanted:
        known = [block for block in shown if re.search(pattern, block, re.MULTILINE)]
        if not known and pattern == STARTED:
            known = [block for block in tutorial if pattern in block]
        chosen.append(without_waiting(known[0]))
    hello, test = blocks(DOCS / "tutorial.md")[:2]
    filters = root / "opt" / "filters"
    if page != "README":
        (filters / "hello.py").write_text(hello)
    (filters / "test_hello.py").write_text(test)
    shutil.copy(EXAMPLES / "message.eml", filters)
    (root / "etc" / "milter" / "hello.py").write_text(blocks(DOCS / "service.md")[0])
    script = "cd /opt/filters\n" + "cd /opt/filters\n".join(chosen)
    script = re.sub(r"(?<![\w.])/(opt|etc|run|var/spool)/", rf"{root}/\1/", script)
    script = re.sub(r"\binet:8891@", f"inet:{free_port()}@", script)
    output = root / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            ["bash", "-c", MACHINE + script],
            cwd=filters, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "FILTERS": str(filters), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status = process.wait(SECONDS)
        finally:
            end_session(process.pid)
            process.kill()
            process.wait(SECONDS)
    text = output.read_text("utf-8", "replace")
    assert status == 0, text
    assert printed in text
    assert "error:" not in text
    assert "Traceback" not in text


def read_up_to(process: subprocess.Popen[str], word: str) -> str:
    """What a process and those that it started write, until the last of its own is there."""
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if line.startswith(word) or "error:" in line:
            break
    return output


def end_session(leader: int) -> None:
    """End all processes of the session that a process leads."""
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if entry.name.isdigit() and int(fields[3]) == leader and int(entry.name) != leader:
            os.kill(int(entry.name), signal.SIGKILL)
