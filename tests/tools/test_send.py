"""``python -m Milter send``, run as a process against the real libmilter and a scripted filter."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mta import (
    DISCARD,
    REJECT,
    TEMPFAIL,
    WAIT,
    LibmilterFilter,
    Peer,
    Script,
    answers,
    build_filter,
    frame,
    optneg,
    records,
)

from Milter._cli.envelope import parse_address

MESSAGE = b"Received: from x\n\tby y\nSubject: hello\nX-Old: 1\n\nbody line\n"

Start = Callable[..., LibmilterFilter]


@pytest.fixture(scope="session")
def filter_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_filter(tmp_path_factory.mktemp("mta_filter"))


@pytest.fixture
def start(filter_program: Path) -> Iterator[Start]:
    """Start the C filter with these settings; see ``mta_filter.c``."""
    with contextlib.ExitStack() as stack:

        def start_filter(**settings: str) -> LibmilterFilter:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mta-")))
            running = LibmilterFilter(filter_program, directory, settings)
            stack.callback(running.stop)
            return running

        yield start_filter


@pytest.fixture
def play() -> Iterator[Callable[[Script], str]]:
    """Start a filter that plays a script on its first connection; gives its address."""
    with contextlib.ExitStack() as stack:

        def start_script(script: Script) -> str:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="mta-"))
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.settimeout(WAIT)
            server.bind(f"{directory}/s")
            server.listen()

            def serve() -> None:
                connection, _ = server.accept()
                with connection, contextlib.suppress(EOFError, OSError):
                    script(Peer(connection))

            thread = threading.Thread(target=serve)
            thread.start()
            stack.callback(thread.join, WAIT)
            return f"unix:{directory}/s"

        yield start_script


@pytest.fixture
def message(tmp_path: Path) -> str:
    path = tmp_path / "message.eml"
    path.write_bytes(MESSAGE)
    return str(path)


# With -m, the working directory comes before the installed package.
HERE = Path(__file__).parent


def send(
    *arguments: str, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "Milter", "send", *arguments],
        cwd=HERE,
        input=stdin,
        capture_output=True,
        timeout=WAIT * 3,
        check=False,
        env={**os.environ, **environment},
    )


def report(done: subprocess.CompletedProcess[bytes]) -> Any:
    """The JSON of a run that had nothing to complain about."""
    assert done.stderr == b""
    return json.loads(done.stdout)


def text(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stdout.decode()


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on standard error, with nothing said elsewhere."""
    assert done.stdout == b""
    said = done.stderr.decode()
    assert said.startswith("python -m Milter send: error: ")
    assert said.count("\n") == 1
    return said


def test_a_message_passes(start: Start, message: str) -> None:
    running = start()
    done = send(running.address, message, "--wait", "20")
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.search(r"^Filter +unix:.*, protocol version 6$", text(done), re.M)
    assert re.search(r"^Verdict +continue \(accepted\), at end of message$", text(done), re.M)
    assert "Modifications" not in text(done)
    assert text(done).endswith(
        "Message\n"
        "    Received: from x\n    \tby y\n    Subject: hello\n    X-Old: 1\n\n    body line\n"
    )
    assert running.calls("header") == [
        [b"Received", b"from x\n\tby y"],
        [b"Subject", b"hello"],
        [b"X-Old", b"1"],
    ]
    assert running.calls("body") == [[b"body line\r\n"]]


def test_line_ends_do_not_matter(start: Start, tmp_path: Path) -> None:
    running = start()
    for data in (MESSAGE, MESSAGE.replace(b"\n", b"\r\n")):
        assert send(running.address, "-", "--wait", "20", stdin=data).returncode == 0
    calls = running.calls("header", "body")
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]


EDITS = records(
    ("insheader", "0", "X-Top", "1"),
    ("chgheader", "subject", "1", "changed\n\tfold"),
    ("chgheader", "X-Old", "1", ""),
    ("addheader", "X-New", "gr\u00fc\udcff\x1b[2J"),
    ("addrcpt_par", "<c@x>", "NOTIFY=NEVER"),
    ("delrcpt", "<b@x>"),
    ("chgfrom", "<n@x>"),
    ("replacebody", "new "),
    ("replacebody", "body\r\n"),
    ("quarantine", "odd"),
)
ENVELOPE = ["--from", "<a@x> SIZE=9", "--rcpt", "b@x NOTIFY=NEVER", "--rcpt", "d@x"]


