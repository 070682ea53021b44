"""Shows what comes out of cases on each MTA, for who writes one: show.py [WORD IN THE NAME]."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from integration.case import MTAS, problems
from integration.cases import CASES
from integration.laboratory import Laboratory, missing


def main() -> None:
    laboratory = Laboratory()
    try:
        for case in CASES:
            if any(word not in case.name for word in sys.argv[1:]):
                continue
            for mta in MTAS:
                if missing(mta):
                    continue
                try:
                    outcome = laboratory.bench(mta).run(case)
                except (TimeoutError, OSError) as exc:
                    print(f"*** {case.name}: {mta}: {str(exc)[:1500]}")
                    continue
                found = problems(case.on(mta), outcome)
                print(f"--- {case.name}: {mta}: {'WRONG' if found else 'right'}")
                if found:
                    print("  replies", "; ".join(f"{k}={v[:90]!r}" for k, v in outcome.replies))
                    print("  seen   ", " ".join(str(event[2]) for event in outcome.seen))
                    print("  mail   ", len(outcome.delivered), outcome.held)
                    for text in found:
                        print("   !", text)
    finally:
        laboratory.close()


if __name__ == "__main__":
    main()
