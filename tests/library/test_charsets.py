"""The charsets that mail names, and the codecs that read them."""

from __future__ import annotations

import codecs
import encodings.aliases

import pytest

from Milter import _charsets
from Milter.utils import parse_header

# The registered names (iana.org/assignments/character-sets) of all charsets that Python has a codec
# for, one charset a line or two: the codec first, and after it the names.
REGISTRY = """
ascii US-ASCII iso-ir-6 ANSI_X3.4-1968 ANSI_X3.4-1986 ISO_646.irv:1991 ISO646-US us
ascii IBM367 cp367 csASCII
iso8859-1 ISO_8859-1:1987 iso-ir-100 ISO_8859-1 ISO-8859-1 latin1 l1 IBM819 CP819 csISOLatin1
iso8859-2 ISO_8859-2:1987 iso-ir-101 ISO_8859-2 ISO-8859-2 latin2 l2 csISOLatin2
iso8859-3 ISO_8859-3:1988 iso-ir-109 ISO_8859-3 ISO-8859-3 latin3 l3 csISOLatin3
iso8859-4 ISO_8859-4:1988 iso-ir-110 ISO_8859-4 ISO-8859-4 latin4 l4 csISOLatin4
iso8859-5 ISO_8859-5:1988 iso-ir-144 ISO_8859-5 ISO-8859-5 cyrillic csISOLatinCyrillic
iso8859-6 ISO_8859-6:1987 iso-ir-127 ISO_8859-6 ISO-8859-6 ECMA-114 ASMO-708 arabic csISOLatinArabic
iso8859-6 ISO_8859-6-E csISO88596E ISO-8859-6-E ISO_8859-6-I csISO88596I ISO-8859-6-I
iso8859-7 ISO_8859-7:1987 iso-ir-126 ISO_8859-7 ISO-8859-7 ELOT_928
iso8859-7 ECMA-118 greek greek8 csISOLatinGreek
iso8859-8 ISO_8859-8:1988 iso-ir-138 ISO_8859-8 ISO-8859-8 hebrew csISOLatinHebrew
iso8859-8 ISO_8859-8-E csISO88598E ISO-8859-8-E ISO_8859-8-I csISO88598I ISO-8859-8-I
iso8859-9 ISO_8859-9:1989 iso-ir-148 ISO_8859-9 ISO-8859-9 latin5 l5 csISOLatin5
iso8859-10 ISO-8859-10 iso-ir-157 l6 ISO_8859-10:1992 csISOLatin6 latin6
iso8859-11 ISO-8859-11
iso8859-13 ISO-8859-13 csISO885913
iso8859-14 ISO-8859-14 iso-ir-199 ISO_8859-14:1998 ISO_8859-14 latin8 iso-celtic l8 csISO885914
iso8859-15 ISO-8859-15 ISO_8859-15 Latin-9 csISO885915
iso8859-16 ISO-8859-16 iso-ir-226 ISO_8859-16:2001 ISO_8859-16 latin10 l10 csISO885916
shift_jis Shift_JIS csShiftJIS
cp932 MS_Kanji Windows-31J csWindows31J
euc_jp Extended_UNIX_Code_Packed_Format_for_Japanese csEUCPkdFmtJapanese EUC-JP CP51932 csCP51932
iso2022_jp ISO-2022-JP csISO2022JP JIS_Encoding csJISEncoding
iso2022_jp_2 ISO-2022-JP-2 csISO2022JP2
iso2022_jp_ext CP50220 csCP50220
euc_kr KS_C_5601-1987 iso-ir-149 KS_C_5601-1989 KSC_5601 korean csKSC56011987 EUC-KR csEUCKR
iso2022_kr ISO-2022-KR csISO2022KR
gb2312 GB_2312-80 iso-ir-58 chinese csISO58GB231280 GB2312 csGB2312
hz HZ-GB-2312
gbk GBK CP936 MS936 windows-936 csGBK
gb18030 GB18030 csGB18030
big5 Big5 csBig5
big5hkscs Big5-HKSCS csBig5HKSCS
utf-7 UTF-7 csUTF7 UNICODE-1-1-UTF-7 csUnicode11UTF7
utf-8 UTF-8 csUTF8 CESU-8 csCESU8 csCESU-8
utf-16 UTF-16 csUTF16 ISO-10646-UCS-2
utf-16-be UTF-16BE csUTF16BE
utf-16-le UTF-16LE csUTF16LE
utf-32 UTF-32 csUTF32 ISO-10646-UCS-4 csUCS4
utf-32-be UTF-32BE csUTF32BE
utf-32-le UTF-32LE csUTF32LE
cp1252 ISO-8859-1-Windows-3.0-Latin-1 csWindows30Latin1
cp1252 ISO-8859-1-Windows-3.1-Latin-1 csWindows31Latin1
cp1250 ISO-8859-2-Windows-Latin-2 csWindows31Latin2
cp1254 ISO-8859-9-Windows-Latin-5 csWindows31Latin5
hp-roman8 hp-roman8 roman8 r8 csHPRoman8
mac-roman macintosh mac csMacintosh
cp437 IBM437 cp437 437 csPC8CodePage437
cp775 IBM775 cp775 csPC775Baltic
cp850 IBM850 cp850 850 csPC850Multilingual
cp852 IBM852 cp852 852 csPCp852
cp855 IBM855 cp855 855 csIBM855
cp857 IBM857 cp857 857 csIBM857
cp858 IBM00858 CCSID00858 CP00858 PC-Multilingual-850+euro csIBM00858
cp860 IBM860 cp860 860 csIBM860
cp861 IBM861 cp861 861 cp-is csIBM861
cp862 IBM862 cp862 862 csPC862LatinHebrew
cp863 IBM863 cp863 863 csIBM863
cp864 IBM864 cp864 csIBM864
cp865 IBM865 cp865 865 csIBM865
cp866 IBM866 cp866 866 csIBM866
cp869 IBM869 cp869 869 cp-gr csIBM869
cp037 IBM037 cp037 ebcdic-cp-us ebcdic-cp-ca ebcdic-cp-wt ebcdic-cp-nl csIBM037
cp273 IBM273 CP273 csIBM273
cp424 IBM424 cp424 ebcdic-cp-he csIBM424
cp500 IBM500 CP500 ebcdic-cp-be ebcdic-cp-ch csIBM500
cp1026 IBM1026 CP1026 csIBM1026
cp1140 IBM01140 CCSID01140 CP01140 ebcdic-us-37+euro csIBM01140
koi8-r KOI8-R csKOI8R
koi8-u KOI8-U csKOI8U
ptcp154 PTCP154 csPTCP154 PT154 CP154 Cyrillic-Asian
kz1048 KZ-1048 STRK1048-2002 RK1048 csKZ1048
tis-620 TIS-620 csTIS620
cp874 windows-874 cswindows874
cp1250 windows-1250 cswindows1250
cp1251 windows-1251 cswindows1251
cp1252 windows-1252 cswindows1252
cp1253 windows-1253 cswindows1253
cp1254 windows-1254 cswindows1254
cp1255 windows-1255 cswindows1255
cp1256 windows-1256 cswindows1256
cp1257 windows-1257 cswindows1257
cp1258 windows-1258 cswindows1258
"""
REGISTERED = [
    (label, line.split()[0]) for line in REGISTRY.split("\n") if line for label in line.split()[1:]
]

