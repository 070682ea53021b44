"""Which of Python's codecs reads mail that names a charset.

Mail names charsets as IANA registers them, and in ways of its own; Python's codecs know half of
these names. And some names are too narrow for what is written under them: ``gb2312`` covers what
is GBK. A codec that decodes more is only asked where the one that was named fails, so that what
the charset has reads as its codec reads it.
"""

from __future__ import annotations

import codecs
import encodings
import encodings.aliases
import functools
import pkgutil
import re

__all__ = ["codec_for", "decode"]

#: The longest name that is looked at; IANA registers none that is longer (RFC 2978 section 2.3).
_LONGEST = 64

# Codecs of Python's that are no charsets: between bytes and bytes or str and str, parts of other
# protocols, notations of programming languages. Two are also slow on hostile input.
_NOT_CHARSETS = frozenset(
    """
    base64_codec bz2_codec charmap hex_codec idna mbcs oem palmos punycode quopri_codec
    raw_unicode_escape rot_13 undefined unicode_escape uu_codec zlib_codec
    """.split()  # noqa: SIM905 - read as a list of words
)

# Names that Python's aliases lack: registered ones, then what mail programs write. Compared without
# punctuation, and after a leading "cs" or "x-" is taken off, so that neither stands here.
_LABELS = {
    "ascii": "ISO_646.irv:1983 ISO_646.basic:1983 INVARIANT iso-ir-2 irv ref csISO2IntlRefVersion",
    "big5": "cn-big5 big5-eten",
    "cp1250": "ISO-8859-2-Windows-Latin-2 csWindows31Latin2 ms-ee",
    "cp1251": "ms-cyrl",
    "cp1252": "ISO-8859-1-Windows-3.0-Latin-1 ISO-8859-1-Windows-3.1-Latin-1 csWindows30Latin1"
    " csWindows31Latin1 ms-ansi",
    "cp1253": "ms-greek",
    "cp1254": "ISO-8859-9-Windows-Latin-5 csWindows31Latin5 ms-turk",
    "cp1255": "ms-hebr",
    "cp1256": "ms-arab",
    "latin_1": "iso-latin-1",
    "cp1140": "ebcdic-us-37+euro",
    "cp858": "PC-Multilingual-850+euro",
    "cp932": "Windows-31J sjis-win mac-japanese",
    "cp949": "windows-ks-c-5601",
    "euc_jp": "Extended_UNIX_Code_Packed_Format_for_Japanese csEUCPkdFmtJapanese euc"
    " eucjp-ms eucjp-win eucjp-open",
    # From Python 3.15 on these are names of cp949 there, which _WIDER has.
    "euc_kr": "KS_C_5601-1987 KS_C_5601-1989 KS_C_5601 KSC_5601 csKSC56011987 iso-ir-149 korean"
    " ks-x-1001 mac-korean ksc5601-1992 ksx1001-1992",
    "gbk": "mac-chinesesimp",
    "big5hkscs": "big5-hkscs-2004",
    "cp950": "mac-chinesetrad",
    "gb2312": "cn-gb cn-gb-isoir165",
    "iso2022_jp": "JIS_Encoding csJISEncoding jis iso-2022-jp-ms",
    "iso2022_jp_ext": "CP50220 CP50221 CP50222",
    "iso8859_6": "ISO-8859-6-E ISO-8859-6-I",
    "iso8859_7": "sun_eu_greek",
    "iso8859_8": "ISO-8859-8-E ISO-8859-8-I logical visual",
    "koi8_r": "koi8 koi",
    "koi8_u": "koi8-ru",
    "mac_croatian": "mac-hr",
    "mac_cyrillic": "mac-ukrainian",
    "mac_iceland": "mac-icelandic",
    "mac_latin2": "mac-ce mac-eastern-europe mac-central-eur-roman",
    "mac_roman": "mac macos-roman",
    "mac_romanian": "mac-romania",
    "shift_jis": "JIS_X0201 x0201 csHalfWidthKatakana",
    "tis_620": "tis-620-2533",
    "utf_16": "ISO-10646-UCS-2 ucs-2 unicode iso-10646-1 unicodefeff",
    "utf_32": "ISO-10646-UCS-4 ucs-4",
    "utf_7": "unicode-2-0-utf-7 unicode20utf7 csUnicode20UTF7 utf-7-imap",
    "utf_8": "CESU-8 unicode-1-1-utf-8 unicode-2-0-utf-8 unicode20utf8 unicode11utf8 utf8mb3"
    " utf8mb4 utf-8-mac utf-8n",
}

