"""The examples, each run as a process and asked by the MTA's side over a unix socket."""

from __future__ import annotations

import base64
import quopri
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from Milter.mta import (
    ChangeHeader,
    Client,
    InsertHeader,
    Message,
    Result,
    Stage,
    Verdict,
)
from Milter.pytest_plugin import MilterApp

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
#: Each example is there as a class and as a function of whole messages, and does the same.
FORMS = {"": "class", "_function": "function"}

FAR = Client("mail.example.org", "203.0.113.9", 2525)
PLAIN = b"From: ann@example.org\nSubject: lunch\n\nAt noon?\n"
SECONDS = 30.0


class Example:
    """An example that serves, and what becomes of messages that are sent to it."""

    def __init__(self, app: MilterApp) -> None:
        self.app = app

    def send(self, message: bytes, **arguments: Any) -> Result:
        """What becomes of one message, from FAR unless told otherwise."""
        arguments.setdefault("sender", "ann@example.org")
        arguments.setdefault("recipients", ["bob@example.com"])
        arguments.setdefault("client", FAR)
        with self.app.mta() as mta:
            return mta.send(message, **arguments)


Start = Callable[..., Example]


@pytest.fixture(params=FORMS, ids=FORMS.get)
def form(request: pytest.FixtureRequest) -> str:
    """What the names of a form end in."""
    return str(request.param)


@pytest.fixture
def start(form: str, milter_app: Callable[..., MilterApp], tmp_path: Path) -> Iterator[Start]:
    """Start an example by its name; it ends cleanly and without a complaint, or the test fails."""
    started: list[MilterApp] = []

    def run(name: str, *arguments: str) -> Example:
        path = EXAMPLES / name.replace(".py", f"{form}.py")
        started.append(milter_app(path, *arguments, cwd=tmp_path))
        return Example(started[-1])

    yield run
    for app in started:
        app.finish()
        assert "Traceback" not in app.output
        assert "untrapped" not in app.output


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_says_how_to_call_it(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--help"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert "--socket" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_importing_does_nothing(name: str) -> None:
    code = (
        "import logging, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import Milter; before = Milter.factory\n"
        f"import {name[:-3]}\n"
        "assert Milter.factory is before\n"
        "assert not logging.getLogger().handlers\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_socket_that_cannot_be_is_one_line_and_status_1(name: str, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/no/such/directory/sock"
    table = [str(EXAMPLES / "policy.table")] if name.startswith("reject_policy") else []
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *table, "--socket", address, "--log-level=warning"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot run" in done.stderr
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_the_sample_message_is_a_message() -> None:
    message = Message.parse((EXAMPLES / "message.eml").read_bytes())
    assert message["Subject"]
    assert message.body.endswith(b"Ann\r\n")


# --- stamp_header.py -----------------------------------------------------------------------------

STAMP = "X-Connection-Facts"


def facts(value: str) -> dict[str, str]:
    """The names and values of a stamp; fails where it has another form."""
    items = value.split(";\n\t")
    assert all(re.fullmatch(r'[a-z-]+="[ !#-\[\]-~]*"', item) for item in items), value
    return {name: text.strip('"') for name, _, text in (item.partition("=") for item in items)}


def test_stamp_tells_the_facts(start: Start) -> None:
    result = start("stamp_header.py").send(
        PLAIN,
        helo="mx.example.org",
        macros={"i": "4Xk2", "{auth_authen}": "ann", "{tls_version}": "TLSv1.3"},
    )
    assert result.accepted
    assert result.message.headers[0].name == STAMP.encode()
    assert facts(result.message[STAMP]) == {
        "client-name": "mail.example.org",
        "client-addr": "203.0.113.9",
        "helo": "mx.example.org",
        "envelope-from": "<ann@example.org>",
        "authenticated": "ann",
        "tls": "TLSv1.3",
        "queue-id": "4Xk2",
    }


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (Client("localhost", None), None),
        (Client("localhost", "/run/submit"), "/run/submit"),
        (Client("six.example.org", "2001:db8::1", 25), "2001:db8::1"),
    ],
)
def test_stamp_copes_with_every_kind_of_client(
    start: Start, client: Client, address: str | None
) -> None:
    result = start("stamp_header.py").send(PLAIN, client=client)
    assert facts(result.message[STAMP]).get("client-addr") == address


