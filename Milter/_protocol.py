"""The protocol's tables: which callback has which options, and names for flags."""

from __future__ import annotations

import milter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: For each callback that the MTA can be asked to leave out: the protocol steps
#: "send it, wait for no reply" (SMFIP_NR_*) and "do not send it" (SMFIP_NO*).
OPTIONAL_CALLBACKS: dict[str, tuple[int, int]] = {
    "connect": (milter.P_NR_CONN, milter.P_NOCONNECT),
    "hello": (milter.P_NR_HELO, milter.P_NOHELO),
    "envfrom": (milter.P_NR_MAIL, milter.P_NOMAIL),
    "envrcpt": (milter.P_NR_RCPT, milter.P_NORCPT),
    "data": (milter.P_NR_DATA, milter.P_NODATA),
    "unknown": (milter.P_NR_UNKN, milter.P_NOUNKNOWN),
    "eoh": (milter.P_NR_EOH, milter.P_NOEOH),
    "body": (milter.P_NR_BODY, milter.P_NOBODY),
    "header": (milter.P_NR_HDR, milter.P_NOHDRS),
}

#: For each callback that can have a macro list of its own: its stage (SMFIM_*).
MACRO_CALLBACKS: dict[str, int] = {
    "connect": milter.M_CONNECT,
    "hello": milter.M_HELO,
    "envfrom": milter.M_ENVFROM,
    "envrcpt": milter.M_ENVRCPT,
    "data": milter.M_DATA,
    "eom": milter.M_EOM,
    "eoh": milter.M_EOH,
}

#: How many macros a list may name.
MAX_MACROS = 5

#: The steps that say what a filter understands rather than what it leaves out.
FEATURE_STEPS: int = milter.P_SKIP | milter.P_RCPT_REJ | milter.P_HDR_LEADSPC


def _all_steps() -> int:
    steps = FEATURE_STEPS
    for no_reply, no_callback in OPTIONAL_CALLBACKS.values():
        steps |= no_reply | no_callback
    return steps


#: Every protocol step that this package knows (SMFI_CURR_PROT).
ALL_STEPS: int = _all_steps()


def decode_mask(bits: int, names: Iterable[str]) -> list[str]:
    """Name the flags that are set in a bit mask, for logs and messages.

    Args:
        bits: the mask, for example ``self._actions`` or ``self._protocol``.
        names: names of flags in the module ``milter``, for example
            ``("P_NOBODY", "P_SKIP")``.

    Returns:
        The given names whose flag is set, in the order given, followed by the
        hexadecimal value of the bits that no name stood for, if any.

    Raises:
        AttributeError: a name is no constant of ``milter``.

    >>> decode_mask(0x410, ["P_NOBODY", "P_NOHDRS"])
    ['P_NOBODY', '0x400']
    """
    found = []
    rest = bits
    for name in names:
        flag: int = getattr(milter, name)
        if bits & flag:
            found.append(name)
            rest &= ~flag
    if rest:
        found.append(hex(rest))
    return found
