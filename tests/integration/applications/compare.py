"""Compare results of run.py, and print a table: compare.py [--update-docs FILE] DIRECTORY...

Each DIRECTORY, named after the run, holds ``before.json`` from Debian's own python3-milter and
``after.json`` from this package.  Two runs differ by nature in a few things (NATURE), which are
taken out; what dkimpy says of each signature itself is compared.  Ends with 1 where anything else
differs, where a case is missing on either side, or where there are fewer cases than there should
be.  FILE is written anew where nothing is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

# What changes between any two runs, what stands for it, what it is, and why it changes.
NATURE = (
    (r"(?m)^([ \t]*by mx\.test \(Postfix\) with E?SMTP id )\w+", r"\1ID",
     "the queue identifier in `Received`", "Postfix makes a new one for each message"),
    (r"queued as \w+", "queued as ID",
     "the queue identifier in the reply to the message", "likewise"),
    (r"\w{3}, [ \d]?\d \w{3} 20\d\d \d\d:\d\d:\d\d [+-]\d{4}(?: \(\w+\))?", "TIME",
     "times in headers", "the runs are one after the other"),
    (r"\bt=\d{9,}", "t=TIME",
     "`t=` of `DKIM-Signature`", "the time of signing"),
    (r"(?s)(\bb=)[A-Za-z0-9+/=\s]+?(?=;|\r\n\S)", r"\1SIGNATURE",
     "`b=` of `DKIM-Signature`", "it signs `t=` too; whether it is valid is compared"),
    (r"\bheader\.b=[\w+/]+", "header.b=SIGNATURE",
     "`header.b=` of `Authentication-Results`", "the beginning of that `b=`"),
)  # fmt: skip

# Two configurations, each with no fewer cases than this.
CONFIGURATIONS = 2
CASES = 36


class Run(NamedTuple):
    """One comparison."""

    name: str
    before: dict[str, Any]
    after: dict[str, Any]


def normalised(value: Any) -> Any:
    """The result without what changes by nature."""
    if isinstance(value, dict):
        return {key: normalised(each) for key, each in value.items()}
    if isinstance(value, list):
        return [normalised(each) for each in value]
    if isinstance(value, str):
        head, separator, body = value.partition("\r\n\r\n")
        for pattern, stand_in, _, _ in NATURE:
            head = re.sub(pattern, stand_in, head + separator)[: -len(separator) or None]
        return head + separator + body
    return value


def outcome(case: dict[str, Any]) -> str:
    """One line on what happened."""
    if "said" not in case:
        return "; ".join(f"{name}: {', '.join(words)}" for name, words in case.items())
    # What the replies say in words is compared too, but is too long to show.
    codes = (re.match(r"\S+: [45]\d\d(?: \d\.\d+\.\d+)?", line) for line in case["said"])
    words = [f"{len(case['arrived'])} delivered"] if case["arrived"] else []
    words += sorted({code[0] for code in codes if code})
    heads = "".join(message.partition("\r\n\r\n")[0] for message in case["arrived"])
    results = sorted(set(re.findall(r"\b(?:dkim|spf)=\w+", heads)))
    if case["signatures"]:
        valid = [judgement == "valid" for each in case["signatures"] for judgement in each]
        if valid:
            results.append(f"{sum(valid)} of {len(valid)} signatures valid")
    return "; ".join([*words, *results])


def cases(result: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """What happened, by configuration and case."""
    return {
        (configuration, case): normalised(what)
        for configuration, found in result["cases"].items()
        for case, what in found.items()
    }


def faults(run: Run) -> list[str]:
    """What is wrong, a line each; nothing where both are the same, complete, and not one thing."""
    old, new = cases(run.before), cases(run.after)
    found = []
    for side, result in (("before", run.before), ("after", run.after)):
        counts = [len(each) for each in result["cases"].values()]
        if len(counts) < CONFIGURATIONS or min(counts) < CASES:
            found.append(f"{run.name}: too few cases {side}: {counts}")
    if run.before["versions"]["pymilter"] == run.after["versions"]["pymilter"]:
        found.append(f"{run.name}: compared with itself")
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            found.append(f"{run.name}: {': '.join(key)}")
            texts = [json.dumps(each.get(key), indent=1).splitlines() for each in (old, new)]
            found += difflib.unified_diff(*texts, "before", "after", n=2, lineterm="")
    return found


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|---" * len(cells) + "|"]


def table(runs: list[Run]) -> list[str]:
    """All cases of all runs; a case that ended differently in two of them has a line for each."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for run in runs:
        old, new = cases(run.before), cases(run.after)
        for key in [*old, *(key for key in new if key not in old)]:
            same = key in old and old[key] == new.get(key)
            line = lines.setdefault((*key, outcome(new.get(key, {}))), {})
            line[run.name] = "the same" if same else "DIFFERENT"
    order = {key: place for place, key in enumerate(dict.fromkeys(line[:2] for line in lines))}
    names = [run.name for run in runs]
    return [
        *head("Configuration", "Case", "Outcome", *names),
        *(
            row(*line, *(lines[line].get(name, "") for name in names))
            for line in sorted(lines, key=lambda line: order[line[:2]])
        ),
    ]


