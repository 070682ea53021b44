"""Run dkimpy-milter and pyspf-milter behind a real Postfix: run.py DIRECTORY RESULT [PREFIX].

On a system of its own (root, no network but a loopback interface; scripts/test-apps makes one) with
the packages postfix, python3-dkim and python3-dnspython.  The applications are Debian's, as far as
they are installed, or those of the virtual environment at PREFIX.  Keys are made in DIRECTORY, or
taken from there.  RESULT gets, as JSON, the versions of all that takes part, what each client was
told and what arrived at the next hop.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import smtplib
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dkim
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

WAIT = 30.0  # seconds: the bound of every wait
LOCAL = "127.0.0.1"
APPLICATIONS = "dkimpy-milter", "pyspf-milter"
SMTPD, SINK = 2525, 2526

SPF = {
    "pass.test": "v=spf1 ip4:192.0.2.0/24 ip6:2001:db8::/32 -all",
    "fail.test": "v=spf1 -all",
    "softfail.test": "v=spf1 ~all",
    "neutral.test": "v=spf1 ?all",
    "permerror.test": "v=spf1 nonsense:here -all",
    "include.test": "v=spf1 include:pass.test -all",
    "explained.test": "v=spf1 -all exp=why.explained.test",
    "why.explained.test": "%{i} may not send for %{d}",
    "signer.test": "v=spf1 ip4:192.0.2.25 -all",
}
SERVFAIL = "temperror.test"


def wait_until(what: str, condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


# --- DNS -----------------------------------------------------------------------------------------


class _Question(socketserver.BaseRequestHandler):
    server: Resolver

    def handle(self) -> None:
        data, sock = self.request
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        text = self.server.texts.get(name)
        if name.endswith(SERVFAIL):
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif text is None:
            known = any(other.endswith(f".{name}") for other in self.server.texts)
            answer.set_rcode(dns.rcode.NOERROR if known else dns.rcode.NXDOMAIN)
        elif question.rdtype == dns.rdatatype.TXT:
            pieces = [text[start : start + 200] for start in range(0, len(text), 200)]
            quoted = " ".join(f'"{piece}"' for piece in pieces)
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "TXT", quoted))
        sock.sendto(answer.to_wire(), self.client_address)


class Resolver(socketserver.ThreadingUDPServer):
    """Answers with the TXT records in ``texts``."""

    daemon_threads = True

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        super().__init__((LOCAL, 53), _Question)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@contextlib.contextmanager
def resolver(texts: dict[str, str]) -> Iterator[None]:
    """A resolver that this system asks."""
    conf = Path("/etc/resolv.conf")
    before = conf.read_bytes() if conf.exists() else None
    server = Resolver(texts)
    conf.write_text(f"nameserver {LOCAL}\n")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        if before is not None:
            conf.write_bytes(before)


# --- the next hop --------------------------------------------------------------------------------


class _Session(socketserver.StreamRequestHandler):
    server: Sink

    def handle(self) -> None:
        self.say("220 sink ESMTP")
        while line := self.rfile.readline():
            verb = line[:4].upper().strip()
            if verb == b"EHLO":
                self.say("250-sink", "250-8BITMIME", "250 SMTPUTF8")
            elif verb == b"DATA":
                self.say("354 Go on")
                lines = []
                while (line := self.rfile.readline()) not in (b".\r\n", b""):
                    lines.append(line[1:] if line.startswith(b".") else line)
                self.server.kept.append(b"".join(lines))
                self.say("250 2.0.0 Kept")
            elif verb == b"QUIT":
                self.say("221 2.0.0 Bye")
                return
            else:
                self.say("250 2.0.0 Ok")

    def say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())


class Sink(socketserver.ThreadingTCPServer):
    """Keeps the messages that it gets."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((LOCAL, SINK), _Session)
        self.kept: list[bytes] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


