"""What scripts/test-sanitizers rests on: how filters are run, and what is read of the reports."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import milter
import pytest

ROOT = Path(__file__).resolve().parents[2]
FUZZ = ROOT / "fuzz"
READER = FUZZ / "sanitizer_reports.py"
SOURCES = [ROOT / "miltermodule.c", *sorted(ROOT.glob("src/**/*.c"))]

# As the tools write them, shortened; {name} is a source file's name without its directory.
VALGRIND = """\
==17== Invalid write of size 4
==17==    at 0x4842B6F: memset (in /usr/libexec/valgrind/vgpreload_memcheck-amd64-linux.so)
==17==    by 0x5A81F3C: some_function ({name}:60)
==17==    by 0x5ABC111: mi_engine (in /usr/lib/x86_64-linux-gnu/libmilter.so.1.0.1)
"""
ADDRESS = """\
=================================================================
==17==ERROR: AddressSanitizer: heap-use-after-free on address 0x602000000010 at pc 0x7f01
WRITE of size 1 at 0x602000000010 thread T3
    #0 0x7f0123 in some_function {path}:60
    #1 0x7f0456 in mi_engine (/usr/lib/x86_64-linux-gnu/libmilter.so.1.0.1+0x5d5e)
"""
LEAK = """\
Direct leak of 77 byte(s) in 1 object(s) allocated from:
    #0 0x7f0123 in malloc (/usr/lib/x86_64-linux-gnu/libasan.so.8+0xb89d8)
    #1 0x7f0456 in some_function {path}:60
"""
THREAD = """\
==================
WARNING: ThreadSanitizer: data race (pid=17)
  Write of size 4 at 0x7f0123 by thread T2:
    #0 some_function {path}:60 (milter_extension+0x7d5e)
"""
TOOLS = {"valgrind": VALGRIND, "address": ADDRESS, "leak": LEAK, "thread": THREAD}


def read(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(READER), str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("tool", TOOLS)
def test_a_report_in_any_source_file_is_seen(tool: str, tmp_path: Path) -> None:
    # CPython has files of these names too.
    shared = ("call.c", "context.c") if tool == "valgrind" else ()
    sources = [source for source in SOURCES if source.name not in shared]
    if tool == "valgrind":  # which tells only the name, and what is the same is told once
        sources = list({source.name: source for source in sources}.values())
    for number, source in enumerate(sources):
        report = TOOLS[tool].format(name=source.name, path=source.relative_to(ROOT))
        (tmp_path / f"report.{number}").write_text(report)
    done = read(tmp_path)
    assert done.returncode == 1, done.stderr
    assert [source.name for source in sources if f"{source.name}:60" not in done.stdout] == []
    count = len(sources)
    assert f"{count} files, {count} reports that name the module; others: " in done.stdout


@pytest.mark.parametrize("tool", TOOLS)
def test_a_report_that_names_the_loaded_module_is_seen(tool: str, tmp_path: Path) -> None:
    where = "/somewhere/milter.cpython-313t-x86_64-linux-gnu.so+0x7d5e"
    report = TOOLS[tool].replace(" ({name}:60)", f" (in {where})").replace("{path}:60", where)
    (tmp_path / "report.17").write_text(report)
    assert read(tmp_path).returncode == 1


@pytest.mark.parametrize("tool", TOOLS)
def test_a_report_elsewhere_is_only_counted(tool: str, tmp_path: Path) -> None:
    for name in ("threadpool.c", "call.c", "pool.cc", "test-pool.c"):
        report = TOOLS[tool].format(name=name, path=f"Python/{name}")
        (tmp_path / f"report.{name}").write_text(report)
    done = read(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("4 files, 0 reports that name the module; others: 4 ")


def test_each_report_of_a_file_is_judged_and_the_same_is_told_once(tmp_path: Path) -> None:
    others = [TOOLS[tool].format(name="ceval.c", path="Python/ceval.c") for tool in TOOLS]
    ours = LEAK.format(path="src/engine/libmilter/pool.c")
    (tmp_path / "report.17").write_text("".join([*others, ours]))
    (tmp_path / "report.18").write_text("".join([ours, *others]))
    done = read(tmp_path)
    assert done.returncode == 1
    assert done.stdout.count("some_function src/engine/libmilter/pool.c:60") == 1
    assert "some_function Python" not in done.stdout
    assert "2 files, 1 reports that name the module; others: " in done.stdout


def called(report: str, name: str) -> str:
    """That report, where our function called one of a library's, which allocated."""
    return report.replace("#1", f"#1 0x7f0234 in {name} (/lib/library.so+0x5853)\n    #2")


