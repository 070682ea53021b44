"""Completion by the shell: ``python -m Milter --print-completion bash``."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.process import WAIT

#: Where what is tested is installed.
PACKAGES = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))

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


#: How each shell is asked what it offers at the end of @LINE@, with the script evaluated before.
ASKING = {
    "bash": """
COMP_WORDS=(@LINE@) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
COMP_LINE="${COMP_WORDS[*]}" COMP_POINT=${#COMP_LINE} COMP_TYPE=9
function=$(complete -p python3 | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function" "${COMP_WORDS[0]}" "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
""",
    # What stands in for zsh's own functions prints what it is given.
    "zsh": """
_describe() { print -rl -- "${(P@)2}" "${@[3,-1]}"; }
words=(@LINE@) CURRENT=$#words PREFIX=$words[-1]
$function
""",
    "fish": """complete -C "$(string join -- ' ' @LINE@)" """,
}
SHELLS = {
    "bash": ["bash", "--norc", "-c"],
    "zsh": ["zsh", "-f", "-c"],
    "fish": ["fish", "--no-config", "-c"],
}
BEFORE = {"zsh": "compdef() { function=$1; }; _default() { :; }\n"}

#: bash is there wherever there are tests; scripts/test installs the others.
each_shell = pytest.mark.parametrize("shell", [each for each in SHELLS if shutil.which(each)])


@functools.cache
def script_for(shell: str) -> str:
    pytest.importorskip("argcomplete")
    done = completion("--print-completion", shell)
    assert done.returncode == 0, done.stderr
    return done.stdout


def completed(shell: str, directory: Path, *words: str) -> list[str]:
    """What the shell offers at the end of a line, without descriptions."""
    script = script_for(shell)
    # The one of these tests, by a name for which the script asks.
    (directory / "python3").symlink_to(sys.executable)
    line = " ".join(map(repr, [f"{directory}/python3", *words]))
    code = f"{BEFORE.get(shell, '')}{script}\n{ASKING[shell].replace('@LINE@', line)}"
    done = subprocess.run(
        [*SHELLS[shell], code],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
        env={**os.environ, "HOME": str(directory), "PYTHONPATH": PACKAGES},
    )
    assert done.stderr == ""
    found = re.findall(r"^[^:\t\n]+", done.stdout, flags=re.MULTILINE)
    return sorted(word.rstrip() for word in found)


@each_shell
def test_commands_are_completed(tmp_path: Path, shell: str) -> None:
    assert completed(shell, tmp_path, "-m", "Milter", "c") == ["check", "config"]


@each_shell
def test_options_of_a_command_are_completed(tmp_path: Path, shell: str) -> None:
    words = ("-m", "Milter", "run", "--drain")
    assert completed(shell, tmp_path, *words) == ["--drain-timeout"]


@each_shell
def test_values_of_an_option_are_completed(tmp_path: Path, shell: str) -> None:
    words = ("-m", "Milter", "run", "--log-format", "")
    assert completed(shell, tmp_path, *words) == ["json", "text"]


@each_shell
def test_other_modules_are_left_alone(tmp_path: Path, shell: str) -> None:
    assert completed(shell, tmp_path, "-m", "http.server", "c") == []


@pytest.mark.parametrize(
    ("shell", "more", "answer"),
    [
        ("bash", {}, "check\013config"),
        (
            "zsh",
            {"_ARGCOMPLETE_IFS": "\n"},
            (
                "check:say whether a filter answers, and what it negotiates\n"
                "config:print what makes Postfix or sendmail use a filter, or do it"
            ),
        ),
        (
            "fish",
            {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_DFS": "\t"},
            (
                "check\tsay whether a filter answers, and what it negotiates\n"
                "config\tprint what makes Postfix or sendmail use a filter, or do it"
            ),
        ),
    ],
)
def test_what_the_shells_are_answered(shell: str, more: dict[str, str], answer: str) -> None:
    """Where they are not there to ask."""
    line = "python3 -m Milter c"
    environment = {
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE": "3",
        "_ARGCOMPLETE_SHELL": shell,
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        **more,
    }
    script = script_for(shell)
    assert all(name in script for name in environment)
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 8>&1 9>/dev/null >/dev/null 2>&1', "sh", *COMMAND],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
        env={**os.environ, **environment},
    )
    separator = environment.get("_ARGCOMPLETE_IFS", "\013")
    assert sorted(done.stdout.split(separator)) == answer.split(separator)


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