def test_stamp_cannot_be_forged_by_what_a_client_says(start: Start) -> None:
    helo = b'a"; helo="bank.example\xff\xc3\xa9%22\\\x01'
    result = start("stamp_header.py").send(PLAIN, helo=helo, sender=b'"\xe9;x="@example.org')
    stamp = facts(result.message[STAMP])
    assert stamp["helo"] == "a%22; helo=%22bank.example%FF%C3%A9%2522%5C%01"
    assert stamp["envelope-from"] == "<%22%E9;x=%22@example.org>"


def test_stamp_removes_the_stamps_that_came_with_the_message(start: Start) -> None:
    forged = b"".join(
        b'%s: helo="bank%d"\n' % (name.encode(), i)
        for i, name in enumerate([STAMP, STAMP.lower(), STAMP.upper()])
    )
    result = start("stamp_header.py").send(forged + PLAIN)
    assert len(result.message.get_all(STAMP)) == 1
    assert "bank" not in result.message[STAMP]
    assert result.message["Subject"] == "lunch"


def test_stamp_counts_forged_headers_for_each_message(start: Start, form: str) -> None:
    with start("stamp_header.py").app.mta() as mta:
        results = [
            mta.send(message, recipients=["bob@example.com"], sender="ann@example.org")
            for message in (STAMP.encode() + b": x\n" + PLAIN, PLAIN)
        ]
    assert [len(result.message.get_all(STAMP)) for result in results] == [1, 1]
    kinds = [[type(one) for one in result.modifications] for result in results]
    # Where the forged one is at the top already, a function changes that one.
    first = [ChangeHeader] if form else [ChangeHeader, InsertHeader]
    assert kinds == [first, [InsertHeader]]


def test_stamp_cuts_what_is_long(start: Start) -> None:
    result = start("stamp_header.py").send(PLAIN, helo=b"\xff" * 5000)
    assert facts(result.message[STAMP])["helo"] == "%FF" * 255


# --- reject_policy.py ----------------------------------------------------------------------------

TABLE = str(EXAMPLES / "policy.table")


@pytest.mark.parametrize(
    ("arguments", "reply"),
    [
        (
            {"client": Client("x.example", "192.0.2.77")},
            "550-5.7.1 No mail from this network.\n550 5.7.1 Ask abuse@example.com.",
        ),
        (
            {"client": Client("h1.DYNAMIC.example", "203.0.113.1")},
            "550 5.7.1 Please send through your provider.",
        ),
        ({"helo": "LocalHost.localdomain"}, "550 5.7.1 That is not your name."),
        ({"sender": "Joe@SPAM.example"}, "550-5.7.1 Not wanted here.\n550 5.7.1 100% of it."),
        (
            {"sender": "@relay.test:joe@spam.example"},
            "550-5.7.1 Not wanted here.\n550 5.7.1 100% of it.",
        ),
    ],
)
def test_policy_refuses_the_message(start: Start, arguments: dict[str, object], reply: str) -> None:
    result = start("reject_policy.py", TABLE).send(PLAIN, **arguments)
    assert result.verdict is Verdict.REJECT
    assert str(result.smtp) == reply


def test_policy_refuses_single_recipients(start: Start) -> None:
    result = start("reject_policy.py", TABLE).send(
        PLAIN, recipients=["old@example.com", "bob@example.com", "BUSY@example.com"]
    )
    assert result.accepted
    assert [address.address for address in result.recipients] == ["bob@example.com"]
    assert [(one.recipient.address, str(one.reply.smtp)) for one in result.refused] == [
        ("old@example.com", "550-5.1.6 Moved.\n550 5.1.6 Try new@example.com."),
        ("BUSY@example.com", "451-4.2.1 Mailbox busy.\n451 4.2.1 Try again later."),
    ]


@pytest.mark.parametrize(
    "client",
    [
        Client("localhost", "127.0.0.1"),
        Client("localhost", "::1"),
        Client("localhost", None),
        Client("localhost", "/run/submit"),
    ],
)
def test_policy_lets_local_submissions_pass(start: Start, client: Client) -> None:
    result = start("reject_policy.py", TABLE).send(
        PLAIN, client=client, helo="localhost", recipients=["old@example.com"]
    )
    assert result.verdict is Verdict.ACCEPT


