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

import milter
from milter import *  # noqa: F403 - the extension's names belong to this namespace too

from ._base import Base, DisabledAction, Milter, R
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
    uniqueID,
)

TYPE_CHECKING = False  # typing takes a megabyte in every filter; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

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

    def __getattr__(name):
        """Read what is not fixed when the package is imported."""
        if name == "_seq":
            return milter._last_unique_id()
        if name == "__version__":
            globals()[name] = _find_version()
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _find_version() -> str:
    """The version: from the project's file beside a source tree, else from the installation."""
    import re
    from importlib import metadata
    from pathlib import Path

    try:
        project = Path(__file__).parent.with_name("pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return metadata.version("pymilter")
    found = re.search(r'^name = "pymilter"\nversion = "([^"]+)"', project, re.MULTILINE)
    return found[1] if found else metadata.version("pymilter")
