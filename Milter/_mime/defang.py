"""The checks, and what stands in the place of a part that did not pass."""

from __future__ import annotations

import io
import re
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from Milter._mime.boundaries import Boundaries
from Milter._mime.codings import apply, as_bytes, as_str
from Milter._mime.containers import names_in_text
from Milter._mime.fields import is_subject
from Milter._mime.html import check_packed, clean_html, clean_xml
from Milter._mime.limits import CONTINUE, Budget, LimitExceeded, log, settings
from Milter._mime.message import MimeMessage, message_from_file
from Milter._mime.names import check_ext, extensions
from Milter._mime.parsing import BESIDE_CR, EARLY_END, lone_cr_readings
from Milter._mime.xml import GZIP_MAGIC
from Milter._mime.zips import is_zip_name

_PAGE_TYPES = frozenset(("text/html", "text/x-scriptlet"))
_HTML_TYPES = _PAGE_TYPES | {"application/xhtml+xml", "image/svg+xml"}
_MESSAGE_EXTENSIONS = frozenset((".eml", ".mht", ".mhtml", ".nws"))
_PAGE_EXTENSIONS = frozenset((".htm", ".html", ".shtml"))
_DRAWING_EXTENSIONS = frozenset((".xht", ".xhtm", ".xhtml", ".svg"))
_HTML_EXTENSIONS = _PAGE_EXTENSIONS | _DRAWING_EXTENSIONS
# What a browser reads as XML, of which it runs what is XHTML or SVG.
_XML_TYPE = re.compile(r"(?:text|application)/(?:x-)?(?:xml|xsl)|image/svg\b.*|[^/]+/.+\+xml")
_XML_EXTENSIONS = _DRAWING_EXTENSIONS | {
    *(".xml", ".xsl", ".xslt", ".svgz", ".rdf", ".rss", ".atom", ".mml", ".xul")
}


def _replace(msg: MimeMessage, badname: str, savname: object) -> None:
    """Put a warning in the place of a part."""
    shown = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+", " ", badname)
    if len(shown) > 255:  # a line of mail has at most 998 characters
        shown = shown[:255] + "..."
    text = settings.virus_msg % (shown, socket.gethostname(), savname)
    plain = text.isascii()
    if not plain:
        text = as_str(text.encode("utf-8", "replace"))
    msg.set_payload(text)
    msg.preamble = msg.epilogue = None
    msg.limit = msg._misread = None
    msg._other_fields = []
    for header in ("content-type", "content-disposition", "content-transfer-encoding"):
        del msg[header]
    msg["Content-Type"] = "text/plain; name=WARNING.TXT" + ("" if plain else "; charset=utf-8")
    if not plain:
        msg["Content-Transfer-Encoding"] = "8bit"


def check_name(
    msg: MimeMessage,
    savname: object = None,
    ckname: Callable[[str], object] = check_ext,
    scan_zip: bool = False,
) -> int:
    """Replace a part by a warning where any name of it is bad.

    Args:
        msg: the part.
        savname: where the original was saved, for the text of the warning (`virus_msg`).
        ckname: called with each name; what it returns is the bad name, None or '' for a good one.
        scan_zip: look at the names inside of zips too; a zip that cannot be read, or that exceeds
            a bound, is bad, an empty one is not.

    Returns:
        CONTINUE.
    """
    checked_name(msg, savname, ckname, scan_zip, Budget())
    return CONTINUE


def checked_name(
    msg: MimeMessage,
    savname: object,
    ckname: Callable[[str], object],
    scan_zip: bool,
    budget: Budget,
) -> bool:
    """Whether the part had to be replaced."""
    bad: object = msg.suspicion()
    if bad:
        log.warning("part removed: %s", bad)
    else:
        try:
            bad = _bad_name(msg, ckname, scan_zip, budget)
        except LimitExceeded as exc:
            log.warning("part removed: %s", exc)
            bad = exc
    if bad:
        _replace(msg, str(bad), savname)
    return bool(bad)


