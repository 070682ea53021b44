"""Whether libmilter and the licences are in a wheel: wheel_contents.py [WHEEL].

Of the wheel, or of the pymilter that this interpreter imports.  Ends with 1 and names what is not
there: each file by itself, as one of them proves nothing of the others.
"""

from __future__ import annotations

import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

# auditwheel puts libraries into pymilter.libs, delocate (macOS) into a directory *.dylibs.
WANTED = {
    "libmilter": r"(?:pymilter\.libs|(?:[^/]+/)?[^/]*\.dylibs)/libmilter[^/]*",
    "its licence": r"pymilter-[^/]+\.dist-info/licenses/LICENSE\.libmilter",
    "the licence": r"pymilter-[^/]+\.dist-info/licenses/COPYING",
    "the module": r"milter\.[^/]*\.so",
    "the MTA's side": r"Milter/mta/__init__\.py",
    "the commands": r"Milter/_cli/__init__\.py",
}
EXPRESSION = "License-Expression: GPL-2.0-or-later AND Sendmail-8.23"


def in_wheel(path: Path) -> tuple[list[str], str]:
    """The names of a wheel's files, and its metadata."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return names, wheel.read(about).decode()


def installed() -> tuple[list[str], str]:
    """The names of the files that are installed, and their metadata."""
    distribution = metadata.distribution("pymilter")
    names = [str(file) for file in distribution.files or [] if Path(file.locate()).is_file()]
    return names, distribution.read_text("METADATA") or ""


def missing(names: list[str], about: str) -> list[str]:
    """What there should be and is not."""
    lacks = [
        f"{what} ({pattern})"
        for what, pattern in WANTED.items()
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    return lacks if EXPRESSION in about.splitlines() else [*lacks, EXPRESSION]


def main(arguments: list[str]) -> int:
    names, about = in_wheel(Path(arguments[0])) if arguments else installed()
    lacks = missing(names, about)
    for each in lacks:
        print(f"error: not in the wheel: {each}", file=sys.stderr)
    if not lacks:
        print("In the wheel:", *sorted(n for n in names if "libmilter" in n or "COPYING" in n))
    return bool(lacks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
