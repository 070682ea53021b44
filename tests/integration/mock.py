"""The mock: an SMTP session that is acted out, with ``Milter.mta`` as its milter side.

It has the manners of Postfix, as the mock has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from integration.case import SKIPPED, Held, Step, Submission, Transaction
from integration.sink import Envelope, canonical, split_address

from Milter.mta import (
    MTA,
    Address,
    Dialect,
    Editor,
    FilterTimeout,
    Header,
    Message,
    Reply,
    Stage,
    Verdict,
)
from Milter.mta import (
    Step as MilterStep,
)

OWN = Header(b"Received", b"from client.example by mx.test.invalid")
REJECTED = "550 5.7.1 Command rejected"
TEMPFAILED = "451 4.7.1 Service unavailable - try again later"
CONNECT_MACROS = {
    "j": "mx.test.invalid",
    "{daemon_name}": "mx.test.invalid",
    "{daemon_addr}": "127.0.0.1",
    "v": "Mock 1.0",
    "_": "localhost [127.0.0.1]",
}
TLS_MACROS = {"{tls_version}": "TLSv1.3", "{cipher}": "MOCK", "{cipher_bits}": "256"}
AUTH_MACROS = {"{auth_type}": "PLAIN", "{auth_authen}": "tester"}


class Mock:
    name = "mock"

    def __init__(self, sockets: Mapping[str, str]) -> None:
        self._sockets = sockets
        self._kept: list[tuple[Envelope, bytes]] = []
        self._held: list[Held] = []

    log = ""

    def run(self, steps: Sequence[Step], port: str) -> list[tuple[str, str]]:
        return _Session(self, self._sockets.get(port, self._sockets["unix"]), port).run(steps)

    def submit(self, submission: Submission) -> int:
        message = Message.parse(submission.content)
        with MTA.connect(self._sockets["unix"]) as mta:
            session = _Session(self, "", "local")
            session.mta = mta
            mta.connect_info("localhost", "127.0.0.1", macros=CONNECT_MACROS)
            mta.helo("localhost")
            whom = [address.strip() for address in (message.get("To") or "").split(",")]
            session.mail("<root@mx.test.invalid>")
            for one in whom:
                session.rcpt(f"<{one[one.find('<') + 1 :].rstrip('>')}>")
            mta.data()
            session.content(submission.content)
        return 0

    def settle(self) -> None:
        pass

    def take(self) -> list[tuple[Envelope, bytes]]:
        kept, self._kept = self._kept, []
        return kept

    def held(self) -> list[Held]:
        held, self._held = self._held, []
        return held

    def stop(self) -> None:
        pass


class _Session:
    def __init__(self, mock: Mock, socket: str, port: str) -> None:
        self._mock = mock
        self._socket = socket
        self._client = "::1" if port == "ipv6" else "127.0.0.1"
        self._patience = 2.0 if port == "impatient" else 60.0
        self.mta: MTA = None  # type: ignore[assignment]
        self._replies: list[tuple[str, str]] = []
        self._begin()

    def _begin(self) -> None:
        self._walk = Transaction()
        self._blocked = ""
        self._silent = False  # the filter has accepted the connection
        self._secure = self._authenticated = False
        self._forget()

    def _forget(self) -> None:
        """No message is under way."""
        self._sender: Address | None = None
        self._recipients: list[Address] = []
        self._over: Reply | None = None
        self._content_verdict: Reply | None = None

    # the client's steps

    def run(self, steps: Sequence[Step]) -> list[tuple[str, str]]:
        try:
            for step in steps:
                self._do(step)
            self._quit()
        finally:
            if self.mta is not None:
                self.mta.close()
        return self._replies

    def _do(self, step: Step) -> None:
        if step.do == "partial":
            return
        if step.do == "pipeline":
            for one in step.steps:
                self._note(one, self._answer(one))
        elif step.do in ("drop", "reconnect"):
            self._quit()
        elif not self._walk.wants(step):
            self._replies.append((step.label, SKIPPED))
        else:
            self._note(step, self._answer(step))

    def _note(self, step: Step, reply: str) -> None:
        self._replies.append((step.label, reply))
        self._walk.answered(step, reply[:1] in ("2", "3"))

    def _quit(self) -> None:
        if self.mta is not None and self.mta.is_open:
            self._abort()
            self.mta.quit()

    def _abort(self) -> None:
        # Postfix says it whether a message is under way or not, and more than once.
        if not self._silent and not self._blocked and self.mta.is_open:
            self.mta.abort()
            self.mta.abort()
        self._forget()

    def _answer(self, step: Step) -> str:
        if step.do != "banner" and not self.mta.is_open:
            return "closed"
        text = step.text.decode("utf-8", "surrogateescape")
        verb = text[:4].upper()
        if step.do == "banner":
            return self._banner()
        if step.do == "content":
            return self.content(step.text)
        if step.do == "starttls":
            self._abort()
            self._secure = True
            return "220 2.0.0 Ready to start TLS"
        if step.do == "auth":
            self._authenticated = True
            return "235 2.7.0 Authentication successful"
        if verb in ("EHLO", "HELO"):
            return self._hello(text[5:])
        if self._blocked:
            return self._blocked
        if verb == "RSET":
            self._abort()
            return "250 2.0.0 Ok"
        if verb == "NOOP":
            return "250 2.0.0 Ok"
        if verb == "MAIL":
            return self.mail(*split_address(text.partition(":")[2]))
        if verb == "RCPT":
            return self.rcpt(*split_address(text.partition(":")[2]))
        if verb == "DATA":
            return self._data()
        return self._unknown(text)

    def _banner(self) -> str:
        self._begin()
        self.mta = MTA.connect(self._socket, dialect=Dialect.POSTFIX, timeout=self._patience)
        reply = self.mta.connect_info("localhost", self._client, 2525, macros=CONNECT_MACROS)
        self._blocked = self._session_verdict(reply)
        if self._blocked.startswith("5"):
            return "554 mx.test.invalid ESMTP not accepting connections"
        return "220 mx.test.invalid ESMTP Mock"

    def _session_verdict(self, reply: Reply) -> str:
        """The reply to everything that follows, where the verdict is for the session."""
        if reply.verdict is Verdict.ACCEPT:
            self._silent = True
        return _refusal(reply)

    def _hello(self, name: str) -> str:
        self._abort()
        if not self._silent and not self._blocked:
            macros = dict(TLS_MACROS) if self._secure else {}
            if Stage.HELO in self.mta.negotiated.macros:
                # Known, but not sent unless it is asked for.
                macros["{client_addr}"] = self._client
            self._blocked = self._session_verdict(self.mta.helo(name, macros=macros))
            if self._blocked.startswith("421"):
                self._quit()
                return self._blocked
        return "250 mx.test.invalid"

    def _unknown(self, text: str) -> str:
        if not self._silent and self._over is None:
            reply = self.mta.unknown(text)
            refusal = _refusal(reply) if self._sender is None else self._ask(reply)
            if refusal:
                return refusal
        return "502 5.5.2 Error: command not recognized"

    def _ask(self, reply: Reply) -> str:
        """The refusal that *reply* makes; notes a verdict that ends the message's way here."""
        if reply.verdict in (Verdict.ACCEPT, Verdict.DISCARD):
            self._over = reply
        return _refusal(reply)

    def mail(self, sender: str, *params: str) -> str:
        self._forget()
        if not self._silent:
            address = sender.strip("<>")
            macros = {
                "{mail_addr}": address,
                "{mail_host}": "[127.0.0.1]:25",
                "{mail_mailer}": "smtp",
                **(AUTH_MACROS if self._authenticated else {}),
            }
            refusal = self._ask(self.mta.mail(sender, *params, macros=macros))
            if refusal:
                self.mta.abort()
                return refusal
        self._sender = Address.make([sender, *params])
        return "250 2.1.0 Ok"

    def rcpt(self, recipient: str, *params: str) -> str:
        unknown = "550 5.1.1 User unknown" if recipient.startswith("<unknown@") else None
        if not self._silent and self._over is None:
            macros = {
                "{rcpt_addr}": recipient.strip("<>"),
                "{rcpt_host}": "[127.0.0.1]:25",
                "{rcpt_mailer}": "smtp",
            }
            refusal = self._ask(
                self.mta.rcpt(
                    recipient, *params, rejected=unknown, macros=None if unknown else macros
                )
            )
            if refusal and not unknown:
                return refusal
        if unknown:
            return unknown
        self._recipients.append(Address.make([recipient, *params]))
        return "250 2.1.5 Ok"

    def _data(self) -> str:
        if not self._recipients:
            return "554 5.5.1 Error: no valid recipients"
        if not self._silent and self._over is None:
            refusal = self._ask(self.mta.data(macros={"i": "MOCK1"}))
            if refusal:
                return refusal
        return "354 End data with <CR><LF>.<CR><LF>"

    def content(self, content: bytes) -> str:
        message = Message.parse(content)
        message.body = _lines(message.body)
        if self._silent or self._over is not None:
            decided = self._over or Reply(Stage.CONNECT, Verdict.ACCEPT)
        else:
            try:
                decided = self._content(message)
            except FilterTimeout:
                self.mta.close()
                return TEMPFAILED
        if decided.verdict.goes_on or decided.verdict is Verdict.ACCEPT:
            self._deliver(message, decided)
        self._abort()
        return _refusal(decided) or "250 2.0.0 Ok: queued as MOCK1"

    def _content(self, message: Message) -> Reply:
        mta = self.mta
        leading = bool(mta.negotiated.steps & MilterStep.HDR_LEADSPC)
        for header in message.headers:
            reply = mta.header(header.name, header.wire_value(leading))
            if not reply.verdict.goes_on:
                return reply
        steps: list[Callable[[], Reply]] = [mta.eoh]
        if message.body:
            steps.append(lambda: mta.body(message.body))
        for step in steps:
            reply = step()
            if not reply.verdict.goes_on:
                return reply
        return mta.eom(macros={"i": "MOCK1"})

    def _deliver(self, message: Message, decided: Reply) -> None:
        assert self._sender is not None
        editor = Editor(
            message,
            self._sender,
            self._recipients,
            dialect=Dialect.POSTFIX,
            own_received=OWN,
            leading_space=bool(self.mta.negotiated.steps & MilterStep.HDR_LEADSPC),
        )
        editor.apply(*decided.modifications)
        if editor.quarantine is not None:
            self._mock._held.append(Held(editor.sender.address, editor.quarantine))
        elif editor.recipients:
            envelope = Envelope(_dsn(editor.sender), [_dsn(one) for one in editor.recipients])
            shown = editor.message
            shown.body = _lines(shown.body)
            self._mock._kept.append((envelope, shown.as_bytes()))


def _dsn(address: Address) -> str:
    """An address with the parameters that go to the next hop."""
    kept = [p for p in address.params if p.partition("=")[0] in ("NOTIFY", "ORCPT", "RET", "ENVID")]
    return canonical(f"<{address.address}>", kept)


def _lines(body: bytes) -> bytes:
    """The body with the line ends that it has on its way to the next hop."""
    text = body.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return text if not text or text.endswith(b"\r\n") else text + b"\r\n"


def _joined(reply: str) -> str:
    """A reply as a client reads it: the code, and the text of the lines."""
    return reply[:3] + " " + "\n".join(line[4:] for line in reply.split("\n"))


def _refusal(reply: Reply) -> str:
    if reply.smtp is not None:
        return _joined(str(reply.smtp))
    if reply.verdict is Verdict.REJECT:
        return REJECTED
    return TEMPFAILED if reply.verdict is Verdict.TEMPFAIL else ""