def _bad_name(
    msg: MimeMessage, ckname: Callable[[str], object], scan_zip: bool, budget: Budget
) -> object:
    names = msg._getnames(False, budget)
    if msg.is_multipart() and msg.get_content_maintype() == "message":
        # mail programs name a message that they attach by its subject
        names = [(attribute, name) for attribute, name in names if not is_subject(name)]
    for name in budget.timed(dict.fromkeys(name for _, name in names)):
        if len(name) > settings.MAX_NAME_TEXT:
            raise LimitExceeded(f"a name of more than {settings.MAX_NAME_TEXT} characters")
        bad = ckname(name) if name else None
        if bad:
            return bad
    if not scan_zip or msg.is_multipart():
        return None
    try:
        inner = dict.fromkeys(n for _, n in msg._zip_names([n for _, n in names], budget))
        for name in inner:
            bad = None if name.endswith("/") else ckname(name)  # of a directory
            if bad:
                log.info("bad name in a zip: %r", name)
                return next((n for _, n in names if is_zip_name(n)), None) or bad
            budget.check_time()
    except (zipfile.BadZipFile, LimitExceeded) as exc:
        log.warning("zip removed: %s", exc)
        return next((n for _, n in names if n), None) or "zip"
    return None


def check_html(msg: MimeMessage, savname: object = None) -> int:
    """Remove the scripts from a part of HTML, or SVG, by its type or by its name.

    The charset and the transfer encoding stay.

    Args:
        msg: the part.
        savname: as for `check_name`, for HTML that takes too long to check and is replaced.

    Returns:
        CONTINUE.
    """
    checked_html(msg, savname, Budget())
    return CONTINUE


def _boundaries(root: MimeMessage, budget: Budget) -> Boundaries:
    """The boundaries of all multiparts of a message; looked for once."""
    known: Boundaries | None = budget.boundaries.get(root)
    if known is None:
        found = (part.get_boundary() for part in root.walk() if part.is_multipart())
        known = Boundaries({as_bytes(b) for b in found if isinstance(b, str)})
        budget.boundaries[root] = known
    return known


_FALLS_APART = "HTML that would fall apart without its scripts"


def checked_html(msg: MimeMessage, savname: object, budget: Budget) -> bool:
    """Whether scripts were taken out; not where the part had to be replaced."""
    if msg.is_multipart() or not isinstance(msg._payload, str):
        return False
    try:
        kinds = _kinds(msg, budget)
        if not kinds:
            return False
        payload = as_bytes(msg._payload)
        encodings = msg._encodings()
        charsets = msg._charsets()
        for encoding, decoded in msg._decoded(payload):
            cleaned = _cleaned(decoded, kinds, charsets, budget)
            if cleaned is not None:
                after = apply(cleaned, encoding)
                forged = not set(names_in_text(cleaned)) <= set(names_in_text(decoded))
                forged = forged or _boundaries(msg._root, budget).forged(payload, after)
                suspicious = msg.suspicion()
                msg.set_payload(after)
                if forged or (msg.suspicion() and not suspicious):
                    raise LimitExceeded(_FALLS_APART)
                if len(encodings) > 1:
                    del msg["Content-Transfer-Encoding"]
                    msg["Content-Transfer-Encoding"] = encoding or "8bit"
                return True
    except LimitExceeded as exc:
        log.warning("HTML removed: %s", exc)
        _replace(msg, str(exc), savname)
    return False


def _cleaned(data: bytes, kinds: set[str], charsets: list[str], budget: Budget) -> bytes | None:
    """A document without scripts, None where it has none.

    A compressed drawing (.svgz) is no HTML, whatever bytes it has; one with a script is replaced
    by a warning, as what would be packed anew were not what was sent either.
    """
    packed = "xml" in kinds and data.startswith(GZIP_MAGIC)
    if packed:
        check_packed(data, budget)
    cleaned = None
    if "page" in kinds or ("html" in kinds and not packed):
        cleaned = clean_html(data, charsets, budget)
    if "xml" in kinds and not packed:
        again = clean_xml(data if cleaned is None else cleaned, charsets, budget)
        cleaned = cleaned if again is None else again
    return cleaned


