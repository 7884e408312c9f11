"""examples/serial-sensor: what its wire does to a message."""

import random
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/serial-sensor"
sys.path.insert(0, str(EXAMPLE))

import serial_link  # type: ignore[import-not-found]  # noqa: E402


class Wire:
    """A UART that takes `most` bytes a write and hands out what is in `there`."""

    def __init__(self, most: int = 9999) -> None:
        self.most = most
        self.there = b""
        self.sent = b""

    def write(self, data: bytes) -> int:
        self.sent += data[: self.most]
        return len(data[: self.most])

    def read(self, size: int) -> bytes | None:
        got, self.there = self.there[:size], self.there[size:]
        return got or None


class Agent:
    class reporter:
        subscriptions = ("stonechat/1/fleet/x/ack", "stonechat/1/fleet/x/command")

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []

    def on_message(self, topic: str, payload: bytes) -> None:
        self.got.append((topic, payload))


def test_every_payload_comes_through() -> None:
    draw = random.Random(1)
    for size in (0, 1, 2, 3, 57, 72, 200):
        payload = draw.randbytes(size)
        if size:
            assert serial_link.parse(serial_link.line("report", payload).rstrip(b"\n")) == ("report", payload)


def test_what_was_damaged_is_dropped() -> None:
    text = serial_link.line("report", bytes(range(60))).rstrip(b"\n")
    for at in range(3, len(text)):
        for bit in (0, 1, 5):
            damaged = bytearray(text)
            damaged[at] ^= 1 << bit
            found = serial_link.parse(bytes(damaged))
            assert found in (None, ("report", bytes(range(60)))), at
    for text in (b"", b"SC", b"SC report", b"hello world", b"SC a !!! 00000000", bytes(40), b"\xff" * 40):
        assert serial_link.parse(text) is None


def test_a_full_uart_raises_so_that_the_agent_sends_again() -> None:
    with pytest.raises(OSError, match="full"):
        serial_link.SerialLink(Wire(20)).publish("a/report", bytes(60), 1, False)


def test_answers_reach_the_agent_among_what_else_comes() -> None:
    wire, agent = Wire(), Agent()
    link = serial_link.SerialLink(wire)
    wire.there = b"noise\n" + serial_link.line("ack", b"\x01\x02") + serial_link.line("model", b"x") + b"\xff" * 2000
    for _ in range(60):
        link.poll(agent)
    assert agent.got == [("stonechat/1/fleet/x/ack", b"\x01\x02")]
    assert link.damaged >= 2 and len(link._text) <= serial_link.LONGEST
    wire.there = b"\n" + serial_link.line("command", b"do")
    for _ in range(5):
        link.poll(agent)
    assert agent.got[-1] == ("stonechat/1/fleet/x/command", b"do")
