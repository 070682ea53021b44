#!/usr/bin/env python3
"""Which innocent mail `mime.defang` alters, and why, in a corpus made of packages.

usage: mime_corpus.py DIRECTORY [--show N]

Below DIRECTORY, each folder is one source: messages (.eml, .txt, msg_*), and HTML of mail and
templates for it (.html, .hbs, ...), which is put into a message.  An HTML parser that is not ours
(lexbor) says what has scripts; of the others at most 1 % may be altered, none of the `STRICT`
sources, and what is not altered is written as it was read, byte for byte.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import hashlib
import io
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from selectolax.lexbor import LexborHTMLParser  # type: ignore[import-not-found,unused-ignore]

import mime

STRICT = ("mjml", "foundation", "mailchimp", "postmark", "cerberus", "mailgen", "react-email")
MESSAGES = (".eml", ".mbox", ".msg.txt")
PAGES = (".html", ".htm", ".hbs", ".handlebars", ".mustache", ".ejs", ".liquid", ".jinja2", ".j2")
HTML_TYPES = ("text/html", "application/xhtml+xml", "image/svg+xml")
LIMIT = 0.01
_HEADER = re.compile(rb"(?mi)^(?:from|to|subject|received|mime-version|content-type)[ :]")
_SCHEME = re.compile("(?:javascript|vbscript|livescript):|data:[^,]*(?:html|xml|script)[^,]*,")
_STYLE = re.compile(
    r"expression\s*\(|(?<![a-z-])(?:behavior|-moz-binding)\s*:[^;{}]*url(?!\(['\"]?#default#)"
    r"|url\(\s*['\"]?javascript:",
    re.IGNORECASE,
)
_CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_OPAQUE = ("-comment", "noscript", "iframe", "noframes", "noembed", "title", "textarea", "xmp")


def has_scripts(html: str, depth: int = 0) -> bool:
    """Whether HTML has scripts, by a parser of another make; what some readers see included."""
    for node in LexborHTMLParser(html).root.traverse(include_text=False):
        tag = node.tag or ""
        if tag.rpartition(":")[2].startswith("script"):
            return True
        if tag == "style" and _STYLE.search(_CSS_COMMENT.sub("", node.text(deep=True) or "")):
            return True
        if tag in _OPAQUE and depth < 2:
            inner = node.html or ""
            inner = inner[4:-3] if tag == "-comment" else (node.text(deep=True) or "")
            if "<" in inner and has_scripts(inner, depth + 1):
                return True
        if any(_runs(name, value or "") for name, value in node.attributes.items()):
            return True
    return False


def _runs(name: str, value: str) -> bool:
    link = re.sub(r"[\x00-\x20]", "", value).lower()
    return bool(
        (re.match("on[a-z]", name) and value)
        or name == "srcdoc"
        or (_SCHEME.match(link) and name not in ("alt", "title"))
        or (name == "content" and re.match(r"[0-9.]*[;,]url=['\"]?javascript:", link))
        or (name == "style" and _STYLE.search(value))
    )


def _html_parts(raw: bytes) -> Iterator[str]:
    for part in email.message_from_bytes(raw, policy=email.policy.compat32).walk():
        if part.is_multipart():
            continue
        name = (part.get_filename() or part.get_param("name") or "") if part else ""
        named = str(name).lower().endswith((".htm", ".html", ".svg", ".xml"))
        if part.get_content_type() in HTML_TYPES or named:
            payload = part.get_payload(decode=True)
            yield payload.decode("latin-1") if isinstance(payload, bytes) else ""


def messages(root: Path) -> Iterator[tuple[str, Path, bytes]]:
    """(source, path, message) of all that is below; what is the same twice only once."""
    seen = set()
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.stat().st_size > 4_000_000:
            continue
        source = path.relative_to(root).parts[0]
        suffix = path.suffix.lower()
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            continue
        seen.add(digest)
        if suffix in MESSAGES or (suffix == ".txt" and _looks_like_mail(data)):
            yield source, path, data
        elif suffix in PAGES and b"<" in data:
            yield source, path, _message(data)


def _looks_like_mail(data: bytes) -> bool:
    head = data[:20_000].partition(b"\n\n")[0]
    return len(_HEADER.findall(head)) > 1


def _message(html: bytes) -> bytes:
    """A message with this HTML, as a newsletter is sent."""
    head = b"From: news@example.com\nMIME-Version: 1.0\nContent-Transfer-Encoding: 8bit\n"
    return head + b"Content-Type: text/html; charset=utf-8\n\n" + html


def _difference(before: bytes, after: bytes) -> str:
    """The first thing that is not what it was."""
    pos = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), 0)
    start = max(before.rfind(b"<", 0, pos + 1), pos - 60, 0)
    return repr(before[start : pos + 60].decode("latin-1"))


class Tally:
    """What was seen of one source."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.altered: list[tuple[Path, str]] = []

    def add(self, path: Path, raw: bytes) -> None:
        """Try one message."""
        pages = list(_html_parts(raw))
        scripts = any(map(has_scripts, pages))
        msg = mime.message_from_file(io.BytesIO(raw))
        # names are another matter: a program among the attachments is no innocent mail
        altered = mime.defang(msg, check=lambda name: None)
        written = msg.as_bytes()
        self.counts["messages"] += 1
        self.counts["with HTML"] += bool(pages)
        self.counts["scripts"] += scripts
        if not altered and written != raw:
            self.counts["not identical"] += 1
            self.altered.append((path, "NOT IDENTICAL"))
        if altered and scripts:
            self.counts["scripts taken out"] += 1
        elif altered:
            self.counts["altered"] += 1
            self.altered.append((path, _difference(raw, written)))
        elif scripts:
            self.counts["scripts left"] += 1
            self.altered.append((path, "SCRIPTS LEFT"))


