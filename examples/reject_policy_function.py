#!/usr/bin/env python3
"""Refuse mail by a small table of clients, HELO names, senders and recipients.

    python examples/reject_policy_function.py --socket unix:/run/policy.sock examples/policy.table

is examples/reject_policy.py as functions, one for each stage.

Each line of the table names what to look at, a pattern, and the reply::

    client     192.0.2.0/24      550 5.7.1  No mail from this network. | Ask abuse@example.com.
    sender     *@spam.example    550 5.7.1  Not wanted here.
    recipient  busy@example.com  451 4.2.1  Mailbox busy, try again later.

A client is an address, a network, or a pattern for its address or host name; helo, sender and
recipient take patterns.  Patterns are shell globs without regard to case.  ``|`` separates the
lines of a reply, and a code of 4xx asks the client to try again later.  The first line that
matches counts.  SIGHUP reads the table again.

Local submissions pass: nothing could be done there about a recipient that is refused.  Clients
that logged in pass everything but the rules for recipients.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Union

import Milter
from Milter import mailfilter

KINDS = ("client", "helo", "sender", "recipient")

# What libmilter takes in one reply.
MAX_LINES = 32
MAX_LENGTH = 980

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

log = logging.getLogger("reject_policy")
rules: tuple[Rule, ...] = ()


class PolicyError(ValueError):
    """A table that cannot be used: says where and why."""


class Rule(NamedTuple):
    """One line of the table."""

    kind: str
    pattern: str
    network: Network | None
    code: str
    status: str
    lines: tuple[str, ...]

    def covers(self, text: str, address: Address | None = None) -> bool:
        """Whether the rule is about this name or address."""
        if self.network is not None:
            return address is not None and address in self.network
        names = (text,) if address is None else (text, str(address))
        return any(fnmatchcase(name.lower(), self.pattern) for name in names)


def parse_rule(line: str) -> Rule:
    """Return the rule that ``line`` states; ValueError says which part is wrong."""
    fields = line.split(maxsplit=4)
    if len(fields) < 5:
        raise ValueError("needs five parts: kind, pattern, code, status and text")
    kind, pattern, code, status, text = fields
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    if not (len(code) == 3 and code.isascii() and code.isdigit() and code[0] in "45"):
        raise ValueError(f"code {code!r} is neither 4xx nor 5xx")
    if not status.startswith(f"{code[0]}."):
        raise ValueError(f"status {status!r} and code {code!r} are of different classes")
    lines = tuple(part.strip() for part in text.split("|"))
    if len(lines) > MAX_LINES or max(map(len, lines)) > MAX_LENGTH:
        raise ValueError(f"a reply has {MAX_LINES} lines of {MAX_LENGTH} characters at most")
    numeric = "/" in pattern or ":" in pattern or pattern.replace(".", "").isdigit()
    network = ipaddress.ip_network(pattern) if kind == "client" and numeric else None
    return Rule(kind, pattern.lower(), network, code, status, lines)


def load_rules(path: Path) -> tuple[Rule, ...]:
    """Return the rules of the table at ``path``; PolicyError where it cannot be read as one."""
    found = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise PolicyError(f"{path}: {exc}") from exc
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found.append(parse_rule(line))
        except ValueError as exc:
            raise PolicyError(f"{path}, line {number}: {exc}") from exc
    return tuple(found)


def mailbox(address: mailfilter.Address) -> str:
    """Return the bare address, without source route and quotes."""
    text = address.address
    if text.startswith("@"):
        text = text.partition(":")[2]
    return text.replace('"', "")


def find(kind: str, text: str, address: Address | None = None) -> Rule | None:
    """The first rule of this kind about this name or address."""
    return next((rule for rule in rules if rule.kind == kind and rule.covers(text, address)), None)


def refusal(mail: mailfilter.Mail, rule: Rule | None) -> mailfilter.Decision | None:
    """The decision that a rule asks for."""
    if rule is None:
        return None
    log.info("%r: %s %r matches: %s", mail.client, rule.kind, rule.pattern, rule.code)
    refuse = mailfilter.reject if rule.code.startswith("5") else mailfilter.tempfail
    return refuse("\n".join(rule.lines), rule.code, rule.status)


@mailfilter.filter(at="connect")
def check_client(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    """Local submissions pass."""
    client = mail.client
    from_program = client.family == 0 and client.host == "localhost"
    is_loopback = client.address is not None and client.address.is_loopback
    if client.path or from_program or is_loopback:
        return mailfilter.accept()
    return None


@mailfilter.filter(at="mail")
def check_sender(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    """What client, HELO and sender deserve, where nobody has logged in."""
    if mail.auth:
        return None
    rule = find("client", mail.client.host, mail.client.address) or find("helo", mail.helo)
    return refusal(mail, rule or find("sender", mailbox(mail.sender)))


@mailfilter.filter(at="rcpt")
def check_recipient(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    """What a recipient has to be told."""
    assert mail.recipient is not None
    return refusal(mail, find("recipient", mailbox(mail.recipient)))


reject_policy = mailfilter.chain(check_client, check_sender, check_recipient)


def main() -> int:
    """Run the filter until it is stopped; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path, help="the table of rules")
    parser.add_argument("--socket", required=True, help="unix:/path or inet:port@host")
    parser.add_argument("--timeout", type=int, default=600, help="seconds to wait for the MTA")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning"])
    args = parser.parse_args()
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )

    def load(*_signal: object) -> None:
        global rules
        rules = load_rules(args.table)
        log.info("%d rules from %s", len(rules), args.table)

    def reload(*_signal: object) -> None:
        try:
            load()
        except PolicyError as exc:
            log.error("the rules stay as they were: %s", exc)

    try:
        load()
        signal.signal(signal.SIGHUP, reload)
        mailfilter.run(reject_policy, args.socket, "reject_policy", timeout=args.timeout)
    except (PolicyError, Milter.error) as exc:
        log.error("cannot run: %s", exc)
        return 1
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
