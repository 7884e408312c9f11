"""The other side of a device's traffic: a broker, a web server, name and time servers, a sink, an echo, a login.

One thread serves all, so that what a real peer costs elsewhere costs next to nothing here.

Examples:
  python -m stonechat_tools.lab.peers --bind 0.0.0.0 --seconds 600     in the namespace across from the device
"""

import argparse
import contextlib
import heapq
import selectors
import socket
import threading
import time
from types import TracebackType

from stonechat_tools.lab.bounds import Deadline, leave_cleanly_on_signals

# service: the port it has when somebody else must find it
PORTS = {
    "broker": 21883,
    "http": 21080,
    "sink": 21443,
    "echo": 21444,
    "login": 21022,
    "stream": 21554,
    "dns": 21053,
    "ntp": 21123,
}
DATAGRAM_SERVICES = ("dns", "ntp")
PAGE_BYTES = 2_000
FIRMWARE_BYTES = 400_000
LOGIN_DELAY_S = 0.05
MAX_CONNECTIONS = 512
_PUBACK = b"\x40\x02\x00\x01"


class _Connection:
    def __init__(self, sock: socket.socket, service: str) -> None:
        self.sock = sock
        self.service = service
        self.unsent = memoryview(b"")
        self.close_when_sent = False


class Peers:
    """A context manager that serves `services` on `host` from a thread. `ports`: service -> the port it got.

    fixed_ports: take those of PORTS (raises OSError when one is taken), else any free ones."""

    def __init__(
        self, host: str = "127.0.0.1", services: tuple[str, ...] = tuple(PORTS), *, fixed_ports: bool = False
    ) -> None:
        self.host = host
        self.ports: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._open: set[_Connection] = set()
        self._logins: list[tuple[float, int, _Connection]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name="peers")
        try:
            for service in services:
                self._listen(service, PORTS[service] if fixed_ports else 0)
        except OSError:
            self._close_all()
            raise

    def __enter__(self) -> "Peers":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stopping = True
        self._thread.join(5)
        self._close_all()

    def _listen(self, service: str, port: int) -> None:
        datagrams = service in DATAGRAM_SERVICES
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM)
        self._selector.register(sock, selectors.EVENT_READ, service)
        sock.setblocking(False)
        if not datagrams:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, port))
        if not datagrams:
            sock.listen(256)
        self.ports[service] = sock.getsockname()[1]

    def _close_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self) -> None:
        while not self._stopping:
            wait_s = 0.2
            if self._logins:
                wait_s = min(wait_s, max(0.0, self._logins[0][0] - time.monotonic()))
            for key, events in self._selector.select(wait_s):
                try:
                    self._handle(key, events)
                except OSError:
                    if isinstance(key.data, _Connection):
                        self._drop(key.data)
            self._answer_logins()

    def _handle(self, key: selectors.SelectorKey, events: int) -> None:
        if isinstance(key.data, _Connection):
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                self._receive(key.data)
            return
        sock: socket.socket = key.fileobj  # type: ignore[assignment]
        if key.data in DATAGRAM_SERVICES:
            data, sender = sock.recvfrom(2048)
            sock.sendto(data + bytes(40), sender)
            return
        accepted, _ = sock.accept()
        if len(self._open) >= MAX_CONNECTIONS:
            accepted.close()
            return
        accepted.setblocking(False)
        connection = _Connection(accepted, key.data)
        self._open.add(connection)
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _receive(self, connection: _Connection) -> None:
        data = connection.sock.recv(65536)
        if not data:
            self._drop(connection)
        elif connection.service == "broker":
            self._send(connection, _PUBACK)
        elif connection.service == "echo":
            self._send(connection, data)
        elif connection.service == "login":
            heapq.heappush(self._logins, (time.monotonic() + LOGIN_DELAY_S, id(connection), connection))
        elif connection.service == "http":
            n_bytes = FIRMWARE_BYTES if b"/firmware" in data else PAGE_BYTES
            connection.close_when_sent = True
            self._send(connection, b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % n_bytes + b"x" * n_bytes)

    def _send(self, connection: _Connection, data: bytes) -> None:
        connection.unsent = memoryview(bytes(connection.unsent) + data)
        self._flush(connection)

    def _flush(self, connection: _Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            while connection.unsent:
                connection.unsent = connection.unsent[connection.sock.send(connection.unsent) :]
        if connection.unsent:
            self._selector.modify(connection.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
        elif connection.close_when_sent:
            self._drop(connection)
        else:
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)

    def _answer_logins(self) -> None:
        while self._logins and self._logins[0][0] <= time.monotonic():
            connection = heapq.heappop(self._logins)[2]
            if connection in self._open:
                connection.close_when_sent = True
                try:
                    self._send(connection, b"denied\n")
                except OSError:
                    self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        if connection in self._open:
            self._open.discard(connection)
            self._selector.unregister(connection.sock)
            connection.sock.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bind", metavar="HOST", default="127.0.0.1", help="address to serve on (default 127.0.0.1)")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default 600)")
    args = parser.parse_args()
    leave_cleanly_on_signals()
    deadline = Deadline(args.seconds)
    with Peers(args.bind, fixed_ports=True):
        print("ready", flush=True)
        deadline.sleep(args.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
