"""The error of what cannot be had or done now, and the gate that says so."""

from __future__ import annotations

#: The stages at which a function may run, in the order in which a session reaches them.
STAGES = ("connect", "helo", "mail", "rcpt", "data", "headers", "eom")


class NotNow(RuntimeError):
    """What is asked for is not there yet, not there any more, or can no longer be changed."""


class Gate:
    """Whether a message may be changed now; shared by all its parts."""

    __slots__ = ("why",)

    def __init__(self, why: str | None = None) -> None:
        self.why = why

    def check(self, what: str) -> None:
        """Refuse a change.

        Args:
            what: what is being changed, for the text of the error.

        Raises:
            NotNow: the message can no longer, or not yet, be changed.
        """
        if self.why is not None:
            raise NotNow(f"{what}: {self.why}")
