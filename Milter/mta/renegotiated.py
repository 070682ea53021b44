"""What of a recorded session can be played where the filter negotiates something else now."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from .session import NO_REPLY, NO_STEP
from .vocabulary import Stage, Step
from .wire import OPTION_SIZE


@dataclass(frozen=True)
class Renegotiated:
    """How the rest of a session is played.

    Actions and lists of macros change nothing of what the MTA says but for the macros, which are
    those that it sent then.

    :ivar left_out: what the filter does not want any more.
    :ivar silent: what it does not answer any more.
    :ivar answered: what it answers now, and did not then.
    :ivar obstacle: why the rest cannot be played; empty where it can be.
    """

    left_out: frozenset[Stage] = frozenset()
    silent: frozenset[Stage] = frozenset()
    answered: frozenset[Stage] = frozenset()
    obstacle: str = ""

    @classmethod
    def between(cls, then: bytes, now: bytes) -> Renegotiated:
        """Compare the data of two answers to the negotiation."""
        if min(len(then), len(now)) < OPTION_SIZE:
            return cls(obstacle="this is no negotiation")
        version, _, steps = struct.unpack_from("!III", then)
        version_now, _, steps_now = struct.unpack_from("!III", now)
        wanted = [
            stage
            for stage, flag in NO_STEP.items()
            # Commands that an MTA does not know are nothing that a session must have.
            if steps & flag and not steps_now & flag and stage is not Stage.UNKNOWN
        ]
        if version != version_now:
            obstacle = "the MTA would speak another version of the protocol"
        elif wanted:
            obstacle = f"the filter wants {_listed(wanted)} now, which the MTA did not send then"
        elif (steps ^ steps_now) & Step.HDR_LEADSPC:
            obstacle = "the MTA would send other blanks before the values of headers"
        elif steps & ~steps_now & Step.RCPT_REJ:
            obstacle = "the MTA would not send recipients that it refused itself"
        else:
            obstacle = ""
        return cls(
            frozenset(stage for stage, flag in NO_STEP.items() if steps_now & ~steps & flag),
            frozenset(stage for stage, flag in NO_REPLY.items() if steps_now & ~steps & flag),
            frozenset(stage for stage, flag in NO_REPLY.items() if steps & ~steps_now & flag),
            obstacle,
        )

    def __str__(self) -> str:
        if self.obstacle:
            return f"the rest is not played, as {self.obstacle}: record such a session anew"
        without = _listed(stage for stage in Stage if stage in self.left_out)
        return f"the rest is played without {without}" if without else "the rest is played"


def _listed(stages: Iterable[Stage]) -> str:
    return ", ".join(str(stage) for stage in stages)
