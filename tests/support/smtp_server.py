"""A mail server on loopback that follows a script, misbehaviour included."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Union

#: Close the connection instead of answering.
DROP = object()
#: Never answer.
STALL = object()
#: Answer one byte at a time, and never to the end.
DRIP = object()
#: Answer as fast as the client reads, and never to the end.
FLOOD = object()

Step = Union[bytes, object]

TLS_FILE = Path(__file__).with_name("tls.pem")


class Late:
    """An answer that comes after a while."""

    def __init__(self, seconds: float, reply: bytes) -> None:
        self.seconds = seconds
        self.reply = reply


class Server:
    """Answers each verb (or whole command line) with what the script says, else 250.

    The verbs ``banner`` and ``.`` are the greeting and the end of the message; with
    ``handshake`` it answers a TLS handshake in plain text, with ``body`` (STALL) it reads
    nothing of the message.
    ``commands`` lists what clients said, ``messages`` what they sent.
    """

    def __init__(
        self, script: Mapping[str, Step], address: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.script = {
            "banner": b"220 mx.test ESMTP",
            "EHLO": b"250-mx.test\r\n250 8BITMIME",
            "DATA": b"354 go ahead",
            "QUIT": b"221 bye",
            "STARTTLS": b"220 ready",
            **script,
        }
        self.commands: list[str] = []
        self.messages: list[bytes] = []
        self.connections = 0
        self.stopped = threading.Event()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, port), family=family)
        self.port: int = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def close(self) -> None:
        self.stopped.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            client.settimeout(0.2)
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._say(client, self.script["banner"]):
                self._talk(client)
        except OSError:
            pass
        finally:
            client.close()

    def _talk(self, client: socket.socket) -> None:
        buffer = bytearray()
        while (line := self._line(client, buffer)) is not None:
            command = line.decode("utf-8", "surrogateescape")
            verb = command.split(" ")[0].split(":")[0].upper()
            self.commands.append(command)
            reply = self.script.get(command, self.script.get(verb, b"250 ok"))
            if not self._say(client, reply) or verb == "QUIT":
                return
            if verb == "STARTTLS" and "handshake" in self.script:
                self._line(client, bytearray(), end=b"\x16\x03")
                client.sendall(b"550 I speak no TLS\r\n")
                return
            if verb == "STARTTLS" and reply == b"220 ready":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(TLS_FILE)
                client.settimeout(10)
                with context.wrap_socket(client, server_side=True) as encrypted:
                    encrypted.settimeout(0.2)
                    self._talk(encrypted)
                return
            if verb == "DATA" and isinstance(reply, bytes) and reply.startswith(b"354"):
                if self.script.get("body") is STALL:
                    self.stopped.wait(60)
                    return
                self.messages.append(self._message(client, buffer))
                if not self._say(client, self.script.get(".", b"250 queued")):
                    return

    def _message(self, client: socket.socket, buffer: bytearray) -> bytes:
        lines = []
        while (line := self._line(client, buffer)) is not None and line != b".":
            lines.append(line[1:] if line.startswith(b".") else line)
        return b"".join(line + b"\r\n" for line in lines)

    def _line(self, client: socket.socket, buffer: bytearray, end: bytes = b"\r\n") -> bytes | None:
        while end not in buffer:
            if self.stopped.is_set():
                return None
            try:
                data = client.recv(65536)
            except socket.timeout:  # TimeoutError from Python 3.10 on
                continue
            if not data:
                return None
            buffer += data
        line, _, rest = bytes(buffer).partition(end)
        buffer[:] = rest
        return line

    def _say(self, client: socket.socket, reply: Step) -> bool:
        """Send a reply; False where the connection is at its end."""
        if isinstance(reply, Late):
            self.stopped.wait(reply.seconds)
            reply = reply.reply
        if reply is DROP:
            return False
        if reply is STALL:
            self.stopped.wait(60)
            return False
        while reply is DRIP:
            if self.stopped.wait(0.05):
                return False
            client.sendall(b"2")
        while reply is FLOOD:
            if self.stopped.is_set():
                return False
            client.sendall(b"250-%s\r\n" % (b"x" * 500) * 100)
        assert isinstance(reply, bytes)
        client.sendall(reply + b"\r\n")
        return True


@contextmanager
def serving(
    script: Mapping[str, Step], address: str = "127.0.0.1", port: int = 0
) -> Iterator[Server]:
    """Run a server for the length of a ``with`` block."""
    server = Server(script, address, port)
    try:
        yield server
    finally:
        server.close()