# --- the applications ----------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the applications are installed."""

    programs: Path
    configuration: Path
    python: Path

    def installed(self) -> list[str]:
        return [name for name in APPLICATIONS if (self.programs / name).exists()]


def place(prefix: str | None) -> Place:
    """Debian's, or a virtual environment."""
    if prefix is None:
        return Place(Path("/usr/bin"), Path("/etc"), Path("/usr/bin/python3"))
    root = Path(prefix)
    return Place(root / "bin", root / "etc", root / "bin" / "python3")


def versions(where: Place) -> dict[str, str]:
    """What takes part."""
    found = {}
    for name, package in (
        ("pymilter", "pymilter"),
        ("dkimpy-milter", "dkimpy-milter"),
        ("pyspf-milter", "spf-engine"),
        ("dkimpy", "dkimpy"),
        ("authres", "authres"),
    ):
        ask = f"from importlib.metadata import version; print(version({package!r}))"
        said = subprocess.run(
            [str(where.python), "-c", ask], capture_output=True, text=True, check=False
        )
        if said.returncode == 0:
            found[name] = said.stdout.strip()
    if where.python == Path("/usr/bin/python3"):
        # Trixie's 1.0.6 says of itself that it is 1.0.5.
        package = ["dpkg-query", "-W", "-f", "${Version}", "python3-milter"]
        found["pymilter"] = subprocess.run(
            package, capture_output=True, text=True, check=True
        ).stdout
    for name, command in (
        ("Python", [str(where.python), "-c", "import platform; print(platform.python_version())"]),
        ("Postfix", ["postconf", "-hd", "mail_version"]),
    ):
        found[name] = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.strip()
    return found


def keys(directory: Path) -> dict[str, str]:
    """Make the keys where they are not there; the DNS records of their public parts."""
    records = {}
    for kind in ("rsa", "ed25519"):
        if not (directory / f"{kind}.key").exists():
            subprocess.run(["dknewkey", "--ktype", kind, kind], cwd=directory, check=True)
        record = (directory / f"{kind}.dns").read_text()
        records[f"{kind}._domainkey.signer.test"] = record.strip()
    return records


DKIM = """\
Syslog no
UMask 007
UserID dkimpy-milter
PidFile /run/dkimpy-milter/dkimpy-milter.pid
Mode sv
Domain signer.test
InternalHosts 127.0.0.1
AuthservID mx.test
"""

# Per round: additions to the configuration of dkimpy-milter; its socket; what is changed in the
# configuration that pyspf-milter ships.
ROUNDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "shipped": (
        "Selector rsa\nKeyFile /etc/dkimpy-milter/rsa.key\nSocket inet:8892@127.0.0.1\n",
        "inet:127.0.0.1:8892",
        {},
    ),
    "strict": (
        """\
Selector rsa
KeyFile /etc/dkimpy-milter/rsa.key
SelectorEd25519 ed25519
KeyFileEd25519 /etc/dkimpy-milter/ed25519.key
Canonicalization simple/simple
Socket local:/run/dkimpy-milter/socket
""",
        "unix:/run/dkimpy-milter/socket",
        {"PermError_reject": "True", "TempError_Defer": "True", "Header_Type": "AR",
         "Authserv_Id": "mx.test"},
    ),
}  # fmt: skip


