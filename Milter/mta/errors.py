"""What goes wrong between an MTA and a filter."""

from __future__ import annotations

from .vocabulary import Stage


class MTAError(Exception):
    """Base of what goes wrong between the MTA and a filter.

    :ivar stage: the :class:`Stage` at which it happened, None before the first.
    :ivar received: the bytes of the offending packet, or of an unfinished one.
    """

    def __init__(self, message: str, stage: Stage | None = None, received: bytes = b"") -> None:
        super().__init__(message)
        self.stage = stage
        self.received = received

    def __str__(self) -> str:
        text = str(self.args[0])
        if self.stage is not None:
            text = f"at {self.stage}: {text}"
        if self.received:
            shown = repr(self.received[:80]) + ("…" if len(self.received) > 80 else "")
            text = f"{text}; received {shown}"
        return text


class ProtocolError(MTAError):
    """The filter did what the milter protocol does not allow."""


class NegotiationError(ProtocolError):
    """The filter's answer to the negotiation does not fit the offer."""


class FilterTimeout(MTAError, TimeoutError):
    """The filter did not answer, or did not read, within the time allowed."""


class FilterClosed(MTAError, ConnectionError):
    """The filter closed the connection where an answer was due."""


class FilterUnreachable(MTAError, ConnectionError):
    """No connection to the filter could be made."""
