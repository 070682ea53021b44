"""Callbacks of one connection come from several OS threads, and nothing gets mixed up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import milter
from driven import is_native, run

from Milter.mta import MTA, Verdict

CONNECTIONS = 40
local = threading.local()
wrong: list[str] = []
threads_of: dict[int, set[int]] = {}  # of each connection
names: dict[int, set[int]] = {}  # of each OS thread: what Python calls it


def step(ctx: Any, expected: str, value: bytes | str) -> int:
    number, seen = ctx.getpriv()
    native = threading.get_native_id()
    threads_of[number].add(native)
    names.setdefault(native, set()).add(threading.get_ident())
    # What is kept for a thread stays with the OS thread.
    if getattr(local, "native", native) != native:
        wrong.append(f"thread-local data moved from {local.native} to {native}")
    local.native = native
    text = value.decode() if isinstance(value, bytes) else value
    if text != f"{expected}-{number}-{len(seen)}":
        wrong.append(f"connection {number}: {text} at step {len(seen)}")
    seen.append(text)
    return milter.CONTINUE


def connect(ctx: Any, hostname: str, family: int, address: Any) -> int:
    number = int(hostname)
    threads_of[number] = set()
    assert ctx.setpriv((number, [])) is None
    return milter.CONTINUE


def eom(ctx: Any) -> int:
    number, seen = ctx.getpriv()
    ctx.addheader("X-Steps", f"{number}: {len(seen)} {ctx.getsymval('i')}")
    return milter.CONTINUE


def drive(open_mta: Callable[..., MTA]) -> None:
    mtas = [open_mta() for _ in range(CONNECTIONS)]
    for number, mta in enumerate(mtas):
        mta.connect_info(str(number))
    # One step of every connection after the other: each finds another thread free.
    for number, mta in enumerate(mtas):
        assert mta.helo(f"helo-{number}-0").verdict is Verdict.CONTINUE
    for number, mta in enumerate(mtas):
        mta.mail(f"mail-{number}-1", macros={"i": f"Q{number}"})
    for number, mta in enumerate(mtas):
        mta.rcpt(f"rcpt-{number}-2")
        mta.data()
    for line in range(10):
        send_all_headers(mtas, line)
    for number, mta in enumerate(mtas):
        mta.eoh()
        mta.body(f"body-{number}-13".encode())
    for number, mta in enumerate(mtas):
        (modification,) = mta.eom().modifications
        assert modification.value == f"{number}: 14 Q{number}".encode(), modification
    for mta in mtas:
        mta.quit()
    assert not wrong, wrong
    assert all(len(idents) == 1 for idents in names.values()), names
    hops = sum(len(threads) > 1 for threads in threads_of.values())
    # A libmilter without a pool has one thread for each connection; the other engine has no more
    # than it needs.
    assert hops > CONNECTIONS // 2 or len(names) >= CONNECTIONS or is_native(), (hops, len(names))


def send_all_headers(mtas: list[MTA], line: int) -> None:
    # All at once, so that several threads of the pool are at work together.
    threads = []
    for number, mta in enumerate(mtas):
        args = ("X", f"header-{number}-{line + 3}")
        threads.append(threading.Thread(target=mta.header, args=args))
        threads[-1].start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    run(
        drive,
        connect=connect,
        helo=lambda ctx, name: step(ctx, "helo", name),
        envfrom=lambda ctx, *args: step(ctx, "mail", args[0]),
        envrcpt=lambda ctx, *args: step(ctx, "rcpt", args[0]),
        header=lambda ctx, name, value: step(ctx, "header", value),
        body=lambda ctx, chunk: step(ctx, "body", chunk),
        eom=eom,
    )
