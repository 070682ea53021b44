"""The steps that one connection leaves out may be left out by all later ones."""

from __future__ import annotations

import sys

from _case import CONNECT, WAIT, case, judge

from Milter.mta import MTA

BODY = """
left_out = [0, milter.P_NOMAIL, 0]
def negotiate(ctx, options):
    options[1] = left_out.pop()
    return milter.CONTINUE
milter.set_envfrom_callback(lambda ctx, *args: milter.CONTINUE)
milter.set_envrcpt_callback(lambda ctx, *args: milter.CONTINUE)
"""


def look() -> tuple[bool, str]:
    """The first and the third connection agreed on MAIL, the second on none."""
    with case(BODY) as one:
        answered = []
        for mta in (one.mta, None, None):
            one.mta = mta or MTA.connect(one.socket, timeout=WAIT)
            one.send(b"C", CONNECT)
            one.mta.read_packet()
            one.send(b"R", b"<c@d>\0")
            answered.append(one.answers())
            one.mta.close()
    before, _, after = answered
    seen = f"RCPT without MAIL: {before}; once another connection agreed on no MAIL: {after}"
    return after != before, seen


if __name__ == "__main__":
    sys.exit(judge(look))
