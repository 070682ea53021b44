"""Changes to headers."""

from __future__ import annotations

from integration.case import HEADERS, Case, Filter, Mail

CASES = (
    Case(
        "addheader appends",
        filter=Filter(on={"eom": lambda f: f.addheader("X-New", "one")}),
        delivered=(Mail(headers=(*HEADERS, "X-New: one")),),
    ),
)
