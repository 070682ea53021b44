#!/usr/bin/env python3
"""A filter that refuses a recipient, in forms that read more or less of the message for it.

usage: function.py SOCKET --form FORM

``whole``, ``no-body`` and ``at-rcpt`` are functions of whole messages, which are asked once they
have all of it, all but the body, or at each recipient; ``base-rcpt`` is a class with callbacks.
"""

from __future__ import annotations

import argparse

import Milter
from Milter import mailfilter

NOBODY = "nobody@example.org"


def decide(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    """What all of those decide that are asked once for a message."""
    return mailfilter.reject("5.1.1 Nobody lives here") if NOBODY in mail.recipients else None


def decide_on_recipient(mail: mailfilter.Mail) -> mailfilter.Decision | None:
    """The same for one recipient."""
    return mailfilter.reject("5.1.1 Nobody lives here") if mail.recipient == NOBODY else None


class Recipients(Milter.Base):
    """What one would write by hand."""

    def envrcpt(self, to: str, *params: str) -> int:
        if to.strip("<>").lower() != NOBODY:
            return Milter.CONTINUE
        self.setreply("550", "5.1.1", "Nobody lives here")
        return Milter.REJECT

    def eom(self) -> int:
        return Milter.ACCEPT


FORMS = {
    "whole": mailfilter.filter(decide),
    "no-body": mailfilter.filter(decide, body=False),
    "at-rcpt": mailfilter.filter(decide_on_recipient, at="rcpt"),
    "base-rcpt": Recipients,
}


def main() -> None:
    """Run the form where the command line says, until it is stopped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", help="where to listen, in libmilter's form")
    parser.add_argument("--form", required=True, choices=FORMS)
    arguments = parser.parse_args()
    Milter.factory = FORMS[arguments.form]
    Milter.runmilter("bench", arguments.socket, 600)


if __name__ == "__main__":
    main()
