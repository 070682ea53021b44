"""An SMTP client whose every wait and every reply has an end."""

from __future__ import annotations

import io
import smtplib
import ssl
import time
from typing import Any, Callable, NamedTuple

__all__ = ["Client", "Limits", "NoEncryption", "remaining"]


class Limits(NamedTuple):
    """What a server may take: seconds to connect and to answer QUIT, bytes of one reply."""

    connect: float
    quit: float
    reply: int


class NoEncryption(Exception):
    """STARTTLS was accepted and the handshake failed."""


def remaining(deadline: float) -> float:
    """Return the seconds left.

    Raises:
        TimeoutError: none are.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return left


class Client(smtplib.SMTP):
    """smtplib's client, every step of which ends at the deadline, and every reply at its size.

    A socket's time-out restarts with each byte that arrives, so it alone does not bound a
    reply; here it is set anew before each read. And smtplib collects the lines of a reply for as
    long as they come.
    """

    def __init__(self, local_hostname: str, deadline: float, limits: Limits) -> None:
        self._deadline = deadline
        self._limits = limits
        self._reply_size = 0
        super().__init__(local_hostname=local_hostname, timeout=limits.connect)

    def connect(
        self, host: str = "", port: int = 0, source_address: Any = None
    ) -> tuple[int, bytes]:
        self.timeout = min(self._limits.connect, remaining(self._deadline))
        return super().connect(host, port)

    def getreply(self) -> tuple[int, bytes]:
        if self.file is None and self.sock is not None:
            self.file = io.BufferedReader(_ReplyReader(self._receive))
        self._reply_size = 0
        return super().getreply()

    def _receive(self, buffer: Any) -> int:
        """Read what has come of a reply, before the deadline; OSError where it is too long."""
        assert self.sock is not None
        if self._reply_size > self._limits.reply:
            raise OSError(f"a reply of more than {self._limits.reply} bytes")
        self.sock.settimeout(remaining(self._deadline))
        size = self.sock.recv_into(buffer)
        self._reply_size += size
        return size

    def send(self, s: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(remaining(self._deadline))
        super().send(s)

    def message(self, data: bytes) -> tuple[int, bytes]:
        """Say DATA and, where the server asks for the message, send it; the last reply."""
        code, text = self.docmd("DATA")
        if code // 100 != 3:
            # A positive reply too: the message was not asked for, so it is not delivered.
            return max(code, 450), text
        if not data.endswith(b"\r\n"):
            data += b"\r\n"
        lead = b"." if data.startswith(b".") else b""
        self.send(lead + data.replace(b"\r\n.", b"\r\n..") + b".\r\n")
        return self.getreply()

    def encrypt(self, host: str) -> None:
        """Switch to TLS and greet again; a server that changed its mind is left as it is.

        Raises:
            NoEncryption: the handshake failed.
        """
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._host = host  # the name for SNI, which smtplib takes from here
        try:
            self.starttls(context=context)
        except smtplib.SMTPResponseException:
            return
        except ssl.SSLError as exc:
            raise NoEncryption from exc
        self.ehlo()

    def leave(self) -> None:
        """Say QUIT; whatever becomes of it, the matter is settled."""
        self._deadline = min(self._deadline, time.monotonic() + self._limits.quit)
        try:
            if self.sock is not None:
                self.docmd("QUIT")
        except (smtplib.SMTPException, OSError):
            pass
        finally:
            self.close()


class _ReplyReader(io.RawIOBase):
    """Makes a file for smtplib to read from."""

    def __init__(self, receive: Callable[[Any], int]) -> None:
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._receive(buffer)