def test_what_changed_is_marked(start: Start, message: str) -> None:
    done = send(start(F_EOM=EDITS).address, message, "--wait", "20", *ENVELOPE)
    assert (done.returncode, done.stderr) == (0, b"")
    _, _, shown = text(done).partition("Quarantine  odd\n\n")
    assert shown == (
        "Envelope\n"
        "  - from  <a@x> SIZE=9\n"
        "  + from  <n@x> SIZE=9\n"
        "  - to    <b@x> NOTIFY=NEVER\n"
        "    to    <d@x>\n"
        "  + to    <c@x> NOTIFY=NEVER\n"
        "\n"
        "Modifications\n"
        "    insert header at 0 X-Top: 1\n"
        "    change header number 1 subject: changed \tfold\n"
        "    delete header X-Old, number 1\n"
        "    add header X-New: gr\u00fc\\xff\\x1b[2J\n"
        "    add recipient <c@x> NOTIFY=NEVER\n"
        "    delete recipient <b@x>\n"
        "    change sender to <n@x>\n"
        "    replace body, 10 bytes\n"
        "    quarantine: odd\n"
        "\n"
        "Message\n"
        "  + X-Top: 1\n"
        "    Received: from x\n"
        "    \tby y\n"
        "  - Subject: hello\n"
        "  + subject: changed\n"
        "  + \tfold\n"
        "  - X-Old: 1\n"
        "  + X-New: gr\u00fc\\xff\\x1b[2J\n"
        "\n"
        "  - body line\n"
        "  + new body\n"
    )


def test_json(start: Start, message: str) -> None:
    running = start(F_EOM=EDITS, F_PFLAGS="0x2", F_SYMLISTS=records(("2", "i j")))
    done = send(running.address, message, "--json", "--wait", "20", *ENVELOPE)
    found = report(done)
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert found["negotiated"]["version"] == 6
    assert found["negotiated"]["steps"] == ["NOHELO"]
    assert found["negotiated"]["macros"] == {"MAIL": ["i", "j"]}
    assert (found["verdict"], found["stage"], found["accepted"]) == ("continue", "EOM", True)
    assert (found["reply"], found["quarantine"], found["refused"]) == (None, "odd", [])
    assert found["sender"] == {"address": "n@x", "params": ["SIZE=9"]}
    assert found["recipients"] == [
        {"address": "d@x", "params": []},
        {"address": "c@x", "params": ["NOTIFY=NEVER"]},
    ]
    assert found["message"] == {
        "headers": [
            ["X-Top", "1"],
            ["Received", "from x\n\tby y"],
            ["subject", "changed\n\tfold"],
            ["X-New", "gr\u00fc\udcff\x1b[2J"],
        ],
        "body": "new body\r\n",
    }
    assert [one["action"] for one in found["modifications"]] == [
        *["insheader", "chgheader", "chgheader", "addheader", "addrcpt", "delrcpt", "chgfrom"],
        *["replacebody", "quarantine"],
    ]
    assert found["modifications"][0] == {
        "action": "insheader",
        "index": 0,
        "name": "X-Top",
        "value": "1",
    }
    assert found["modifications"][4] == {
        "action": "addrcpt",
        "address": "<c@x>",
        "params": "NOTIFY=NEVER",
    }
    assert found["replies"][:2] == [
        {"stage": "CONNECT", "verdict": "continue"},
        {"stage": "HELO", "verdict": "not sent"},
    ]


def test_json_of_a_body_that_is_not_utf_8(start: Start) -> None:
    running = start()
    done = send(running.address, "-", "--json", "--wait", "20", stdin=b"A: \xff\n\n\xfe\n")
    assert report(done)["message"] == {
        "headers": [["A", "\udcff"]],
        "body_base64": base64.b64encode(b"\xfe\r\n").decode(),
    }


