"""A command that does not fit where the session is: dropped without an answer."""

from __future__ import annotations

import sys

from _case import CONNECT, case, judge

BODY = """
milter.set_helo_callback(lambda ctx, name: milter.CONTINUE)
milter.set_envfrom_callback(lambda ctx, *args: milter.CONTINUE)
milter.set_envrcpt_callback(lambda ctx, *args: milter.CONTINUE)
milter.set_eom_callback(lambda ctx: milter.CONTINUE)
negotiate = None
"""


def look() -> tuple[bool, str]:
    with case(BODY) as one:
        one.send(b"C", CONNECT)
        one.mta.read_packet()
        one.send(b"R", b"<c@d>\0")
        answered = one.answers()
    seen = f"RCPT before MAIL: {answered} (an answer, or the end of the session, is due)"
    return not answered, seen


if __name__ == "__main__":
    sys.exit(judge(look))