# What mail programs write without asking IANA.
IN_USE = {
    "x-sjis": "shift_jis",
    "sjis": "shift_jis",
    "shift-jis": "shift_jis",
    "x-ms-cp932": "cp932",
    "ms932": "cp932",
    "x-euc-jp": "euc_jp",
    "x-gbk": "gbk",
    "cn-gb": "gb2312",
    "x-x-big5": "big5",
    "x-windows-949": "cp949",
    "ks_c_5601": "euc_kr",
    "cp-850": "cp850",
    "ibm-850": "cp850",
    "x-mac-roman": "mac-roman",
    "x-mac-ce": "mac-latin2",
    "x-mac-centraleurroman": "mac-latin2",
    "ms-ansi": "cp1252",
    "MS-CYRL": "cp1251",
    "ISO-Latin-1": "latin-1",
    "ibm-943": "cp932",
    "x-mac-cyrillic": "mac-cyrillic",
    "win-1251": "cp1251",
    "x-cp1251": "cp1251",
    "ansi-1252": "cp1252",
    "windows_1252": "cp1252",
    "cp65001": "utf-8",
    "windows-28605": "iso8859-15",
    "iso8859_15": "iso8859-15",
    "8859-1": "iso8859-1",
    "koi8-ru": "koi8-u",
    "utf8": "utf-8",
    "utf8mb4": "utf-8",
    "x-utf-8": "utf-8",
    '"utf-8"': "utf-8",
}

