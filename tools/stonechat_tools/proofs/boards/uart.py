"""A plain Pico that reports over its UART: examples/serial-sensor as it is, a terminal of this machine as the wire."""

import os
import socket
import subprocess
import sys
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from stonechat_tools.console import working_copy
from stonechat_tools.proofs.boards.firmware import Board, BuildError
from stonechat_tools.proofs.boards.machine import Machine, package

EXAMPLE = "examples/serial-sensor"


@contextmanager
def wire() -> Iterator[tuple[socket.socket, str]]:
    """-> (the end that a board's UART gets, the path of a terminal at the other end)."""
    board, ours = socket.socketpair()
    master, slave = os.openpty()
    tty.setraw(slave)

    def pump(receive: int, send: int) -> None:
        try:
            while data := os.read(receive, 4096):
                os.write(send, data)
        except OSError:
            pass

    threads = [
        threading.Thread(target=pump, args=pair, daemon=True)
        for pair in ((ours.fileno(), master), (master, ours.fileno()))
    ]
    for thread in threads:
        thread.start()
    try:
        yield board, os.ttyname(slave)
    finally:
        board.close()
        ours.shutdown(socket.SHUT_RDWR)
        os.close(slave)
        for thread in threads:
            thread.join(5)
        ours.close()
        os.close(master)


def files_of(key: bytes, more: str = "") -> dict[str, bytes]:
    """What lies on the board: what `stonechat build` makes, the example with the device's key and `more` arguments of
    start(), the model."""
    root = working_copy()
    files = package("armv6m")
    example = root / EXAMPLE
    text = (example / "main.py").read_text()
    for old, new in (("bytes(32)", f'bytes.fromhex("{key.hex()}")'), ('firmware="1.0"', 'firmware="1.0"' + more)):
        if text.count(old) != 1:
            raise BuildError(f"{example}/main.py: {old} is not there once")
        text = text.replace(old, new)
    files["/main.py"] = text.encode()
    files["/boot.py"] = b"from stonechat.board import hooks\nhooks.install()\n"
    files["/serial_link.py"] = (example / "serial_link.py").read_bytes()
    files["/model.tflite"] = (root / "models/micropython-1/model.tflite").read_bytes()
    return files


@contextmanager
def reporting(board: Board, device: str, key: bytes, broker: str) -> Iterator[None]:
    """The board is on and reports each window as `device`, and forward.py takes its lines to broker (HOST:PORT)."""
    with wire() as (uart, terminal):
        command = [sys.executable, str(working_copy() / EXAMPLE / "forward.py"), terminal, device, "--broker", broker]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as forward:
            try:
                with Machine(board, files=files_of(key, ", heartbeat_windows=1"), uart=uart, repl=False):
                    yield
            finally:
                forward.kill()