@pytest.mark.parametrize(
    "name",
    [
        *("__cxa_thread_atexit_impl", "smfi_register", "smfi_setconn"),
        "thread_PyThread_start_new_thread",
    ],
)
def test_what_a_library_keeps_is_no_leak_of_the_module(name: str, tmp_path: Path) -> None:
    (tmp_path / "report.17").write_text(
        called(LEAK.format(path="src/engine/libmilter/pool.c"), name)
    )
    assert read(tmp_path).returncode == 0


def test_what_a_thread_held_that_the_interpreter_ended_is_no_leak(tmp_path: Path) -> None:
    """In that process; and an error is one there too."""
    leak = LEAK.format(path="src/engine/libmilter/pool.c")
    packet = called(LEAK, "mi_rd_cmd").format(path="../engine.c")
    (tmp_path / "report.17").write_text(leak + packet)
    assert read(tmp_path).returncode == 0
    (tmp_path / "report.18").write_text(ADDRESS.format(path="src/engine/libmilter/pool.c") + packet)
    assert read(tmp_path).returncode == 1
    (tmp_path / "report.18").write_text(leak)
    assert read(tmp_path).returncode == 1


# --- how filters are run

UNDER = """
import os, signal, subprocess, sys

def test_what_is_started_runs_under_the_command():
    code = "import os; print(os.getenv('UNDER'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "yes\\n"

def test_the_tests_do_not():
    assert os.getenv("UNDER") is None

def test_what_is_killed_may_end():
    code = '''import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(flush=True)
time.sleep(60)'''
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with child, child.stdout:
        child.stdout.readline()
        child.kill()
        assert child.wait(60) == 7
"""


@pytest.mark.parametrize("parallel", [[], ["-p", "xdist", "-n", "1"]], ids=["alone", "parallel"])
def test_filters_run_under_the_command_and_end_by_themselves(
    parallel: list[str], tmp_path: Path
) -> None:
    (tmp_path / "test_under.py").write_text(UNDER)
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "default",
            "-m",
            "pytest",
            "-q",
            "-p",
            "fuzz_under",
            *parallel,
            "test_under.py",
        ],
        env={**environment, "PYTHONPATH": str(FUZZ), "FUZZ_UNDER": "env UNDER=yes"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    assert "cleaning up" not in done.stdout


# --- the script itself -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> Any:
    loader = importlib.machinery.SourceFileLoader(
        "test_sanitizers_script", str(ROOT / "scripts" / "test-sanitizers")
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # which dataclasses look into
    sys.dont_write_bytecode, written = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = written
    yield module
    del sys.modules[loader.name]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["asan", "clang", "valgrind", "tsan"]),
        (["all"], ["asan", "clang", "valgrind", "tsan"]),
        (["--short"], ["asan"]),
        (["tsan", "--short"], ["tsan"]),
        (["valgrind", "asan", "--whole"], ["valgrind", "asan"]),
        (["asan", "--run", "python", "--short", "nonsense"], ["asan"]),
    ],
)
def test_which_tools_are_asked_for(script: Any, arguments: list[str], names: list[str]) -> None:
    request = script.Request.read(arguments)
    assert request.names == names
    run = arguments.index("--run") if "--run" in arguments else len(arguments)
    assert request.command == arguments[run + 1 :]
    assert request.short == ("--short" in arguments[:run])
    assert request.whole == ("--whole" in arguments[:run])