def versions(runs: list[Run]) -> list[str]:
    """What was compared with what."""
    names = dict.fromkeys(name for run in runs for name in run.after["versions"])
    lines = head("", *(run.name for run in runs))
    old = [run.before["versions"]["pymilter"] for run in runs]
    lines.append(row("pymilter, Debian's own", *old))
    for name in names:
        shown = "pymilter, this one" if name == "pymilter" else name
        lines.append(row(shown, *(run.after["versions"].get(name, "none there") for run in runs)))
    return lines


PAGE = """\
# Applications on this package

Applications that others wrote for pymilter must run on this package as they are. Two were run
unchanged behind a real Postfix: dkimpy-milter, which signs with DKIM and verifies, and
pyspf-milter, which refuses by SPF; with a DNS server, clients and a next hop on the loopback
interface. First on Debian's own python3-milter, then on this package in its place. What every
client was told, and every message that arrived at the next hop, was compared byte for byte.

`scripts/test-apps --update-docs` does it in fresh trees of Debian, and writes this page. It fails
where anything differs. Last run on {date}:

{versions}

In the trees that bear a suite's name, python3-milter was replaced by the package that
`scripts/build-deb` made. In those with pip there is neither a compiler nor libmilter: `pip install
dkimpy-milter 'spf-engine[milter]'` (pyspf-milter is part of spf-engine) found this package's wheel
for the `pymilter` that both require, and what they do there is compared with Debian's own, too.

## What was compared

"shipped" is pyspf-milter as Debian configures it, with RSA signatures and both filters on TCP;
"strict" adds Ed25519 signatures, simple canonicalisation and a unix socket, and has pyspf-milter
refuse on errors and write `Authentication-Results`. In both, dkimpy-milter signs what it verifies,
as the sender's domain is its own: a message leaves with one signature more for each key.

{table}

{count} cases, no difference.

## What is not compared

It changes between any two runs, and something constant stands for it in both:

{nature}

Message bodies are compared as they are.
"""


def page(runs: list[Run], date: datetime.date) -> str:
    nature = [*head("What", "Why"), *(row(what, why) for _, _, what, why in NATURE)]
    return PAGE.format(
        date=date.isoformat(),
        versions="\n".join(versions(runs)),
        table="\n".join(table(runs)),
        count=sum(len(cases(run.after)) for run in runs),
        nature="\n".join(nature),
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--update-docs", type=Path, metavar="FILE")
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIRECTORY")
    given = parser.parse_args(arguments)
    runs = [
        Run(directory.name, *(
            json.loads((directory / f"{name}.json").read_text()) for name in ("before", "after")
        ))
        for directory in given.directories
    ]  # fmt: skip
    print("\n".join([*versions(runs), "", *table(runs)]))
    found = [line for run in runs for line in faults(run)]
    print(f"\n{sum(len(cases(run.after)) for run in runs)} cases, {len(found)} lines of faults")
    if found:
        print("\n".join(found))
        return 1
    if given.update_docs:
        today = datetime.datetime.now(datetime.timezone.utc).date()
        given.update_docs.write_text(page(runs, today), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
