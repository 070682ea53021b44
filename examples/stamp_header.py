#!/usr/bin/env python3
"""Stamp each message with what the MTA knows about the connection it came over.

    python examples/stamp_header.py --socket unix:/run/stamp/stamp.sock

adds, above all other headers, one like the Received-SPF of RFC 7208::

    X-Connection-Facts: client-name="mail.example.org"; client-addr="192.0.2.25";
            helo="mail.example.org"; envelope-from="<ann@example.org>"; queue-id="4Xk2"

Values come from whoever sent the mail.  They are written so that they can neither break out of
their quotes nor add a header, and headers of that name that came with the message are removed:
what a reader finds was written here.
"""

from __future__ import annotations

import argparse
import logging
import sys
from urllib.parse import quote

import Milter

HEADER = "X-Connection-Facts"

# An address or a host name has its limits in SMTP; what is longer is cut.
MAX_VALUE = 255

# Everything printable except what means something here: the quotes, RFC 5322's escape
# character, and the percent sign that stands for the bytes in need of one.
PLAIN = " !#$&'()*+,/:;<=>?@[]^`{|}"

log = logging.getLogger("stamp_header")


def quoted(value: str) -> str:
    """Return ``value`` as a quoted string of printable ASCII; other bytes become ``%XX``."""
    return '"' + quote(value[:MAX_VALUE].encode("utf-8", "surrogateescape"), safe=PLAIN) + '"'


def client_address(hostaddr: tuple[object, ...] | str | None) -> str:
    """Return the client's IP address or socket path, "" for a message submitted locally."""
    if hostaddr is None:
        return ""
    return hostaddr if isinstance(hostaddr, str) else str(hostaddr[0])


class StampHeader(Milter.Base):
    """One connection: facts of the session, then facts of each message on it."""

    def __init__(self) -> None:
        super().__init__()
        self.session: dict[str, str] = {}
        self.sender = ""
        self.forged = 0

    @Milter.noreply
    def connect(self, hostname: str, family: int, hostaddr: tuple[object, ...] | str | None) -> int:
        self.session = {"client-name": hostname, "client-addr": client_address(hostaddr)}
        return Milter.CONTINUE

    @Milter.noreply
    def hello(self, hostname: str) -> int:
        self.session["helo"] = hostname
        return Milter.CONTINUE

    @Milter.noreply
    def envfrom(self, f: str, *params: str) -> int:
        self.sender = f
        self.forged = 0
        return Milter.CONTINUE

    @Milter.noreply
    def header(self, field: str, value: str) -> int:
        if field.lower() == HEADER.lower():
            self.forged += 1
        return Milter.CONTINUE

    def eom(self) -> int:
        queue_id = self.getsymval("i") or ""
        # From the last to the first: an MTA may renumber what follows a deleted header.
        for index in range(self.forged, 0, -1):
            self.chgheader(HEADER, index, None)
        facts = {
            **self.session,
            "envelope-from": self.sender,
            "authenticated": self.getsymval("{auth_authen}") or "",
            "tls": self.getsymval("{tls_version}") or "",
            "queue-id": queue_id,
        }
        items = [f"{name}={quoted(value)}" for name, value in facts.items() if value]
        self.addheader(HEADER, ";\n\t".join(items), 0)
        log.info("%s: stamped mail from %r, %d forged", queue_id, self.sender, self.forged)
        return Milter.CONTINUE


def main() -> int:
    """Run the filter until it is stopped; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--socket", required=True, help="unix:/path or inet:port@host")
    parser.add_argument("--timeout", type=int, default=600, help="seconds to wait for the MTA")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning"])
    args = parser.parse_args()
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    Milter.factory = StampHeader
    Milter.set_flags(Milter.ADDHDRS | Milter.CHGHDRS)
    log.info("listening on %s", args.socket)
    try:
        Milter.runmilter("stamp_header", args.socket, args.timeout)
    except Milter.error as exc:
        log.error("cannot run: %s", exc)
        return 1
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