def _kinds(msg: MimeMessage, budget: Budget) -> set[str]:
    """What a reader takes a part for, by its type or by one of its names: a page, HTML, XML."""
    kinds = set()
    for media_type in msg._media_types():
        if media_type in _PAGE_TYPES:
            kinds.add("page")
        if media_type in _HTML_TYPES:
            kinds.add("html")
        if _XML_TYPE.fullmatch(media_type):
            kinds.add("xml")
    for _, name in budget.timed(msg._getnames(False, budget)):
        found = set(extensions(name[-settings.MAX_NAME_TEXT :]))
        for kind, known in (
            ("page", _PAGE_EXTENSIONS),
            ("html", _HTML_EXTENSIONS),
            ("xml", _XML_EXTENSIONS),
        ):
            if not known.isdisjoint(found):
                kinds.add(kind)
    return kinds


def check_attachments(
    msg: MimeMessage, check: Callable[[Any], int], lev: list[int] | None = None
) -> int:
    """Call a function with each leaf, parts of attached messages included.

    Args:
        msg: the message, or a part.
        check: called with each leaf; the first one for which it does not return CONTINUE is the
            last.
        lev: where `msg` is in the tree, as a list of part numbers; not needed.

    Returns:
        CONTINUE, or what `check` returned instead.
    """
    level = lev or []
    if not msg.is_multipart():
        return check(msg)
    for number, part in enumerate(list(msg._payload), 1):
        verdict = check_attachments(part, check, [*level, number])
        if verdict != CONTINUE:
            return verdict
    return CONTINUE


def _content_types(msg: MimeMessage) -> bytes:
    """The Content-Type headers, each on one line."""
    return b"".join(
        b"Content-Type: " + as_bytes(re.sub(r"[\r\n]+", " ", str(value))) + b"\n"
        for name, value in msg.raw_items()
        if name.lower() == "content-type"
    )