def test_an_engine_is_named(script: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert script.Request.read(["asan"]).engine == ""
    assert script.Request.read(["asan", "--engine", "native"]).engine == "native"
    for wrong in ("other", "asan"):
        with pytest.raises(SystemExit):
            script.Request.read(["asan", "--engine", wrong])
        assert f"--engine {wrong}: there are libmilter and native" in capfd.readouterr().err


@pytest.mark.parametrize("engine", ["", "libmilter", "native"])
def test_what_each_engine_does_is_tested_on_both(
    script: Any, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "REPORTS", tmp_path)
    played: dict[str, set[Path]] = {}

    def play(path: str, *arguments: Any) -> int:
        at = arguments.index("--engine")
        played[arguments[at + 1]] = set(arguments[at + 2 :])
        return 0

    made = script.Build("asan", sys.executable)
    monkeypatch.setattr(made, "play", play)
    assert script.check(made, script.Request(engine=engine))
    whole = set(script.whole_suite())
    if engine:
        assert played == {engine: whole}
        return
    assert played["libmilter"] == whole
    folders = {path.parent.name for path in played["native"]}
    assert folders == {"wire", "lifecycle", "mailfilter", "library", "integration"}
    assert {path for path in whole if "coroutines" in path.name} <= played["native"]
    assert {path for path in whole if path.parent.name == "wire"} <= played["native"]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("tool", ["asan", "clang", "valgrind", "tsan"])
def test_each_tool_has_tests_that_are_there(script: Any, tool: str, short: bool) -> None:
    for whole in (False, True):
        chosen = script.chosen(tool, short, whole)
        assert chosen
        assert [path for path in chosen if not path.is_file()] == []
        assert len(chosen) == len(set(chosen))
    assert set(script.chosen(tool, True, False)) <= set(script.chosen(tool, False, True))


@pytest.mark.parametrize("engine", ["libmilter", "native"])
@pytest.mark.parametrize("tool", ["asan", "clang", "valgrind", "tsan"])
def test_what_is_left_out_is_the_name_of_a_test(script: Any, tool: str, engine: str) -> None:
    """Else a test that was renamed is no longer left out."""
    files = script.whole_suite()
    text = "".join(path.name + path.read_text(encoding="utf-8") for path in files)
    words = set(re.findall(r"\w+", script.left_out(tool, engine))) - {"or", "and"}
    found = {word for word in words if re.search(rf"(?:def test_\w*|[\"/ ]\w*){word}", text)}
    assert found == words


@pytest.mark.parametrize(
    "bug",
    [
        *("overflow", "freed", "freed-object", "signed", "leak", "leaked-object", "race"),
        "uninitialised",
    ],
)
def test_there_is_a_place_for_each_bug(script: Any, bug: str, tmp_path: Path) -> None:
    assert {each for bugs in script.SEEN_BY.values() for each in bugs} == set(script.BUGS)
    for path in ROOT.glob("*.c"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src")
    script.plant(bug, tmp_path)
    changed = [
        path.relative_to(tmp_path)
        for path in tmp_path.glob("**/*.[ch]")
        if path.read_text() != (ROOT / path.relative_to(tmp_path)).read_text()
    ]
    assert len(changed) == 1
    planted = (tmp_path / changed[0]).read_text()
    before = planted.replace(f"    {script.BUGS[bug]}\n", "")
    # what the bugs are made of is included in front
    assert before.endswith((ROOT / changed[0]).read_text())
    assert "on_helo(" in planted.partition(script.BUGS[bug])[0]


def test_a_module_with_a_bug_is_the_one_that_is_loaded(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler is stood in for by a copy of the module that is installed."""

    def compile_it(*_: Any, cwd: Path, **__: Any) -> subprocess.CompletedProcess[str]:
        (cwd / "lib").mkdir()
        shutil.copy(milter.__file__, cwd / "lib")
        return subprocess.CompletedProcess([], 0, "")

    made = script.Build("valgrind", sys.executable)
    with monkeypatch.context() as patched:
        patched.setattr(script.subprocess, "run", compile_it)
        library = script.build_copy(made, "overflow", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", "import Milter, milter; print(milter.__file__)"],
        env={**os.environ, "PYTHONPATH": str(library)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert Path(done.stdout.strip()).parent == library, done.stderr


@pytest.mark.parametrize("how", ["sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_command_ends_as_the_shell_would_say(script: Any, how: str) -> None:
    made = script.Build("valgrind", sys.executable)
    status = made.run([sys.executable, "-c", f"import os, signal, sys; {how}"])
    assert status == (3 if "exit" in how else 128 + signal.SIGKILL)
