"""Names of files: what a system makes of one, and which are dangerous."""

from __future__ import annotations

import re
import unicodedata
import urllib.parse
from collections.abc import Iterator

from Milter._mime.limits import settings

_OVERRIDES = re.compile("[\u202d\u202e\u2066-\u2068]")
_BLANKS = " \t\r\n.\"'<>;,"
_CLSID = re.compile(r"\{[0-9a-f-]+\}?\Z")


def compatible_forms(text: str) -> str:
    """Each character as its compatibility form (Unicode's NFKC), on its own.

    The ASCII that hides in other characters comes out just as well.  Of the whole text, NFKC
    sorts the combining marks that follow one another, in a time quadratic in their number.
    """
    forms = {ord(c): unicodedata.normalize("NFKC", c) for c in set(text) if c > "\x7f"}
    return text.translate(forms)


def _name_readings(name: str) -> Iterator[str]:
    """The names that a system might make of `name` when it writes the file."""
    yield name
    if "\0" in name or "%00" in name:
        cut = re.split("\0|%00", name, maxsplit=1)[0]
        yield cut
        yield urllib.parse.unquote(cut)
    if "%" in name:
        yield urllib.parse.unquote(name)
    if not name.isascii():
        yield compatible_forms(name)


def extensions(name: str) -> Iterator[str]:
    """The extensions, with the dot and in lower case, that a system might see in `name`."""
    for reading in _name_readings(name):
        visible = "".join(c for c in reading if unicodedata.category(c) not in ("Cc", "Cf"))
        for piece in re.split(r":(?=\S)", visible):  # NTFS: name:stream
            tail = re.split(r"[/\\]", piece.rstrip(_BLANKS + "/\\\u3000\xa0"))[-1]
            _, dot, extension = tail.rstrip(_BLANKS).rpartition(".")
            if dot:
                yield "." + extension.strip().lower()


def check_ext(name: str | None) -> str | None:
    """Whether the extension of a name is in `bad_extensions`.

    Looks through what hides an extension: trailing dots and blanks, invisible and control
    characters, compatibility forms, alternate streams.  A name that reverses the direction of
    writing is bad in itself.

    Args:
        name: the name of a file, or None.

    Returns:
        `name` where it is bad, else None ('' for '').

    >>> check_ext('picture.gif.EXE . ')
    'picture.gif.EXE . '
    >>> check_ext('report.pdf')
    """
    if not name:
        return name
    if _OVERRIDES.search(name):
        return name
    bad = set(settings.bad_extensions)
    for extension in extensions(name):
        if extension in bad or extension[1:] in bad or _CLSID.match(extension, 1):
            return name
    return None