class _Run:
    """One run of `defang`: its arguments and what it may still use."""

    def __init__(
        self,
        owner: Defang,
        savname: object,
        check: Callable[[str], object],
        scan_rfc822: bool,
        scan_zip: bool,
    ) -> None:
        self.owner = owner
        self.savname = savname
        self.asked = check
        self._answers: dict[str, object] = {}
        self._asked_ahead: frozenset[str] = frozenset()
        self.scan_rfc822 = scan_rfc822
        self.scan_zip = scan_zip
        self.budget = Budget()
        self._cleaned: list[MimeMessage] = []
        self._decoded = 0

    def check(self, name: str) -> object:
        """Ask the application about a name."""
        if name in self._asked_ahead:
            return self._answers[name]
        answer = self._answers[name] = self.asked(name)
        return answer

    def check_again(self, name: str) -> object:
        """What the application said about a name, which is asked once for each."""
        return self._answers[name] if name in self._answers else self.check(name)

    def message(self, msg: MimeMessage, decoded: int = 0) -> None:
        """Check a message, or a part that is judged by itself, and what it will be read as."""
        before, self._cleaned = self._cleaned, []
        self._excuse_lone_crs(msg, decoded)
        self.part(msg, decoded)
        if self._cleaned and self._reads_otherwise(msg):
            for part in self._cleaned:
                log.warning("HTML removed: %s", _FALLS_APART)
                _replace(part, _FALLS_APART, self.savname)
        self._cleaned = before

    def _excuse_lone_crs(self, msg: MimeMessage, decoded: int) -> None:
        """Let a message with lone CRs pass where it is harmless in every way they are read."""
        parts = [part for part in msg.walk() if getattr(part, "_misread", None)]
        if not any(part._misread in (EARLY_END, BESIDE_CR) for part in parts):
            return
        readings = [] if msg.ismodified() else lone_cr_readings(msg.as_bytes())
        if readings and all(self._harmless(reading, decoded) for reading in readings):
            for part in parts:
                part._misread = None
        self._asked_ahead = frozenset(self._answers)

    def _harmless(self, raw: bytes, decoded: int) -> bool:
        """Whether nothing of a message would have to go."""
        msg = message_from_file(io.BytesIO(raw))
        arguments = (self.check_again, self.scan_rfc822, self.scan_zip)
        run = _Run(self.owner, self.savname, *arguments)
        run.budget = self.budget
        outer, _running.run = _running.run, run
        try:
            run.message(msg, decoded)
        finally:
            _running.run = outer
        return not msg.ismodified()

    def _reads_otherwise(self, msg: MimeMessage) -> bool:
        """Whether the message, once it is written, has parts that nobody checked.

        What was taken out of HTML may have been all that hid a boundary, a header or a file, and
        only what reads the bytes as they are sent finds all of these.  So a message from which
        scripts were taken, and no other, is written and read once more, at the cost of reading.
        Where nobody was to look, in attached messages, there may be harm as before.
        """
        cleaned = set(map(id, self._cleaned))
        parts = list(msg.walk())
        again = list(message_from_file(io.BytesIO(msg.as_bytes())).walk())
        if [p.get_content_type() for p in parts] != [p.get_content_type() for p in again]:
            return True
        try:
            return any(
                self._harm(new) and (id(old) in cleaned or not self._harm(old))
                for old, new in zip(parts, again)
            )
        except LimitExceeded:
            return True

    def _harm(self, part: Any) -> bool:
        if not isinstance(part, MimeMessage):
            return False
        return bool(part.suspicion() or _bad_name(part, self.check_again, False, self.budget))

    def part(self, msg: MimeMessage, decoded: int = 0) -> None:
        """Check a part and the parts within it; `decoded`: how often it was unwrapped."""
        if not msg.is_multipart():
            before, self._decoded = self._decoded, decoded
            self.owner._chk_name(msg)
            self._decoded = before
        elif self._named_well(msg, decoded):
            self._within(msg, decoded)

    def leaf(self, msg: MimeMessage) -> None:
        """Check a part that holds no others."""
        if not self._named_well(msg, self._decoded) or not self.owner.scan_html:
            return
        if checked_html(msg, self.savname, self.budget):
            self._cleaned.append(msg)

    def _named_well(self, msg: MimeMessage, decoded: int) -> bool:
        """Whether a part needs not be replaced, by its name and by what it holds encoded."""
        try:
            self.budget.check_time()
            return not (
                checked_name(msg, self.savname, self.check, self.scan_zip, self.budget)
                or self._hidden(msg, decoded)
            )
        except LimitExceeded as exc:
            log.warning("part removed: %s", exc)
            _replace(msg, str(exc), self.savname)
            return False

    def _within(self, msg: MimeMessage, decoded: int) -> None:
        """Check the parts within a part."""
        if self.scan_rfc822 or msg.get_content_maintype() != "message":
            for child in list(msg._payload):
                self.part(child, decoded)
            if msg._parts_after_end and msg.epilogue:
                self._epilogue(msg, decoded)
            if self.owner.scan_html and not _HTML_TYPES.isdisjoint(msg._media_types()):
                self._shown_as_html(msg)

    def _shown_as_html(self, msg: MimeMessage) -> None:
        """Replace a multipart, or a message, with scripts for a reader that takes it as HTML.

        Under two types, that is; scripts in the HTML within are gone by now.
        """
        body = msg._body_bytes()
        for _, decoded in msg._decoded(body):
            try:
                clean = clean_html(decoded, msg._charsets(), self.budget)
            except LimitExceeded as exc:
                log.warning("part removed: %s", exc)
                _replace(msg, str(exc), self.savname)
                return
            if clean is not None:
                _replace(msg, "ambiguous content type", self.savname)
                return

    def _epilogue(self, msg: MimeMessage, decoded: int) -> None:
        """Check the parts that follow the end of a multipart, which some readers show.

        Mail of which an inner multipart has the boundary of the outer one has such parts.
        """
        data = _content_types(msg) + b"\n" + as_bytes(msg.epilogue or "")
        try:
            if decoded >= settings.MAX_ZIP_DEPTH:
                raise LimitExceeded("multiparts after each other's end")
            self.budget.unpack(len(data))
        except LimitExceeded as exc:
            log.warning("parts removed: %s", exc)
            msg.epilogue = ""
            return
        hidden = message_from_file(io.BytesIO(data))
        self.message(hidden, decoded + 1)
        if hidden.ismodified():
            msg.epilogue = as_str(hidden._body_bytes())
            # Without what was taken out of it, it may hold a boundary of the multiparts around.
            self._cleaned.append(msg)

    def _hidden(self, msg: MimeMessage, decoded: int) -> bool:
        """Replace a part whose bad content shows only to a reader that decodes more."""
        for data, shown in self._decoded_messages(msg):
            if decoded >= settings.MAX_ZIP_DEPTH:
                raise LimitExceeded("messages encoded within each other")
            self.budget.unpack(len(data))
            hidden = message_from_file(io.BytesIO(data))
            self.part(hidden, decoded + 1)
            if hidden.ismodified():
                _replace(msg, shown, self.savname)
                return True
        return False

    def _decoded_messages(self, msg: MimeMessage) -> Iterator[tuple[bytes, str]]:
        """(bytes, name) of the messages that a reader might find by decoding a part.

        Messages and multiparts in a transfer encoding, which RFC 2045, section 6.4, forbids but
        readers decode all the same; and files that a reader opens as messages.
        """
        kind = msg.get_content_maintype()
        if kind != "multipart" and not self.scan_rfc822:
            return
        if not msg.is_multipart() and isinstance(msg._payload, str):
            for _, name in self.budget.timed(msg._getnames(False, self.budget)):
                if any(extension in _MESSAGE_EXTENSIONS for extension in extensions(name)):
                    for _, data in msg._decoded(as_bytes(msg._payload)):
                        yield data, name
                    break
        if kind not in ("multipart", "message"):
            return
        types = _content_types(msg)
        body = msg._body_bytes()
        for encoding, data in msg._decoded(body):
            if data != body:
                yield types + b"\n" + data, f"{kind} in {encoding}"