COLUMNS = (
    "messages",
    "with HTML",
    "scripts",
    "scripts taken out",
    "scripts left",
    "altered",
    "not identical",
)


def _report(tallies: dict[str, Tally], show: int) -> bool:
    total: Counter[str] = Counter()
    print(f"{'source':32}" + "".join(f"{name:>18}" for name in COLUMNS))
    for source, tally in sorted(tallies.items()):
        total.update(tally.counts)
        print(f"{source[:31]:32}" + "".join(f"{tally.counts[name]:18}" for name in COLUMNS))
    print(f"{'all':32}" + "".join(f"{total[name]:18}" for name in COLUMNS))
    for source, tally in sorted(tallies.items()):
        for path, why in tally.altered[:show]:
            print(f"  {source}: {path.name}: {why}")
    innocent = total["with HTML"] - total["scripts"]
    share = total["altered"] / max(innocent, 1)
    print(f"altered: {total['altered']} of {innocent} with HTML and without scripts, {share:.2%}")
    strict = [s for s, t in tallies.items() if s.startswith(STRICT) and t.counts["altered"]]
    if strict:
        print("none may be altered of: " + ", ".join(strict))
    return share <= LIMIT and not strict and not total["not identical"]


def main() -> int:
    """Go through the corpus and print the table."""
    options = argparse.ArgumentParser(description="What mime.defang alters of innocent mail")
    options.add_argument("directory", type=Path)
    options.add_argument("--show", type=int, default=5, help="examples for each source")
    arguments = options.parse_args()
    logging.getLogger("mime").setLevel(logging.CRITICAL)
    tallies: dict[str, Tally] = {}
    for count, (source, path, raw) in enumerate(messages(arguments.directory), 1):
        tallies.setdefault(source, Tally()).add(path, raw)
        if not count % 50 and sys.stderr.isatty():
            print(f"\r{count} messages, {source[:40]:40}", end="", file=sys.stderr, flush=True)
        elif not count % 500:
            print(f"{count} messages", file=sys.stderr, flush=True)
    return 0 if _report(tallies, arguments.show) else 1


if __name__ == "__main__":
    sys.exit(main())
