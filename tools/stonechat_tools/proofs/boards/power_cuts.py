"""A device's life on a board with power cuts inside flash operations, on the firmware's own littlefs.

    python -m stonechat_tools.proofs.boards.power_cuts m3 --cuts 100

Each life mounts the board's medium through a block device that stops in the middle of the N-th write (half of it is on
the medium, nothing after it is), starts the full profile, and lets windows pass until the power is cut. Then the board
starts again from what is on the medium. Every report is opened with the collector's reader. No number may come twice
with another content, and no state and no outbox may be refused.
"""

import argparse
import random
import sys
import time
from binascii import unhexlify
from dataclasses import dataclass, field

from stonechat_tools.console import working_copy
from stonechat_tools.fleet import keyring, wire
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import BoardError, LateError, Machine, package
from stonechat_tools.proofs.boards.prove import PRELUDE

KEY = bytes(range(32))
MOST_WRITES = 60  # of a life without a cut; a life has about as many
MEDIUM = {"rp2": "import rp2\nmedium, options = rp2.Flash(), {'progsize': 256}", "qemu": "medium, options = disk, {}"}
LIFE = """
import os, vfs, sys
{medium}
class Cut:
    left = {after}
    def readblocks(self, *a):
        return medium.readblocks(*a)
    def writeblocks(self, block, data, offset=0):
        if self.left <= 0:
            return -5  # an exception would go right through littlefs
        self.left -= 1
        if self.left == 0:
            half = len(data) // 2 & ~255 or len(data) // 2
            if half and {half}:
                medium.writeblocks(block, memoryview(data)[:half], offset)
            return -5
        return medium.writeblocks(block, data, offset)
    def ioctl(self, request, argument):
        if request == 6 and self.left <= 0:
            return -5
        return medium.ioctl(request, argument)
cut = Cut()
vfs.umount("/")
vfs.mount(vfs.VfsLfs2(cut, **options), "/")
os.chdir("/")
import prelude
prelude.made[0] = {life}  # where the port has no random numbers, each start has others all the same
from binascii import hexlify
from stonechat.board import hooks
hooks.install()
from stonechat.board import full
def publish(topic, payload, qos, retain):
    if not retain and cut.left > 0:  # after it, the power is off
        print("REPORT", hexlify(payload).decode())
try:
    watch = full.start("sensor-7", {key!r}, "/model.tflite", publish=publish, folder="/data", heartbeat_windows=1)
except Exception as error:
    print("DEAD" if cut.left <= 0 else "REFUSED", repr(error))
    watch = None
if watch:
    agent = watch.agent
    print("START", bool(agent.state.damaged) and cut.left > 0, agent.reporter.outbox.damaged)
    agent.reporter.bytes_per_day = 0
    now = 0
    for i in range(40):
        now += agent.window_ms
        agent.end_window(now)
        agent.reporter.pump(publish, now)
        if i % 5 == 4:
            watch.save()
        if cut.left <= 0:
            break
    print("END", i, cut.left, agent.errors, agent.last_error)
"""


@dataclass
class Lives:
    """What N lives showed. reused: numbers that came twice with another content; damaged: states or outboxes that a
    start refused; torn: records that a cut cost; unread: reports that the collector's reader refused."""

    board: str
    cuts: int = 0
    reports: int = 0
    reused: int = 0
    damaged: int = 0
    torn: int = 0
    unread: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def proved(self) -> bool:
        return not (self.reused or self.damaged or self.unread or self.failed) and self.reports > self.cuts

    def __str__(self) -> str:
        lines = [
            f"{self.board}: {self.cuts} power cuts inside flash operations, {self.reports} reports: "
            f"{self.reused} numbers reused, {self.damaged} damaged states,",
            f"  {self.unread} unreadable reports, {self.torn} records torn; {self.seconds:.0f} s",
        ]
        return "\n".join([*lines, *[f"  {line}" for line in self.failed]])


def files_of(board: Board) -> dict[str, bytes]:
    files = package(board.architecture or "armv6m")
    files["/model.tflite"] = (working_copy() / "models/micropython-1/model.tflite").read_bytes()
    files["/prelude.py"] = PRELUDE.encode()
    return files


def lives(board: Board, cuts: int, seed: int = 1) -> Lives:
    """Raises BoardError, BuildError."""
    result = Lives(board.name)
    draw = random.Random(seed)
    keys = keyring.DeviceKeys(KEY, "sensor-7")
    seen: dict[int, bytes] = {}
    began = time.monotonic()
    with Machine(board, files=files_of(board)) as machine:
        while result.cuts < cuts:
            after = draw.randint(1, MOST_WRITES)
            script = LIFE.format(
                medium=MEDIUM[board.port], after=after, half=draw.random() < 0.7, key=KEY, life=997 * result.cuts
            )
            try:
                printed = machine.run(script)
            except LateError:
                raise
            except BoardError as error:
                result.failed.append(f"cut at write {after}: {str(error).splitlines()[-1]}")
                break
            result.cuts += 1
            read(printed, result, keys, seen)
            if result.cuts % 10 == 0:
                print(f"{board.name}: {result.cuts} of {cuts} cuts, {result.reports} reports", file=sys.stderr)
            if len(result.failed) > 5:
                break
            machine.restart()
    result.seconds = time.monotonic() - began
    return result


def read(printed: str, result: Lives, keys: keyring.DeviceKeys, seen: dict[int, bytes]) -> None:
    for line in printed.splitlines():
        kind, *words = line.split(" ", 1)
        rest = words[0] if words else ""
        if kind == "REPORT":
            try:
                report = wire.open_report("sensor-7", keys, unhexlify(rest))
            except keyring.Rejected as error:
                result.unread += 1
                result.failed.append(str(error))
                continue
            result.reports += 1
            if seen.setdefault(report.sequence, report.body) != report.body:
                result.reused += 1
                result.failed.append(f"number {report.sequence} with two contents")
        elif kind == "START":
            damaged, torn = rest.split()
            result.damaged += damaged == "True"
            result.torn += int(torn)
        elif kind == "REFUSED":
            result.damaged += 1
            result.failed.append(f"start refused: {rest}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", nargs="*", help="rp2040, m0, m3, m7, rv32 (default all)")
    parser.add_argument("--cuts", type=int, default=100, help="on each board (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    try:
        results = [lives(board, args.cuts, args.seed) for board in build_all(args.boards) if board.name != "pico"]
    except (BuildError, BoardError) as error:
        print(f"boards: {error}", file=sys.stderr)
        return 1
    for one in results:
        print(one)
    return 0 if all(one.proved for one in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