@pytest.mark.parametrize(
    ("settings", "status", "verdict"),
    [
        ({"F_VERDICT_eom": REJECT}, 3, "reject"),
        ({"F_VERDICT_helo": REJECT}, 3, "reject"),
        ({"F_VERDICT_rcpt": TEMPFAIL}, 4, "tempfail"),
        ({"F_VERDICT_data": DISCARD}, 5, "discard"),
        (
            {"F_VERDICT_mail": REJECT, "F_REPLY_mail": records(("550", "5.7.1", "one", "two"))},
            3,
            "reject",
        ),
    ],
)
def test_refusals(
    start: Start, message: str, settings: dict[str, str], status: int, verdict: str
) -> None:
    running = start(**settings)
    done = send(running.address, message, "--wait", "20")
    assert done.returncode == status
    assert done.stderr == b""
    assert re.search(rf"^Verdict +{verdict}, at ", text(done), re.M)
    assert text(done).endswith("\n\nMessage: none, see the verdict\n")
    if "F_REPLY_mail" in settings:
        assert "Reply       550-5.7.1 one\n            550 5.7.1 two\n" in text(done)
    done = send(running.address, message, "--json")
    found = report(done)
    assert (done.returncode, found["verdict"], found["message"]) == (status, verdict, None)
    if "F_REPLY_mail" in settings:
        assert found["reply"] == {"code": 550, "xcode": "5.7.1", "lines": ["one", "two"]}


def test_refused_recipients_are_shown(start: Start, message: str) -> None:
    running = start(
        F_PFLAGS="0x800",
        F_VERDICT_rcpt=REJECT,
        F_ONLY_RCPT="<b@x>",
        F_REPLY_rcpt=records(("550", "5.1.1", "who?")),
    )
    options = ["--rcpt", "b@x", "--rcpt", "c@x", "--rejected-rcpt", "d@x", "550 5.1.1 User unknown"]
    done = send(running.address, message, "--wait", "20", *options)
    assert done.returncode == 0
    assert (
        "    to    <c@x>\n"
        "  ! to    <b@x>: refused by the filter, 550 5.1.1 who?\n"
        "  ! to    <d@x>: refused by the MTA, 550 5.1.1 User unknown\n"
    ) in text(done)
    assert running.calls("rejected") == [[b"5.1.1", b"User unknown"]]
    found = report(send(running.address, message, "--json", *options))
    assert [(one["address"], one["by"]) for one in found["refused"]] == [
        ("b@x", "filter"),
        ("d@x", "mta"),
    ]


def test_the_session_is_as_told(start: Start, message: str) -> None:
    running = start(F_MACROS="i j _ {daemon_name} {mine} {late} {rcpt_addr} {mail_addr}")
    done = send(
        *[running.address, message, "--wait", "20", "--from", "", "--rcpt", "<b@x>"],
        *["--client-name", "mx.example.com", "--client-addr", "2001:db8::7", "--client-port", "25"],
        *["--helo", "helo.example.com", "--macro", "i=Q1", "--macro", "{mine}=a=b"],
        *["--macro", "EOM:late=1", "--macro", "j="],
    )
    assert done.returncode == 0
    assert running.lines()[1] == [
        "connect",
        b"mx.example.com".hex(),
        *["inet6", "2001:db8::7", "25"],
    ]
    assert running.calls("helo", "mail", "rcpt") == [[b"helo.example.com"], [b"<>"], [b"<b@x>"]]
    assert running.calls("macro") == [
        [b"i", b"Q1"],
        [b"j", b""],
        [b"_", b"mx.example.com [2001:db8::7]"],
        [b"{daemon_name}", b"pymilter-send"],
        [b"{mine}", b"a=b"],
        [b"{late}", b"1"],
        [b"{rcpt_addr}", b"b@x"],
        [b"{mail_addr}", b""],
    ]


def test_a_client_without_an_address(start: Start, message: str) -> None:
    running = start()
    assert (
        send(running.address, message, "--wait", "20", "--client-addr", "unknown").returncode == 0
    )
    assert running.lines()[1][-1] == "none"


