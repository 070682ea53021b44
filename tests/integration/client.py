"""The SMTP client that holds a case's dialogue with a real MTA."""

from __future__ import annotations

import contextlib
import smtplib
import ssl
from collections.abc import Sequence

from integration.case import SKIPPED, Step, Transaction
from integration.processes import WAIT

Replies = list[tuple[str, str]]


class Dialogue:
    """Says the steps of a case to the MTA at *address*, and notes the replies."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._smtp: smtplib.SMTP | None = None
        self._transaction = Transaction()
        self.replies: Replies = []

    def run(self, steps: Sequence[Step]) -> Replies:
        try:
            for step in steps:
                self._do(step)
            self._quit()
        finally:
            self._close()
        return self.replies

    def _do(self, step: Step) -> None:
        if step.do == "drop":
            self._close()
        elif step.do == "reconnect":
            self._quit()
            self._close()
        elif step.do == "banner":
            self._transaction = Transaction()
            self._smtp = smtplib.SMTP(timeout=WAIT)
            code, text = self._smtp.connect(*self._address)
            self._note(step, f"{code} {text.decode('utf-8', 'surrogateescape')}")
        elif step.do == "pipeline":
            self._pipeline(step.steps)
        elif step.do == "partial":
            self._send(step)
        elif not self._transaction.wants(step):
            self.replies.append((step.label, SKIPPED))
        else:
            self._send(step)
            self._note(step, self._reply(step))

    def _send(self, step: Step) -> None:
        smtp = self._smtp
        if smtp is None or smtp.sock is None:
            return
        with contextlib.suppress(ConnectionError):
            if step.do == "content":
                smtp.sock.sendall(_stuffed(step.text))
            else:
                smtp.sock.sendall(step.text + b"\r\n")

    def _reply(self, step: Step) -> str:
        smtp = self._smtp
        if smtp is None or smtp.sock is None:
            return "closed"
        try:
            code, text = smtp.getreply()
        except (smtplib.SMTPServerDisconnected, ConnectionError):
            return "closed"
        if step.do == "starttls" and code == 220:
            self._secure(smtp)
        return f"{code} {text.decode('utf-8', 'surrogateescape')}"

    @staticmethod
    def _secure(smtp: smtplib.SMTP) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        assert smtp.sock is not None
        assert smtp.file is not None
        smtp.file.close()
        smtp.sock = context.wrap_socket(smtp.sock)
        smtp.file = smtp.sock.makefile("rb")

    def _pipeline(self, steps: Sequence[Step]) -> None:
        assert self._smtp is not None
        assert self._smtp.sock is not None
        self._smtp.sock.sendall(b"".join(step.text + b"\r\n" for step in steps))
        for step in steps:
            self._note(step, self._reply(step))

    def _note(self, step: Step, reply: str) -> None:
        self.replies.append((step.label, reply))
        self._transaction.answered(step, reply[:1] in ("2", "3"))

    def _quit(self) -> None:
        if self._smtp is not None and self._smtp.sock is not None:
            with contextlib.suppress(smtplib.SMTPException, OSError):
                self._smtp.docmd("QUIT")

    def _close(self) -> None:
        if self._smtp is not None:
            self._smtp.close()


def _stuffed(content: bytes) -> bytes:
    """*content* as it goes after DATA: dots doubled, and the final dot."""
    stuffed = content.replace(b"\r\n.", b"\r\n..")
    if stuffed.startswith(b"."):
        stuffed = b"." + stuffed
    return stuffed + (b"" if stuffed.endswith(b"\r\n") else b"\r\n") + b".\r\n"
