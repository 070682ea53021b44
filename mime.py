"""MIME messages that can be taken apart, made harmless and written back byte for byte.

`message_from_file` reads a message into a tree of `MimeMessage`, which are the standard library's
`email.message.Message` with a memory: what nobody changed is written back exactly as it came in,
down to the last byte, and the other parts around it too.

>>> import io
>>> raw = b'Subject:  odd   spacing\\r\\n\\tkept\\nContent-type:text/plain\\n\\nHi\\r\\n'
>>> msg = message_from_file(io.BytesIO(raw))
>>> msg.as_bytes() == raw, msg.ismodified()
(True, False)

`defang` replaces attachments with dangerous names by a warning and takes the scripts out of HTML.
`check_name`, `check_html` and `check_attachments` are its steps, for filters that want their own.

The input is hostile.  Everything here takes linear time (up to the nesting depth), and these
bounds hold; a part that exceeds one counts as dangerous, is replaced by a warning that says which,
and is logged to the logger ``mime``.  Assign to the names to change them.

=================== ========= ===================================================================
`MAX_DEPTH`         50        messages and multiparts within each other
`MAX_PARTS`         10,000    parts of one message
`MAX_PARAMETERS`    1,000     parameters in the Content-Type or Content-Disposition of a part
`MAX_NAME_TEXT`     65,536    characters in all Content-Types and Content-Dispositions of a part,
                              and in one name
`MAX_BOUNDARY`      1,000     characters in a boundary (RFC 2046 allows 70)
`MAX_HEADER_LINES`  100,000   lines in the headers of one message and its parts
`MAX_MARKUP`        750,000   tags, and the like, in one message's HTML that are not quite plain
`MAX_SECONDS`       30.0      time to read, or to check, one message
`MAX_UNPACKED`      100 MiB   bytes unpacked from the archives of one message
`MAX_ZIP_DEPTH`     5         zips within each other
`MAX_ZIP_NAMES`     10,000    names in one zip and the zips in it
`MAX_ZIP_NAME`      4,096     bytes, or characters, in one of these names
`MAX_ZIP_EXTRA`     4 MiB     extra fields in the directory of one zip
=================== ========= ===================================================================

Memory has no bound of its own, it goes with the size of the message.  Reading and checking takes 4
to 9 bytes for each byte of ordinary mail.  Of 10 MB of hostile mail (lines of one character,
headers, parts, nesting, folds, parameters: ``benchmarks/mime_hostile.py``) reading and writing
takes at most 10 s on a core of a small server and 20 times the size; what would take more is
suspicious at one of the bounds.  Have the MTA refuse what is too large for that times the messages
that come at once (Postfix: ``message_size_limit``), or count in the body callback.

Not looked into, but judged by the names that the part itself has:

- archives and packed files other than zip: tar, gzip (but for drawings, ``.svgz``), 7z, rar, cab
  and others; of zips, and zips within them, the names are looked at (`scan_zip`), not the files
- TNEF (``winmail.dat``), opaque S/MIME (``application/pkcs7-mime``), and whatever is encrypted
- what ``message/external-body`` has a reader fetch from elsewhere, and the whole that it makes
  of the pieces in ``message/partial``: only what stands in the mail itself can be checked
- what documents hold: macros, objects, links

A filter that wants none of these refuses them by type (`get_content_type`) or by name (`check`).

Names are looked for in Content-Type and Content-Disposition, and where those give none in
Content-Name, X-Sun-Data-Name, Content-Description and Content-Location; an address, a host within a
sentence, or a text of more than 255 characters is no name.  Content-ID, Content-Base and
X-Attachment-Id name no files.

Charsets are those that Python brings along and the names in ``encodings.aliases``: a codec of your
own needs an entry there.  Mail may name no other, as Python keeps every name it is asked for.
"""

from __future__ import annotations

import email
import re
import socket
import sys
import zipfile
from email import encoders, message_from_binary_file
from email.generator import BytesGenerator
from email.message import Message
from email.utils import quote
from io import BytesIO, StringIO

import Milter
from Milter._mime.defang import Defang as _defang
from Milter._mime.defang import check_attachments, check_html, check_name
from Milter._mime.fields import parseparam as _parseparam  # noqa: F401  # as pymilter's
from Milter._mime.fields import unquote
from Milter._mime.html import HTMLScriptFilter, SGMLFilter
from Milter._mime.limits import LimitExceeded
from Milter._mime.message import MimeGenerator, MimeMessage, message_from_file
from Milter._mime.message import unquote_value as _unquotevalue  # noqa: F401
from Milter._mime.names import check_ext
from Milter._mime.zips import zipnames
from Milter.sgmllib import SGMLParser as HTMLParser

