"""Cuts the power, again and again, while the outbox writes; then looks what is left.

On MicroPython (unix port) littlefs lies on a simulated NOR flash whose operations tear. On Linux a process that appends
is ended by kill -9 and started again on the same folder. No confirmed report may be lost before its acknowledgement, no
sequence number used twice, nothing read that was not written.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stonechat.errors import StonechatError
from stonechat.outbox import Outbox

from ..console import working_copy

CUTS = 1500
KILLS = 200
ERASES_PER_REPORT = 0.25

# The victim: says what append() confirmed and what it acknowledged, each line flushed before the next step.
_VICTIM = """
import os, sys
from stonechat.outbox import Outbox
outbox = Outbox(sys.argv[1], 65536)
os.write(1, b"up %d\\n" % outbox.boot)
while True:
    sequence = outbox.append(b"%012d" % outbox.sequence + b"x" * 40)
    os.write(1, b"put %d\\n" % sequence)
    if sequence % 3 == 0 and sequence - 6 >= outbox.oldest:
        os.write(1, b"ack %d\\n" % (sequence - 6))
        outbox.ack(outbox.oldest, sequence - 6, outbox.stream)
    if sequence % 50 == 0:
        outbox.save()
"""


def soak(scale: float) -> bool:
    """CUTS * scale torn operations on littlefs and KILLS * scale on this file system; prints the figures."""
    return littlefs(max(20, int(CUTS * scale))) & kills(max(5, int(KILLS * scale)))


def micropython(*arguments: str, name: str = "power_cuts.py") -> dict[str, Any]:
    """Run a script of firmware_tests/life on the unix port. Raises StonechatError where it can't be."""
    script = working_copy() / "firmware_tests/life" / name
    beside = Path(sys.executable).with_name("micropython")
    if not script.exists() or not beside.exists():
        raise StonechatError("needs a working copy with the MicroPython of `make setup`")
    environment = dict(os.environ, MICROPYPATH=str(working_copy() / "agent"))
    command = [str(beside), "-X", "heapsize=16m", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise StonechatError(f"{script.name}: {(done.stderr or done.stdout)[-300:]}")
    return dict(json.loads(lines[-1]))


def littlefs(cuts: int) -> bool:
    began_s = time.monotonic()
    totals = {"cuts": 0, "lives": 0, "confirmed": 0, "checked": 0, "wrong": 0}
    first = ""
    seed = 0
    while totals["cuts"] < cuts:
        seed += 1
        figures = micropython(str(min(300, cuts - totals["cuts"])), str(seed))
        first = first or str(figures["first"])
        for name in totals:
            totals[name] += figures[name]
    cost = micropython("cost")
    print(
        f"littlefs: {totals['cuts']} torn operations, {totals['lives']} lives, {totals['confirmed']} confirmed reports"
        f" ({totals['checked']} sought), {totals['wrong']} wrong {first}; {time.monotonic() - began_s:.0f} s"
    )
    print(
        f"littlefs: {cost['erases_per_report']:.3f} erases and {cost['bytes_per_report']:.0f} bytes programmed a report"
    )
    return totals["wrong"] == 0 and cost["erases_per_report"] <= ERASES_PER_REPORT


def kills(count: int) -> bool:
    """kill -9 in the middle of appends, `count` times on one folder."""
    confirmed: set[int] = set()
    acknowledged = 0
    wrong: list[str] = []
    boots: list[int] = []
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch + "/box"
        for _ in range(count):
            for word, number in _one_life(folder, rng.randint(1, 80)):
                if word == "up":
                    boots.append(number)
                elif word == "ack":
                    acknowledged = max(acknowledged, number)
                elif number in confirmed:
                    wrong.append(f"number {number} used twice")
                else:
                    confirmed.add(number)
        outbox = Outbox(folder, 65536)
        found: dict[int, bytes] = {}
        record = outbox.after(0)
        while record is not None:
            found[record[0]] = bytes(record[1])
            record = outbox.after(record[0])
        damaged = outbox.damaged
        lost = outbox.lost
    wrong += [f"number {n} reads wrong" for n, body in found.items() if body != b"%012d" % n + b"x" * 40]
    wrong += [f"number {n} is lost" for n in sorted(confirmed) if n > acknowledged and n not in found]
    if boots != sorted(set(boots)):
        wrong.append("a boot was counted twice")
    if confirmed and outbox.sequence <= max(confirmed):
        wrong.append(f"number {outbox.sequence} would be used again")
    print(
        f"kill -9: {count} kills, {len(confirmed)} confirmed reports, {damaged} torn tails at the end, {lost} dropped,"
        f" {len(wrong)} wrong {'; '.join(wrong[:3])}"
    )
    return not wrong and len(confirmed) > count


def _one_life(folder: str, lines: int) -> list[tuple[str, int]]:
    """Start the victim, kill it after N lines of output -> all its output."""
    victim = subprocess.Popen([sys.executable, "-c", _VICTIM, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert victim.stdout is not None and victim.stderr is not None
    said = b"".join(victim.stdout.readline() for _ in range(lines))
    victim.kill()
    rest, errors = victim.communicate()
    if errors:
        raise StonechatError(errors.decode()[-300:])
    whole = (said + rest).decode().split("\n")[:-1]  # what follows the last newline was cut off
    return [(line.split()[0], int(line.split()[1])) for line in whole]
