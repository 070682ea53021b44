#!/usr/bin/env python3
"""What a function of whole messages costs: python benchmarks/mailfilter_cost.py

Prints the CPU time that a filter's process takes for a message of 10 KB with 24 headers, in
microseconds: of a `Base` that keeps envelope, headers and body and tags the subject, of a function
that tags it, of one without the body, and of one that decides at RCPT.  Then the memory that a body
of 30 MB takes in the process of the first function, in KiB.
"""

from __future__ import annotations

import argparse
import os
import sys

import Milter
from Milter import mailfilter
from Milter.pytest_plugin import MilterApp
from Milter.utils import parse_header

HERE = os.path.dirname(os.path.abspath(__file__))
HEADERS = (
    b"From: a@b.example\r\nTo: c@d.example\r\nSubject: hello there\r\nDate: today\r\n"
    + b"".join(
        b"X-Header-%d: some value of a usual length, as they are\r\n" % number
        for number in range(20)
    )
)
LINE = b"x" * 76 + b"\r\n"
MESSAGE = HEADERS + b"\r\n" + LINE * 110


class Written(Milter.Base):
    """What one would write by hand."""

    @Milter.noreply
    def connect(self, hostname: str, family: int, hostaddr: object) -> int:
        self.client = hostname, hostaddr
        return Milter.CONTINUE

    @Milter.noreply
    def hello(self, hostname: str) -> int:
        self.helo = hostname
        return Milter.CONTINUE

    @Milter.noreply
    def envfrom(self, f: str, *params: str) -> int:
        self.sender = f
        self.recipients: list[str] = []
        self.fields: list[tuple[str, str]] = []
        self.chunks: list[bytes] = []
        return Milter.CONTINUE

    @Milter.noreply
    def envrcpt(self, to: str, *params: str) -> int:
        self.recipients.append(to)
        return Milter.CONTINUE

    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        self.fields.append((field, value))
        return Milter.CONTINUE

    @Milter.noreply
    def body(self, blk: bytes) -> int:
        self.chunks.append(blk)
        return Milter.CONTINUE

    def eom(self) -> int:
        for name, value in self.fields:
            if name.lower() == "subject":
                self.chgheader("Subject", 1, "[list] " + parse_header(value))
                break
        return Milter.ACCEPT


@mailfilter.filter
def tag(mail: mailfilter.Mail) -> None:
    """The same, as a function."""
    mail.headers["Subject"] = "[list] " + mail.headers["Subject"]


@mailfilter.filter(body=False)
def without_body(mail: mailfilter.Mail) -> None:
    """The same, and the MTA keeps the body for itself."""
    mail.headers["Subject"] = "[list] " + mail.headers["Subject"]


@mailfilter.filter(at="rcpt")
def at_rcpt(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    """Decides before there is a message."""
    return mailfilter.reject() if mail.recipient == "nobody@d.example" else None


def cpu(pid: int) -> float:
    """Seconds that a process has taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(pid: int) -> int:
    """The most memory that a process had, in KiB."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def cost(name: str, messages: int) -> float:
    """Microseconds for a message."""
    with MilterApp(f"mailfilter_cost:{name}", cwd=HERE) as app, app.mta() as mta:
        for number in range(messages + 200):
            if number == 200:
                before = cpu(app.pid)
            mta.send(MESSAGE, recipients=["c@d.example"], sender="a@b.example")
        return (cpu(app.pid) - before) / messages * 1e6


def memory() -> int:
    """KiB that a body of 30 MB takes."""
    large = HEADERS + b"\r\n" + LINE * (30 * 2**20 // len(LINE))
    with MilterApp("mailfilter_cost:tag", cwd=HERE) as app, app.mta() as mta:
        mta.send(MESSAGE, recipients=["c@d.example"])
        before = peak(app.pid)
        mta.send(large, recipients=["c@d.example"])
        return peak(app.pid) - before


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--messages", type=int, default=2500, help="for each figure")
    parser.add_argument("--rounds", type=int, default=3, help="of all of them; the least counts")
    args = parser.parse_args()
    names = ("Written", "tag", "without_body", "at_rcpt")
    rounds = [{name: cost(name, args.messages) for name in names} for _ in range(args.rounds)]
    least = {name: min(one[name] for one in rounds) for name in names}
    for name, found in least.items():
        times = found / least["Written"]
        print(f"{name:14} {found:6.0f} us   {times:5.2f} times what is written by hand")
    print(f"30 MB          {memory():6d} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
