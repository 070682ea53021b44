"""ESMTP parameters of MAIL and RCPT (RFC 5321, section 4.1.2) as dictionaries and keywords."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, TypeVar, Union

    Text = Union[str, bytes]
    T = TypeVar("T")


def _split(item: Text) -> tuple[str, Text | None]:
    """The name, always as str, and the value, as given, of one parameter."""
    if isinstance(item, bytes):
        name, sign, value = item.partition(b"=")
        return name.decode("utf-8", "surrogateescape"), value if sign else None
    text_name, text_sign, text_value = item.partition("=")
    return text_name, text_value if text_sign else None


# The parameter's name is part of the interface: callers pass it by keyword.
def param2dict(str: Iterable[Text]) -> dict[str, Any]:
    """Turn ESMTP parameters into a dictionary.

    Args:
        str: the parameters of ``envfrom`` or ``envrcpt`` after the address, each
            ``NAME`` or ``NAME=VALUE``, as str or (with ``@decode("bytes")``) bytes.

    Returns:
        Name to value. Names are str in upper case, as ESMTP keywords ignore case
        (RFC 5321, section 2.4); a value has the type of its parameter and is None
        where the parameter had none. The last of several with one name wins.

    >>> param2dict(["size=1024", "SMTPUTF8"])
    {'SIZE': '1024', 'SMTPUTF8': None}
    """
    return {name.upper(): value for name, value in map(_split, str)}


def dictfromlist(args: Iterable[Text]) -> dict[str, Any]:
    """Turn those ESMTP parameters that have a value into a dictionary.

    :func:`param2dict` is usually the better choice: this one drops parameters
    without a value, such as ``SMTPUTF8``.

    Args:
        args: parameters, each ``NAME`` or ``NAME=VALUE``, as str or bytes.

    Returns:
        Name in upper case to value, for the items of the form ``NAME=VALUE``; an item without
        a name counts as none.

    >>> dictfromlist(["size=1024", "SMTPUTF8"])
    {'SIZE': '1024'}
    """
    return {name.upper(): value for name, value in map(_split, args) if name and value is not None}


def envcallback(c: Callable[..., T], args: Sequence[Text]) -> T:
    """Call a function with an envelope address and its ESMTP parameters as keywords.

    The client chooses the names, as far as the MTA lets them pass. One that ``c`` does not take,
    or that is the name of a parameter which already has its value by position, is a TypeError, as
    in any call. A function with ``**keywords`` whose other parameters are by position only
    (``/``) can be called with all of them.

    Args:
        c: called as ``c(address, *others, NAME=VALUE, …)``, where ``others`` are the
            parameters without a value. Names are in upper case.
        args: the address, followed by the parameters: what ``envfrom`` or
            ``envrcpt`` got, as one sequence.

    Returns:
        What ``c`` returns.

    >>> envcallback(lambda f, /, *flags, **kw: (f, flags, kw), ["<a@b>", "SIZE=9", "SMTPUTF8"])
    ('<a@b>', ('SMTPUTF8',), {'SIZE': '9'})
    """
    keywords: dict[str, Text] = {}
    others: list[Text] = []
    for item in args[1:]:
        name, value = _split(item)
        if value is None or not name:
            others.append(item)
        else:
            keywords[name.upper()] = value
    return c(args[0], *others, **keywords)
