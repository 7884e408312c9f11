"""Whom the simulated firmware talks to, on loopback: a broker, a web server and a time server at port, port + 1 and
port + 2 of 127.0.0.1, and a stranger at port + 4 of 127.66.0.6. One thread each; they end with the process.

    with Peers() as port: ...
    python -m stonechat_tools.lab.firmware.peers HOME STRANGER      elsewhere: prints the port, ends with its input
"""

import contextlib
import random
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType

HOME = "127.0.0.1"
STRANGER = "127.66.0.6"


class Peers:
    def __init__(self, home: str = HOME, stranger: str = STRANGER) -> None:
        self._home = home
        self._stranger = stranger
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> int:
        for _ in range(20):
            port = random.randrange(34_000, 46_000, 6)
            try:
                self._start(port)
                return port
            except OSError:  # one of them is taken
                self._close()
        raise OSError("no six ports in a row are free on loopback")

    def _start(self, port: int) -> None:
        for host, number, answer in (
            (self._home, port, _broker),
            (self._home, port + 1, _web),
            (self._stranger, port + 4, _stranger),
        ):
            listener = socket.create_server((host, number), backlog=64)
            self._sockets.append(listener)
            threading.Thread(target=_serve, args=(listener, answer), daemon=True).start()
        clock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sockets.append(clock)
        clock.bind((self._home, port + 2))
        threading.Thread(target=_clock, args=(clock,), daemon=True).start()

    def _close(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _serve(listener: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    with contextlib.suppress(OSError):
        while True:
            stream, _ = listener.accept()
            threading.Thread(target=_guarded, args=(stream, answer), daemon=True).start()


def _guarded(stream: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    with contextlib.suppress(OSError), stream:
        answer(stream)


def _broker(stream: socket.socket) -> None:
    while True:
        size = stream.recv(1)
        if not size:
            return
        left = size[0]
        while left:
            left -= len(stream.recv(left))
        stream.sendall(b"\x40\x02\x00\x01")


def _web(stream: socket.socket) -> None:
    request = stream.recv(512)
    size = int(request.split(b"n=")[1].split()[0]) if b"n=" in request else 0
    stream.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + b"c" * size)


def _stranger(stream: socket.socket) -> None:
    while data := stream.recv(4096):
        if data.startswith(b"hello"):
            stream.sendall(b"sleep\n")


def _clock(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            data, peer = server.recvfrom(64)
            if peer:  # shut down: no data from nobody
                server.sendto(data, peer)


if __name__ == "__main__":
    with Peers(*sys.argv[1:]) as number:
        print(number, flush=True)
        sys.stdin.read()
