"""What fuzzing found once, and a little fuzzing: scripts/fuzz does it at length."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mime

HERE = Path(__file__).parent
FUZZ = HERE.parents[1] / "fuzz"
CASES = sorted([*HERE.glob("fuzz_cases/*/*"), *FUZZ.glob("corpus/*/*")])


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FUZZ / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def targets() -> Any:
    return load("targets").TARGETS


@pytest.mark.parametrize("case", CASES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_case(targets: Any, case: Path) -> None:
    targets[case.parent.name](case.read_bytes())


def test_there_are_cases_for_each_target(targets: Any) -> None:
    assert {case.parent.name for case in CASES} == set(targets)


def test_each_target_is_run(targets: Any) -> None:
    assert sorted(load("python_run").NAMES) == sorted(targets)


# --- what was found


@pytest.mark.parametrize(
    "text",
    [
        "<</</script>script>alert(1)</script>",
        "<</<p>script>alert(1)</script>",
        '<</x="y">script>alert(1)</script>',
        "<<a'b>script>alert(1)</script>",
        '<<a"b>script src=x>',
        "<textarea><</title>script>alert(1)</script></textarea>",
        "<</script>script>alert(1)",
    ],
)
def test_tags_taken_out_of_html_leave_no_script_behind(text: str) -> None:
    """ "<" before a tag that goes and "script>" after it would become the tag of a script."""
    out = io.StringIO()
    parser = mime.HTMLScriptFilter(out)
    parser.feed(text)
    parser.close()
    assert "<script" not in out.getvalue()


@pytest.mark.parametrize("name", ['s"tyle', "st-yle", "x:style", "x:title", "text.area"])
def test_what_only_resembles_a_raw_element_hides_nothing(name: str) -> None:
    """The filter took the content for text, where a browser sees an attribute's value."""
    out = io.StringIO()
    parser = mime.HTMLScriptFilter(out)
    plain = re.sub(r"x:|[^a-z]", "", name)
    parser.feed(f"<{name}><img src='</{plain}>' onerror=alert(1)>")
    parser.close()
    assert "onerror" not in out.getvalue()


@pytest.mark.parametrize("space", ["\x0b", "\x1f", "\x85", "\xa0", "\u2003"])
@pytest.mark.parametrize(
    "tag",
    [
        "<img x{} onerror=alert(1)>",
        "<img{}x onerror=alert(1)>",
        "<img{}onerror=alert(1)>",
        '<img a={}"b onerror=alert(1) c">',
        '<img a={}"b title="onerror=alert(1) c">',
        '<img ={}"onerror=alert(1) x">',
        "<img a=x{}onerror=alert(1)>",
    ],
)
def test_odd_spaces_end_no_tag_and_hide_no_event(space: str, tag: str) -> None:
    """Python's white space is more than that of HTML, and some readers have their own."""
    out = io.StringIO()
    parser = mime.HTMLScriptFilter(out)
    parser.feed(tag.format(space))
    parser.close()
    assert not re.search(r"(?<!title=\")onerror", out.getvalue())
    assert space not in out.getvalue() or "onerror" not in out.getvalue()


def test_spaces_within_values_stay() -> None:
    text = '<p title="a\xa0b" style="margin: 0\u2003auto" class=x>\xa0</p>'
    out = io.StringIO()
    parser = mime.HTMLScriptFilter(out)
    parser.feed(text)
    parser.close()
    assert out.getvalue() == text


@pytest.mark.parametrize(
    "line",
    [
        b"--x\0",
        b"--x\0\0",
        b"--\0x",
        b"<p\r\n--x onload=y\r\n>",
        b"--x</</script>",
        b"--x--</script>",
    ],
    ids=["nul", "nuls", "inner-nul", "attribute", "odd-tag", "end-tag"],
)
@pytest.mark.parametrize("head", [b"", b"Content-Disposition: attachment; filename=a.exe\r\n"])
def test_html_without_scripts_has_no_new_boundary(line: bytes, head: bytes) -> None:
    """What is taken out of a line must not leave the line that ends the part."""
    raw = (
        b'Content-Type: multipart/mixed; boundary="x"\r\n\r\n--x\r\n'
        b"Content-Type: text/html\r\n\r\n" + line + b"\r\n" + head + b"\r\nMZ\r\n--x--\r\n"
    )
    msg = mime.message_from_file(io.BytesIO(raw))
    assert len(msg.get_payload()) == 1
    mime.defang(msg)
    again = mime.message_from_file(io.BytesIO(msg.as_bytes()))
    parts = [part.get_filename() for part in again.walk()]
    assert parts in ([None, None], [None, "WARNING.TXT"], ["WARNING.TXT"])


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"], ids=["lf", "cr", "crlf"])
@pytest.mark.parametrize("within", [False, True], ids=["message", "attached"])
def test_a_body_without_an_empty_line_before_it_becomes_no_header(end: bytes, within: bool) -> None:
    """What ended the header was a NUL, which goes with the scripts."""
    raw = (
        b"Content-Type: text/html" + end + b"\0Content-Disposition: attachment; filename=a.exe\n"
        b"Content-Transfer-Encoding: base64\n\nTVo=\n"
    )
    if within:
        raw = b"Content-Type: message/rfc822\n\n" + raw
    msg = mime.message_from_file(io.BytesIO(raw))
    assert mime.defang(msg)
    again = mime.message_from_file(io.BytesIO(msg.as_bytes()))
    assert "a.exe" not in [part.get_filename() for part in again.walk()]


