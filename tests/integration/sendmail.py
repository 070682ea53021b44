"""A private sendmail on the loopback interface, from packages that are unpacked, not installed."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from integration.case import Held, Submission
from integration.processes import WAIT, end, free_port, has_ipv6, wait_until

SENDMAIL_MC = """\
include(`{tree}/usr/share/sendmail/cf/m4/cf.m4')
OSTYPE(`linux')
define(`confDOMAIN_NAME', `mx.test.invalid')
define(`QUEUE_DIR', `{base}/queue')
define(`STATUS_FILE', `')
define(`ALIAS_FILE', `')
define(`HELP_FILE', `')
define(`confPID_FILE', `{base}/pid')
define(`confSERVICE_SWITCH_FILE', `{base}/service.switch')
define(`confDELIVERY_MODE', `interactive')
define(`confDONT_PROBE_INTERFACES', `true')
define(`confTO_IDENT', `0')
define(`confDONT_BLAME_SENDMAIL', `TrustStickyBit,GroupWritableDirPathSafe')
define(`confQUEUE_LA', `1000')
define(`confREFUSE_LA', `1000')
define(`confLOG_LEVEL', `14')
define(`confMAX_MESSAGE_SIZE', `0')
define(`confSERVER_CERT', `{base}/cert.pem')
define(`confSERVER_KEY', `{base}/key.pem')
define(`confCACERT', `{base}/cert.pem')
define(`confCACERT_PATH', `{base}')
define(`confTLS_SRV_OPTIONS', `V')
define(`confAUTH_MECHANISMS', `PLAIN LOGIN')
define(`confAUTH_OPTIONS', `A')
FEATURE(`no_default_msa')
FEATURE(`nocanonify')
FEATURE(`accept_unresolvable_domains')
FEATURE(`accept_unqualified_senders')
FEATURE(`promiscuous_relay')
{daemons}
{filters}
define(`confINPUT_MAIL_FILTERS', `')
MAILER(`local')
MAILER(`smtp')
LOCAL_CONFIG
ESASL_CONF_PATH={base}/etc/sasl
LOCAL_RULE_0
Runknown < @ $+ >	$#error $@ 5.1.1 $: "550 5.1.1 User unknown"
R$+ < @ $+ >	$#sink $@ [127.0.0.1] $: $1 < @ $2 >
MAILER_DEFINITIONS
Msink, P=[IPC], F=mDFMuXka8, S=EnvFromSMTP/HdrFromSMTP, R=EnvToSMTP, E=\\r\\n, L=0,
	T=DNS/RFC822/SMTP, A=TCP $h {sink}
"""

# The submission program, which hands its mail to the daemon.
SUBMIT_MC = """\
include(`{tree}/usr/share/sendmail/cf/m4/cf.m4')
define(`confCF_VERSION', `Submit')
define(`__OSTYPE__', `')
define(`_USE_DECNET_SYNTAX_', `1')
define(`confTIME_ZONE', `USE_TZ')
define(`confDONT_INIT_GROUPS', `True')
define(`confDOMAIN_NAME', `mx.test.invalid')
define(`MSP_QUEUE_DIR', `{base}/mspqueue')
define(`confPID_FILE', `{base}/msp.pid')
define(`STATUS_FILE', `')
define(`confSERVICE_SWITCH_FILE', `{base}/service.switch')
define(`confDONT_BLAME_SENDMAIL', `TrustStickyBit,GroupWritableDirPathSafe')
define(`confRUN_AS_USER', `nobody')
define(`confTRUSTED_USER', `nobody')
define(`confTO_IDENT', `0')
define(`confDIRECT_SUBMISSION_MODIFIERS', `')
define(`RELAY_MAILER_ARGS', `TCP $h {port}')
FEATURE(`msp', `[127.0.0.1]')
"""


def tree() -> Path | None:
    """Where the packages sendmail-bin and sendmail-cf are unpacked."""
    name = os.environ.get("PYMILTER_SENDMAIL")
    path = Path(name) if name else Path(__file__).parents[2] / ".venvs" / "sendmail"
    return path if (path / "usr/libexec/sendmail/sendmail").exists() else None


def missing() -> str:
    """Why sendmail cannot run here, or an empty text."""
    if tree() is None:
        return "sendmail is not unpacked (scripts/test-mtas does it)"
    if not shutil.which("m4"):
        return "m4 is not installed (scripts/test-mtas installs it)"
    if os.geteuid() != 0:
        return "sendmail can only be started by root"
    return ""


def _filter(socket: str) -> str:
    """A socket in libmilter's form as sendmail writes it."""
    # Literal IPv6 addresses fail with "Invalid argument" in 8.17; names do not.
    return socket.replace("@[::1]", "@localhost6")


class Sendmail:
    """Listeners are named as in ``Case.port``, and after the default action that they have."""

    name = "sendmail"

    def __init__(self, base: Path, sockets: Mapping[str, str], sink: int) -> None:
        self.base = base
        found = tree()
        assert found is not None
        self._tree = found
        self._binary = found / "usr/libexec/sendmail/sendmail"
        self.addresses: dict[str, tuple[str, int]] = {}
        self._prepare(sockets, sink)
        self._start()

    def _prepare(self, sockets: Mapping[str, str], sink: int) -> None:
        base = self.base
        for name in ("queue", "mspqueue"):
            (base / name).mkdir(exist_ok=True)
            (base / name).chmod(0o700)
        os.chown(base / "mspqueue", pwd.getpwnam("nobody").pw_uid, -1)
        (base / "hosts").write_text("127.0.0.1 localhost\n::1 localhost6\n")
        (base / "service.switch").write_text("hosts files\naliases files\n")
        timeouts = "T=C:10s;S:60s;R:60s;E:2m"
        filters = {kind: (socket, f"F=T, {timeouts}") for kind, socket in sockets.items()}
        filters["impatient"] = (sockets["unix"], "F=T, T=C:10s;S:2s;R:2s;E:1m")
        filters["accept"] = (sockets["unix"], timeouts)
        filters["reject"] = (sockets["unix"], f"F=R, {timeouts}")
        filters["quarantine"] = (sockets["unix"], f"F=4, {timeouts}")
        daemons = [self._daemon(name, name, "inet", "127.0.0.1") for name in filters]
        if has_ipv6():
            daemons.append(self._daemon("ipv6", "unix", "inet6", "::1"))
        lines = [
            f"MAIL_FILTER(`f{name}', `S={_filter(socket)}, {flags}')"
            for name, (socket, flags) in filters.items()
        ]
        self._make(
            "sendmail",
            SENDMAIL_MC.format(
                tree=self._tree,
                base=base,
                sink=sink,
                daemons="\n".join(daemons),
                filters="\n".join(lines),
            ),
        )
        port = self.addresses["unix"][1]
        self._make("submit", SUBMIT_MC.format(tree=self._tree, base=base, port=port))

    def _daemon(self, name: str, filters: str, family: str, host: str) -> str:
        self.addresses[name] = (host, free_port(host))
        port = self.addresses[name][1]
        return (
            f"DAEMON_OPTIONS(`Name=M{name}, Family={family}, Addr={host}, Port={port}, "
            f"InputMailFilters=f{filters}')"
        )

    def _make(self, name: str, text: str) -> None:
        source = self.base / f"{name}.mc"
        source.write_text(text)
        with (self.base / f"{name}.cf").open("wb") as output:
            subprocess.run(
                ["m4", str(source)], stdout=output, stderr=subprocess.DEVNULL,
                check=True, timeout=WAIT,
            )  # fmt: skip

    def _command(self, config: str, *arguments: str) -> list[str]:
        # A host name without a dot would make sendmail sleep: it gets one of its own, and a name
        # for ::1.
        prepare = 'hostname mx.test.invalid && mount --bind "$0" /etc/hosts && exec "$@"'
        return [
            "unshare", "--uts", "--mount", "sh", "-c", prepare, str(self.base / "hosts"),
            str(self._binary), "-C", str(self.base / f"{config}.cf"),
            "-D", str(self.base / "debug.log"), "-d64.5", *arguments,
        ]  # fmt: skip

    def _start(self) -> None:
        with (self.base / "output").open("wb") as output:
            self.process = subprocess.Popen(
                self._command("sendmail", "-X", str(self.base / "traffic.log"), "-bD"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return "\n".join(
            (self.base / name).read_text(errors="backslashreplace")
            for name in ("output", "debug.log", "traffic.log")
            if (self.base / name).exists()
        )

    def submit(self, submission: Submission) -> int:
        done = subprocess.run(
            self._command("submit", *submission.arguments),
            input=submission.content.replace(b"\r\n", b"\n"),
            timeout=WAIT,
            check=False,
        )
        return done.returncode

    def settle(self) -> None:
        """Wait until nothing is on its way through the queue."""
        wait_until("sendmail's queue empties", lambda: not self._queued())

    def _queued(self) -> list[str]:
        names = os.listdir(self.base / "queue") + os.listdir(self.base / "mspqueue")
        return [name for name in names if name[:2] in ("qf", "tf", "xf")]

    def held(self) -> list[Held]:
        """What is in quarantine, which is emptied."""
        found = []
        for path in (self.base / "queue").glob("hf*"):
            text = path.read_text(errors="surrogateescape")
            sender = re.search(r"^S<?([^>\n]*)>?$", text, re.MULTILINE)
            reason = re.search(r"^q(.*)$", text, re.MULTILINE)
            found.append(Held(sender.group(1) if sender else "", reason.group(1) if reason else ""))
            path.unlink()
            (path.parent / f"df{path.name[2:]}").unlink(missing_ok=True)
        return found

    def stop(self) -> None:
        end(self.process)
