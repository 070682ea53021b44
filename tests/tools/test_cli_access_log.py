"""``python -m Milter run --access-log``: a line for each message."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import threading
import time
from typing import Any

import pytest
from support.commands import MESSAGE, Runner
from support.process import WAIT, Filter

from Milter.mta import MTA, Client, Verdict

MODULE = '''
import asyncio

import Milter
from Milter import mailfilter

class Quiet(Milter.Base):
    """Asks for nothing but the end of messages."""

class Judge(Milter.Base):
    def envfrom(self, sender, *params):
        if "nobody" in sender:
            self.setreply("550", "5.7.1", "not", "100%% you")
            return Milter.REJECT
        return Milter.CONTINUE

    def envrcpt(self, to, *params):
        if "gone" in to:
            self.setreply("550", "5.1.1", "no such user")
            return Milter.REJECT
        return Milter.TEMPFAIL if "later" in to else Milter.CONTINUE

    def header(self, name, value):
        if value == "raise":
            raise ValueError("of the filter")
        return {"drop": Milter.DISCARD, "take": Milter.ACCEPT}.get(value, Milter.CONTINUE)

    def eom(self):
        self.addheader("X-A", "b")
        self.context.chgheader("Subject", 1, "new")
        self.chgheader("Subject", 1, None)
        self.addrcpt("<c@d>")
        self.delrcpt(rcpt="<b@example.com>")
        self.replacebody(b"one")
        self.replacebody(b"two")
        self.quarantine("look, at it")
        return Milter.ACCEPT

class Odd(Milter.Base):
    @Milter.nocallback
    def envfrom(self, sender, *params):
        raise ValueError("is not to be called")

class Waits(Milter.Base):
    async def eom(self):
        await asyncio.sleep(0.05)
        self.addheader("X-A", "b")
        return Milter.CONTINUE

@mailfilter.filter
def function(mail):
    mail.headers.add("X-A", "b")
    return mailfilter.reject("5.7.1 no") if "bad" in str(mail.sender) else None
'''


@pytest.fixture(autouse=True)
def module(runner: Runner) -> None:
    (runner.place / "judge.py").write_text(MODULE)


def log(runner: Runner, count: int, name: str = "access") -> list[str]:
    """Wait until the log has so many lines; returns them, without time and process."""
    path = runner.place / name
    deadline = time.monotonic() + WAIT
    while True:
        text = path.read_text() if path.exists() else ""
        if text.count("\n") >= count:
            break
        assert time.monotonic() < deadline, text
        time.sleep(0.005)
    lines = text.splitlines()
    assert len(lines) == count
    return [line.split(" ", 2)[2].rpartition(" ms=")[0] for line in lines]


def send(
    mta: MTA, *recipients: str, sender: str = "a@example.com", message: bytes = MESSAGE
) -> Any:
    return mta.send(message, sender=sender, recipients=list(recipients or ["b@example.com"]))


WHO = "client=mail.example.org[192.0.2.1]"
CLIENT = Client("mail.example.org", "192.0.2.1", 25)


def connected(filter_: Filter, queue_id: str = "4Fx") -> MTA:
    mta = filter_.mta()
    mta.set_macros("CONNECT", {"i": queue_id})
    mta.greet(CLIENT)
    return mta


@pytest.mark.parametrize("engine", ["libmilter", "native"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_became_of_each_message(runner: Runner, engine: str, workers: str) -> None:
    filter_ = runner.start(
        "judge:Judge", "--access-log", "access", "--workers", workers, engine=engine
    )
    with connected(filter_) as mta:
        assert send(mta).verdict is Verdict.ACCEPT
        assert send(mta, "b@example.com", "gone@d", "later@d").verdict is Verdict.ACCEPT
        assert send(mta, sender="nobody@e").verdict is Verdict.REJECT
        assert send(mta, message=b"X: drop\r\n\r\n").verdict is Verdict.DISCARD
        assert send(mta, message=b"X: take\r\n\r\n").verdict is Verdict.ACCEPT
        assert send(mta, message=b"X: raise\r\n\r\n").verdict is Verdict.TEMPFAIL
        send(mta, "gone@d")  # nobody is left: the MTA gives the message up
    did = (
        "actions=addheader(X-A),chgheader(Subject:1),delheader(Subject:1),addrcpt(<c@d>),"
        'delrcpt(<b@example.com>),replacebody,"quarantine(look, at it)"'
    )
    start = f"id=4Fx {WHO} from=<a@example.com> to=<b@example.com>"
    refused = 'refused="<gone@d> (550 5.1.1 no such user)"'
    assert log(runner, 7) == [
        f"{start} verdict=accept stage=eom {did}",
        f'{start} {refused},"<later@d> (tempfail)" verdict=accept stage=eom {did}',
        (
            f"id=4Fx {WHO} from=<nobody@e> to=- verdict=reject stage=envfrom "
            r'reply="550 5.7.1 not\n100% you"'
        ),
        f"{start} verdict=discard stage=header",
        f"{start} verdict=accept stage=header",
        (
            f"{start} verdict=tempfail stage=header "
            'reply="451 4.3.0 pymilter: untrapped exception in judge"'
        ),
        f"id=4Fx {WHO} from=<a@example.com> to=- {refused} verdict=abort stage=abort",
    ]
    assert filter_.stop() == 0, filter_.output


@pytest.mark.parametrize("name", ["Quiet", "Odd"])
def test_a_filter_that_asks_for_less(runner: Runner, name: str) -> None:
    """The log knows what the filter does not ask for, which it does not get by that."""
    filter_ = runner.start(f"judge:{name}", "--access-log", "access")
    with connected(filter_) as mta:
        assert send(mta).verdict is Verdict.CONTINUE
        assert send(mta).verdict is Verdict.CONTINUE
    line = f"id=4Fx {WHO} from=<a@example.com> to=<b@example.com> verdict=accept stage=eom"
    assert log(runner, 2) == [line, line]
    assert "Traceback" not in filter_.output


@pytest.mark.parametrize("engine", ["libmilter", "native"])
def test_a_coroutine_and_its_time(runner: Runner, engine: str) -> None:
    options = ("--access-log", "-", "--log-format", "json")
    filter_ = runner.start("judge:Waits", *options, engine=engine)
    with connected(filter_) as mta:
        send(mta)
    fields = json.loads(filter_.wait_for('"queue_id"'))
    assert fields["milliseconds"] > 45
    assert (fields["queue_id"], fields["actions"]) == ("4Fx", ["addheader(X-A)"])
    assert (fields["client_name"], fields["client_address"]) == ("mail.example.org", "192.0.2.1")


def test_a_function_of_whole_messages(runner: Runner) -> None:
    filter_ = runner.start("judge:function", "--access-log", "access")
    with connected(filter_) as mta:
        send(mta)
        send(mta, sender="bad@e")
    start = f"id=4Fx {WHO} from="
    assert log(runner, 2) == [
        (
            f"{start}<a@example.com> to=<b@example.com> verdict=accept stage=eom "
            "actions=addheader(X-A)"
        ),
        f'{start}<bad@e> to=<b@example.com> verdict=reject stage=eom reply="550 5.7.1 no"',
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_and_no_field_is_forged(runner: Runner, form: str) -> None:
    filter_ = runner.start("judge:Quiet", "--access-log", "access", "--log-format", form)
    with filter_.mta() as mta:
        mta.connect_info("a b\x1b[2J", "192.0.2.1", 25)
        mta.mail('<"x\r\n2026 verdict=accept"@e> verdict=accept')
        mta.rcpt("<\u202ea,b\xff\\n@c>")
        mta.eom()
        mta.quit()
    (text,) = log(runner, 1) if form == "text" else [(runner.place / "access").read_text()]
    if form == "json":
        fields = json.loads(text)
        assert fields["client_name"] == "a b\\x1b[2J"
        assert fields["recipients"] == ["<\\u202ea,b\xff\\n@c>"]
        assert text.isascii() and text.count("\n") == 1
        return
    assert text == (
        r'id=- client="a b\x1b[2J[192.0.2.1]" '
        r'from="<\"x\r\n2026 verdict=accept\"@e> verdict=accept" '
        'to="<\\u202ea,b\xff\\\\n@c>" verdict=accept stage=eom'
    )


def test_a_message_that_is_cut_off(runner: Runner) -> None:
    filter_ = runner.start("judge:Quiet", "--access-log", "access")
    with connected(filter_) as mta:
        mta.mail("<a@example.com>")
        mta.rcpt("<b@example.com>")
        mta.abort()
        mta.mail("<second@example.com>")
        mta.close()
    lines = log(runner, 2)
    assert lines[0].endswith("from=<a@example.com> to=<b@example.com> verdict=abort stage=abort")
    assert "from=<second@example.com> to=- verdict=abort" in lines[1]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_file_that_is_renamed_and_reloads(runner: Runner, workers: str) -> None:
    """As logrotate does: no line is lost, and the old generation writes to the new file too."""
    filter_ = runner.start("judge:Quiet", "--access-log", "access", "--workers", workers)
    place = runner.place
    with connected(filter_, "first") as old:
        send(old)
        log(runner, 1)
        (place / "access").rename(place / "access.1")
        filter_.process.send_signal(signal.SIGHUP)
        filter_.wait_for("milter.run: reloaded:")
        send(old)
        with connected(filter_, "second") as new:
            send(new)
    assert [line.split()[0] for line in log(runner, 1, "access.1")] == ["id=first"]
    assert [line.split()[0] for line in log(runner, 2)] == ["id=first", "id=second"]
    pids = {line.split()[1] for line in (place / "access").read_text().splitlines()}
    assert len(pids) == 2
    assert filter_.stop() == 0, filter_.output


def test_many_at_once(runner: Runner) -> None:
    """Lines of threads and processes stay whole."""
    filter_ = runner.start("judge:Quiet", "--access-log", "access", "--workers", "2")
    failures: list[BaseException] = []

    def client() -> None:
        try:
            with connected(filter_) as mta:
                for _ in range(20):
                    send(mta)
        except BaseException as exc:  # noqa: BLE001 - for the test to see
            failures.append(exc)

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert failures == []
    assert len(set(log(runner, 120))) == 1


def test_a_file_that_cannot_be_opened(runner: Runner) -> None:
    filter_ = runner.start("judge:Quiet", "--access-log", "gone/access")
    assert filter_.wait() == 1
    assert filter_.output.rstrip().endswith(
        "python -m Milter run: error: --access-log gone/access: No such file or directory"
    )
    assert not (runner.place / "run" / "s").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_said_once_and_stops_no_mail(runner: Runner) -> None:
    filter_ = runner.start("judge:Quiet", "--access-log", "/dev/full")
    with connected(filter_) as mta:
        for _ in range(3):
            assert send(mta).verdict is Verdict.CONTINUE
    assert filter_.stop() == 0
    assert filter_.output.count("cannot write the access log /dev/full") == 1
    assert "No space left on device" in filter_.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_the_file_belongs_to_who_serves(runner: Runner) -> None:
    logs = runner.place / "logs"
    logs.mkdir()
    shutil.chown(logs, "nobody")
    options = ("--user", "nobody", "--access-log", "logs/access")
    filter_ = runner.start("judge:Quiet", *options)
    with connected(filter_) as mta:
        send(mta)
    log(runner, 1, "logs/access")
    status = (logs / "access").stat()
    assert status.st_uid == pwd.getpwnam("nobody").pw_uid
    assert status.st_mode & 0o007 == 0
    assert filter_.stop() == 0


def test_without_it_the_extension_tells_nobody(runner: Runner) -> None:
    """And the MTA is asked for no more steps."""
    filter_ = runner.start("judge:Quiet")
    with filter_.mta() as mta:
        without = mta.negotiated
    assert filter_.stop() == 0
    filter_ = runner.start("judge:Quiet", "--access-log", "access")
    with filter_.mta() as mta:
        assert mta.negotiated != without