def test_the_warning_for_an_attached_message_stays_within_it() -> None:
    raw = b"Content-Type: message/rfc822\r\0Content-Type: a; name=b.exe\n\nbegin 644 c.exe\n#AAAA\n"
    msg = mime.message_from_file(io.BytesIO(raw))
    assert mime.defang(msg)
    again = mime.message_from_file(io.BytesIO(msg.as_bytes()))
    # the lone CR may end the first header or be a part of it
    names = [part.get_filename() for part in again.walk()]
    assert names in ([None, "WARNING.TXT"], ["WARNING.TXT"])


def test_records_of_another_class_are_no_answer() -> None:
    """AAAA in the class CH holds anything, and once made a ValueError."""
    dns = pytest.importorskip("dns.message")
    from types import SimpleNamespace

    from Milter.dns import Session

    case = HERE / "fuzz_cases" / "dns" / "aaaa-of-another-class"
    wire = case.read_bytes()
    answer = SimpleNamespace(response=dns.from_wire(wire, ignore_trailing=True))
    session = Session(SimpleNamespace(resolve=lambda *args, **options: answer))  # type: ignore[arg-type]
    assert session.dns("example.com", "AAAA") == []


def test_a_damaged_dumb_map_is_an_os_error(tmp_path: Path) -> None:
    from Milter.policy import dbmopen

    (tmp_path / "map.dat").write_bytes(b"REJECT")
    for index in (b"'a\0', (0, 5)\n", b"'a', (0,\n", b'"a" (0, 5)\n', b"'" * 9):
        (tmp_path / "map.dir").write_bytes(index)
        with pytest.raises((OSError, ValueError), match=r"map"):
            dbmopen(tmp_path / "map")


# --- the wire


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("fuzz") / "wire"
    subprocess.run(
        [
            os.environ.get("CC", "cc"),
            "-std=gnu11",
            "-O1",
            "-pthread",
            FUZZ / "wire.c",
            "-o",
            program,
        ],
        check=True,
    )
    return program


def test_conversations_with_any_bytes_in_any_order(generator: Path) -> None:
    options = ["--conversations", "1500", "--seed", "1", "--jobs", "4"]
    done = subprocess.run(
        [sys.executable, FUZZ / "wire_run.py", generator, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1500 conversations in" in done.stdout


class Babbler:
    """No filter: it answers the negotiation, then each command with these bytes."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(20)
                try:
                    self._talk(connection.makefile("rwb", buffering=0))
                except (OSError, ValueError):
                    continue

    def _talk(self, stream: Any) -> None:
        while head := stream.read(5):
            data = stream.read(int.from_bytes(head[:4], "big") - 1)
            command = head[4:]
            if command == b"O":
                # All actions; of the steps only what goes beyond version 2 without effect.
                steps = int.from_bytes(data[8:12], "big") & 0x100C00
                stream.write(b"\0\0\0\x0dO\0\0\0\6\0\0\1\xff" + steps.to_bytes(4, "big"))
            elif command not in b"DQA":
                stream.write(self._answer)

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(20)


@pytest.fixture
def babble(directory: Path) -> Iterator[Any]:
    babblers = []

    def start(answer: bytes) -> str:
        path = directory / "babble"
        babblers.append(Babbler(path, answer))
        return str(path)

    yield start
    for babbler in babblers:
        babbler.stop()


CONTINUE = b"\0\0\0\1c"


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (CONTINUE * 2, "c came that answers nothing|the answer to"),
        (b"\0\0\0\1a", "is a, not c"),
        (b"", "no answer within"),
        (b"\0\0\0\x0bhX\nY\0evil\0x" + CONTINUE, "is h, not c"),
        (b"\xff\xff\xff\xffc", "a reply of 4294967295 bytes"),
    ],
    ids=["doubled", "wrong", "missing", "action", "length"],
)
def test_the_generator_sees_what_is_wrong(
    generator: Path, babble: Any, answer: bytes, seen: str
) -> None:
    done = subprocess.run(
        # Its conversation 0 is an honest one.
        [generator, "--conversations", "1", "--threads", "1", "--timeout", "1", babble(answer)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert re.search(rf"^FINDING: seed 0, conversation 0: .*(?:{seen})", done.stdout, re.MULTILINE)


# --- what libmilter does wrong, and our own engine does not


@pytest.mark.parametrize("engine", ["libmilter", "native"])
@pytest.mark.parametrize(
    "script", sorted(FUZZ.glob("libmilter/[!_]*.py")), ids=lambda path: path.stem
)
def test_a_fault_of_libmilter_is_shown(script: Path, engine: str) -> None:
    """The evidence for SECURITY.md: the fault is there, or this libmilter has it no longer; our own
    engine never has it.
    """
    assert f"(`{script.name}`)" in (FUZZ.parent / "SECURITY.md").read_text(encoding="utf-8")
    no_compiler = shutil.which(os.environ.get("CC", "cc").split()[0]) is None
    if script.stem == "slow_pool" and engine == "libmilter" and no_compiler:
        pytest.skip("needs a C compiler")
    done = subprocess.run(
        [sys.executable, str(script), engine],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout.splitlines()[-1:]
    assert "Traceback" not in done.stderr
    if engine == "native":
        assert done.returncode == 0, said
        assert said[0].startswith("native: no fault: ")
    else:
        assert done.returncode in (0, 1), done.stderr
        assert said[0].startswith(("libmilter: the fault is there: ", "libmilter: no fault: "))
