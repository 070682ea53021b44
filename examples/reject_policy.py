#!/usr/bin/env python3
"""Refuse mail by a small table of clients, HELO names, senders and recipients.

    python examples/reject_policy.py --socket unix:/run/policy/policy.sock examples/policy.table

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
from typing import ClassVar, NamedTuple, Union

import Milter

KINDS = ("client", "helo", "sender", "recipient")

# What libmilter takes in one reply.
MAX_LINES = 32
MAX_LENGTH = 980

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

log = logging.getLogger("reject_policy")


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
    rules = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise PolicyError(f"{path}: {exc}") from exc
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            rules.append(parse_rule(line))
        except ValueError as exc:
            raise PolicyError(f"{path}, line {number}: {exc}") from exc
    return tuple(rules)


def mailbox(path: str) -> str:
    """Return the bare address of an SMTP path, without brackets, source route and quotes."""
    address = path.strip().lstrip("<").rstrip(">")
    if address.startswith("@"):
        address = address.partition(":")[2]
    return address.replace('"', "")


def client_address(hostaddr: tuple[object, ...] | str | None) -> Address | None:
    """Return the client's IP address, None where it has none."""
    if hostaddr is None or isinstance(hostaddr, str):
        return None
    address = ipaddress.ip_address(str(hostaddr[0]))
    return getattr(address, "ipv4_mapped", None) or address


class RejectPolicy(Milter.Base):
    """One connection.  What client and HELO deserve is said at MAIL, when a login is known."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.client: Rule | None = None
        self.helo: Rule | None = None
        self.peer = ""

    def find(self, kind: str, text: str, address: Address | None = None) -> Rule | None:
        """The first rule of this kind about this name or address."""
        return next(
            (rule for rule in self.rules if rule.kind == kind and rule.covers(text, address)), None
        )

    def refuse(self, rule: Rule, subject: str) -> int:
        """Set the rule's reply and return the verdict of its class."""
        log.info("%s: %s %r matches %r: %s", self.peer, rule.kind, subject, rule.pattern, rule.code)
        # A lone % is an order to sendmail, a double one stands for itself.
        self.setreply(rule.code, rule.status, *(line.replace("%", "%%") for line in rule.lines))
        return Milter.REJECT if rule.code.startswith("5") else Milter.TEMPFAIL

    def connect(self, hostname: str, family: int, hostaddr: tuple[object, ...] | str | None) -> int:
        address = client_address(hostaddr)
        self.peer = f"{hostname!r} [{address or hostaddr}]"
        on_socket = isinstance(hostaddr, str)
        from_program = hostaddr is None and hostname == "localhost"
        if on_socket or from_program or (address is not None and address.is_loopback):
            return Milter.ACCEPT
        self.client = self.find("client", hostname, address)
        return Milter.CONTINUE

    def hello(self, hostname: str) -> int:
        # A client may greet again, after STARTTLS for one.
        self.helo = self.find("helo", hostname)
        return Milter.CONTINUE

    def envfrom(self, f: str, *params: str) -> int:
        if self.getsymval("{auth_authen}"):
            return Milter.CONTINUE
        rule = self.client or self.helo or self.find("sender", mailbox(f))
        return self.refuse(rule, f) if rule else Milter.CONTINUE

    def envrcpt(self, to: str, *params: str) -> int:
        rule = self.find("recipient", mailbox(to))
        return self.refuse(rule, to) if rule else Milter.CONTINUE


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
        RejectPolicy.rules = load_rules(args.table)
        log.info("%d rules from %s", len(RejectPolicy.rules), args.table)

    def reload(*_signal: object) -> None:
        try:
            load()
        except PolicyError as exc:
            log.error("the rules stay as they were: %s", exc)

    try:
        load()
        signal.signal(signal.SIGHUP, reload)
        Milter.factory = RejectPolicy
        log.info("listening on %s", args.socket)
        Milter.runmilter("reject_policy", args.socket, args.timeout)
    except (PolicyError, Milter.error) as exc:
        log.error("cannot run: %s", exc)
        return 1
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
