"""A filter and the MTA that drives it in one process: scripts in this folder call run().

The filter runs on the main thread, drive() on another; what drive() raises is the end of the
script.  A script says "ok" when all went well.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, Callable

import milter

from Milter.mta import MTA

WAIT = 30.0
STAGES = ("connect", "helo", "envfrom", "envrcpt", "header", "eoh", "body", "eom", "abort", "close")


def run(drive: Callable[[Callable[..., MTA]], None], **callbacks: Callable[..., Any]) -> None:
    """Run a filter with *callbacks* until drive(connect) has returned."""
    faulthandler.dump_traceback_later(4 * WAIT, exit=True)
    failures: list[BaseException] = []

    def play() -> None:
        try:
            drive(lambda **options: MTA.connect(address, timeout=WAIT, wait_for=WAIT, **options))
        except BaseException as exc:  # noqa: BLE001 - the main thread judges it
            traceback.print_exc()
            failures.append(exc)
        finally:
            milter.stop()

    with tempfile.TemporaryDirectory(prefix="milter-") as directory:
        address = f"unix:{directory}/s"
        milter.set_flags(milter.CURR_ACTS)
        for stage in STAGES:
            getattr(milter, f"set_{stage}_callback")(callbacks.get(stage))
        milter.register(
            "isolated",
            negotiate=callbacks.get("negotiate"),
            data=callbacks.get("data"),
            unknown=callbacks.get("unknown"),
        )
        milter.setconn(address)
        driver = threading.Thread(target=play)
        driver.start()
        milter.main()
        driver.join(WAIT)
        assert not driver.is_alive()
    created, deleted = milter.getdiag()[:2]
    assert created == deleted, (created, deleted)
    faulthandler.cancel_dump_traceback_later()
    if failures:
        sys.exit(1)
    os.write(1, b"ok\n")


def is_native() -> bool:
    return os.environ.get("PYMILTER_ENGINE") == "native"


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again until *condition* holds; AssertionError where it does not in time."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def thread_states() -> int:
    """How many thread states the interpreter has, those of idle threads included."""
    api = ctypes.pythonapi
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    api.PyInterpreterState_ThreadHead.restype = ctypes.c_void_p
    api.PyInterpreterState_ThreadHead.argtypes = [ctypes.c_void_p]
    api.PyThreadState_Next.restype = ctypes.c_void_p
    api.PyThreadState_Next.argtypes = [ctypes.c_void_p]
    count = 0
    state = api.PyInterpreterState_ThreadHead(api.PyInterpreterState_Get())
    while state:
        count += 1
        state = api.PyThreadState_Next(state)
    return count
