"""Writes docs/mta-differences.md from what the cases declare: differences.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.case import Case
from integration.cases import CASES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mta-differences.md"
NAMES = {"postfix": "Postfix", "sendmail": "sendmail", "mock": "`Milter.mta`"}

HEAD = """\
# Where MTAs differ

Postfix and sendmail speak one protocol and do not always mean the same by it. Each line here is
declared in a case of `tests/integration/cases/`, which runs on the mock (`Milter.mta`, in Postfix's
manner), on Postfix and on sendmail, and fails when the MTA does otherwise. What is not listed was
the same on all three. Seen with Postfix 3.7 and sendmail 8.17.

This page is made by `python tests/integration/differences.py`.
"""


def rows(cases: Sequence[Case]) -> dict[str, dict[tuple[str, str], list[str]]]:
    """The names of the cases, by topic, then by MTA and sentence."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for case in cases:
        for one in case.differs:
            for mta in one.mta.split():
                table = found.setdefault(case.topic, {})
                table.setdefault((mta, one.why), []).append(case.name)
    return found


def _shown(names: Sequence[str]) -> str:
    text = "; ".join(names[:3])
    return text if len(names) <= 3 else f"{text}; and {len(names) - 3} more"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("@", "&#64;")


def page(cases: Sequence[Case] = CASES) -> str:
    """The text of the page."""
    parts = [HEAD]
    for topic, table in rows(cases).items():
        lines = [f"\n## {topic}\n", "| MTA | what it does | cases |", "|---|---|---|"]
        for (mta, why), names in table.items():
            lines.append(f"| {NAMES[mta]} | {_cell(why)} | {_cell(_shown(names))} |")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def summary(cases: Sequence[Case] = CASES) -> str:
    """How many cases there are, and how many differences they declare."""
    counts = dict.fromkeys(NAMES, 0)
    sentences = set()
    for table in rows(cases).values():
        for (mta, why), names in table.items():
            counts[mta] += len(names)
            sentences.add((mta, why))
    shown = ", ".join(f"{NAMES[mta].strip('`')} {count}" for mta, count in counts.items())
    return (
        f"{len(cases)} cases on {len(NAMES)} MTAs; {sum(counts.values())} declared differences "
        f"({shown}) in {len(sentences)} sentences"
    )


def main() -> int:
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            print(f"{PAGE} is out of date: run {Path(__file__).name}", file=sys.stderr)
            return 1
        return 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
