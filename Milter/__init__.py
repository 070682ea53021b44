"""Mail filters (milters) for Postfix and sendmail, in Python.

A filter is a subclass of ``Base`` whose methods are called as the MTA goes through an SMTP
session; ``runmilter`` serves the MTA until it is stopped::

    import Milter

    class StampMilter(Milter.Base):
        def eom(self):
            self.addheader("X-Seen-By", "StampMilter")
            return Milter.ACCEPT

    Milter.factory = StampMilter
    Milter.runmilter("stamp", "unix:/run/stamp/socket")

``factory`` makes the object for each connection. It is looked up each time, so it can be
replaced while the filter runs; so can the functions of this module.

Everything in the extension module ``milter``, such as the verdicts (``CONTINUE``,
``ACCEPT``, ``REJECT``, ``TEMPFAIL``, ``DISCARD``), the flags and ``error``, is here as well.
"""

from __future__ import annotations

from . import _origin  # first, as it says what to do where the extension module is none of ours

# isort: split
import milter
from milter import *  # noqa: F403 - the extension's names belong to this namespace too

from ._base import Base, DisabledAction, Milter, R
from ._borrowed import borrowed
from ._decorators import (
    decode,
    enable_protocols,
    header_leading_space,
    nocallback,
    noreply,
    rejected_recipients,
    symlist,
)
from ._esmtp import dictfromlist, envcallback, param2dict
from ._protocol import MACRO_CALLBACKS, OPTIONAL_CALLBACKS, decode_mask
from ._runner import _seq_lock as _seq_lock
from ._runner import (
    close_callback,
    connect_callback,
    negotiate_callback,
    runmilter,
    serve,
    uniqueID,
)

TYPE_CHECKING = False  # typing takes a megabyte in every filter; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._types import Address as Address
    from ._types import Answer as Answer

#: Called without arguments for each connection; returns its filter object, a ``Base``.
factory: Callable[[], Any] = Milter

__all__ = [
    "Base",
    "DisabledAction",
    "MACRO_CALLBACKS",
    "Milter",
    "OPTIONAL_CALLBACKS",
    "R",
    "close_callback",
    "connect_callback",
    "decode",
    "decode_mask",
    "dictfromlist",
    "enable_protocols",
    "envcallback",
    "factory",
    "header_leading_space",
    "milter",
    "negotiate_callback",
    "nocallback",
    "noreply",
    "param2dict",
    "rejected_recipients",
    "runmilter",
    "serve",
    "symlist",
    "uniqueID",
]


def _show_here(value: Any) -> None:
    """Make a public object say that it is found here, not in the private module it lives in."""
    if callable(value):
        value.__module__ = __name__
    if isinstance(value, type):
        for member in vars(value).values():
            function = getattr(member, "__func__", member)
            if getattr(function, "__module__", None) == f"{__name__}._base":
                function.__module__ = __name__


for _name in __all__:
    _show_here(globals()[_name])
del _name

if TYPE_CHECKING:
    __all__ += milter.__all__
    __version__: str
    _seq: int
else:
    __all__ += [name for name in vars(milter) if not name.startswith("_")]

    #: Not in ``__all__``: whoever takes all names gets those of the filter's own modules back.
    _BORROWED = {
        "os": "os",
        "re": "re",
        "sys": "sys",
        "thread": "_thread",
        "wraps": "functools:wraps",
    }
    _get_borrowed = borrowed(__name__, _BORROWED)

    def __dir__():
        """List the names that are read late too."""
        return sorted({*globals(), *_BORROWED, "__version__", "_seq"})

    def __getattr__(name):
        """Read what is not fixed when the package is imported."""
        if name == "_seq":
            return milter._last_unique_id()
        if name in ("Address", "Answer"):
            from . import _types

            globals()[name] = getattr(_types, name)
            return globals()[name]
        if name == "__version__":
            globals()[name] = _origin.find_version()
            return globals()[name]
        return _get_borrowed(name)
