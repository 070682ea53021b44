"""The HTTP server of ``Milter.metrics``."""

from __future__ import annotations

import socket
from http.server import ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """A server on one address, whose port several processes may share.

    :param address: host and port.
    :param handler: the class that answers requests.
    :param family: of the address, such as ``socket.AF_INET``.
    :param share: whether other processes of this user may listen there too.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type, family: int, share: bool) -> None:
        self.address_family = socket.AddressFamily(family)
        self._share = share
        super().__init__(address, handler)

    def server_bind(self) -> None:
        if self._share:
            # Of several workers the system picks one for each request.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Not HTTPServer's own, which looks the host's name up in the DNS.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
