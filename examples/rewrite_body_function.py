#!/usr/bin/env python3
"""Append a footer to plain text messages, in the message's own charset and encoding.

    python examples/rewrite_body_function.py --socket unix:/run/rewrite.sock --footer footer.txt

is examples/rewrite_body.py as a function of whole messages.

Only a message that is one text/plain part is rewritten.  Left alone, with the reason in the log:
signed mail (S/MIME, OpenPGP, DKIM), which any change would break; encrypted and multipart mail;
what is larger than --max-size; what is not encoded as it says; and what has the footer already.
"""

from __future__ import annotations

import argparse
import logging
import string
import sys
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import SMTP
from pathlib import Path

import Milter
from Milter import mailfilter

FOOTER = "-- \nThis message passed through example.com.\n"

MAX_SIZE = 10 * 1024 * 1024

# The fields that say how to read the body, or that it must stay as it is.
RELEVANT = ("mime-version", "content-type", "content-transfer-encoding", "dkim-signature")

log = logging.getLogger("rewrite_body")
footer = FOOTER


class LeaveAlone(Exception):
    """A message that is not for this filter to change; the text says why."""


def extends_ascii(charset: str) -> bool:
    """Whether ASCII text is itself in ``charset``: so in what is used in mail, but for UTF-16."""
    try:
        return string.printable.encode(charset) == string.printable.encode("ascii")
    except (LookupError, UnicodeError):
        return False


def check_header(fields: dict[str, str]) -> None:
    """Raise LeaveAlone where the header alone tells that the body must not change."""
    if "dkim-signature" in fields:
        raise LeaveAlone("signed with DKIM")
    kind = fields.get("content-type", "text/plain").partition(";")[0].strip().lower()
    if kind != "text/plain":
        raise LeaveAlone(f"{kind!a}, not text/plain")


def decode_body(message: EmailMessage, charset: str) -> str:
    """Return the body's text with LF line ends; LeaveAlone where it is not what it claims."""
    if not extends_ascii(charset):
        raise LeaveAlone(f"charset {charset!a} is not supported")
    content = message.get_payload(decode=True)
    if message.defects or not isinstance(content, bytes):
        raise LeaveAlone("does not decode")
    try:
        return content.decode(charset).replace("\r\n", "\n")
    except UnicodeError:
        raise LeaveAlone(f"is not in {charset}") from None


def rewrite(fields: dict[str, str], body: bytes, footer: str) -> tuple[bytes, dict[str, str]]:
    """Return the body with the footer, and the header fields that change with it.

    ``fields`` are those of RELEVANT that the message has, by their names in lower case.
    Raises LeaveAlone for a message that must stay as it is.
    """
    check_header(fields)
    head = "".join(f"{name}: {value}\n" for name, value in fields.items())
    message = BytesParser(_class=EmailMessage, policy=SMTP).parsebytes(
        head.encode("utf-8", "surrogateescape") + b"\n" + body
    )
    charset = message.get_content_charset("us-ascii")
    encoding = str(message.get("content-transfer-encoding", "7bit")).strip().lower()
    if encoding not in ("7bit", "8bit", "quoted-printable", "base64"):
        raise LeaveAlone(f"encoding {encoding!a} is not supported")
    text = decode_body(message, charset)
    if "-----BEGIN PGP " in text:
        raise LeaveAlone("signed or encrypted with OpenPGP")
    if text.rstrip().endswith(footer.rstrip()):
        raise LeaveAlone("has the footer already")

    text = (text if text.endswith("\n") or not text else text + "\n") + footer
    new_charset, new_encoding = charset, encoding
    try:
        ascii_only = text.encode(charset).isascii()
    except UnicodeEncodeError:
        new_charset, ascii_only = "utf-8", False
    if encoding == "7bit" and not ascii_only:
        new_encoding = "quoted-printable"

    rewritten = EmailMessage(policy=SMTP)
    rewritten.set_content(text, charset=new_charset, cte=new_encoding)
    changes = {}
    if new_charset != charset:
        for name in ("format", "delsp"):
            value = message.get_param(name)
            if value in ("flowed", "yes"):
                rewritten.set_param(name, str(value))
        changes["Content-Type"] = str(rewritten["Content-Type"])
    if new_encoding != encoding:
        changes["Content-Transfer-Encoding"] = new_encoding
    if changes and "mime-version" not in fields:
        changes["MIME-Version"] = "1.0"
    return rewritten.as_bytes().partition(b"\r\n\r\n")[2], changes


def rewrite_body(mail: mailfilter.Mail) -> None:
    """Append the footer, or say in the log why not."""
    fields: dict[str, str] = {}
    try:
        for name in RELEVANT:
            found = mail.headers.find(name)
            if len(found) > 1 and name != "dkim-signature":
                raise LeaveAlone(f"more than one {name}")
            if found:
                fields[name] = found[0].raw.decode("utf-8", "surrogateescape").partition(":")[2]
        check_header(fields)
        if mail.truncated:
            raise LeaveAlone(f"larger than {len(mail.body)} bytes")
        content, changes = rewrite(fields, mail.body.read(), footer)
    except LeaveAlone as why:
        log.info("%s: left alone: %s", mail.queue_id or "no queue id", why)
        return
    for name, value in changes.items():
        mail.headers[name] = value
    mail.body = content
    log.info("%s: footer added", mail.queue_id or "no queue id")


def main() -> int:
    """Run the filter until it is stopped; return the exit status."""
    global footer
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--footer", type=Path, help="a file of UTF-8 text to append")
    parser.add_argument(
        "--max-size", type=int, default=MAX_SIZE, help="bytes of body to keep at most"
    )
    parser.add_argument("--socket", required=True, help="unix:/path or inet:port@host")
    parser.add_argument("--timeout", type=int, default=600, help="seconds to wait for the MTA")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning"])
    args = parser.parse_args()
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    try:
        if args.footer:
            footer = args.footer.read_text(encoding="utf-8")
        made = mailfilter.filter(max_body=args.max_size, oversize="truncate")(rewrite_body)
        mailfilter.run(made, args.socket, timeout=args.timeout)
    except (OSError, UnicodeDecodeError, Milter.error) as exc:
        log.error("cannot run: %s", exc)
        return 1
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
