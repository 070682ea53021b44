"""The benchmark: it runs from end to end, and a filter that answers wrong does not go unnoticed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.mta import WAIT, Peer, frame, optneg

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks" / "bench.py"

ADD_HEADER = frame(b"h", b"X-Bench\0checked\0")
CONTINUE = frame(b"c")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the tool with the interpreter that has the package."""
    return subprocess.run(
        [sys.executable, str(BENCH), "--calm", str(os.cpu_count()), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=WAIT * 4,
        check=False,
    )


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the load generator and the floor, compiled as the tool compiles them."""
    directory = tmp_path_factory.mktemp("programs")
    done = bench("--list", "--build", directory)
    assert done.returncode == 0, done.stderr
    assert "noop/unix/1" in done.stdout.split()
    return directory


# --- the load generator -----------------------------------------------------------------------


class Load:
    """The generator, and a socket on which a script plays the filter."""

    def __init__(self, program: Path, directory: Path) -> None:
        self._program = program
        self.path = directory / "s"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(WAIT)
        self.listener.bind(str(self.path))
        self.listener.listen()

    def run(self, *options: str) -> tuple[int, dict[str, Any]]:
        """Run it for a moment; returns its exit status and its report."""
        done = subprocess.run(
            [
                *[str(self._program), "--socket", f"unix:{self.path}", "--warmup", "0"],
                *["--duration", "0.05", "--timeout", "5", *options],
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def against(self, script: Callable[[Peer], None], *options: str) -> dict[str, Any]:
        """Run it against a script for one connection; the report has the exit status too."""

        def play() -> None:
            connection, _ = self.listener.accept()
            with connection:
                script(Peer(connection))

        with ThreadPoolExecutor(1) as pool:
            played = pool.submit(play)
            status, report = self.run(*options)
            played.result(WAIT)
        return {**report, "status": status}


@pytest.fixture
def load(programs: Path, tmp_path: Path) -> Iterator[Load]:
    generator = Load(programs / "load", tmp_path)
    with generator.listener:
        yield generator


def filter_script(
    steps: int = 0,
    answers: dict[bytes, bytes] | None = None,
    silent: bytes = b"",
    seen: list[tuple[bytes, bytes]] | None = None,
) -> Callable[[Peer], None]:
    """A filter that is right but for the answers to the commands given; to some it is silent."""
    given = {b"E": ADD_HEADER + CONTINUE, **(answers or {})}

    def script(peer: Peer) -> None:
        peer.answer(optneg(steps=steps))
        try:
            while True:
                command, _ = peer.command()
                if command == b"Q":
                    break
                if command not in silent:
                    peer.send(given.get(command, CONTINUE))
        except (EOFError, OSError):
            pass
        if seen is not None:
            seen.extend(peer.seen)

    return script


def test_a_right_filter_passes(load: Load) -> None:
    seen: list[tuple[bytes, bytes]] = []
    report = load.against(filter_script(seen=seen), "--headers", "2", "--body", "100")
    assert (report["status"], report["errors"], report["error"]) == (0, 0, "")
    assert report["messages"] >= report["completed"] > 0
    assert report["steps"] == len("MRRRTLLNBE")
    commands = b"".join(command for command, _ in seen if command != b"D")
    assert commands.startswith(b"OCHMRRRTLLNBEM")
    assert commands.endswith(b"EQ")
    assert commands.count(b"E") == report["messages"]


def test_it_says_what_postfix_says(load: Load) -> None:
    seen: list[tuple[bytes, bytes]] = []
    load.against(filter_script(seen=seen), "--headers", "1")
    assert seen[0] == (b"O", bytes.fromhex("00000006 000001ff 001fffff"))
    macros = [data for command, data in seen if command == b"D"]
    assert macros[0].startswith(b"Cj\0mail.example.org\0{daemon_name}\0")
    assert macros[1].startswith(b"M{mail_addr}\0alice@example.com\0")
    assert [data[:1] for data in macros[2:8]] == [b"R", b"R", b"R", b"T", b"N", b"E"]
    first, later = macros[7], macros[14]
    assert first[:4] == later[:4] == b"Ei\x004"
    assert first != later, "each message has a queue ID of its own"
    assert macros[6][1:] == first[1:], "which is the same at each of its stages"


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ({b"E": CONTINUE}, "end of message: 0 headers added instead of 1"),
        ({b"E": ADD_HEADER * 2 + CONTINUE}, "end of message: 2 headers added instead of 1"),
        ({b"E": frame(b"h", b"X-Bench\0wrong\0") + CONTINUE}, "added X-Bench: wrong instead of"),
        ({b"E": frame(b"m", b"\0\0\0\1X\0y\0") + CONTINUE}, "end of message: answered with 'm'"),
        ({b"E": ADD_HEADER + frame(b"t")}, "end of message: answered with 't' instead of 'c'"),
        ({b"R": frame(b"r")}, "RCPT: answered with 'r' instead of 'c'"),
        ({b"L": frame(b"s")}, "header: answered with 's'"),
        ({b"B": ADD_HEADER}, "body: answered with 'h'"),
        ({b"H": CONTINUE + CONTINUE}, "said 'c' unasked"),
        ({b"M": frame(b"c")[:-1]}, "no answer in"),
        ({b"M": b"\xff\xff\xff\xffc"}, "a packet of 4294967295 bytes"),
    ],
)
def test_a_wrong_answer_is_an_error(
    load: Load, answers: dict[bytes, bytes], complaint: str
) -> None:
    options = ["--timeout", "0.3"] if complaint == "no answer in" else []
    report = load.against(filter_script(answers=answers), *options)
    assert complaint in report["error"]
    assert (report["status"], report["errors"]) == (1, 1)


def test_silence_and_hanging_up_are_errors(load: Load) -> None:
    report = load.against(filter_script(silent=b"T"), "--timeout", "0.3")
    assert report["error"] == "DATA: no answer in 0.3 s"

    def leave(peer: Peer) -> None:
        peer.answer(optneg(), CONTINUE)
        peer.command()

    report = load.against(leave)
    assert report["error"] == "HELO: the filter hung up"
    load.listener.close()
    status, report = load.run()
    assert status == 1
    assert "connecting: " in report["error"]


def test_what_was_agreed_is_kept_to(load: Load) -> None:
    no_helo, no_data, no_body = 0x2, 0x200, 0x10
    no_header_reply, no_recipient_reply, leading_space = 0x80, 0x8000, 0x100000
    steps = no_helo | no_data | no_body | no_header_reply | no_recipient_reply | leading_space
    seen: list[tuple[bytes, bytes]] = []
    report = load.against(filter_script(steps=steps, silent=b"LR", seen=seen), "--headers", "2")
    assert (report["status"], report["error"]) == (0, "")
    commands = b"".join(command for command, _ in seen if command != b"D")
    assert commands.startswith(b"OCMRRRLLNEM")
    header = next(data for command, data in seen if command == b"L")
    assert header.startswith(b"Received\0 from ")
    # A reply where none was agreed on is too much.
    report = load.against(filter_script(steps=steps, silent=b"L"), "--headers", "2")
    assert report["status"] == 1


def test_skip_leaves_out_the_rest_of_the_body(load: Load) -> None:
    seen: list[tuple[bytes, bytes]] = []
    script = filter_script(steps=0x400, answers={b"B": frame(b"s")}, seen=seen)
    report = load.against(script, "--body", "1000", "--chunk", "100", "--headers", "0")
    assert (report["status"], report["error"]) == (0, "")
    assert b"".join(command for command, _ in seen if command != b"D").startswith(b"OCHMRRRTNBEM")


def test_big_bodies_arrive_whole(load: Load) -> None:
    seen: list[tuple[bytes, bytes]] = []
    load.against(filter_script(seen=seen), "--body", "200000", "--headers", "0")
    chunks = [data for command, data in seen if command == b"B"]
    assert [len(chunk) for chunk in chunks[:4]] == [65535, 65535, 65535, 200000 - 3 * 65535]
    lines = b"".join(chunks[:4]).split(b"\r\n")
    assert set(lines[:-1]) == {
        b"It is a truth universally acknowledged, that a single man in possession"
    }


@pytest.mark.parametrize(
    "options",
    [["--body", "x"], ["--connections", "-1"], ["--socket", "nonsense"], ["--warmup", "nan"]],
)
def test_wrong_options_are_named(programs: Path, options: list[str]) -> None:
    done = subprocess.run(
        [str(programs / "load"), "--socket", "unix:/nowhere", *options],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2
    assert f"{options[0]}" in done.stderr
    assert options[1] in done.stderr


# --- the tool ---------------------------------------------------------------------------------


def test_it_measures_from_end_to_end(programs: Path, tmp_path: Path) -> None:
    keys = [
        *("churn/unix/16", "noop/unix/1", "noop/tcp/4", "block/unix/32", "big/unix/4"),
        "idle/unix/1000",
    ]
    written = tmp_path / "results.json"
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- benchmark: made by scripts/bench --update-docs, not by hand -->\nold\n"
        "<!-- end of benchmark -->\nafter\n"
    )
    done = bench(
        *("--subjects", "floor,floor-nodelay,native", "--only", ",".join(keys)),
        *("--subject", f"again={sys.executable}", "--quick", "--rounds", "1", "--seconds", "0.5"),
        *("--build", programs, "--json", written, "--update-docs", page),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(written.read_text())
    assert results["subjects"] == ["floor", "floor-nodelay", "native", "again"]
    assert list(results["samples"]) == keys
    for key, subjects in results["samples"].items():
        nodelay = {"floor-nodelay"} if "/tcp/" in key else set()
        assert set(subjects) == {"floor", "native", "again"} | nodelay
        turns = {"0.0"} if key.startswith("idle") else {"0.0", "0.1"}
        assert all(set(taken) == turns for taken in subjects.values())
        for sample in (taken["0.0"] for taken in subjects.values()):
            if key.startswith("idle"):
                assert sample["pss"] > 0
            else:
                assert sample["rate"] > 0
                assert sample["p50"] <= sample["p99"] <= sample["max"]
                assert 0 < sample["cpu_per_callback"] < 10_000
    assert results["samples"]["churn/unix/16"]["native"]["0.0"]["sessions"] > 16
    table = done.stdout
    assert "msg/s" in table
    assert table.count(" again ") >= 5
    assert "native, no-op, unix, 1 connection: messages/s of the floor's" in table
    assert done.stderr.count("[1/1]") == 6
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmark")
    assert text.endswith("<!-- end of benchmark -->\nafter\n")
    assert "| noop | unix | 1 | native |" in text
    assert "old" not in text
    assert socket.gethostname() not in text
    assert str(ROOT) not in text


def test_parsing_is_checked_too(programs: Path) -> None:
    done = bench(
        *("--subjects", "ours", "--only", "parse/unix/1", "--rounds", "1", "--seconds", "1"),
        *("--build", programs),
    )
    assert done.returncode == 0, done.stderr


def test_functions_of_whole_messages_are_compared_by_what_they_read(
    programs: Path, tmp_path: Path
) -> None:
    written = tmp_path / "results.json"
    done = bench(
        *("--subjects", "whole,no-body,at-rcpt,base-rcpt,native", "--only", "function/unix/1"),
        *("--rounds", "1", "--turns", "1", "--seconds", "0.3", "--build", programs),
        *("--json", written),
    )
    assert done.returncode == 0, done.stderr
    (subjects,) = json.loads(written.read_text())["samples"].values()
    steps = {name: taken["0.0"]["steps"] for name, taken in subjects.items()}
    # Sender, recipients, 20 headers, the body, and the ends of headers and message.
    assert steps["whole"] == steps["no-body"] + 1
    assert steps["at-rcpt"] < steps["whole"] - 20
    assert set(steps) == {"whole", "no-body", "at-rcpt", "base-rcpt"}
    rows = [line.split() for line in done.stdout.splitlines()]
    table = {row[1]: row for row in rows if len(row) == 6 and row[0] == "1"}
    assert table["whole"][4] == "1.00"
    assert {name: int(row[2]) for name, row in table.items()} == steps


def test_a_filter_that_fails_is_told_and_fails_the_run(programs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 3\n")
    broken.chmod(0o755)
    done = bench(
        *("--subjects", "floor", "--subject", f"broken={broken}", "--only", "noop/unix/1"),
        *("--rounds", "2", "--seconds", "0.1", "--build", programs),
    )
    assert done.returncode == 1
    assert (
        "failed: noop/unix/1 broken: the filter ended with status 3: no such thing" in done.stderr
    )
    assert "floor" in done.stdout


def test_the_engine_is_the_one_that_was_asked_for(programs: Path, tmp_path: Path) -> None:
    told = tmp_path / "python"
    told.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit\necho "engine: $PYMILTER_ENGINE" >&2\nexit 3\n'
    )
    told.chmod(0o755)
    done = bench(
        *("--subjects", "", "--subject", f"usual={told}", "--subject", f"own={told},engine=native"),
        *("--only", "noop/unix/1", "--rounds", "1", "--build", programs),
    )
    assert done.returncode == 1
    for name, engine in (("usual", ""), ("own", " native")):
        assert f"failed: noop/unix/1 {name}: the filter ended with status 3: engine:{engine}\n" in (
            done.stderr
        )


def made_up(rates: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Results in which only messages per second were measured."""
    samples = {
        key: {
            subject: {str(n): {"rate": rate} for n, rate in enumerate(found)}
            for subject, found in subjects.items()
        }
        for key, subjects in rates.items()
    }
    subjects = sorted({subject for found in rates.values() for subject in found})
    return {
        "date": "2026-01-01",
        "machine": {},
        "subjects": subjects,
        "versions": {},
        "rounds": 3,
        "seconds": 1.0,
        "samples": samples,
        "failures": {},
    }


def test_ratios_are_of_the_same_round(tmp_path: Path) -> None:
    results = made_up(
        {"noop/unix/1": {"floor": [100, 1000, 10], "ours": [95, 800, 9.5], "pymilter": [50] * 3}}
    )
    source = tmp_path / "results.json"
    source.write_text(json.dumps(results))
    done = bench("--from", source)
    assert done.returncode == 0, done.stderr
    verdict = next(line for line in done.stdout.splitlines() if line.startswith("no-op, unix, 1"))
    assert verdict.split()[-3:] == ["0.9", "0.950", "reached"]
    results["samples"]["noop/unix/1"]["ours"]["0"]["rate"] = 80
    source.write_text(json.dumps(results))
    assert "0.800  NOT REACHED" in bench("--from", source).stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "nonsense"], "--only nonsense: no such workload"),
        (["--subjects", "floor,nonsense"], "--subjects nonsense: none of floor"),
        (["--subjects", "pymilter"], "--pymilter names no interpreter"),
        (["--subject", "x"], "'x' is not NAME=PYTHON"),
        (["--subject", "x=sh,engine="], "'x=sh,engine=' is not NAME=PYTHON"),
        (["--subject", "x=/no/python"], "'/no/python' is no program"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--seconds", "0"], "--seconds 0.0: more than 0"),
    ],
)
def test_wrong_arguments_are_named(programs: Path, arguments: list[str], complaint: str) -> None:
    done = bench(*arguments, "--build", programs)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_a_page_without_the_place_is_left_alone(tmp_path: Path) -> None:
    source, page = tmp_path / "results.json", tmp_path / "page.md"
    source.write_text(json.dumps(made_up({})))
    page.write_text("nothing\n")
    done = bench("--from", source, "--update-docs", page)
    assert done.returncode == 2
    assert "page.md: lacks <!-- benchmark" in done.stderr
    assert page.read_text() == "nothing\n"