def configure(directory: Path, name: str, where: Place) -> tuple[list[list[str]], list[str]]:
    """The commands that start the applications, and their sockets as Postfix writes them."""
    addition, socket_name, changes = ROUNDS[name]
    for user in APPLICATIONS:
        # What Debian's packages make.
        Path("/etc", user).mkdir(exist_ok=True)
        if subprocess.run(["id", user], capture_output=True, check=False).returncode:
            subprocess.run(["useradd", "--system", "--user-group", user], check=True)
        # What systemd clears away with the service.
        shutil.rmtree(f"/run/{user}", ignore_errors=True)
        Path("/run", user).mkdir()
        shutil.chown(f"/run/{user}", user, user)
    for kind in ("rsa", "ed25519"):
        key = Path("/etc/dkimpy-milter", f"{kind}.key")
        shutil.copy(directory / f"{kind}.key", key)
        key.chmod(0o600)
    Path("/etc/dkimpy-milter/test.conf").write_text(DKIM + addition)
    installed = where.installed()
    if "pyspf-milter" in installed:
        shipped = (where.configuration / "pyspf-milter" / "pyspf-milter.conf").read_text()
        settings = "".join(f"{key} = {value}\n" for key, value in changes.items())
        for key in changes:
            shipped = re.sub(rf"(?m)^{key}\b.*\n", "", shipped)
        Path("/etc/pyspf-milter/test.conf").write_text(f"{shipped}\n{settings}")
    # pyspf-milter first, as dkimpy-milter is to see what it added.
    sockets = {"pyspf-milter": f"inet:{LOCAL}:8893", "dkimpy-milter": socket_name}
    return (
        [[str(where.programs / each), f"/etc/{each}/test.conf"] for each in installed],
        [socket for each, socket in sockets.items() if each in installed],
    )


def answers(name: str) -> bool:
    """Whether something listens at the socket, written as Postfix writes it."""
    kind, _, rest = name.partition(":")
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    host, _, port = rest.rpartition(":")
    with socket.socket(family) as probe:
        probe.settimeout(WAIT)
        return probe.connect_ex(rest if kind == "unix" else (host, int(port))) == 0


@contextlib.contextmanager
def applications(
    directory: Path, name: str, where: Place, ends: dict[str, Any]
) -> Iterator[list[str]]:
    """The applications running; their sockets.  ``ends`` gets how they ended."""
    commands, sockets = configure(directory, name, where)
    with (directory / f"{name}.log").open("wb") as log:
        running = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            for command in commands
        ]
        try:
            for each in sockets:
                wait_until(f"nobody listens at {each}", lambda each=each: answers(each))
            yield sockets
        finally:
            for process in running:
                alive = process.poll() is None
                process.send_signal(signal.SIGTERM)
                status = process.wait(WAIT)
                program = Path(process.args[0]).name
                ends[program] = [f"alive until stopped: {alive}", f"exit status {status}"]


# --- Postfix -------------------------------------------------------------------------------------


@contextlib.contextmanager
def postfix(sockets: list[str]) -> Iterator[None]:
    settings = {
        "compatibility_level": "3.6",
        "maillog_file": "/var/log/mail.log",
        "myhostname": "mx.test",
        "mydestination": "",
        "inet_interfaces": LOCAL,
        "inet_protocols": "all",
        "mynetworks": "127.0.0.0/8 192.0.2.0/24 198.51.100.0/24 [2001:db8::]/32",
        "smtpd_authorized_xclient_hosts": LOCAL,
        "smtpd_peername_lookup": "no",
        "smtpd_error_sleep_time": "0",
        "default_transport": f"smtp:[{LOCAL}]:{SINK}",
        "smtp_dns_support_level": "disabled",
        "smtpd_milters": ", ".join(sockets),
        "milter_default_action": "tempfail",
        "local_recipient_maps": "",
        "alias_maps": "",
        "message_size_limit": "0",
    }
    subprocess.run(["postconf", "-e", *(f"{k}={v}" for k, v in settings.items())], check=True)
    subprocess.run(["postconf", "-M#", "smtp/inet"], check=True)
    service = f"{LOCAL}:{SMTPD}/inet={LOCAL}:{SMTPD} inet n - n - - smtpd"
    subprocess.run(["postconf", "-M", service], check=True)
    # Its chroot would lack this system's resolver and the filters' sockets.
    subprocess.run(["postconf", "-F", "*/*/chroot=n"], check=True)
    for user in ("dkimpy-milter",):
        subprocess.run(["usermod", "-a", "-G", user, "postfix"], check=True)
    subprocess.run(["postfix", "start"], check=True, capture_output=True)
    try:
        wait_until("Postfix does not listen", lambda: answers(f"inet:{LOCAL}:{SMTPD}"))
        yield
    finally:
        subprocess.run(["postfix", "stop"], check=True, capture_output=True)