# The numbers of code pages, Microsoft's and IBM's, that are other charsets than "cp" and the number
# in Python.
_CODE_PAGES = {
    "878": "koi8_r",
    "936": "gbk",
    "943": "cp932",
    "1200": "utf_16_le",
    "1201": "utf_16_be",
    "10000": "mac_roman",
    "10001": "cp932",
    "10002": "cp950",
    "10003": "euc_kr",
    "10004": "mac_arabic",
    "10006": "mac_greek",
    "10007": "mac_cyrillic",
    "10008": "gbk",
    "10010": "mac_romanian",
    "10017": "mac_cyrillic",
    "10029": "mac_latin2",
    "10079": "mac_iceland",
    "10081": "mac_turkish",
    "10082": "mac_croatian",
    "12000": "utf_32_le",
    "12001": "utf_32_be",
    "1361": "johab",
    "20127": "ascii",
    "20866": "koi8_r",
    "20932": "euc_jp",
    "20936": "gb2312",
    "20949": "euc_kr",
    "21866": "koi8_u",
    "38598": "iso8859_8",
    "50220": "iso2022_jp_ext",
    "50221": "iso2022_jp_ext",
    "50222": "iso2022_jp_ext",
    "50225": "iso2022_kr",
    "51932": "euc_jp",
    "51936": "gb2312",
    "51949": "euc_kr",
    "52936": "hz",
    "54936": "gb18030",
    "65000": "utf_7",
    "65001": "utf_8",
    **{str(28590 + n): f"iso8859_{n}" for n in (*range(1, 12), *range(13, 17))},
}

# What mail under a charset's name may really be, the narrowest first: each decodes what the one
# before it does, some characters of it differently.
_WIDER = {
    "gb2312": ("gbk", "gb18030"),
    "gbk": ("gb18030",),
    "euc_kr": ("cp949",),
    "shift_jis": ("cp932",),
    "big5": ("cp950", "big5hkscs"),
    "cp950": ("big5hkscs",),
    "euc_jp": ("euc_jis_2004",),
    "iso2022_jp": ("iso2022_jp_ext", "iso2022_jp_2", "iso2022_jp_3", "iso2022_jp_2004"),
    "iso2022_jp_1": ("iso2022_jp_ext", "iso2022_jp_2"),
    "tis_620": ("cp874",),
}

_CODE_PAGE = re.compile("(?:cp|ibm|ms|win|windows|ansi|ccsid|mscp|microsoftcp|dos|oem)0*([0-9]+)")
_ISO_8859 = re.compile("(?:iso)?8859([0-9]{1,2})")


def codec_for(label: str, *, widest: bool = True) -> str | None:
    """Return the codec for the text that mail has under a charset's name.

    It is the widest: ``gb18030`` for ``gb2312``, as much is GBK that says so. In any case, with
    any punctuation; registered names, and those that mail programs make up.

    Args:
        label: the name as the mail gives it, however long or odd
        widest: False takes the name at its word, ``gb2312``

    Returns:
        The name of a codec between bytes and str; None for a name that is no charset's, or whose
        charset Python does not have.
    """
    names = _codecs_for(label)
    return names[-1 if widest else 0] if names else None


def decode(data: bytes, label: str) -> str | None:
    """Decode text under a charset's name; what the charset lacks becomes U+FFFD.

    Args:
        data: the bytes
        label: the name as the mail gives it

    Returns:
        The text, read by the narrowest codec that has all of it; None where there is none for
        the name.
    """
    texts = []
    for name in _codecs_for(label):
        try:
            return data.decode(name)
        except UnicodeError:
            texts.append(data.decode(name, "replace"))
    return min(texts, key=lambda text: text.count("\ufffd")) if texts else None


def _codecs_for(label: str) -> tuple[str, ...]:
    """Return the codecs for a name, the one that it means first."""
    if len(label) > _LONGEST or not label.isascii():
        return ()
    key = _squeeze(label)
    known = _known()
    name = known.get(key) or _numbered(key)
    while name is None and key.startswith(("x", "cs")):
        key = key[1:] if key.startswith("x") else key[2:]
        name = known.get(key) or _numbered(key)
    return _usable(name) if name else ()


def _squeeze(label: str) -> str:
    """Leave out what spellings of one name differ in."""
    return re.sub("[^a-z0-9]+", "", label.lower())


def _numbered(key: str) -> str | None:
    """Return the codec for a code page or a part of ISO 8859 that is named by its number."""
    page = _CODE_PAGE.fullmatch(key)
    if page:
        return _CODE_PAGES.get(page[1]) or _known().get("cp" + page[1])
    part = _ISO_8859.fullmatch(key)
    return _known().get("iso8859" + part[1]) if part else None


@functools.cache
def _known() -> dict[str, str]:
    """Return the codecs by the names they go under, without punctuation.

    Python's own are read rather than asked for, as it keeps every name that it was ever asked for.
    """
    known = {_squeeze(m.name): m.name for m in pkgutil.iter_modules(encodings.__path__)}
    known.update((_squeeze(alias), name) for alias, name in encodings.aliases.aliases.items())
    known = {key: name for key, name in known.items() if name not in _NOT_CHARSETS}
    known.pop("aliases", None)
    for name, labels in _LABELS.items():
        known.update(dict.fromkeys(map(_squeeze, labels.split()), name))
    return known


@functools.cache
def _usable(name: str) -> tuple[str, ...]:
    """Return a codec's canonical name and those of its wider ones, without any that cannot decode.

    There are as many as Python has codecs.
    """
    usable = []
    for codec in (name, *_WIDER.get(name, ())):
        try:
            found = codecs.lookup(codec).name
            b"a".decode(found, "replace")  # refuses what is no codec between bytes and str
        except (LookupError, ValueError, TypeError):
            continue
        usable.append(found)
    return tuple(usable)
