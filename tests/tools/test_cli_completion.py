"""Completion by the shell: ``python -m Milter --print-completion bash``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.process import WAIT

COMMAND = [sys.executable, "-m", "Milter"]


def completion(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def completed(line: str, directory: Path) -> list[str]:
    """What bash offers at the end of a line."""
    pytest.importorskip("argcomplete")
    script = completion("--print-completion", "bash")
    assert script.returncode == 0, script.stderr
    words = line.split(" ")
    asking = (
        f"{script.stdout}\n"
        f"COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9 COMP_CWORD={len(words) - 1}\n"
        f"COMP_WORDS=({' '.join(repr(word) for word in words)})\n"
        "function=$(complete -p python3 | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        f'"$function" {sys.executable} "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"\n'
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", asking],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stderr == ""
    return sorted(word.rstrip() for word in done.stdout.splitlines() if word)


def test_commands_are_completed(tmp_path: Path) -> None:
    assert completed("python3 -m Milter c", tmp_path) == ["check", "config"]


def test_options_of_a_command_are_completed(tmp_path: Path) -> None:
    assert completed("python3 -m Milter run --drain", tmp_path) == ["--drain-timeout"]


def test_values_of_an_option_are_completed(tmp_path: Path) -> None:
    line = "python3 -m Milter run --log-format "
    assert completed(line, tmp_path) == ["json", "text"]


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    assert completed("python3 -m http.server c", tmp_path) == []


def test_without_the_library_it_is_named() -> None:
    code = (
        "import sys; sys.modules['argcomplete'] = None\n"
        "from Milter.__main__ import main; main(['--print-completion', 'bash'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "python -m Milter: error: --print-completion needs the Python package argcomplete: "
        "pip install argcomplete"
    )


def test_another_shell_is_refused() -> None:
    done = completion("--print-completion", "csh")
    assert done.returncode == 2
    assert "invalid choice: 'csh'" in done.stderr
