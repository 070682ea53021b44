"""Runs the cases with another pymilter, as a black box: blackbox.py [--only MTA] [PYTHON].

PYTHON is an interpreter that has that pymilter; without it, pymilter 1.0.5 is installed from PyPI
into .venvs/blackbox (needs a compiler and libmilter's headers).  Prints, as a Markdown table, the
cases that do not come out as they do with this project's package, and what was seen instead.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("PYMILTER_TEST_WAIT", "8")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.case import MTAS, Case, problems
from integration.cases import CASES, portable
from integration.laboratory import Bench, missing

from Milter.mta import MTAError

VERSION = "1.0.5"
# The others have no Milter.portable.
COMPARED = tuple(case for case in CASES if case.topic != portable.TOPIC)
VENV = Path(__file__).resolve().parents[2] / ".venvs" / "blackbox"


def install() -> str:
    """The interpreter of an environment that has the published pymilter."""
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "setuptools", f"pymilter=={VERSION}"],
        check=True,
    )
    return str(python)


class Subject:
    """A bench with the other pymilter, made anew where a case has left it useless."""

    def __init__(self, mta: str, python: str) -> None:
        self._mta = mta
        self._python = python
        self._bench: Bench | None = None

    def fails(self, case: Case) -> str:
        """What is wrong in *case*, in a line; empty where it comes out right."""
        if self._bench is None:
            self._bench = Bench(self._mta, self._python)
        try:
            found = problems(case.on(self._mta), self._bench.run(case))
        except (MTAError, TimeoutError, OSError, RuntimeError) as exc:
            self.close()
            return f"no outcome: {str(exc).splitlines()[0]}"
        return "; ".join(" ".join(text.split()) for text in found)

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()
            self._bench = None


def compare(mtas: list[str], python: str) -> dict[str, dict[str, str]]:
    """What fails, by case and MTA."""
    failures: dict[str, dict[str, str]] = {}
    for mta in mtas:
        subject = Subject(mta, python)
        try:
            for case in COMPARED:
                print(f"{mta}: {case.name}", file=sys.stderr, flush=True)
                if text := subject.fails(case):
                    failures.setdefault(case.name, {})[mta] = text
        finally:
            subject.close()
    return failures


def table(failures: dict[str, dict[str, str]]) -> str:
    lines = ["| case | on | what was seen instead |", "|---|---|---|"]
    for name, by_mta in failures.items():
        text = next(iter(by_mta.values()))[:200].replace("|", "\\|")
        lines.append(f"| {name} | {', '.join(by_mta)} | {text} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", choices=MTAS, help="one MTA instead of all")
    parser.add_argument("python", nargs="?", help="an interpreter that has the other pymilter")
    options = parser.parse_args()
    mtas = [mta for mta in MTAS if options.only in (None, mta)]
    for mta in list(mtas):
        if reason := missing(mta):
            print(f"without {mta}: {reason}", file=sys.stderr)
            mtas.remove(mta)
    failures = compare(mtas, options.python or install())
    print(table(failures))
    print(f"\n{len(failures)} of {len(COMPARED)} cases fail on at least one of {', '.join(mtas)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