NO_CHARSETS = [
    "",
    "-",
    "x-",
    "x",
    "cs",
    "csx-cs",
    "x-unknown",
    "unknown-8bit",
    "x-user-defined",
    "8bit",
    "cp",
    "cp0",
    "cp99999999",
    "windows-0x4e4",
    "iso-8859-12",
    "iso-8859-99",
    "viscii",
    "utf-9",
    "b\u00fccher",
    "utf-8\ud800",
    "u" * 100_000,
    "cp" + "8" * 62,
    "aliases",
    "base64",
    "bz2",
    "charmap",
    "hex",
    "idna",
    "mbcs",
    "punycode",
    "quopri",
    "raw_unicode_escape",
    "rot13",
    "undefined",
    "unicode_escape",
    "uu",
    "zlib",
]


@pytest.mark.parametrize(("label", "codec"), REGISTERED)
def test_registered_names_mean_their_charset(label: str, codec: str) -> None:
    # What both read alike tells which one it is without a word on wider ones.
    for spelling in (label, label.lower(), label.upper()):
        assert _means(spelling) == codecs.lookup(codec).name


@pytest.mark.parametrize(("label", "codec"), IN_USE.items())
def test_names_in_use_mean_their_charset(label: str, codec: str) -> None:
    assert _means(label) == codecs.lookup(codec).name


@pytest.mark.parametrize("label", NO_CHARSETS)
def test_other_names_mean_nothing(label: str) -> None:
    assert _charsets.codec_for(label) is None
    assert _charsets.decode(b"abc", label) is None


def test_pythons_names_mean_what_they_mean_to_python() -> None:
    for alias, module in encodings.aliases.aliases.items():
        if _charsets.codec_for(alias) is not None:
            meant = {codecs.lookup(module).name}
            if meant == {"cp949"}:
                # From Python 3.15 on it has the names of KS C 5601 too.
                meant.add("euc_kr")
            assert _means(alias) in meant, alias


def test_each_codec_decodes() -> None:
    for label, _ in REGISTERED:
        codec = _charsets.codec_for(label)
        assert codec is not None
        assert isinstance(b"abc".decode(codec, "replace"), str)


def _means(label: str) -> str | None:
    return _charsets.codec_for(label, widest=False)


WIDER = [
    ("gb2312", b"\x87\xe2", "gbk"),
    ("GB_2312-80", b"\x87\xe2", "gbk"),
    ("csISO58GB231280", b"\x87\xe2", "gbk"),
    ("chinese", b"\x87\xe2", "gbk"),
    ("gb2312", b"\x81\x30\x81\x30", "gb18030"),
    ("gbk", b"\x81\x30\x81\x30", "gb18030"),
    ("x-gbk", b"\x81\x30\x81\x30", "gb18030"),
    ("ks_c_5601-1987", b"\x8cc", "cp949"),
    ("KS_C_5601-1989", b"\x8cc", "cp949"),
    ("korean", b"\x8cc", "cp949"),
    ("euc-kr", b"\x8cc", "cp949"),
    ("shift_jis", b"\x87\x40", "cp932"),
    ("x-sjis", b"\xfa\x40", "cp932"),
    ("euc-jp", b"\xad\xa1", "euc_jis_2004"),
    ("big5", b"\xf9\xd6", "cp950"),
    ("big5", b"\x87\x40", "big5hkscs"),
    ("iso-2022-jp", b"\x1b(I1\x1b(B", "iso2022_jp_ext"),
    ("tis-620", b"\xa0\xa1", "cp874"),
]


@pytest.mark.parametrize(("label", "data", "codec"), WIDER)
def test_what_is_written_under_a_narrow_name_is_read(label: str, data: bytes, codec: str) -> None:
    want = data.decode(codec)
    assert "\ufffd" not in want
    assert _charsets.decode(data, label) == want
    word = "".join(f"={byte:02x}" for byte in data)
    assert parse_header(f"=?{label}?q?{word}?=") == want


@pytest.mark.parametrize(
    ("label", "data"),
    [("gb2312", b"\xa1\xaa"), ("shift_jis", b"\x81\x60"), ("big5", b"\xa1\x45")],
)
def test_what_the_charset_has_reads_as_it_did(label: str, data: bytes) -> None:
    assert _charsets.decode(data, label) == data.decode(label)


@pytest.mark.parametrize("label", ["gb2312", "big5", "shift_jis", "euc-kr", "iso-2022-jp", "ascii"])
def test_bytes_of_no_charset_lose_no_more_than_with_its_own_codec(label: str) -> None:
    data = b"ab\xff\xffcd\x80"
    text = _charsets.decode(data, label)
    assert text is not None
    assert text.startswith("ab")
    assert text.count("\ufffd") <= data.decode(label, "replace").count("\ufffd")
