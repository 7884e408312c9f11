# mypy: ignore-errors
"""MicroPython: the outbox on littlefs on a simulated NOR flash whose power fails in the middle of an operation.

    micropython life/power_cuts.py CUTS SEED     prints one line of figures as JSON
    micropython life/power_cuts.py cost          what one report costs the flash

A cut tears the program or erase operation that it hits; then the machine is as if dead. The next life mounts a copy of
the flash: file objects of the old one must not reach it.
"""

import os
import random
import sys

from stonechat.errors import OutboxError
from stonechat.outbox import Outbox

BLOCK_BYTES = 4096
BLOCKS = 64
LARGE_RING_BYTES = 32_768  # holds all that one trial writes
SMALL_RING_BYTES = 4096  # drops its oldest all the time
SMALL_RING_REPORTS = 16  # what it holds at the least, four lives having left a short segment each
_NEVER = -1


class Flash:
    """NOR: an erase sets a block to ones, a program clears bits. After `left` operations the next one tears."""

    def __init__(self, data=None):
        self.data = data or bytearray(b"\xff" * (BLOCK_BYTES * BLOCKS))
        self.left = _NEVER
        self.erases = 0
        self.programmed = 0

    def _tear(self, size):
        """None while the power holds; else how many bytes of this operation still land."""
        if self.left == _NEVER:
            return None
        if self.left == 0:
            raise OSError(5)
        self.left -= 1
        return random.getrandbits(16) % (size + 1) if self.left == 0 else None

    def readblocks(self, block, buffer, offset=0):
        at = block * BLOCK_BYTES + offset
        buffer[:] = self.data[at : at + len(buffer)]

    def writeblocks(self, block, buffer, offset=None):
        if offset is None:
            self.ioctl(6, block)
            offset = 0
        landing = self._tear(len(buffer))
        at = block * BLOCK_BYTES + offset
        for i in range(len(buffer) if landing is None else landing):
            self.data[at + i] &= buffer[i]
        self.programmed += len(buffer)
        if landing is not None:
            raise OSError(5)

    def ioctl(self, operation, block):
        if operation == 4:
            return BLOCKS
        if operation == 5:
            return BLOCK_BYTES
        if operation == 6:
            landing = self._tear(BLOCK_BYTES)
            size = BLOCK_BYTES if landing is None else landing
            at = block * BLOCK_BYTES
            self.data[at : at + size] = b"\xff" * size
            self.erases += 1
            if landing is not None:
                raise OSError(5)
        return 0


def mount(flash):
    os.mount(os.VfsLfs2(flash, progsize=256, readsize=32, lookahead=32), "/f")


def body_of(sequence):
    return b"%08d" % sequence + b"x" * 40


class Trial:
    """A few lives on one flash, and what must be true after them."""

    def __init__(self, small):
        self.small = small
        self.ring_bytes = SMALL_RING_BYTES if small else LARGE_RING_BYTES
        self.flash = Flash()
        os.VfsLfs2.mkfs(self.flash, progsize=256)
        mount(self.flash)
        self.confirmed = []  # sequence numbers whose append() returned
        self.acknowledged = set()
        self.cuts = 0
        self.wrong = []

    def live(self):
        """One life: append and acknowledge until the power fails."""
        flash = self.flash
        flash.left = 5 + random.getrandbits(10) % 150
        waiting = []
        outbox = None
        try:
            outbox = Outbox("/f/box", self.ring_bytes)
            for _ in range(60):
                sequence = outbox.append(body_of(outbox.sequence))
                if sequence in self.confirmed:
                    self.wrong.append("number %d used twice" % sequence)
                self.confirmed.append(sequence)
                waiting.append(sequence)
                chance = random.getrandbits(4)
                if chance < 3 and len(waiting) > 3:  # as the collector does: some, out of order too
                    first = waiting.pop(0 if chance else 2)
                    self.acknowledged.add(first)
                    outbox.ack(first, first, outbox.stream)
                if chance == 15:
                    outbox.save()
        except (OutboxError, OSError):
            pass
        if flash.left == 0:
            self.cuts += 1
        flash.left = 0
        try:
            if outbox is not None:
                outbox._file.close()  # now, in vain, and not by the garbage collector later
        except OSError:
            pass
        try:
            os.umount("/f")
        except OSError:
            pass
        self.flash = Flash(bytearray(flash.data))
        try:
            mount(self.flash)
        except OSError as error:
            self.wrong.append("littlefs does not mount: %s" % error)

    def check(self):
        """Everything confirmed and not acknowledged is there, once, whole, unless the ring says that it dropped it."""
        outbox = Outbox("/f/box", 1 << 20)
        found = set()
        record = outbox.after(0)
        while record is not None:
            sequence, body = record
            if bytes(body) != body_of(sequence):
                self.wrong.append("number %d reads wrong" % sequence)
            if sequence in found:
                self.wrong.append("number %d is there twice" % sequence)
            found.add(sequence)
            record = outbox.after(sequence)
        if self.confirmed and outbox.sequence <= max(self.confirmed):
            self.wrong.append("number %d would be used again" % outbox.sequence)
        kept = self.confirmed[-SMALL_RING_REPORTS if self.small else 0 :]
        for sequence in kept:
            if sequence not in found and sequence not in self.acknowledged:
                self.wrong.append("number %d is lost" % sequence)
        os.umount("/f")
        return len(kept)


def run(cuts, seed):
    random.seed(seed)
    figures = {"cuts": 0, "lives": 0, "confirmed": 0, "checked": 0, "wrong": 0, "first": ""}
    while figures["cuts"] < cuts:
        trial = Trial(small=figures["lives"] % 16 == 0)
        for _ in range(4):
            trial.live()
            figures["lives"] += 1
            if trial.wrong:
                break
        figures["checked"] += trial.check()
        figures["cuts"] += trial.cuts
        figures["confirmed"] += len(trial.confirmed)
        figures["wrong"] += len(trial.wrong)
        if trial.wrong and not figures["first"]:
            figures["first"] = trial.wrong[0]
    return figures


def cost(reports=400):
    """Erases and bytes programmed for each report of usual size, every one acknowledged a few later."""
    flash = Flash()
    os.VfsLfs2.mkfs(flash, progsize=256)
    mount(flash)
    outbox = Outbox("/f/box")
    flash.erases = flash.programmed = 0
    for _ in range(reports):
        sequence = outbox.append(bytes(44))
        outbox.ack(sequence - 3, sequence - 3, outbox.stream)
    os.umount("/f")
    return {"erases_per_report": flash.erases / reports, "bytes_per_report": flash.programmed / reports}


if __name__ == "__main__":
    import json

    if sys.argv[1] == "cost":
        print(json.dumps(cost()))
    else:
        print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
