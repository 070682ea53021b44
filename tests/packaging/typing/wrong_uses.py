"""Twenty-seven mistakes that a type checker must find: the lines that say ``# error``, no others.

Never imported, only read by ``test_typing.py``.
"""

from __future__ import annotations

import milter

import Milter
import mime
from Milter import mailfilter
from Milter.mta import MTA, Message, Verdict


class Wrong(Milter.Base):
    def connect(self, hostname: str) -> int:  # error: family and hostaddr are missing
        return Milter.CONTINUE

    def hello(self, hostname: str) -> str:  # error: a verdict is an int
        return hostname

    def body(self, blk: str) -> int:  # error: the body is bytes
        return Milter.CONTINUE

    async def envrcpt(self, to: str, *params: str) -> str:  # error: a verdict is an int
        return to

    async def negotiate(self, opts: list[int]) -> int:  # error: it is no coroutine
        return Milter.CONTINUE

    @Milter.symlist(1)  # error: the names of macros are text
    def data(self) -> int:
        return Milter.CONTINUE

    def eom(self) -> int:
        self.addheader("X-Score")  # error: without a value
        self.addheader("X-Score", 5)  # error: the value is text
        self.chgheader("Subject", "1", None)  # error: the index is a number
        self.setreply(550, "5.7.1", "No")  # error: the reply code is text
        self.quarantine(None)  # error: a reason is needed
        self.delrcpt(["<bob@example.org>"])  # error: one recipient at a time
        self.replacebody(3)  # error: neither text nor bytes
        self.getsymval("i").upper()  # error: the macro may be missing
        self.add_header("X-Score", "5")  # error: no such method
        return "ACCEPT"  # error: a verdict is an int


def ip_of(hostaddr: Milter.Address) -> str:
    return hostaddr[0]  # error: local submissions have none


milter.set_flags("ADDHDRS")  # error: flags are numbers
milter.set_flags(milter.ADD_HEADERS)  # error: no such flag
Milter.runmilter("wrong")  # error: without a socket
Milter.runmilter("wrong", "unix:/run/wrong", workers="4")  # error: workers are counted
mime.message_from_file("message.eml")  # error: a file, not its name
with MTA.connect("unix:/run/wrong") as mta:
    mta.send("Subject: hi", recipients=["bob@example.org"])  # error: a message is bytes


# Right uses of the same calls, which must pass.


@mailfilter.filter
def wrong(mail: mailfilter.Mail) -> mailfilter.Decision:
    mail.headers["Subject"] = 5  # error: a value is text or bytes
    mail.body = "text"  # error: a body is bytes
    print(mail.subject)  # error: there is no such attribute
    return mailfilter.reject("no", ["550"])  # error: a code is an int or a text


class Right(Milter.Base):
    @Milter.noreply
    def connect(self, hostname: str, family: int, hostaddr: object) -> int:
        return Milter.CONTINUE

    @Milter.symlist("i", "{auth_authen}")
    def envfrom(self, f: str, *params: str) -> int:
        return Milter.CONTINUE

    @Milter.decode("bytes")
    def header(self, field: str, value: bytes) -> int:
        return Milter.SKIP

    def eom(self) -> int:
        self.addheader("X-Score", b"5", 0)
        self.chgheader("Subject", 1, None)
        self.setreply("550", "5.7.1", "No", "and no")
        self.addrcpt("<bob@example.org>", ["NOTIFY=NEVER"])
        self.replacebody(memoryview(b"text"))
        return Milter.REJECT if self.getsymval("i") else Milter.ACCEPT


@mailfilter.filter(at="rcpt")
async def right(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    address: mailfilter.Address | None = mail.recipient
    return mailfilter.reject("5.1.1 no") if address == "bob@example.org" else None


@mailfilter.filter
def edits(mail: mailfilter.Mail) -> None:
    mail.headers["Subject"] = mail.headers["Subject"] + "!"
    mail.body = mail.body.read()
    mail.sender = "joe@example.com"
    mail.message = mail.message


Milter.factory = mailfilter.chain(right, edits)
Milter.factory = Right
Milter.runmilter("right", "unix:/run/right", 600.0, workers=4)
with MTA.connect("unix:/run/right") as mta, open("message.eml", "rb") as file:
    result = mta.send(Message.parse(file.read()), recipients=["bob@example.org"])
    assert result.verdict is Verdict.REJECT
    mime.defang(mime.message_from_file(file))