@pytest.mark.parametrize("version", ["2", "4"])
def test_older_protocols(start: Start, message: str, version: str) -> None:
    running = start(F_AFLAGS="0")
    options = ["--json", "--wait", "20", "--protocol-version", version]
    done = send(running.address, message, *options)
    assert report(done)["negotiated"]["version"] == int(version)
    assert ("data" in running.names()) == (version == "4")


def test_dialects(start: Start, message: str) -> None:
    twice = records(("addheader", "Subject", "second"))
    running = start(F_EOM=twice)
    for dialect, expected in [("postfix", ["hello", "second"]), ("sendmail", ["second", "hello"])]:
        done = send(running.address, message, "--json", "--wait", "20", "--dialect", dialect)
        headers = report(done)["message"]["headers"]
        assert [value for name, value in headers if name == "Subject"] == expected


def test_the_result_may_be_written_to_a_file(start: Start, message: str, tmp_path: Path) -> None:
    running = start(F_EOM=records(("addheader", "X", "\udcff"), ("replacebody", "a\r\nb\r\n")))
    target = tmp_path / "out.eml"
    done = send(running.address, message, "--wait", "20", "--output", str(target))
    assert done.returncode == 0
    assert target.read_bytes() == MESSAGE.replace(b"\n\nbody line\n", b"\nX: \xff\n\na\nb\n")
    done = send(running.address, message, "--output", str(tmp_path / "no" / "out"))
    assert done.returncode == 2
    assert "cannot write" in complaint(done)


def test_the_body_may_come_with_end_of_message(play: Callable[[Script], str], message: str) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def script(peer: Peer) -> None:
        peer.answer(optneg(), *[frame(b"c")] * 10)
        seen.extend(peer.seen)
        peer.receive()

    assert send(play(script), message, "--body-in-eom").returncode == 0
    assert seen[-1] == (b"E", b"body line\r\n")


def test_trace(start: Start) -> None:
    running = start(F_EOM=records(("addheader", "X-New", "\x1b[2J")))
    body = b"a\x1b[2J\tb\r\n" + b"x" * 1000 + b"\r\n"
    macros = ["--macro", "j=mx", "--macro", "_=x", "--macro", "{daemon_name}=d", "--macro", "i=Q1"]
    done = send(
        *[running.address, "-", "--wait", "20", "--trace", *macros, "--rcpt", '"b c"@x SIZE=9'],
        stdin=b"Subject: hello\n\tworld\n\n" + body,
    )
    assert done.returncode == 0
    said = done.stderr.decode()
    times = [float(time) for time in re.findall(r"^[<>] +(\d+\.\d) ms  ", said, re.M)]
    lines = re.sub(r" +\d+\.\d ms  ", " ", said).splitlines()
    assert len(times) == len(lines)
    assert times == sorted(times)
    assert lines[0].startswith("> negotiation: version 6, actions ADDHDRS CHGBODY ")
    assert lines[1].startswith("< negotiation: version 6, actions ADDHDRS CHGBODY ")
    assert lines[2:] == [
        "> macros for connect: j=mx, _=x, {daemon_name}=d",
        "> connect: localhost, INET 127.0.0.1, port 0",
        "< connect: continue",
        "> HELO: localhost",
        "< HELO: continue",
        "> macros for MAIL: i=Q1, {mail_addr}=sender@example.com",
        "> MAIL: <sender@example.com>",
        "< MAIL: continue",
        '> macros for RCPT: {rcpt_addr}="b c"@x',
        '> RCPT: <"b c"@x> SIZE=9',
        "< RCPT: continue",
        "> DATA",
        "< DATA: continue",
        "> header: Subject: hello\\n\\tworld",
        "< header: continue",
        "> end of headers",
        "< end of headers: continue",
        f'> body: "a\\x1b[2J\\tb\\r\\n{"x" * 63}"… ({len(body)} bytes)',
        "< body: continue",
        "> end of message",
        "< end of message: add header: X-New: \\x1b[2J",
        "< end of message: continue",
        "> quit",
    ]


