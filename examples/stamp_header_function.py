#!/usr/bin/env python3
"""Stamp each message with what the MTA knows about the connection it came over.

    python examples/stamp_header_function.py --socket unix:/run/stamp/stamp.sock

is examples/stamp_header.py as a function of whole messages.  Values come from whoever sent the
mail: they can neither break out of their quotes nor add a header, and headers of that name that
came with the message are removed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from urllib.parse import quote

import Milter
from Milter import mailfilter

HEADER = "X-Connection-Facts"

# An address or a host name has its limits in SMTP; what is longer is cut.
MAX_VALUE = 255

# Everything printable except what means something here.
PLAIN = " !#$&'()*+,/:;<=>?@[]^`{|}"

log = logging.getLogger("stamp_header")


def quoted(value: str) -> str:
    """Return ``value`` as a quoted string of printable ASCII; other bytes become ``%XX``."""
    return '"' + quote(value[:MAX_VALUE].encode("utf-8", "surrogateescape"), safe=PLAIN) + '"'


@mailfilter.filter(body=False)
def stamp_header(mail: mailfilter.Mail) -> None:
    """Put the facts above all other headers."""
    forged = mail.headers.delete(HEADER)
    facts = {
        "client-name": mail.client.host,
        "client-addr": str(mail.client.address or mail.client.path or ""),
        "helo": mail.helo,
        "envelope-from": f"<{mail.sender}>",
        "authenticated": mail.auth.name if mail.auth else "",
        "tls": mail.tls.version if mail.tls else "",
        "queue-id": mail.queue_id or "",
    }
    items = [f"{name}={quoted(value)}" for name, value in facts.items() if value]
    mail.headers.insert(0, HEADER, ";\n\t".join(items).encode())
    log.info("%s: stamped mail from %r, %d forged", mail.queue_id, str(mail.sender), forged)


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
    try:
        mailfilter.run(stamp_header, args.socket, timeout=args.timeout)
    except Milter.error as exc:
        log.error("cannot run: %s", exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