__all__ = [
    "HTMLScriptFilter",
    "MimeGenerator",
    "MimeMessage",
    "SGMLFilter",
    "bad_extensions",
    "check_attachments",
    "check_ext",
    "check_html",
    "check_name",
    "defang",
    "extlist",
    "message_from_file",
    "unquote",
    "virus_msg",
    "zipnames",
    # what applications find here, or get by "from mime import *", with pymilter
    "BytesGenerator",
    "BytesIO",
    "HTMLParser",
    "Message",
    "Milter",
    "StringIO",
    "email",
    "encoders",
    "message_from_binary_file",
    "quote",
    "re",
    "socket",
    "sys",
    "zipfile",
]

MAX_DEPTH = 50
MAX_PARTS = 10_000
MAX_PARAMETERS = 1_000
MAX_NAME_TEXT = 65_536
MAX_BOUNDARY = 1_000
MAX_HEADER_LINES = 100_000
MAX_MARKUP = 750_000
MAX_SECONDS = 30.0
MAX_UNPACKED = 100 * 1024 * 1024
MAX_ZIP_DEPTH = 5
MAX_ZIP_NAMES = 10_000
MAX_ZIP_NAME = 4_096
MAX_ZIP_EXTRA = 4 * 1024 * 1024

extlist = (
    "ade,adp,asd,asx,asp,bas,bat,chm,cmd,com,cpl,crt,dll,exe,hlp,hta,inf,ins,isp,js,jse,lnk,mdb,mde,"
    "msc,msi,msp,mst,ocx,pcd,pif,reg,scr,sct,shs,url,vb,vbe,vbs,wsc,wsf,wsh"
)
"""The extensions that pymilter takes for bad, as it has them."""

bad_extensions = [
    # what pymilter has: see extlist
    *(".ade", ".adp", ".asd", ".asx", ".asp", ".bas", ".bat", ".chm", ".cmd", ".com", ".cpl"),
    *(".crt", ".dll", ".exe", ".hlp", ".hta", ".inf", ".ins", ".isp", ".js", ".jse", ".lnk"),
    *(".mdb", ".mde", ".msc", ".msi", ".msp", ".mst", ".ocx", ".pcd", ".pif", ".reg", ".scr"),
    *(".sct", ".shs", ".url", ".vb", ".vbe", ".vbs", ".wsc", ".wsf", ".wsh"),
    # programs and scripts that Windows, its shells or Java run
    *(".gadget", ".jar", ".jnlp", ".msh", ".msh1", ".msh2", ".mshxml", ".msh1xml", ".msh2xml"),
    *(".ps1", ".ps1xml", ".ps2", ".ps2xml", ".psc1", ".psc2", ".psm1", ".scf", ".shb", ".vxd"),
    *(".ws", ".wsb", ".xbap", ".xll"),
    # packages that it installs
    *(".appcontent-ms", ".appinstaller", ".application", ".appref-ms", ".appx", ".appxbundle"),
    *(".diagcab", ".diagcfg", ".diagpkg", ".msix", ".msixbundle", ".msu", ".theme", ".themepack"),
    # images that it mounts as a drive, without the mark that what is in them came by mail
    *(".img", ".iso", ".vhd", ".vhdx"),
    # links, searches, settings and connections that it follows
    *(".library-ms", ".printerexport", ".rdp", ".search-ms", ".searchconnector-ms"),
    *(".settingcontent-ms", ".udl", ".webpnp", ".website", ".xnk"),
    # data bases of Access, and shortcuts into them, that have code
    *(".mad", ".maf", ".mag", ".mam", ".maq", ".mar", ".mas", ".mau", ".mav", ".maw", ".mda"),
    *(".mdt", ".mdw", ".mdz"),
]
"""Extensions of files that Windows runs, installs, mounts or follows when they are opened, in lower
case and with the dot; change the list in place.

It holds all of pymilter's (`extlist`), and of what Outlook blocks that on which a program of
Windows, Office or Java acts; no source code, web pages or data that people exchange (``.py``,
``.aspx``, ``.cer``, ``.mat``, ``.pst``, ``.tmp``).
``mime.bad_extensions[:] = ["." + e for e in mime.extlist.split(",")]`` is the old list.
"""

virus_msg = (
    "This message appeared to contain a virus.\n"
    "It was originally named '%s', and has been removed.\n"
    "A copy of your original message was saved as '%s:%s'.\n"
    "See your administrator.\n"
)
"""What stands in for a removed part, % (bad name, host name, name of the saved copy)."""

defang = _defang()
"""Make a message harmless: replace parts with bad names, and take scripts out of HTML.

``defang(msg, savname=None, check=check_ext, scan_rfc822=True, scan_zip=False)`` returns whether
anything of the message was modified, here or before.  `savname`, `check` and `scan_zip` are those
of `check_name`; multiparts and attached messages are checked for names of their own.
`scan_rfc822`: look into attached messages.  With ``defang.scan_html = False`` HTML stays as it is.
"""

for _public in (
    *(_defang, HTMLScriptFilter, LimitExceeded, MimeGenerator, MimeMessage, SGMLFilter),
    *(check_attachments, check_ext, check_html, check_name, message_from_file),
    *(unquote, zipnames),
):
    _public.__module__ = __name__
del _public