def test_trace_of_raw_bytes(start: Start, message: str) -> None:
    done = send(start().address, "--trace=raw", message, "--wait", "20")
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].startswith(b"> b'\\x00\\x00\\x00\\rO")
    assert b"< b'\\x00\\x00\\x00\\x01c'" in done.stderr.splitlines()


def test_nobody_listens(message: str, tmp_path: Path) -> None:
    done = send(f"unix:{tmp_path}/none", message)
    assert done.returncode == 1
    assert "cannot connect to the filter" in complaint(done)


def test_a_protocol_violation(play: Callable[[Script], str], message: str) -> None:
    done = send(play(answers(frame(b"z"))), message)
    assert done.returncode == 1
    assert "at connect: b'z' is no answer to this step" in complaint(done)


def test_a_filter_that_does_not_answer(play: Callable[[Script], str], message: str) -> None:
    done = send(play(answers()), message, "--timeout", "0.2")
    assert done.returncode == 1
    assert "at connect: no answer within 0.2 s" in complaint(done)


def test_a_violation_at_the_end_does_not_hide_the_result(
    play: Callable[[Script], str], message: str
) -> None:
    def script(peer: Peer) -> None:
        peer.answer(optneg(), *[frame(b"c")] * 11)
        peer.receive()
        peer.send(frame(b"c"))

    done = send(play(script), message)
    assert done.returncode == 1
    assert "Verdict     continue (accepted)" in text(done)
    assert b"at quit: the filter speaks where nothing was due" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["unix:/run/x", "/no/such/message"], "cannot read the message '/no/such/message'"),
        (["tcp:1@x", "-"], "socket 'tcp:1@x': unknown scheme"),
        (["unix:/run/x", "-", "--macro", "novalue"], "macro 'novalue'"),
        (["unix:/run/x", "-", "--macro", "MAIL:=x"], "macro 'MAIL:=x'"),
        (
            ["unix:/run/x", "-", "--protocol-version", "7"],
            "--protocol-version: protocol version 7 is not",
        ),
    ],
)
def test_bad_input(arguments: list[str], said: str) -> None:
    done = send(*arguments, stdin=MESSAGE)
    assert done.returncode == 2
    assert said in complaint(done)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--macro", "NOSTAGE:x=1"], "macro stage 'NOSTAGE'"),
        (["--client-addr", "example.com"], "--client-addr 'example.com': write an IPv4"),
        (["--rejected-rcpt", "b@x", "no"], "rejected 'no'"),
    ],
)
def test_bad_input_found_later(start: Start, message: str, arguments: list[str], said: str) -> None:
    done = send(start().address, message, "--wait", "20", *arguments)
    assert done.returncode == 2
    assert said in complaint(done)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["send"],
        ["send", "x", "y", "--timeout", "-1"],
        ["send", "x", "y", "--wait", "soon"],
        ["?"],
    ],
)
def test_usage(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "Milter", *arguments],
        cwd=HERE,
        capture_output=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2
    assert b"usage: python -m Milter" in done.stderr
    assert b"Traceback" not in done.stderr


def test_help_names_the_exit_statuses() -> None:
    done = send("--help")
    assert done.returncode == 0
    for line in ("0  the message is accepted", "3  rejected", "5  discarded"):
        assert line in text(done)