def test_policy_trusts_a_login_but_for_recipients(start: Start) -> None:
    listed = Client("x.example", "192.0.2.77")
    result = start("reject_policy.py", TABLE).send(
        PLAIN,
        client=listed,
        recipients=["bob@example.com", "old@example.com"],
        macros={"{auth_authen}": "ann"},
    )
    assert result.accepted
    assert [one.recipient.address for one in result.refused] == ["old@example.com"]


def test_policy_knows_an_ipv4_address_in_ipv6_form(start: Start) -> None:
    result = start("reject_policy.py", TABLE).send(
        PLAIN, client=Client("x.example", "::ffff:192.0.2.1")
    )
    assert result.verdict is Verdict.REJECT


def test_policy_copes_with_an_unknown_client(start: Start) -> None:
    result = start("reject_policy.py", TABLE).send(
        PLAIN, client=Client("unknown", None), sender="joe@spam.example"
    )
    assert result.verdict is Verdict.REJECT


def test_policy_reads_its_table_again_at_sighup(start: Start, tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_text("sender ann@example.org 550 5.7.1 One.\n")
    running = start("reject_policy.py", str(table))
    assert str(running.send(PLAIN).smtp) == "550 5.7.1 One."
    running.app.wait_for_output("1 rules from")
    for text, line in (
        ("sender ann@example.org 450 4.7.1 Two.\n", "1 rules from"),
        ("sender ann@example.org 250 2.0.0 Three.\n", "the rules stay as they were"),
    ):
        table.write_text(text)
        seen = running.app.output.count(line)
        running.app.process.send_signal(signal.SIGHUP)
        running.app.wait_for_output(line, seen + 1)
        assert str(running.send(PLAIN).smtp) == "450 4.7.1 Two."


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("sender a@b.example 550 5.7.1", "five parts"),
        ("size 100 550 5.7.1 no", "'size'"),
        ("sender a@b.example 250 2.0.0 no", "'250'"),
        ("sender a@b.example 550 4.7.1 no", "different classes"),
        ("client 192.0.2.1/24 550 5.7.1 no", "host bits"),
        ("client 300.0.2.1 550 5.7.1 no", "300.0.2.1"),
        ("sender a@b.example 550 5.7.1 " + "|".join("x" * 33), "32 lines"),
        ("sender a@b.example 550 5.7.1 " + "x" * 981, "980"),
    ],
)
def test_policy_says_which_line_of_its_table_is_wrong(tmp_path: Path, line: str, why: str) -> None:
    table = tmp_path / "table"
    table.write_text(f"# a comment\n\n{line}\n")
    script = str(EXAMPLES / "reject_policy.py")
    done = subprocess.run(
        [sys.executable, script, str(table), "--socket", f"unix:{tmp_path}/s"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert f"{table}, line 3: " in done.stderr
    assert why in done.stderr
    assert "Traceback" not in done.stderr


# --- rewrite_body.py -----------------------------------------------------------------------------

FOOTER = "-- \r\nThis message passed through example.com.\r\n"


def mail(body: bytes, *fields: str) -> bytes:
    """A message with these fields."""
    return "".join(f"{field}\n" for field in ("Subject: x", *fields)).encode() + b"\n" + body


def decoded(result: Result) -> str:
    """The text of the resulting body, by what its headers say."""
    message = result.message
    body = message.body
    encoding = message.get("Content-Transfer-Encoding", "7bit")
    if encoding == "base64":
        body = base64.b64decode(body, validate=False)
    elif encoding == "quoted-printable":
        body = quopri.decodestring(body)
    charset = re.search(r'charset="?([\w-]+)', message.get("Content-Type", "") or "")
    return body.decode(charset[1] if charset else "ascii")


def test_rewrite_appends_to_a_message_without_mime(start: Start) -> None:
    result = start("rewrite_body.py").send(PLAIN)
    assert result.message.body == b"At noon?\r\n" + FOOTER.encode()
    assert [header.name for header in result.message.headers] == [b"From", b"Subject"]


@pytest.mark.parametrize(
    ("charset", "encoding", "encode"),
    [
        ("utf-8", "8bit", bytes),
        ("iso-8859-1", "8bit", bytes),
        ("koi8-r", "base64", base64.encodebytes),
        ("utf-8", "quoted-printable", quopri.encodestring),
        ("iso-2022-jp", "7bit", bytes),
    ],
)
def test_rewrite_keeps_charset_and_encoding(
    start: Start, charset: str, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    text = {"koi8-r": "Привет\n", "iso-2022-jp": "こんにちは\n"}.get(
        charset, "Café = 1 €"[:7] + "\n"
    )
    fields = (
        f"Content-Type: text/plain; charset={charset}; format=flowed",
        f"Content-Transfer-Encoding: {encoding}",
    )
    result = start("rewrite_body.py").send(mail(encode(text.encode(charset)), *fields))
    assert result.body_replaced
    assert decoded(result).replace("\r\n", "\n") == text + FOOTER.replace("\r\n", "\n")
    assert [str(bytes(header), "ascii") for header in result.message.headers[1:]] == list(fields)


def test_rewrite_goes_to_utf8_where_the_charset_lacks_a_letter(
    start: Start, tmp_path: Path
) -> None:
    footer = tmp_path / "footer"
    footer.write_text("Grüße aus Łódź\n", encoding="utf-8")
    result = start("rewrite_body.py", "--footer", str(footer)).send(
        mail(b"Hi\n", "Content-Type: text/plain; charset=us-ascii; format=flowed")
    )
    assert decoded(result) == "Hi\r\nGrüße aus Łódź\r\n"
    assert result.message.body.isascii()
    assert result.message["Content-Transfer-Encoding"] == "quoted-printable"
    assert result.message["MIME-Version"] == "1.0"
    assert "flowed" in result.message["Content-Type"]
    assert len(result.message.get_all("Content-Type")) == 1


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (mail(b"--x\n", "Content-Type: multipart/signed; boundary=x"), "multipart/signed"),
        (mail(b"--x\n", "Content-Type: multipart/mixed; boundary=x"), "multipart/mixed"),
        (mail(b"x\n", "Content-Type: application/pkcs7-mime"), "application/pkcs7-mime"),
        (mail(b"<p>x\n", "Content-Type: text/html"), "text/html"),
        (mail(b"x\n", "DKIM-Signature: v=1; a=rsa-sha256"), "DKIM"),
        (mail(b"-----BEGIN PGP SIGNED MESSAGE-----\n"), "OpenPGP"),
        (mail(b"x\n", "Content-Type: text/plain", "Content-Type: text/html"), "more than one"),
        (mail(b"\xff\n", "Content-Type: text/plain; charset=utf-8"), "not in utf-8"),
        (mail(b"\xff\n"), "not in us-ascii"),
        (mail(b"x\n", "Content-Type: text/plain; charset=nonsense"), "not supported"),
        (mail(b"x\n", "Content-Type: text/plain; charset=utf-16"), "not supported"),
        (mail(b"x\n", "Content-Type: text/plain; charset=utf-7"), "not supported"),
        (mail(b"x\n", "Content-Type: text/plain; charset=rot13"), "not supported"),
        (mail(b"x\n", "Content-Type: text/plain; charset=idna"), "not supported"),
        (mail(b"x\n", "Content-Transfer-Encoding: x-uuencode"), "not supported"),
        (mail(b"!!!\n", "Content-Transfer-Encoding: base64"), "does not decode"),
        (mail(b"x\n" + FOOTER.encode()), "already"),
        (mail(b"x" * 2000 + b"\n"), "larger than 1000 bytes"),
    ],
)
def test_rewrite_leaves_alone_and_says_why(start: Start, message: bytes, why: str) -> None:
    running = start("rewrite_body.py", "--max-size=1000")
    result = running.send(message)
    assert result.accepted
    assert result.modifications == ()
    assert running.app.stop() == 0
    reasons = re.findall("left alone: (.*)", running.app.output)
    assert len(reasons) == 1
    assert why in reasons[0]


@pytest.mark.parametrize("form", [""])
def test_rewrite_spares_the_mta_what_it_leaves_alone(start: Start) -> None:
    message = mail(b"x" * 200_000, "Content-Type: text/html")
    replies = start("rewrite_body.py").send(message).replies
    # One chunk of several: the rest is not sent.
    assert [reply.verdict for reply in replies if reply.stage is Stage.BODY] == [Verdict.SKIP]


def test_rewrite_forgets_the_previous_message(start: Start) -> None:
    with start("rewrite_body.py").app.mta() as mta:
        for message in (mail(b"x\n", "Content-Type: text/html"), PLAIN):
            result = mta.send(message, recipients=["bob@example.com"])
        assert result.message.body == b"At noon?\r\n" + FOOTER.encode()


def test_rewrite_twice_is_rewritten_once(start: Start) -> None:
    running = start("rewrite_body.py")
    once = running.send(PLAIN).message
    assert running.send(once.as_bytes()).modifications == ()


# --- serve_status.py -----------------------------------------------------------------------------


def status(port: int, path: str = "/", host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=SECONDS) as page:
        text: str = page.read().decode()
        return text


def status_port(app: MilterApp) -> int:
    return int(app.wait_for_output("status page on port").split()[-1])


def test_status_is_served_beside_the_filter(
    milter_app: Callable[..., MilterApp], tmp_path: Path
) -> None:
    app = milter_app(EXAMPLES / "serve_status.py", cwd=tmp_path)
    port = status_port(app)
    assert status(port) == "connections 0\nopen 0\nmessages 0\n"
    with app.mta() as mta:
        result = mta.send(
            PLAIN,
            sender="ann@example.org",
            recipients=["bob@example.com"],
            client=Client("localhost", "/run/submit"),
        )
        assert result.message["X-Client-Name"] == "unknown"
        assert status(port) == "connections 1\nopen 1\nmessages 1\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        status(port, "/else")
    app.finish()
    assert "Traceback" not in app.output
    assert "stopped" in app.output


def test_status_finds_the_name_of_a_client(
    milter_app: Callable[..., MilterApp], tmp_path: Path
) -> None:
    try:
        name, _ = socket.getnameinfo(("127.0.0.1", 0), socket.NI_NAMEREQD)
    except OSError:
        pytest.skip("127.0.0.1 has no name here")
    app = milter_app(EXAMPLES / "serve_status.py", cwd=tmp_path)
    with app.mta() as mta:
        client = Client("[127.0.0.1]", "127.0.0.1", 2525)
        result = mta.send(PLAIN, recipients=["bob@example.com"], client=client)
    assert result.message["X-Client-Name"] == name
    app.finish()


def test_who_does_not_ask_for_the_status_does_not_keep_it_from_ending(
    milter_app: Callable[..., MilterApp], tmp_path: Path
) -> None:
    app = milter_app(EXAMPLES / "serve_status.py", cwd=tmp_path)
    port = status_port(app)
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        status(port)  # it came later, and so the other one is known
        app.finish()
    assert "Traceback" not in app.output
    assert "stopped" in app.output


@pytest.mark.parametrize(
    ("form", "host"),
    [("{}", "127.0.0.1"), ("localhost:{}", "localhost"), ("[::1]:{}", "[::1]")],
)
def test_status_is_where_it_is_told(
    milter_app: Callable[..., MilterApp],
    tmp_path: Path,
    free_port: Callable[[], int],
    form: str,
    host: str,
) -> None:
    if host == "[::1]":
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("there is no IPv6 here")
    port = free_port()
    app = milter_app(EXAMPLES / "serve_status.py", "--status", form.format(port), cwd=tmp_path)
    assert status_port(app) == port
    assert status(port, host=host).startswith("connections 0")
    # Nobody else is let in: another address of this machine is free.
    with socket.socket() as other:
        other.bind(("127.0.0.2", port))
    app.finish()


@pytest.mark.parametrize("text", ["abc", "127.0.0.1:99999", "127.0.0.1:", "::1:80", ":80", "[]:80"])
def test_status_says_what_is_wrong_with_an_address(text: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "serve_status.py")),
            *("--socket", f"unix:{tmp_path}/s", f"--status={text}"),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 2
    rule = "is none of HOST:PORT, [IPV6]:PORT and PORT, where a port is 0 to 65535"
    assert done.stderr.splitlines()[-1].endswith(f"error: argument --status: {text!r} {rule}")
