"""The MTA's side of the milter protocol: a client for tests and tools.

A mail filter answers questions that a mail transfer agent (MTA) asks it over a
socket.  This package asks them, as Postfix and sendmail do, and tells what the
filter wants done to the message.  It uses the standard library, and of the extension
module the grammar of socket names; importing it loads that, with libmilter, and the
package ``Milter`` of which it is a part.

>>> from Milter.mta import MTA, Client, Verdict
>>> message = b"Subject: hello\\r\\n\\r\\nA body.\\r\\n"
>>> with MTA.connect("unix:/run/filter.sock", wait_for=5) as mta:  # doctest: +SKIP
...     result = mta.send(
...         message,
...         sender="alice@example.com",
...         recipients=["bob@example.org"],
...         client=Client("mail.example.com", "192.0.2.7"),
...         helo="mail.example.com",
...         macros={"i": "4XyZ0123", "CONNECT:j": "mx.example.org"},
...     )
...     assert result.verdict in (Verdict.ACCEPT, Verdict.CONTINUE)
...     print(result.message["Subject"], result.recipients, result.modifications)

Several messages may follow each other on one connection.  Leaving the ``with``
block sends QUIT and waits until the filter has closed the connection, so that
nothing the filter says too much goes unnoticed.

The single steps are methods too, one for each command; each returns a
:class:`Reply`:

>>> with MTA.connect("inet:8891@127.0.0.1") as mta:  # doctest: +SKIP
...     mta.connect_info("mail.example.com", "192.0.2.7", 2525, macros={"j": "mx"})
...     mta.helo("mail.example.com")
...     mta.mail("<alice@example.com>", "SIZE=1000")
...     assert mta.rcpt("<bob@example.org>").verdict is Verdict.CONTINUE
...     mta.data(); mta.header("Subject", "hello"); mta.eoh(); mta.body(b"A body.\\r\\n")
...     print(mta.eom().modifications)

Steps are not held to SMTP's order, so that a test can break it;
:meth:`MTA.send` keeps it.  For what no MTA would say there are
:meth:`MTA.send_packet`, :meth:`MTA.send_raw` and :meth:`MTA.read_packet`.

**Text.**  Arguments are ``str`` or ``bytes``.  A ``str`` travels as UTF-8 with
``surrogateescape``, and text that comes back is decoded so; whatever a filter
says can be compared and sent again without loss.  Header names and values and
the body are ``bytes`` in results.

**Strictness.**  The filter is held to the protocol: it may ask only for what
was offered, must answer each step once with an answer that the step allows,
must stay silent where silence was agreed, may modify only at the end of the
message and only as agreed, and each packet must have the form that its command
prescribes.  What breaks a rule is a :class:`ProtocolError`.  A filter that does
not answer in time is a :class:`FilterTimeout`, one that hangs up a
:class:`FilterClosed`.  Each says at which stage, and what was received.

**MTAs differ** in how they apply edits; see :class:`Dialect`.

The wire format is that of sendmail's libmilter, header ``libmilter/mfdef.h``;
comments beside the constants cite its names.

:class:`Editor` answers without a filter what modifications do to a message.

:class:`Recording` is a session that ``python -m Milter record`` has written to a file;
:meth:`MTA.replay` has an MTA say all of it again, and compares the answers.
"""

from __future__ import annotations

# The annotations of the classes are read with the names that are here.
import socket as socket
from collections.abc import Mapping as Mapping

from .address import SocketAddress, parse_socket
from .client import MTA
from .edits import Editor, HeaderEdit
from .errors import (
    FilterClosed,
    FilterTimeout,
    FilterUnreachable,
    MTAError,
    NegotiationError,
    ProtocolError,
)
from .messages import Address, Client, Header, Message
from .messages import AddressLike as AddressLike
from .recording import Entry, Recording
from .replay import Difference, Replay
from .transaction import RefusedRecipient, Result
from .vocabulary import CURRENT_ACTIONS as CURRENT_ACTIONS
from .vocabulary import CURRENT_STEPS as CURRENT_STEPS
from .vocabulary import V1_ACTIONS as V1_ACTIONS
from .vocabulary import V1_STEPS as V1_STEPS
from .vocabulary import V2_ACTIONS as V2_ACTIONS
from .vocabulary import V2_STEPS as V2_STEPS
from .vocabulary import (
    Action,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteRecipient,
    Dialect,
    Family,
    InsertHeader,
    Modification,
    Negotiated,
    Offer,
    Quarantine,
    ReplaceBody,
    Reply,
    SmtpReply,
    Stage,
    Step,
    Verdict,
    flag_names,
)
from .vocabulary import MacroValues as MacroValues
from .vocabulary import Text as Text
from .wire import CHUNK_SIZE as CHUNK_SIZE
from .wire import MAX_DATA_SIZE as MAX_DATA_SIZE
from .wire import MAX_REPLY_LINE as MAX_REPLY_LINE
from .wire import MAX_REPLY_LINES as MAX_REPLY_LINES
from .wire import MAX_REPLY_SIZE as MAX_REPLY_SIZE
from .wire import MDS_1M_SIZE as MDS_1M_SIZE
from .wire import MDS_256K_SIZE as MDS_256K_SIZE
from .wire import OPTION_SIZE as OPTION_SIZE
from .wire import Packet
from .words import Side

__all__ = [
    "MTA",
    "Action",
    "AddHeader",
    "AddRecipient",
    "Address",
    "ChangeHeader",
    "ChangeSender",
    "Client",
    "DeleteRecipient",
    "Dialect",
    "Difference",
    "Editor",
    "Entry",
    "Family",
    "FilterClosed",
    "FilterTimeout",
    "FilterUnreachable",
    "Header",
    "HeaderEdit",
    "InsertHeader",
    "MTAError",
    "Message",
    "Modification",
    "Negotiated",
    "NegotiationError",
    "Offer",
    "Packet",
    "ProtocolError",
    "Quarantine",
    "Recording",
    "RefusedRecipient",
    "Replay",
    "ReplaceBody",
    "Reply",
    "Result",
    "Side",
    "SmtpReply",
    "SocketAddress",
    "Stage",
    "Step",
    "Verdict",
    "flag_names",
    "parse_socket",
]

# The modules within are the project's own; what is public is found here, and says so.
for _name in __all__:
    _value = globals()[_name]
    if callable(_value) and hasattr(_value, "__module__"):
        _value.__module__ = __name__
del _name, _value