@pytest.mark.parametrize("options", [[], ["--postfix-syntax"]], ids=["plain", "asked for"])
def test_the_order_of_postfix(start: Start, message: str, options: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(F_SOCKET=f"inet:{port}@127.0.0.1")
    done = send(f"inet:127.0.0.1:{port}", message, *options, "--wait", "20")
    assert done.returncode == 0


def test_a_reader_who_has_had_enough(start: Start, message: str) -> None:
    running = start(F_EOM=records(("bigbody", "1000000")))
    with subprocess.Popen(
        [sys.executable, "-m", "Milter", "send", running.address, message, "--wait", "20"],
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(WAIT) == 0  # the message was accepted


# --- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "params"),
    [
        ("a@x", "a@x", ()),
        ("<a@x> SIZE=9", "a@x", ("SIZE=9",)),
        ("<a@x>SIZE=9", "a@x", ("SIZE=9",)),
        ("  a@x \t SIZE=9  BODY=7BIT ", "a@x", ("SIZE=9", "BODY=7BIT")),
        ("", "", ()),
        ("<>", "", ()),
        ("<> SIZE=9", "", ("SIZE=9",)),
        ('"john doe"@x', '"john doe"@x', ()),
        ('"john doe"@x NOTIFY=NEVER', '"john doe"@x', ("NOTIFY=NEVER",)),
        ('<"john doe"@x> NOTIFY=NEVER', '"john doe"@x', ("NOTIFY=NEVER",)),
        ('<"a > b"@x> SIZE=9', '"a > b"@x', ("SIZE=9",)),
        ('"a\\" b"@x SIZE=9', '"a\\" b"@x', ("SIZE=9",)),
        ('"a\\\\"@x SIZE=9', '"a\\\\"@x', ("SIZE=9",)),
        ('a."b c".d@x SIZE=9', 'a."b c".d@x', ("SIZE=9",)),
        ('<@r1,@r2:"a b"@x> SIZE=9', '@r1,@r2:"a b"@x', ("SIZE=9",)),
        ('"only quoted"', '"only quoted"', ()),
        # What opens no quoted local part is a character like any other.
        ('o"brien@x ORCPT=rfc822;o"brien@x', 'o"brien@x', ('ORCPT=rfc822;o"brien@x',)),
        ('"never closed@x SIZE=9', '"never', ("closed@x", "SIZE=9")),
        ('"a b" c@x', '"a b"', ("c@x",)),
        ("<never closed", "<never", ("closed",)),
        ("j\u00a0doe@x SIZE=9", "j\u00a0doe@x", ("SIZE=9",)),
    ],
)
def test_addresses(text: str, address: str, params: tuple[str, ...]) -> None:
    found = parse_address(text)
    assert (found.address, found.params) == (address, params)


def test_quoted_local_parts_reach_the_filter(start: Start, message: str) -> None:
    running = start()
    options = ["--from", '"john doe"@x SIZE=9', "--rcpt", '<"a > b"@x> NOTIFY=NEVER']
    done = send(running.address, message, "--wait", "20", *options)
    assert (done.returncode, done.stderr) == (0, b"")
    assert '    from  <"john doe"@x> SIZE=9\n' in text(done)
    assert '    to    <"a > b"@x> NOTIFY=NEVER\n' in text(done)
    assert running.calls("mail", "rcpt") == [
        [b'<"john doe"@x>', b"SIZE=9"],
        [b'<"a > b"@x>', b"NOTIFY=NEVER"],
    ]


# --- the end of the last line --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"A: 1\n\nlast", b"last\r\n"),
        (b"A: 1\r\n\r\none\r\nlast", b"one\r\nlast\r\n"),
        (b"A: 1\r\n\r\nlast\r", b"last\r\n"),
        (b"A: 1\n\nlast\n", b"last\r\n"),
        (b"A: 1\n\nlast\n\n", b"last\r\n\r\n"),
        (b"no header", b"no header\r\n"),
        (b"A: 1", None),
        (b"A: 1\n\n", None),
    ],
)
def test_the_last_line_has_an_end(start: Start, data: bytes, body: bytes | None) -> None:
    running = start()
    done = send(running.address, "-", "--json", "--wait", "20", stdin=data)
    assert report(done)["message"]["body"] == (body or b"").decode()
    assert running.calls("body") == ([] if body is None else [[body]])


def test_the_last_line_of_a_new_body_has_an_end(start: Start, message: str, tmp_path: Path) -> None:
    running = start(F_EOM=records(("replacebody", "new")))
    target = tmp_path / "out.eml"
    done = send(running.address, message, "--json", "--wait", "20", "--output", str(target))
    assert report(done)["message"]["body"] == "new\r\n"
    assert report(done)["modifications"] == [{"action": "replacebody", "body": "new"}]
    assert target.read_bytes().endswith(b"\n\nnew\n")
