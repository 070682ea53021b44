"""The order of the C: who may include whom and call libmilter, and how long functions are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
MODULE = ROOT / "miltermodule.c"
INTERNALS = ROOT / "docs" / "internals.md"

# By floors, from the ground up: a file includes headers of lower floors and of its own.
FLOORS = [
    {"clock", "stages", "wake", "descriptors", "signal_sets", "process", "common"},
    {"text", "arguments", "reply", "report", "constants", "socket_name", "engine"},
    {"engine/"},
    {"threads", "turns", "crew", "metrics", "context", "observer", "actions"},
    {"verdict", "failure", "call", "negotiate", "trampolines", "decoder", "rules"},
    {"signals", "socket", "workers", "lifecycle"},
]
LONGEST_FUNCTION = 60
LONGEST_FILE = 1200

pytestmark = pytest.mark.skipif(not MODULE.exists(), reason="the sources are not here")


def c_files() -> list[Path]:
    return [MODULE, *sorted(SOURCE.rglob("*.[ch]"))]


def test_the_module_begins_with_a_map_of_the_floors() -> None:
    head = MODULE.read_text("utf-8").partition("*/")[0]
    told = re.findall(r"^ \*   (\d)  (.*(?:\n \*      .*)*)", head, re.MULTILINE)
    assert [int(number) for number, _ in told] == list(range(len(FLOORS)))
    for (_, text), names in zip(told, FLOORS):
        assert set(re.findall(r"[\w/]+", text)) >= names


def test_the_documentation_has_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.+?) \|", INTERNALS.read_text("utf-8"), re.MULTILINE)
    told = {int(number): set(re.findall(r"`([\w/]+)(?:\.h)?`", names)) for number, names in rows}
    assert told == dict(enumerate(FLOORS))


def name_of(path: Path) -> str:
    """The path below src/, without its ending."""
    if path == MODULE:
        return "miltermodule"
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def floor_of(path: Path) -> int:
    if path == MODULE:
        return len(FLOORS)
    name = name_of(path)
    within = name.partition("/")[0] + "/" if "/" in name else name
    (found,) = [number for number, names in enumerate(FLOORS) if within in names]
    return found


def code_of(path: Path) -> str:
    """The text without comments and strings, with all its lines."""

    def blank(match: re.Match[str]) -> str:
        text = match[0]
        return '""' if text[0] == '"' else "0" if text[0] == "'" else "\n" * text.count("\n")

    pattern = r'/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, blank, path.read_text(encoding="utf-8"), flags=re.DOTALL)


def included_by(path: Path) -> list[Path]:
    """The product's own headers that a file includes."""
    names = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    found = []
    for name in names:
        places = [path.parent / name, SOURCE / name]
        found.append(next(place.resolve() for place in places if place.exists()))
    return found


@pytest.mark.parametrize("path", c_files(), ids=name_of)
def test_no_file_includes_upward(path: Path) -> None:
    higher = [name_of(header) for header in included_by(path) if floor_of(header) > floor_of(path)]
    assert higher == []


def test_no_part_needs_itself() -> None:
    """A part is a file and its header."""
    needs: dict[str, set[str]] = {}
    for path in c_files():
        needed = needs.setdefault(name_of(path), set())
        needed |= {name_of(header) for header in included_by(path)} - {name_of(path)}
    while True:
        leaves = {part for part, needed in needs.items() if not needed}
        if not leaves:
            break
        needs = {part: needed - leaves for part, needed in needs.items() if part not in leaves}
    assert needs == {}, "these are in a circle, or above one"


@pytest.mark.parametrize(
    "path", [path for path in c_files() if path.suffix == ".c" and path != MODULE], ids=name_of
)
def test_each_file_has_a_header_and_includes_it_first(path: Path) -> None:
    assert included_by(path)[0] == path.with_suffix(".h")


@pytest.mark.parametrize("path", c_files(), ids=name_of)
def test_only_its_engine_calls_libmilter(path: Path) -> None:
    # struct smfi_str is what mfapi.h calls the context, which each engine defines for itself
    calls = [name for name in re.findall(r"\bsmfi_\w+", code_of(path)) if name != "smfi_str"]
    assert not calls or name_of(path).startswith("engine/libmilter/"), calls


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("engine*/**/*.[ch]")), ids=name_of)
def test_an_engine_knows_nothing_of_python(path: Path) -> None:
    assert re.findall(r"\bPy[A-Z_]\w*", code_of(path)) == []
    names = {name_of(header) for header in included_by(path)}
    assert not names & {"common", "text", "arguments", "reply", "report", "constants"}


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Each function with the number of its lines, from its name to its brace."""
    name, start = "", 0
    for number, line in enumerate(code_of(path).split("\n")):
        match = re.match(r"(\w+)\(", line)
        if match:
            name, start = match[1], number
        elif line == "}" and name:
            yield name, number - start + 1
            name = ""


@pytest.mark.parametrize("path", c_files(), ids=name_of)
def test_functions_and_files_are_short(path: Path) -> None:
    long = [(name, lines) for name, lines in functions_of(path) if lines > LONGEST_FUNCTION]
    assert long == []
    most = 900 if path == MODULE else LONGEST_FILE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


def test_the_check_sees_functions() -> None:
    found = [name for path in c_files() for name, _ in functions_of(path)]
    assert {"begin", "finish", "milter_main", "poll_and_tend_pool"} <= set(found)
    assert len(found) > 300
