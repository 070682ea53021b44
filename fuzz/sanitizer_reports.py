#!/usr/bin/env python3
"""Print those of a sanitizer's reports that name the module: sanitizer_reports.py DIRECTORY.

Ends with status 1 where there are any. What does not name it is counted by kind: leaks that the
interpreter, or another extension, leaves at its exit.
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "miltermodule.c", *ROOT.glob("src/**/*.c")]
# CPython has files of these names too; what is in ours was called from another of our files.
SHARED_NAMES = {"call.c", "context.c"}
PATHS = "|".join(re.escape(path.relative_to(ROOT).as_posix()) for path in SOURCES)
NAMES = "|".join(re.escape(path.name) for path in SOURCES if path.name not in SHARED_NAMES)
# A frame in the module: by the module's file, or by a source's, which valgrind names without its
# directory.
MODULE = re.compile(
    rf"\bmilter\.(?:cpython|abi3)[^/\s]*\.so|(?<![\w.-])(?:{PATHS}):\d+|(?<![\w./-])(?:{NAMES}):\d+"
)
# The C library's record of what to call when a thread ends: reached from thread-local storage only,
# where LeakSanitizer does not look (see scripts/test-sanitizers).  And libmilter's copies of the
# filter's name and of its socket, which it forgets at the next smfi_register() and smfi_setconn().
# And what a thread of Python begins with, which is freed as it ends: a daemon that a callback
# started, such as that of Milter.mailfilter's progress, has not ended by the exit.
NO_LEAK = re.compile(
    r"(?:Direct|Indirect) leak of .*\n +#0 .*\n +#1 \S+ in "
    r"(?:__cxa_thread_atexit_impl|smfi_register|smfi_setconn|thread_PyThread_start_new_thread)"
)
# libmilter has lost the packet that it called us for: as the interpreter exited it ended a thread
# in the middle of a callback, and what stood on its stack is lost with it.
THREAD_LOST = re.compile(r"leak of .*\n +#0 .*\n +#1 \S+ in mi_rd_cmd")
# Where a report, or one leak of a report, begins.
BEGIN = re.compile(
    r"(?m)^(?=(?:==\d+==)?(?:==\d+== ?)?ERROR: AddressSanitizer|Direct leak of|Indirect leak of|"
    r"WARNING: ThreadSanitizer|\S+:\d+:\d+: runtime error|"
    r"==\d+== (?:Invalid|Conditional|Use of|Syscall|Mismatched|Source and|Argument|Process term))"
)
KIND = re.compile(r"Direct leak|Indirect leak|ERROR: \w+: [\w-]+|runtime error|Sanitizer: [\w ]+")


def main() -> int:
    ours: dict[str, str] = {}
    others: collections.Counter[str] = collections.Counter()
    files = sorted(Path(sys.argv[1]).glob("report*"))
    for path in files:
        text = path.read_text(errors="replace")
        no_leak = re.compile("(?:Direct|Indirect) leak") if THREAD_LOST.search(text) else NO_LEAK
        for report in BEGIN.split(text):
            if MODULE.search(report) and not no_leak.match(report):
                ours.setdefault(re.sub(r"0x[0-9a-f]+|==\d+==|\d+ byte\S*", "", report), report)
            elif report.strip():
                kind = KIND.search(report)
                others[kind[0] if kind else "other"] += 1
    for report in list(ours.values())[:200]:
        print(report.strip()[:6000], end="\n\n")
    told = ", ".join(f"{count} {kind}" for kind, count in others.most_common(6)) or "none"
    print(f"{len(files)} files, {len(ours)} reports that name the module; others: {told}")
    return min(len(ours), 1)


if __name__ == "__main__":
    sys.exit(main())
