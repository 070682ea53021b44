"""The soak: it runs from end to end, and sees what leaks or answers wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOAK = ROOT / "benchmarks" / "soak.py"


def soak(*arguments: str | Path, script: Path = SOAK) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMILTER_ENGINE", "none")  # with which no filter starts
    load = ["--messages", "600", "--connections", "4", "--engine", "libmilter"]
    done = soak(*load, "--json", tmp_path / "j")
    result = json.loads((tmp_path / "j").read_text())
    # A process that has just begun still grows: memory is for longer runs to judge.
    faults = [fault for fault in result["verdict"]["faults"] if "memory" not in fault]
    assert faults == [], done.stderr
    assert result["engine"] == "libmilter"
    assert result["load"]["connections"] >= 600
    assert result["load"]["messages"] >= 600
    assert result["after"]["created"] == result["after"]["deleted"] > 500
    kinds = ("quick", "change", "refuse", "raise", "block", "cut", "reuse", "drop", "mute")
    assert all(result["load"][kind] for kind in kinds)
    assert result["after"]["reported"] > 0


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('self.chgheader("X-Header-0", 1, "changed")', "pass", "4 changes by the filter"),
        ("return Milter.REJECT", "return Milter.CONTINUE", "a refused recipient: answer"),
        ("self.told = hostname", "keep.append(open('/dev/null')); self.told = ''", "descriptors: "),
    ],
)  # fmt: skip
def test_a_filter_that_does_wrong_fails(tmp_path: Path, old: str, new: str, told: str) -> None:
    copy = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", copy)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    source = (copy / "filters" / "soak.py").read_text()
    assert old in source
    source = source.replace(old, new).replace("class Raised", "keep = []\n\n\nclass Raised", 1)
    (copy / "filters" / "soak.py").write_text(source)
    judge = (copy / "soak.py").read_text().replace("ENDING = 90.0", "ENDING = 0.5")
    (copy / "soak.py").write_text(judge)
    done = soak("--messages", "300", script=copy / "soak.py")
    assert done.returncode == 1, done.stderr
    assert told in done.stdout
    assert "FAILED" in done.stdout


@pytest.fixture(scope="module")
def module() -> Any:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = loaded  # for its dataclasses
    spec.loader.exec_module(loaded)
    return loaded


def samples(module: Any, rss: list[int]) -> list[Any]:
    return [
        module.Sample(i, i * 1000, i * 1000, each, 8, 7, i, i, 0, 0, 5)
        for i, each in enumerate(rss)
    ]


@pytest.mark.parametrize(
    ("rss", "grown"),
    [
        ([1, 9, *[10] * 40, 99, *[10] * 20], 0),  # a moment's peak is no growth
        ([1, 5, *range(10, 60)], 40),
        ([*[50] * 30, *[20] * 30], -30),
        ([1, 2, 9], None),  # the last alone is settled
    ],
)
def test_growth_is_that_after_the_beginning(module: Any, rss: list[int], grown: int | None) -> None:
    assert module.growth(samples(module, rss), 2000) == grown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"deleted": 9}, "10 contexts created, 9 deleted"),
        ({"in_progress": 1}, "1 messages and 0 callbacks are left"),
        ({"inside": 1}, "0 messages and 1 callbacks are left"),
        ({"descriptors": 9}, "descriptors: 8 before, 9 after"),
        ({"threads": 8}, "threads: 7 before, 8 after"),
        ({}, None),
    ],
)
def test_what_is_left_is_a_fault(module: Any, change: dict[str, int], told: str | None) -> None:
    before = module.Sample(0, 0, 0, 1, 8, 7, 10, 10, 0, 0, 5)
    report = {"errors": 0, "error": "", "raise": 1}
    verdict = module.judge([], before, dataclasses.replace(before, **change), report, 10)
    assert verdict.faults == ([told] if told else [])


def test_growth_and_wrong_answers_are_faults(module: Any) -> None:
    before = module.Sample(0, 0, 0, 1, 8, 7, 10, 10, 0, 0, 5)
    report = {"errors": 3, "error": "eom: answer 'r'", "raise": 1}
    many = samples(module, [0] * 20 + [1 << 20] * 20)
    assert module.judge(many, before, before, report, 0).faults == [
        "memory grew by 1024 KiB after 0 messages",
        "3 wrong answers, the first: eom: answer 'r'",
    ]


@pytest.fixture
def result(module: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a run has seen: sixty samples, in which nothing leaks."""
    many = samples(module, [20 << 20] * 60)
    report = {"errors": 0, "error": "", "raise": 1, "connections": 60_000, "messages": 60_000}
    after = dataclasses.replace(many[-1], seconds=61.0)
    verdict = module.judge(many, many[0], after, report, 30_000)
    found = {
        "verdict": dataclasses.asdict(verdict),
        "load": report,
        "before": dataclasses.asdict(many[0]),
        "after": dataclasses.asdict(after),
        "samples": [dataclasses.asdict(sample) for sample in many],
    }
    monkeypatch.setattr(module, "run", lambda options, directory: found)
    return found


def test_the_conclusion_says_what_was_judged(
    module: Any, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main([]) == 0
    said = capsys.readouterr().out
    assert "memory grew by 0 KiB after 30,000" in said
    assert said.endswith("OK: nothing leaks\n")


def test_a_run_too_short_for_memory_does_not_say_that_nothing_leaks(
    module: Any, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result["verdict"]["growth"] = None
    assert module.main([]) == 0
    said = capsys.readouterr().out
    assert "memory not judged" in said
    assert "nothing leaks" not in said


def test_a_fault_is_told(
    module: Any, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result["verdict"]["faults"] = ["threads: 7 before, 8 after"]
    assert module.main([]) == 1
    assert capsys.readouterr().out.endswith("FAULT: threads: 7 before, 8 after\nFAILED\n")


def test_the_plot(module: Any, result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="scripts/soak installs matplotlib")
    picture = tmp_path / "soak.svg"
    assert module.main(["--plot", str(picture)]) == 0
    drawn = picture.read_text()
    for text in ("60,000 connections, 60,000 messages", "resident set", "threads", "contexts"):
        assert f"<!-- {text}" in drawn