# --- the scenarios -------------------------------------------------------------------------------

_numbers = itertools.count(1)


def message(subject: str, body: str, *headers: str) -> bytes:
    """A message from a domain that signs, with a Message-ID, as Postfix would add its own."""
    lines = [
        "Date: Mon, 02 Mar 2026 10:00:00 +0000",
        "From: ann@signer.test",
        "To: bob@example.org",
        f"Message-ID: <{next(_numbers)}@signer.test>",
        *headers,
        f"Subject: {subject}",
    ]
    return ("\r\n".join(lines) + f"\r\n\r\n{body}").encode()


PLAIN = message("plain", "Text.\r\n..dots\r\n\r\n\r\n")
MIME = "MIME-Version: 1.0", "Content-Type: text/plain; charset=utf-8"
SIGNED = {
    "plain": PLAIN,
    "no body": message("empty", ""),
    "folded": message("a\r\n\tb\r\n   c d", "x \t y \r\n"),
    "8 bit": message("8bit", "Grüße, 世界\r\n", *MIME, "Content-Transfer-Encoding: 8bit"),
    "UTF-8 header": message("Grüße", "text\r\n"),
    "large": message("large", "line of text that goes on\r\n" * 40000),
    "headers twice": message("one", "text\r\n", "X-A: 1", "X-A: 2", "X-A: 3"),
    "forged result": message(
        "forged", "text\r\n", "Authentication-Results: mx.test; dkim=pass header.d=evil.test"
    ),
}
SENDERS = (
    "pass.test", "fail.test", "softfail.test", "neutral.test", "permerror.test", "include.test",
    "explained.test", "none.test", SERVFAIL,
)  # fmt: skip


class Client:
    """An SMTP client that notes what it is told."""

    def __init__(self, address: str, helo: str = "client.test") -> None:
        self.said: list[str] = []
        self.smtp = smtplib.SMTP(LOCAL, SMTPD, timeout=WAIT)
        self.smtp.ehlo("tests")
        if address != LOCAL:
            shown = f"IPV6:{address}" if ":" in address else address
            self.say(f"XCLIENT ADDR={shown} NAME=client.test")
        self.say(f"EHLO {helo}", quiet=True)

    def say(self, command: str, quiet: bool = False) -> int:
        code, text = self.smtp.docmd(command)
        if not quiet or code >= 400:
            verb = re.split(r"[ :]", command)[0]
            self.said.append(f"{verb}: {code} {text.decode(errors='replace')}")
        return code

    def send(self, sender: str, recipients: list[str], message: bytes) -> bool:
        """Whether the message was taken."""
        if self.say(f"MAIL FROM:<{sender}>") >= 400:
            self.say("RSET", quiet=True)
            return False
        taken = [self.say(f"RCPT TO:<{recipient}>") < 400 for recipient in recipients]
        if not any(taken):
            self.say("RSET", quiet=True)
            return False
        self.say("DATA")
        self.smtp.send(re.sub(rb"(?m)^\.", b"..", message) + b".\r\n")
        code, text = self.smtp.getreply()
        self.said.append(f".: {code} {text.decode(errors='replace')}")
        return code < 400

    def close(self) -> None:
        self.say("QUIT", quiet=True)
        self.smtp.close()


