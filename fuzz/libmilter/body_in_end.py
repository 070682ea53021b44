"""Body data in the packet that ends the body: answered twice, or never."""

from __future__ import annotations

import sys

from _case import CONNECT, case

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


def answers(body: str) -> list[bytes]:
    with case(body) as one:
        for command, data in ((b"C", CONNECT), (b"M", b"<a@b>\0"), (b"R", b"<c@d>\0"), (b"N", b"")):
            one.send(command, data)
            one.answers(0.3)
        one.send(b"E", b"text\r\n")
        return one.answers()


def main() -> int:
    rejected, silent = answers(REJECTS), answers(SILENT)
    print(f"REJECT by the body callback: {rejected} (one answer is due)")
    print(f"no reply to body agreed, ACCEPT by the eom callback: {silent} (one answer is due)")
    return 0 if len(rejected) == 2 and not silent else 1


if __name__ == "__main__":
    sys.exit(main())
