"""Names that modules of pymilter had because they imported them; applications took some of them."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def borrowed(module: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a module's ``__getattr__``, which finds such names when somebody asks for them.

    Args:
        module: the module's name.
        places: for each name where it is found, ``module`` or ``module:attribute``.

    Returns:
        The function.
    """

    def __getattr__(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        source, _, attribute = places[name].partition(":")
        found = import_module(source)
        return getattr(found, attribute) if attribute else found

    return __getattr__
