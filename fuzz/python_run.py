"""Feed the targets of fuzz/targets.py: with atheris, or without it by a small fuzzer of our own.

Both are guided by coverage. Inputs that reach something new are kept in .venvs/fuzz-corpus/, those
that are findings in .venvs/fuzz-found/; what is in fuzz/corpus/ is where it begins.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import random
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SLOW_SECONDS = 5
LONGEST = 4096
NAMES = (
    *("mime", "zip", "html", "xml", "sgml", "header", "networks", "dns", "cache", "access"),
    *("config", "session"),
)


def seeds(name: str) -> list[Path]:
    return sorted((HERE / "corpus" / name).glob("*"))


def run_atheris(name: str, arguments: list[str]) -> None:
    """Runs libFuzzer, which ends the process."""
    import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

    with atheris.instrument_imports(include=["mime", "Milter"]):
        import targets
    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name])
    atheris.Fuzz()


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A few changes at random places."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        where = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[where % len(out)] = rng.randrange(256)
        elif kind == 1:
            out[where:where] = rng.randbytes(rng.randrange(1, 8))
        elif kind == 2:
            del out[where : where + rng.randrange(1, 20)]
        elif kind == 3:
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            out[where:where] = other[begin : begin + rng.randrange(1, 60)]
        elif kind == 4:
            piece = bytes(out[where : where + rng.randrange(1, 30)])
            out[where:where] = piece * rng.randrange(1, 4)
        elif out:
            out[where % len(out)] ^= 1 << rng.randrange(8)
    return bytes(out[:LONGEST])


def run_own(name: str, seconds: float, seed: int, found: Path) -> int:
    """The same without atheris: mutates what reached a new line."""
    import targets

    target = targets.TARGETS[name]
    rng = random.Random(seed)
    reached: set[tuple[str, int]] = set()
    lines: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, argument: object) -> Any:
        path = frame.f_code.co_filename
        if "Milter" not in path and not path.endswith("mime.py"):
            return None
        if event == "line":
            lines.add((path, frame.f_lineno))
        return trace

    corpus = [path.read_bytes() for path in seeds(name)] or [b"", b"a"]
    todo = list(corpus)
    deadline = time.monotonic() + seconds
    runs = 0
    while time.monotonic() < deadline:
        data = todo.pop() if todo else mutate(rng.choice(corpus), corpus, rng)
        lines.clear()
        began = time.monotonic()
        sys.settrace(trace)
        try:
            target(data)
        except Exception:  # noqa: BLE001 - any is a finding
            sys.settrace(None)
            found.joinpath(f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            traceback.print_exc()
            return 1
        finally:
            sys.settrace(None)
        if time.monotonic() - began > SLOW_SECONDS:
            found.joinpath(f"slow-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
            print(f"slower than {SLOW_SECONDS} s")
            return 1
        runs += 1
        if not lines <= reached:
            reached |= lines
            corpus.append(data)
    print(f"Done {runs} runs, cov: {len(reached)} lines, corp: {len(corpus)}")
    return 0


def run_one(name: str, seconds: int, engine: str, seed: int) -> tuple[bool, str]:
    """Feed one target in a process of its own. Whether nothing was found, and the figures."""
    kept = ROOT / ".venvs" / "fuzz-corpus" / name
    found = ROOT / ".venvs" / "fuzz-found" / name
    kept.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--inside", engine, name]
    if engine == "atheris":
        command += [f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-seed={seed}"]
        command += [f"-timeout={SLOW_SECONDS}", f"-artifact_prefix={found}/", "-verbosity=1"]
        dictionary = HERE / "corpus" / f"{name}.dict"
        command += [f"-dict={dictionary}"] if dictionary.exists() else []
        command += ["-rss_limit_mb=2048", str(kept), str(HERE / "corpus" / name)]
    else:
        command += [str(seconds), str(seed), str(found)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    match = re.findall(r"Done \d+ runs.*|cov: \d+ .*corp: \S+", done.stdout)
    figures = "; ".join(dict.fromkeys(match[-2:]))
    if done.returncode:
        print(done.stdout[-6000:])
    return done.returncode == 0, figures


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        engine, name, *rest = sys.argv[2:]
        logging.disable()  # it tells of what was refused
        os.chdir(HERE)
        if engine == "atheris":
            run_atheris(name, rest)
        return run_own(name, float(rest[0]), int(rest[1]), Path(rest[2]))

    parser = argparse.ArgumentParser(prog="scripts/fuzz python", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 1 << 31))
    parser.add_argument("--own", action="store_true", help="without atheris")
    options = parser.parse_args()
    for name in options.targets:
        if name not in NAMES:
            parser.error(f"no such target: {name} (there are {', '.join(NAMES)})")
    engine = "own" if options.own or not importlib.util.find_spec("atheris") else "atheris"
    if engine == "own":
        print("atheris is not used: the fuzzer of our own, guided by sys.settrace")
    failed = []
    for name in options.targets or NAMES:
        good, figures = run_one(name, options.seconds, engine, options.seed)
        print(f"{name:10} {'ok' if good else 'FOUND'}  {figures}", flush=True)
        if not good:
            failed.append(name)
    count = len(options.targets or NAMES)
    print(
        f"{count} targets, {count * options.seconds} s in sum with {engine}, seed {options.seed}: "
        + (f"FINDINGS in {', '.join(failed)}; see .venvs/fuzz-found" if failed else "nothing found")
    )
    return min(len(failed), 1)


if __name__ == "__main__":
    sys.exit(main())
