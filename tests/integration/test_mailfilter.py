"""Random edits through real MTAs: what arrives is what the function left."""

from __future__ import annotations

import random
import re
import smtplib

import pytest
from integration import laboratory
from integration.cases import mailfilters
from integration.laboratory import Bench
from integration.processes import WAIT
from support import random_mail

from Milter import mailfilter

COUNT = 100
#: A message has one, or the MTA would add it.
MESSAGE_ID = b"Message-Id: <%d@example.com>\r\nX-Seed: %d\r\n"


def came(seed: int) -> tuple[bytes, mailfilter.Mail]:
    """A message, as sent and as the filter sees it."""
    rng = random.Random(seed)
    data = random_mail.message(rng).replace(
        b"\r\n\r\n", b"\r\n" + MESSAGE_ID % (seed, seed) + b"\r\n", 1
    )
    recipients = random_mail.recipients(rng)
    made = mailfilter.Mail.from_bytes(data, sender="ann@example.com", recipients=recipients)
    return data, made


def left(mail: mailfilter.Mail) -> mailfilter.Result:
    """What the function makes of it."""
    return mailfilter.filter(mailfilters.RANDOM.filter.functions[0][0]).check(mail)


def send(bench: Bench) -> None:
    with smtplib.SMTP(*bench.server.addresses["unix"], timeout=WAIT) as smtp:
        for seed in range(COUNT):
            data, mail = came(seed)
            smtp.sendmail(
                str(mail.sender), [str(one) for one in mail.recipients], data, ["BODY=8BITMIME"]
            )


@pytest.mark.parametrize("mta", ["postfix", "sendmail"])
def test_what_arrives_is_what_the_function_left(mta: str, lab: laboratory.Laboratory) -> None:
    laboratory.require(mta)
    bench = lab.bench(mta)
    behaviour = bench.filter()
    run = behaviour.select(mailfilters.RANDOM.name)
    bench.taken()
    send(bench)
    bench.server.settle()
    behaviour.finish(run, 1)
    assert not [line for line in behaviour.log if "runs as root" not in line]
    arrived: dict[int, tuple[set[bytes], set[str], set[str]]] = {}
    for envelope, content in bench.taken():
        found = re.search(rb"^X-Seed: (\d+)", content, re.MULTILINE)
        assert found, content.decode("latin-1")
        seed = int(found[1])
        contents, senders, recipients = arrived.setdefault(seed, (set(), set(), set()))
        contents.add(without_received(content))
        senders.add(envelope.sender)
        recipients.update(envelope.recipients)
    assert sorted(arrived) == list(range(COUNT))
    for seed, (contents, senders, recipients) in arrived.items():
        result = left(came(seed)[1])
        assert contents == {result.as_bytes()}, seed
        assert {one.partition(" ")[0] for one in senders} == {f"<{result.sender}>"}, seed
        assert {one.partition(" ")[0] for one in recipients} == {
            f"<{one}>" for one in result.recipients
        }, seed


def without_received(content: bytes) -> bytes:
    """Without the MTA's own header, wherever headers were put above it."""
    return re.sub(rb"^Received: .*\r\n(?:[ \t].*\r\n)*", b"", content, count=1, flags=re.MULTILINE)
