"""A private Postfix on the loopback interface."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from integration.case import Held, Submission
from integration.processes import WAIT, end, free_port, has_ipv6, wait_until

DAEMONS = Path("/usr/lib/postfix/sbin")

MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {base}/queue
data_directory = {base}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
maillog_file = {base}/maillog
maillog_file_prefixes = {base}
myhostname = mx.test.invalid
mydestination =
inet_interfaces = 127.0.0.1{ipv6_interface}
inet_protocols = {protocols}
mynetworks = 127.0.0.0/8 [::1]/128
smtpd_recipient_restrictions =
    check_recipient_access inline:{{ {{unknown@example.org = 550 5.1.1 User unknown}} }}
    permit_mynetworks, permit_sasl_authenticated, reject
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
smtpd_hard_error_limit = 100
smtpd_client_connection_count_limit = 0
smtp_dns_support_level = disabled
default_transport = smtp:[127.0.0.1]:{sink}
smtpd_discard_ehlo_keywords =
smtputf8_enable = yes
local_recipient_maps =
alias_maps =
alias_database =
message_size_limit = 0
mailbox_size_limit = 0
queue_run_delay = 300s
enable_long_queue_ids = no
internal_mail_filter_classes = bounce
notify_classes =
smtpd_tls_security_level = may
smtpd_tls_cert_file = {base}/cert.pem
smtpd_tls_key_file = {base}/key.pem
smtpd_tls_received_header = no
tls_random_source = dev:/dev/urandom
smtpd_sasl_auth_enable = {auth}
smtpd_sasl_local_domain = mx.test.invalid
smtpd_sasl_type = cyrus
smtpd_sasl_path = smtpd
cyrus_sasl_config_path = {base}/etc/sasl
smtpd_milters = {unix}
non_smtpd_milters = {unix}
milter_default_action = tempfail
milter_protocol = 6
milter_connect_timeout = 10s
milter_command_timeout = 60s
milter_content_timeout = 60s
"""

SMTPD = "{listen} inet n - n - - smtpd{options}\n"

MASTER_CF = """\
pickup    unix  n - n 300 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
tlsmgr    unix  - - n 1000? 1 tlsmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
verify    unix  - - n - 1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n - - proxymap
anvil     unix  - - n - 1 anvil
showq     unix  n - n - - showq
error     unix  - - n - - error
retry     unix  - - n - - error
discard   unix  - - n - - discard
smtp      unix  - - n - - smtp
postlog   unix-dgram n - n - 1 postlogd
"""


def missing() -> str:
    """Why Postfix cannot run here, or an empty text."""
    if not shutil.which("postconf") or not (DAEMONS / "master").exists():
        return "Postfix is not installed (scripts/test-mtas installs it)"
    if os.geteuid() != 0:
        return "Postfix can only be started by root"
    return ""


def milter(socket: str) -> str:
    """A socket in libmilter's form as Postfix writes it."""
    kind, _, rest = socket.partition(":")
    if kind == "unix":
        return socket
    port, _, host = rest.partition("@")
    return f"inet:{host if host.startswith('[') or ':' not in host else f'[{host}]'}:{port}"


class Postfix:
    """Listeners are named as in ``Case.port``, and after the default action that they have.

    :param sockets: where the filters are, by kind: unix, inet, inet6.
    """

    name = "postfix"

    def __init__(self, base: Path, sockets: Mapping[str, str], sink: int) -> None:
        self.base = base
        self._held: list[str] = []
        self.addresses: dict[str, tuple[str, int]] = {}
        self._prepare(sockets, sink)
        self._start()

    def _prepare(self, sockets: Mapping[str, str], sink: int) -> None:
        base = self.base
        for name in ("etc", "queue", "data"):
            (base / name).mkdir(exist_ok=True)
            (base / name).chmod(0o755)
        os.chown(base / "data", pwd.getpwnam("postfix").pw_uid, -1)
        (base / "data").chmod(0o700)
        auth = (base / "sasldb2").exists()
        ipv6 = has_ipv6()
        (base / "etc" / "main.cf").write_text(
            MAIN_CF.format(
                base=base,
                sink=sink,
                unix=milter(sockets["unix"]),
                auth="yes" if auth else "no",
                ipv6_interface=" ::1" if ipv6 else "",
                protocols="all" if ipv6 else "ipv4",
            )
        )
        lines = [self._listener("unix", "127.0.0.1", "")]
        if ipv6:
            lines.append(self._listener("ipv6", "::1", ""))
        for kind in ("inet", "inet6"):
            if kind in sockets:
                option = f" -o smtpd_milters={milter(sockets[kind])}"
                lines.append(self._listener(kind, "127.0.0.1", option))
        option = " -o milter_command_timeout=2s -o milter_content_timeout=2s"
        lines.append(self._listener("impatient", "127.0.0.1", option))
        for action in ("accept", "reject", "quarantine"):
            option = f" -o milter_default_action={action}"
            lines.append(self._listener(action, "127.0.0.1", option))
        (base / "etc" / "master.cf").write_text("".join(lines) + MASTER_CF)
        for path in (base / "etc").glob("*.cf"):
            # Postfix waits for a configuration that was written just now to settle.
            os.utime(path, (time.time() - 60, time.time() - 60))

    def _listener(self, name: str, host: str, options: str) -> str:
        self.addresses[name] = (host, free_port(host))
        shown = f"[{host}]" if ":" in host else host
        return SMTPD.format(listen=f"{shown}:{self.addresses[name][1]}", options=options)

    def _start(self) -> None:
        etc = str(self.base / "etc")
        subprocess.run(["postfix", "-c", etc, "check"], check=True, timeout=WAIT)
        self.process = subprocess.Popen(
            [str(DAEMONS / "master"), "-c", etc, "-d"],
            env={**os.environ, "MAIL_CONFIG": etc},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        path = self.base / "maillog"
        return path.read_text(errors="backslashreplace") if path.exists() else ""

    def submit(self, submission: Submission) -> int:
        """``sendmail -t`` and its like; the exit status."""
        done = subprocess.run(
            ["/usr/sbin/sendmail", "-C", str(self.base / "etc"), *submission.arguments],
            input=submission.content.replace(b"\r\n", b"\n"),
            timeout=WAIT,
            check=False,
        )
        return done.returncode

    def settle(self) -> None:
        """Wait until nothing is on its way through the queue."""
        wait_until("Postfix's queue empties", lambda: not self._queued())

    def _queued(self) -> list[Path]:
        return [
            path
            for name in ("maildrop", "incoming", "active")
            for path in (self.base / "queue" / name).rglob("*")
        ]

    def held(self) -> list[Held]:
        """What is in quarantine, which is emptied."""
        etc = str(self.base / "etc")
        if not any(path.is_file() for path in (self.base / "queue" / "hold").rglob("*")):
            return []
        shown = subprocess.run(
            ["postqueue", "-c", etc, "-j"], check=True, timeout=WAIT, capture_output=True
        ).stdout
        messages = [json.loads(line) for line in shown.splitlines()]
        found = [
            Held(message["sender"], self._reason(message["queue_id"]))
            for message in messages
            if message["queue_name"] == "hold"
        ]
        subprocess.run(
            ["postsuper", "-c", etc, "-d", "ALL", "hold"],
            check=True, timeout=WAIT, capture_output=True,
        )  # fmt: skip
        return found

    def _reason(self, queue_id: str) -> str:
        lines = [
            line for line in self.log.splitlines() if re.search(rf"{queue_id}: milter-hold", line)
        ]
        return lines[-1] if lines else ""

    def stop(self) -> None:
        end(self.process)
