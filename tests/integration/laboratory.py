"""Where cases are run: the MTAs with their filters, and what comes out of them."""

from __future__ import annotations

import os
import shutil
import smtplib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from integration import mock, postfix, sendmail
from integration.case import Case, Outcome, Submission
from integration.client import Dialogue
from integration.processes import WAIT, CaseFilter, free_port, has_ipv6, wait_until
from integration.sink import Sink, as_mail

ATTEMPTS = 3  # at starting an MTA


def missing(mta: str) -> str:
    """Why *mta* cannot run here, or an empty text."""
    return {"postfix": postfix.missing, "sendmail": sendmail.missing}.get(mta, lambda: "")()


def _listens(server: Any, address: tuple[str, int]) -> bool:
    if server.process.poll() is not None:
        raise RuntimeError(f"{server.name} has ended:\n{server.log[-4000:]}")
    # The whole of a session, so that nothing of it reaches the filter of a case.
    try:
        with smtplib.SMTP(*address, timeout=WAIT):
            return True
    except smtplib.SMTPConnectError:
        return True  # it answers; the filter is not there yet
    except OSError:
        return False


def lacks(mta: str, case: Case) -> str:
    """Why *case* cannot run on *mta* here, or an empty text."""
    if mta != "mock" and case.authenticates and _password_tool() is None:
        return "sasl2-bin is not unpacked (scripts/test-mtas does it)"
    return missing(mta)


def require(mta: str, case: Case | None = None) -> None:
    """Skip the test where *mta* cannot run, visibly; in CI that is a failure."""
    case = case or Case("")
    if case.port in ("ipv6", "inet6") and not has_ipv6():
        pytest.skip("there is no ::1 here")
    if reason := lacks(mta, case):
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


class Bench:
    """One MTA with its filters, in a directory of its own.

    :param python: the interpreter that runs the filters, with its pymilter.
    """

    def __init__(self, mta: str, python: str = sys.executable) -> None:
        self.mta = mta
        # Not below pytest's directories: the MTAs' users must reach it.
        self.base = Path(tempfile.mkdtemp(prefix=f"pymilter-{mta}-"))
        self.base.chmod(0o755)
        self._sockets = {"unix": f"unix:{self.base}/filter.sock", "inet": _inet("127.0.0.1")}
        if has_ipv6():
            self._sockets["inet6"] = _inet("::1")
        self._python = python
        self._filters: dict[str, CaseFilter] = {}
        self._sink = Sink()
        try:
            self.server: Any = self._start()
        except BaseException:
            self._sink.close()
            shutil.rmtree(self.base, ignore_errors=True)
            raise

    def _start(self) -> Any:
        if self.mta == "mock":
            return mock.Mock(self._sockets)
        _make_credentials(self.base)
        kind = postfix.Postfix if self.mta == "postfix" else sendmail.Sendmail
        for attempt in range(ATTEMPTS):
            server = kind(self.base, self._sockets, self._sink.port)
            try:
                for address in server.addresses.values():
                    wait_until(
                        f"{self.mta} listens", lambda at=address, on=server: _listens(on, at)
                    )
            except BaseException as exc:
                server.stop()
                # Somebody else may have taken one of the ports that were free.
                if attempt == ATTEMPTS - 1 or not isinstance(exc, RuntimeError):
                    raise
            else:
                return server

    def filter(self, port: str = "unix") -> CaseFilter:
        """The filter behind a listener, started when it is first needed."""
        kind = port if port in self._sockets else "unix"
        if kind not in self._filters:
            self._filters[kind] = CaseFilter(self._sockets[kind], self._python)
            wait_until("the filter listens", self._filters[kind].listens)
        return self._filters[kind]

    def run(self, case: Case) -> Outcome:
        """Run *case* and gather what came out."""
        wanted = case.on(self.mta)
        behaviour = self.filter(case.port)
        run = behaviour.select(case.name)
        self.taken()
        outcome = Outcome()
        if isinstance(wanted.dialogue, Submission):
            outcome.replies = [("status", str(self.server.submit(wanted.dialogue)))]
        elif self.mta == "mock":
            outcome.replies = self.server.run(wanted.dialogue, case.port)
        else:
            outcome.replies = Dialogue(self.server.addresses[case.port]).run(wanted.dialogue)
        self.server.settle()
        try:
            outcome.seen = behaviour.finish(run, wanted.connections)
        except TimeoutError as exc:
            raise TimeoutError(f"{exc}\n{outcome.replies}\n{self.server.log[-4000:]}") from None
        outcome.delivered = [as_mail(*one, case.received) for one in self.taken()]
        outcome.held = self.server.held()
        return outcome

    def taken(self) -> list[Any]:
        """What the next hop got since the last call: envelopes and contents."""
        return self.server.take() if self.mta == "mock" else self._sink.take()

    def close(self) -> None:
        for one in self._filters.values():
            one.stop()
        self.server.stop()
        self._sink.close()
        shutil.rmtree(self.base, ignore_errors=True)


class Laboratory:
    """The benches, each made when it is first needed."""

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._benches: dict[str, Bench] = {}

    def bench(self, mta: str) -> Bench:
        if mta not in self._benches:
            self._benches[mta] = Bench(mta, self._python)
        return self._benches[mta]

    def close(self) -> None:
        for bench in self._benches.values():
            bench.close()


def _inet(host: str) -> str:
    kind, shown = ("inet6", f"[{host}]") if ":" in host else ("inet", host)
    return f"{kind}:{free_port(host)}@{shown}"


def _password_tool() -> Path | None:
    """Debian's saslpasswd2, unpacked beside sendmail."""
    found = sendmail.tree()
    tool = found / "usr/sbin/saslpasswd2" if found else None
    return tool if tool and tool.exists() else None


def _make_credentials(base: Path) -> None:
    """A certificate of one day, and a password for AUTH where the tool for it is there."""
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-days", "1", "-subj", "/CN=mx.test.invalid",
            "-keyout", str(base / "key.pem"), "-out", str(base / "cert.pem"),
        ],
        check=True, capture_output=True, timeout=WAIT,
    )  # fmt: skip
    (base / "key.pem").chmod(0o600)
    if tool := _password_tool():
        database = base / "sasldb2"
        subprocess.run(
            [str(tool), "-f", str(database), "-c", "-p", "-u", "mx.test.invalid", "tester"],
            input=b"secret", check=True, timeout=WAIT,
        )  # fmt: skip
        database.chmod(0o644)
        # Debian's Postfix looks below its own configuration, whatever it is told.
        (base / "etc" / "sasl").mkdir(parents=True)
        for name in ("smtpd", "Sendmail"):
            (base / "etc" / "sasl" / f"{name}.conf").write_text(
                "pwcheck_method: auxprop\nauxprop_plugin: sasldb\n"
                f"mech_list: PLAIN LOGIN\nsasldb_path: {database}\n"
            )
