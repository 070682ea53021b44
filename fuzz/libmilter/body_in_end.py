"""Body data in the packet that ends the body: answered twice, or never."""

from __future__ import annotations

import sys

from _case import CONNECT, case, judge

REJECTS = """
milter.set_body_callback(lambda ctx, chunk: milter.REJECT)
negotiate = None
"""
SILENT = """
def negotiate(ctx, options):
    options[1] &= milter.P_NR_BODY
    return milter.CONTINUE
milter.set_body_callback(lambda ctx, chunk: milter.NOREPLY)
milter.set_eom_callback(lambda ctx: milter.ACCEPT)
"""


def answers(body: str) -> list[str]:
    with case(body) as one:
        for command, data in ((b"C", CONNECT), (b"M", b"<a@b>\0"), (b"R", b"<c@d>\0"), (b"N", b"")):
            one.send(command, data)
            one.mta.read_packet()
        one.send(b"E", b"text\r\n")
        return one.answers()


def look() -> tuple[bool, str]:
    rejected, silent = answers(REJECTS), answers(SILENT)
    seen = f"answers to REJECT by the body callback: {rejected} (one is due); to ACCEPT by the eom"
    seen += f" callback where no reply to body was agreed: {silent} (one is due)"
    return rejected != ["r"] or silent != ["a"], seen


if __name__ == "__main__":
    sys.exit(judge(look))
