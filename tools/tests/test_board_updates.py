"""A board that takes releases: its built package on each MicroPython target, over a real broker."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_process import DEVICE
from fleet_support import Mosquitto, needs_mosquitto
from release_support import Hand, Vendor, described
from stonechat import slots
from stonechat.model import load_model
from stonechat.own_model_file import seal
from stonechat_tools.device import build as builder
from stonechat_tools.fleet import wire_release

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))

from targets import Target, targets  # noqa: E402

pytestmark = [needs_mosquitto, pytest.mark.slow(12)]
MODEL = ROOT / "models/micropython-1/model.tflite"
ARCHITECTURE = {"unix-x64": "x64", "unix-i386": "x86", "unix-armhf": "armv6m"}
SECRET = bytes(range(32))


def quickly(version: int) -> bytes:
    """The shipped model, which learns for 16 windows in place of 128."""
    data = MODEL.read_bytes()
    meta = load_model(data).metadata
    meta.learn_windows, meta.version = 16, version
    return seal(data, meta)


class Board:
    """One target's device; start() is a boot, end() a power cut."""

    def __init__(self, target: Target, folder: Path, lib: Path, port: int, public: bytes) -> None:
        self.model = folder / "model.tflite"
        self.model.write_bytes(quickly(1))
        data = folder / "data"
        data.mkdir()
        words = [str(lib), str(data), str(self.model), str(port), DEVICE, SECRET.hex(), public.hex()]
        self.command = [*target.command, str(ROOT / "firmware_tests/life/updates.py"), *words]
        self.said = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self, *more: str) -> str:
        self.process = subprocess.Popen(
            [*self.command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return self._line()

    def _line(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        self.said += line
        return line

    def ask(self, command: str) -> str:
        """-> the answer, "" where the device has reset itself."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def connect(self, hand: Hand) -> None:
        """Until the device has subscribed: its status has come."""
        hand.status = None
        for _ in range(300):
            if hand.status:
                return
            self.ask("turn 10")
        raise AssertionError(self.said[-3000:])

    def until(self, hand: Hand, *wanted: int) -> str:
        """Turn until the collector has such a status, and the device agrees."""
        for _ in range(300):
            line = self.ask("turn 20")
            if not line or "Traceback" in line:
                break
            status = hand.status and hand.status.update
            if status and line.startswith(f"turned {[*wanted]}"[:-1]):
                return line
        raise AssertionError(f"wanted {wanted}: {self.said[-3000:]}")

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", params=targets(), ids=lambda target: target.name)
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.param
    if found.missing:
        pytest.skip(found.missing)
    return found


@pytest.fixture(scope="module")
def lib(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built once for each target; linking takes longest."""
    folder = tmp_path_factory.mktemp(target.name)
    builder.build(ARCHITECTURE[target.name], folder, ["updater"], linked=target.name == "unix-x64")
    assert (folder / "stonechat/updater.mpy").exists()
    return folder


@pytest.fixture
def site(target: Target, lib: Path, tmp_path: Path) -> Iterator[tuple[Board, Hand, Vendor]]:
    vendor = Vendor(tmp_path)
    with Mosquitto.plain(tmp_path) as broker:
        board = Board(target, tmp_path, lib, broker.port, vendor.public)
        try:
            with Hand(broker.port, SECRET, lambda: board.said) as hand:
                yield board, hand, vendor
        finally:
            board.end()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def test_a_board_pulls_tries_confirms_rolls_back_and_is_brought_back(site: tuple[Board, Hand, Vendor]) -> None:
    board, hand, vendor = site
    second, third = quickly(2), quickly(3)
    assert board.start().startswith("started [0, 0, 0, 0, 0, 0]"), board.said
    board.connect(hand)
    assert "windows 30 0 0 0" in board.ask("windows 30"), board.said
    # version 2: pulled, on trial in the running firmware, confirmed
    hand.serve(2, vendor.sign(second, 2), second)
    line = board.until(hand, 0, 0, 1, 2, slots.NONE, 0)
    assert digest(second) in line and "False" in line
    assert hand.status is not None
    hand.send(wire_release.seal_confirm(hand.keys, 2, hand.status.stream))
    board.until(hand, 2, 1, 0, 2, slots.CONFIRMED, 0)
    # version 3 by a reset, which then never gets further than its boot: a reset loop
    board.end()
    assert board.start("reset").startswith("started [2, 1, 0, 2, 1"), board.said
    board.connect(hand)
    assert " 0 0 0 " in board.ask("windows 12"), board.said
    hand.serve(3, vendor.sign(third, 3), third)
    for _ in range(300):
        if not board.ask("turn 20"):
            break
    else:
        raise AssertionError(board.said[-2000:])
    for boot in range(3):
        assert board.start().startswith("started [2, 1, 2, 3, 0"), (boot, board.said)
        board.end()
    assert board.start().startswith(f"started [2, 1, 0, 3, {slots.RESTARTS}"), board.said
    board.connect(hand)
    line = board.ask("turn 1")
    assert digest(second) in line and "False" in line
    # withdraw: the model that it came with runs again, and still knows what is normal
    assert hand.status is not None
    hand.send(wire_release.seal_withdraw(hand.keys, 2, hand.status.stream))
    line = board.until(hand, 0, 0, 0, 3, slots.WITHDRAWN)
    assert digest(quickly(1)) in line and "False" in line
    assert " 0 0 0 " in board.ask("windows 5"), board.said


def test_a_board_refuses_what_is_wrong_and_scores_on(target: Target, site: tuple[Board, Hand, Vendor]) -> None:
    """All of it on one target, and a signature, a size and a digest on the others; firmware_tests/unit/test_update.py
    and test_updater.py go through every case on each of them."""
    board, hand, vendor = site
    second = quickly(2)
    sha, size, schema_id, golden = described(second)
    changed = bytearray(vendor.sign(second, 11))
    changed[200] ^= 1
    corrupt = bytearray(second)
    corrupt[900] ^= 1
    cases = (
        (Vendor(board.model.parent, "stranger.pub").sign(second, 10), second, slots.SIGNATURE),
        (bytes(changed), second, slots.SIGNATURE),
        (vendor.sign(second, 12, _3="valve"), second, slots.CLASS),
        (vendor.sign(second, 13, _6=[sha, size, bytes(8), golden]), second, slots.SCHEMA),
        (vendor.sign(second, 14, _5=1_700_000_001, _4=1), second, slots.EXPIRED),
        (vendor.sign(second, 15, _6=[sha, 10_000_000, schema_id, golden]), second, slots.TOO_LARGE),
        (vendor.sign(second, 16), bytes(corrupt), slots.DIGEST),
        (vendor.sign(second, 17, _6=[sha, size, schema_id, bytes(32)]), second, slots.MODEL),
    )
    tried = range(len(cases)) if target.name == "unix-x64" else (1, 5, 6)
    board.start()
    board.connect(hand)
    board.ask("windows 30")
    for count, number in enumerate(tried, 1):
        message, model, result = cases[number]
        hand.serve(10 + number, message, model)
        line = board.until(hand, 0, 0, 0, 10 + number, result, count)
        assert digest(quickly(1)) in line
        assert " 0 0 0 " in board.ask("windows 1"), board.said
    hand.offer(30, bytes(10_000_000))
    board.until(hand, 0, 0, 0, 30, slots.TOO_LARGE, len(tried) + 1)
    assert " 0 0 0 " in board.ask("windows 3"), board.said
