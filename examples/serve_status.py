#!/usr/bin/env python3
"""Serve a filter and a status page in one event loop.

    python examples/serve_status.py --socket unix:/run/status/status.sock --status 127.0.0.1:9802

looks the client's address up in the DNS for each connection, while others go on, and adds what it
is called there::

    X-Client-Name: mail.example.org

``http://127.0.0.1:9802/`` says how many connections and messages there were and are.  SIGTERM and
SIGINT end the program once the messages in progress are through.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import re
import signal
import socket
import sys

import Milter

HEADER = "X-Client-Name"
LOOK_UP_SECONDS = 3.0
REQUEST_SECONDS = 2.0  # the end waits for as long, where somebody is there who does not ask

log = logging.getLogger("serve_status")


class Counts:
    """What the status page shows.  Coroutines alone change it, which all run in one thread."""

    connections = 0
    open = 0
    messages = 0


async def name_of(hostaddr: tuple[object, ...] | str | None) -> str:
    """Return what a client's address is called in the DNS, "unknown" where that is not known."""
    if not isinstance(hostaddr, tuple):
        return "unknown"
    # The resolver of the system blocks; the loop has threads for such calls.
    looked_up = asyncio.get_running_loop().getnameinfo(
        (str(hostaddr[0]), 0), socket.NI_NAMEREQD | socket.NI_NUMERICSERV
    )
    try:
        return (await asyncio.wait_for(looked_up, LOOK_UP_SECONDS))[0]
    except (asyncio.TimeoutError, OSError):
        return "unknown"


class ClientName(Milter.Base):
    """One connection."""

    client = "unknown"
    counted = False

    async def connect(
        self, hostname: str, family: int, hostaddr: tuple[object, ...] | str | None
    ) -> int:
        Counts.connections += 1
        Counts.open += 1
        self.counted = True
        self.client = await name_of(hostaddr)
        return Milter.CONTINUE

    async def eom(self) -> int:
        Counts.messages += 1
        self.addheader(HEADER, self.client)
        return Milter.CONTINUE

    async def close(self) -> int:
        Counts.open -= self.counted
        return Milter.CONTINUE


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one HTTP request."""
    try:
        request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_SECONDS)
        if request.startswith(b"GET / "):
            text = f"connections {Counts.connections}\nopen {Counts.open}\n"
            status, body = "200 OK", f"{text}messages {Counts.messages}\n"
        else:
            status, body = "404 Not Found", "there is only /\n"
        head = f"HTTP/1.0 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}\r\n{body}".encode())
        await writer.drain()
    except (asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        pass  # whoever asked has gone, or never meant to ask
    except asyncio.CancelledError:
        pass  # the program ends; before Python 3.12 a handler that is cancelled looks like a fault
    finally:
        writer.close()


def host_and_port(text: str) -> tuple[str, int]:
    """Return both from HOST:PORT; a port alone is one of 127.0.0.1, not of all addresses.

    Raises:
        argparse.ArgumentTypeError: it has another form.
    """
    found = re.fullmatch(r"(?:(?:\[([^\[\]]+)\]|([^\[\]:]+)):)?([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of HOST:PORT, [IPV6]:PORT and PORT, where a port is 0 to 65535"
        )
    return found[1] or found[2] or "127.0.0.1", int(found[3])


async def serve(args: argparse.Namespace) -> None:
    """Serve both until a signal comes, then drain."""
    server = await asyncio.start_server(answer, *args.status)
    log.info("status page on port %d", server.sockets[0].getsockname()[1])
    served = asyncio.ensure_future(Milter.serve("serve_status", args.socket, args.timeout))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, served.cancel)
    async with server:
        await asyncio.wait([served])
    if not served.cancelled():
        served.result()


def main() -> int:
    """Run the program until it is stopped; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--socket", required=True, help="unix:/path or inet:port@host")
    parser.add_argument(
        "--status",
        metavar="[HOST:]PORT",
        type=host_and_port,
        default="127.0.0.1:0",
        help="where the status page is (default: a free port of 127.0.0.1)",
    )
    parser.add_argument("--timeout", type=int, default=600, help="seconds to wait for the MTA")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning"])
    args = parser.parse_args()
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s: %(message)s"
    )
    Milter.factory = ClientName
    log.info("listening on %s", args.socket)
    try:
        asyncio.run(serve(args))
    except (Milter.error, OSError) as exc:
        log.error("cannot run: %s", exc)
        return 1
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
