"""The comparison of the two engines: it runs, and sees what differs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.process import WAIT

FUZZ = Path(__file__).parents[2] / "fuzz"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")),
    reason="needs a C compiler, and Linux",
)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("fuzz") / "wire"
    compiler = shutil.which("cc") or "gcc"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-pthread"]
    subprocess.run([compiler, *flags, str(FUZZ / "wire.c"), "-o", str(program)], check=True)
    return program


def compare(
    generator: Path, *arguments: str, planted: str = ""
) -> subprocess.CompletedProcess[str]:
    # The filters inherit the environment: in -X dev they would be compared by their warnings.
    environment = {**os.environ, "FUZZ_PLANT": planted, "PYTHONWARNINGS": "", "PYTHONDEVMODE": ""}
    return subprocess.run(
        [sys.executable, str(FUZZ / "differential.py"), str(generator), *arguments],
        capture_output=True, text=True, timeout=4 * WAIT, check=False, env=environment,
        errors="replace",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Bytes", "bare"])
def test_the_engines_answer_alike(generator: Path, kind: str) -> None:
    done = compare(generator, "--kind", kind, "--conversations", "300", "--seed", "17")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "300 conversations on both engines" in done.stdout
    assert " 0 different" in done.stdout
    assert " ends" in done.stdout  # of what no MTA sends there was some


@pytest.mark.parametrize("engine", ["libmilter", "native"])
def test_a_difference_is_found_and_shown(generator: Path, engine: str) -> None:
    arguments = ["--kind", "Strict", "--packets", "orderly", "--seed", "3", "--conversations", "20"]
    done = compare(generator, *arguments, planted=engine)
    assert done.returncode == 1, done.stderr
    assert "differs (Strict):\n--- libmilter\n+++ native\n" in done.stdout
    assert "-  < hX-Noted" in done.stdout
    assert "+  < hX-Noted" in done.stdout
    assert "One again: --seed S --kind K" in done.stdout


def test_a_filter_that_does_not_start_is_an_error(generator: Path, tmp_path: Path) -> None:
    (tmp_path / "milter.py").write_text("raise SystemExit('no such engine')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(FUZZ / "differential.py"), str(generator)],
        capture_output=True, text=True, timeout=WAIT, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: the filter did not start" in done.stderr
    assert "no such engine" in done.stderr
