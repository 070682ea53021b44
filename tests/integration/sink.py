"""The next hop: a small SMTP server that keeps what it is given."""

from __future__ import annotations

import re
import socketserver
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from integration.case import Mail

_NOISE = re.compile(r" (SIZE=\d+|BODY=\w+|SMTPUTF8)", re.IGNORECASE)
_ADDRESS = re.compile(r'<(?:"[^"]*"|[^">])*>')


@dataclass
class Envelope:
    sender: str
    recipients: list[str] = field(default_factory=list)


class _Handler(socketserver.StreamRequestHandler):
    server: Sink

    def handle(self) -> None:
        self._say("220 sink.test.invalid ESMTP")
        envelope = Envelope("")
        while line := self.rfile.readline():
            text = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
            verb = text[:4].upper()
            if verb in ("EHLO", "LHLO"):
                self._say(
                    "250-sink.test.invalid", "250-PIPELINING", "250-8BITMIME",
                    "250-SMTPUTF8", "250-DSN", "250 SIZE 0",
                )  # fmt: skip
            elif verb == "MAIL":
                envelope = Envelope(_parameters(text))
                self._say("250 2.1.0 Ok")
            elif verb == "RCPT":
                if "<refused@" in text:
                    self._say("550 5.1.1 The sink refuses")
                else:
                    envelope.recipients.append(_parameters(text))
                    self._say("250 2.1.5 Ok")
            elif verb == "DATA" and not envelope.recipients:
                self._say("554 5.5.1 No recipients")
            elif verb == "DATA":
                self._say("354 Go on")
                self.server.keep(envelope, self._content())
                self._say("250 2.0.0 Kept")
            elif verb == "QUIT":
                self._say("221 2.0.0 Bye")
                return
            else:
                self._say("250 2.0.0 Ok")

    def _say(self, *lines: str) -> None:
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())

    def _content(self) -> bytes:
        lines = []
        while (line := self.rfile.readline()) not in (b".\r\n", b""):
            lines.append(line[1:] if line.startswith(b".") else line)
        return b"".join(lines)


def _parameters(command: str) -> str:
    """What follows the colon of MAIL or RCPT, without what says nothing here."""
    text = _NOISE.sub("", command.partition(":")[2].strip())
    found = _ADDRESS.match(text)
    if found is None:
        return text
    address = found.group()
    return canonical(address, text[len(address) :].split())


def split_address(text: str) -> list[str]:
    """The address with its angle brackets, and the parameters after it."""
    found = _ADDRESS.match(text)
    address = found.group() if found else text.split()[0]
    return [address, *text[len(address) :].split()]


def canonical(address: str, params: Iterable[str]) -> str:
    """An address and its parameters in order; ORCPT is left out where it says the same address."""
    same = f"rfc822;{address[1:-1]}"
    kept = [p for p in params if not (p.startswith("ORCPT=") and _xtext(p[6:]) == same)]
    return " ".join([address, *sorted(kept)])


def _xtext(text: str) -> str:
    """The text that RFC 3461's xtext stands for."""
    data = re.sub(
        rb"\+([0-9A-F]{2})",
        lambda found: bytes([int(found.group(1), 16)]),
        text.encode("utf-8", "surrogateescape"),
    )
    return data.decode("utf-8", "surrogateescape")


class Sink(socketserver.ThreadingTCPServer):
    """Listens on the loopback interface as soon as it is made."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._lock = threading.Lock()
        self._kept: list[tuple[Envelope, bytes]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port

    def keep(self, envelope: Envelope, content: bytes) -> None:
        with self._lock:
            self._kept.append((envelope, content))

    def take(self) -> list[tuple[Envelope, bytes]]:
        """All that came since the last call."""
        with self._lock:
            kept, self._kept = self._kept, []
        return kept

    def count(self) -> int:
        with self._lock:
            return len(self._kept)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join(10)


def as_mail(envelope: Envelope, content: bytes, received: bool) -> Mail:
    """What was kept, as a case speaks of it."""
    head, _, body = content.partition(b"\r\n\r\n")
    if content.startswith(b"\r\n"):
        head, body = b"", content[2:]
    text = head.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    headers = [_own(header) for header in re.split(r"\n(?![ \t])", text) if header]
    if not received:
        headers = [header for header in headers if header != "Received: own"]
    return Mail(envelope.sender, tuple(envelope.recipients), tuple(headers), body)


def _own(header: str) -> str:
    ours = header.lower().startswith("received:") and "mx.test.invalid" in header
    return "Received: own" if ours else header