class Round:
    """One configuration of the applications."""

    def __init__(self, sink: Sink, texts: dict[str, str]) -> None:
        self.sink = sink
        self.texts = texts
        self.results: dict[str, dict[str, Any]] = {}

    def note(self, name: str, client: Client, taken: int) -> list[bytes]:
        """Wait for the messages that were taken; note what was said and what arrived."""
        wait_until(f"{name}: no delivery", lambda: len(self.sink.kept) >= taken)
        arrived, self.sink.kept[:] = list(self.sink.kept), []
        self.results[name] = {
            "said": [re.sub(r"queued as \w+", "queued as ID", line) for line in client.said],
            "arrived": [message.decode("latin-1") for message in arrived],
            "signatures": [self.judge(message) for message in arrived],
        }
        return arrived

    def judge(self, message: bytes) -> list[str]:
        """What dkimpy, without the filter, says of the message's signatures."""

        def lookup(name: bytes, timeout: int = 5) -> bytes:
            return self.texts.get(name.decode().rstrip("."), "").encode()

        head = message.partition(b"\r\n\r\n")[0]
        judgements = []
        for index in range(len(re.findall(rb"(?mi)^DKIM-Signature:", head))):
            try:
                valid = dkim.DKIM(message).verify(idx=index, dnsfunc=lookup)
            except dkim.DKIMException as problem:
                judgements.append(f"{type(problem).__name__}: {problem}")
            else:
                judgements.append("valid" if valid else "not valid")
        return judgements

    def one(
        self, name: str, address: str, sender: str, message: bytes,
        recipients: tuple[str, ...] = ("bob@example.org",), helo: str = "client.test",
    ) -> list[bytes]:  # fmt: skip
        client = Client(address, helo)
        taken = client.send(sender, list(recipients), message)
        client.close()
        return self.note(name, client, int(taken))

    def run(self) -> None:
        signed = {}
        for name, text in SIGNED.items():
            (signed[name],) = self.one(f"sign: {name}", LOCAL, "ann@signer.test", text)
        for name, text in signed.items():
            self.one(f"verify: {name}", "192.0.2.25", "ann@signer.test", text)
        broken = signed["plain"].replace(b"Text.", b"Test.")
        self.one("verify: body changed", "192.0.2.25", "ann@signer.test", broken)
        broken = signed["plain"].replace(b"Subject: plain", b"Subject: other")
        self.one("verify: header changed", "192.0.2.25", "ann@signer.test", broken)
        self.one("verify: not signed", "192.0.2.25", "ann@signer.test", PLAIN)
        for domain in SENDERS:
            self.one(f"SPF: {domain}", "192.0.2.25", f"ann@{domain}", PLAIN)
        self.one("SPF: IPv6 pass", "2001:db8::25", "ann@pass.test", PLAIN)
        self.one("SPF: wrong client", "198.51.100.7", "ann@pass.test", PLAIN)
        self.one("SPF: HELO fails", "192.0.2.25", "ann@pass.test", PLAIN, helo="fail.test")
        self.one("SPF: bounce, HELO passes", "192.0.2.25", "", PLAIN, helo="pass.test")
        self.one("SPF: bounce, HELO fails", "192.0.2.25", "", PLAIN, helo="fail.test")
        several = ("bob@example.org", "eve@example.org")
        self.one("two recipients", "192.0.2.25", "ann@pass.test", PLAIN, several)
        client = Client("192.0.2.25")
        taken = [
            client.send(sender, ["bob@example.org"], PLAIN)
            for sender in ("ann@fail.test", "ann@pass.test", "ann@softfail.test", "ann@fail.test")
        ]
        client.close()
        self.note("four messages in a session", client, sum(taken))


def main(directory: Path, result: Path, prefix: str | None = None) -> None:
    where = place(prefix)
    if not where.installed():
        raise SystemExit(f"error: none of {', '.join(APPLICATIONS)} in {where.programs}")
    texts = {**SPF, **keys(directory)}
    found: dict[str, Any] = {}
    sink = Sink()
    with resolver(texts):
        for name in ROUNDS:
            ends: dict[str, Any] = {}
            run = Round(sink, texts)
            with applications(directory, name, where, ends) as sockets, postfix(sockets):
                run.run()
            found[name] = {**run.results, "the end": ends}
    result.write_text(json.dumps({"versions": versions(where), "cases": found}, indent=1))


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
