"""Every verdict at every stage."""

from __future__ import annotations

import Milter
from integration.case import Case, Differs, Filter, mail, session

ALL = "connect hello envfrom envrcpt data header*5 eoh body eom close"

CASES = (
    Case("a message passes unchanged", seen=ALL),
    Case(
        "REJECT at eom",
        session(mail(end="550 5.7.1 Command rejected")),
        Filter(on={"eom": lambda f: Milter.REJECT}),
        seen=ALL,
        delivered=(),
        differs=(
            Differs(
                "sendmail",
                "refuses a message after DATA with 554 where Postfix says 550.",
                replies={"end": "554 5.7.1 Command rejected"},
            ),
        ),
    ),
)
