"""Whole messages: a filter is a function that takes one, decides, and edits it.

>>> from __future__ import annotations
>>> from Milter import mailfilter
>>> @mailfilter.filter
... def newsletters(mail: mailfilter.Mail) -> mailfilter.Decision | None:
...     if mail.client.host == "spam.example":
...         return mailfilter.reject("5.7.1 we know you")
...     mail.headers["Subject"] = "[list] " + mail.headers["Subject"]
...     mail.recipients.add("archive@example.org")

It is tried out without an MTA:

>>> mail = mailfilter.Mail.from_bytes(b"Subject: hello\\n\\nA body.\\n", sender="joe@example.com")
>>> result = newsletters.check(mail)
>>> result.decision.kind, result.message["Subject"], str(result.recipients[0])
('accept', '[list] hello', 'archive@example.org')

``mailfilter.run(newsletters, "inet:8891@127.0.0.1")`` serves with it, as does ``python -m Milter
run module:newsletters``; ``Milter.factory = newsletters`` takes it as it takes a class.
"""

from __future__ import annotations

from ._addresses import Address, Recipients
from ._body import Body
from ._decisions import (
    Accept,
    Decision,
    Discard,
    Quarantine,
    Raised,
    Reject,
    Tempfail,
    accept,
    discard,
    quarantine,
    reject,
    tempfail,
)
from ._errors import NotNow
from ._filter import Filter, Result, as_filter, chain, filter, run
from ._headers import Header, Headers
from ._mail import TLS, Auth, Client, Macros, Mail

__all__ = [
    "TLS",
    "Accept",
    "Address",
    "Auth",
    "Body",
    "Client",
    "Decision",
    "Discard",
    "Filter",
    "Header",
    "Headers",
    "Macros",
    "Mail",
    "NotNow",
    "Quarantine",
    "Raised",
    "Recipients",
    "Reject",
    "Result",
    "Tempfail",
    "accept",
    "as_filter",
    "chain",
    "discard",
    "filter",
    "quarantine",
    "reject",
    "run",
    "tempfail",
]

for _name in __all__:
    globals()[_name].__module__ = __name__
del _name
