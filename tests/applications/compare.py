"""Compare two results of run.py, and print a table: compare.py BEFORE AFTER.

Two runs differ by nature in times, in Postfix's queue identifiers, and in signatures over the time
of signing (tags t and b of DKIM-Signature): those are taken out.  What dkimpy says of each
signature itself is compared.  Ends with 1 where anything else differs.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any

# What changes between any two runs, and what stands for it.
NATURE = (
    (r"(?m)^([ \t]*by mx\.test \(Postfix\) with E?SMTP id )\w+", r"\1ID"),
    (r"\w{3}, [ \d]?\d \w{3} 20\d\d \d\d:\d\d:\d\d [+-]\d{4}(?: \(\w+\))?", "TIME"),
    (r"\bt=\d{9,}", "t=TIME"),
    (r"(?s)(\bb=)[A-Za-z0-9+/=\s]+?(?=;|\r\n\S)", r"\1SIGNATURE"),
    (r"\bheader\.b=[\w+/]+", "header.b=SIGNATURE"),
    (r"queued as \w+", "queued as ID"),
)  # fmt: skip


def normalised(value: Any) -> Any:
    """The result without what changes by nature."""
    if isinstance(value, dict):
        return {key: normalised(each) for key, each in value.items()}
    if isinstance(value, list):
        return [normalised(each) for each in value]
    if isinstance(value, str):
        head, separator, body = value.partition("\r\n\r\n")
        for pattern, stand_in in NATURE:
            head = re.sub(pattern, stand_in, head + separator)[: -len(separator) or None]
        return head + separator + body
    return value


def outcome(case: dict[str, Any]) -> str:
    """One line on what happened."""
    if "said" not in case:
        return "; ".join(f"{name}: {', '.join(words)}" for name, words in case.items())
    refused = [line for line in case["said"] if re.match(r"\S+: [45]", line)]
    words = [f"{len(case['arrived'])} delivered"] if case["arrived"] else []
    words += sorted({line.split("  ")[0][:60] for line in refused})
    heads = "".join(message.partition("\r\n\r\n")[0] for message in case["arrived"])
    results = sorted(set(re.findall(r"\b(?:dkim|spf)=\w+", heads)))
    if case["signatures"]:
        valid = [judgement == "valid" for each in case["signatures"] for judgement in each]
        if valid:
            results.append(f"{sum(valid)} of {len(valid)} signatures valid")
    return "; ".join([*words, *results])


def main(before: Path, after: Path) -> int:
    old, new = (normalised(json.loads(path.read_text())) for path in (before, after))
    differences = 0
    print("| Configuration | Case | Outcome | Compared with Debian's own |\n|---|---|---|---|")
    for name in old:
        for case in old[name]:
            same = old[name][case] == new.get(name, {}).get(case)
            differences += not same
            shown = outcome(new.get(name, {}).get(case, {}))
            print(f"| {name} | {case} | {shown} | {'the same' if same else 'DIFFERENT'} |")
    cases = sum(len(each) for each in old.values())
    print(f"\n{cases} cases, {differences} differences")
    if differences or old.keys() != new.keys():
        texts = [json.dumps(each, indent=1).splitlines() for each in (old, new)]
        print("\n".join(difflib.unified_diff(*texts, "before", "after", n=2, lineterm="")))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