class Defang:
    """The type of `mime.defang`, which is called as a function.

    Attribute ``scan_html``: whether scripts are taken out of HTML; True.  A subclass may override
    ``_chk_name(part)``, which is called with each part that holds no others, checks it, and
    returns CONTINUE; for as long as it runs, ``_savname``, ``_check``, ``scan_rfc822`` and
    ``scan_zip`` are the arguments of the call.
    """

    scan_html = True

    def __call__(
        self,
        msg: MimeMessage,
        savname: object = None,
        check: Callable[[str], object] = check_ext,
        scan_rfc822: bool = True,
        scan_zip: bool = False,
    ) -> bool:
        """Make a message harmless: replace parts with bad names, and take scripts out of HTML.

        Multiparts and attached messages are checked for names of their own.

        Args:
            msg: the message.
            savname: as for `check_name`.
            check: called with each name, as `ckname` of `check_name`.
            scan_rfc822: look into attached messages.
            scan_zip: as for `check_name`.

        Returns:
            Whether anything of the message was modified, here or before.
        """
        outer = getattr(_running, "run", None)
        _running.run = run = _Run(self, savname, check, scan_rfc822, scan_zip)
        try:
            run.message(msg)
        finally:
            _running.run = outer
        return msg.ismodified()

    def _chk_name(self, msg: MimeMessage) -> int:
        """Check a part that holds no others."""
        run: _Run = _running.run
        run.leaf(msg)
        return CONTINUE

    def __getattr__(self, name: str) -> Any:
        # of the call that this thread is in: many may use the one instance at the same time
        run = getattr(_running, "run", None)
        if run is not None and name in _ARGUMENTS:
            return getattr(run, _ARGUMENTS[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


_running = threading.local()
_ARGUMENTS = {
    "_savname": "savname",
    "_check": "asked",
    "scan_rfc822": "scan_rfc822",
    "scan_zip": "scan_zip",
}
