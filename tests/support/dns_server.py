"""A small name server on loopback that answers what a test tells it to."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Union

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


@dataclass
class Answer:
    """What to send for one question: records in zone-file form, and misbehaviour."""

    records: Sequence[str] = ()
    additional: Sequence[str] = ()
    rcode: str = "NOERROR"
    truncate: bool = False  # over UDP only
    silent: bool = False
    wrong_id: bool = False


Zone = dict[tuple[str, str], Union[Answer, Sequence[str]]]


class Server:
    """Answers over UDP and TCP; ``asked`` lists ``(name, type, protocol)``."""

    def __init__(self, zone: Zone, address: str = "127.0.0.1") -> None:
        self.zone = zone
        self.asked: list[tuple[str, str, str]] = []
        self.udp, self.tcp = _same_port(address)
        self.port: int = self.udp.getsockname()[1]
        self.threads = [
            threading.Thread(target=serve, daemon=True) for serve in (self._udp, self._tcp)
        ]
        for thread in self.threads:
            thread.start()

    def close(self) -> None:
        for sock in (self.udp, self.tcp):
            # Wakes the thread that waits for it, which close() alone does not.
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(10)
        self.udp.close()
        self.tcp.close()

    def _udp(self) -> None:
        while True:
            wire, peer = self.udp.recvfrom(65535)
            if not wire:
                return
            reply = self._reply(wire, "udp")
            if reply:
                self.udp.sendto(reply, peer)

    def _tcp(self) -> None:
        while True:
            try:
                client, _ = self.tcp.accept()
            except OSError:
                return
            with client, client.makefile("rb") as stream:
                client.settimeout(10)
                head = stream.read(2)
                if len(head) == 2:
                    reply = self._reply(stream.read(struct.unpack("!H", head)[0]), "tcp")
                    if reply:
                        client.sendall(struct.pack("!H", len(reply)) + reply)

    def _reply(self, wire: bytes, protocol: str) -> bytes | None:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        qtype = dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, qtype, protocol))
        answer = self.zone.get((name.lower(), qtype), Answer(rcode="NXDOMAIN"))
        if not isinstance(answer, Answer):
            answer = Answer(answer)
        if answer.silent:
            return None
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        response.set_rcode(dns.rcode.from_text(answer.rcode))
        if answer.truncate and protocol == "udp":
            response.flags |= dns.flags.TC
        else:
            _add(response.answer, answer.records)
            _add(response.additional, answer.additional)
        if answer.wrong_id:
            response.id ^= 1
        return response.to_wire()


def _add(section: list[dns.rrset.RRset], records: Sequence[str]) -> None:
    for record in records:
        name, rtype, data = record.split(" ", 2)
        section.append(dns.rrset.from_text(name + ".", 300, "IN", rtype, data))


def _same_port(address: str) -> tuple[socket.socket, socket.socket]:
    """Bind one port number for UDP and TCP."""
    for _ in range(50):
        tcp = socket.create_server((address, 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind((address, tcp.getsockname()[1]))
        except OSError:
            tcp.close()
            udp.close()
        else:
            return udp, tcp
    raise OSError(f"no port of {address} is free for both UDP and TCP")


@contextmanager
def serving(zone: Zone, address: str = "127.0.0.1") -> Iterator[Server]:
    """Run a server for the length of a ``with`` block."""
    server = Server(zone, address)
    try:
        yield server
    finally:
        server.close()
