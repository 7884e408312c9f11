"""Cuts the power, again and again, while a device installs a release; then looks what it would run.

On MicroPython (unix port) littlefs lies on a simulated NOR flash whose operations tear. On Linux a process installs and
is ended by kill -9, again and again on one folder. Every start must find a whole model, and no version may be
final that the collector has not acknowledged.
"""

import random
import subprocess
import sys
import tempfile
import time

from ..console import working_copy
from . import update_bytes
from .power_cuts import micropython

CUTS = 1500
KILLS = 200


def soak(scale: float) -> bool:
    """CUTS * scale torn operations on littlefs, KILLS * scale on this file system, and a release that is changed and
    cut at each 1/scale-th of its bytes; prints the figures."""
    cuts = littlefs(max(20, int(CUTS * scale))) & kills(max(5, int(KILLS * scale)))
    return update_bytes.soak(max(1, round(1 / scale))) and cuts


def littlefs(cuts: int) -> bool:
    began_s = time.monotonic()
    totals = {"cuts": 0, "lives": 0, "devices": 0, "installed": 0, "wrong": 0}
    first = ""
    seed = 0
    while totals["cuts"] < cuts:
        seed += 1
        figures = micropython(str(min(300, cuts - totals["cuts"])), str(seed), name="update_cuts.py")
        first = first or str(figures["first"])
        for name in totals:
            totals[name] += figures[name]
    print(
        f"littlefs: {totals['cuts']} torn operations in {totals['lives']} lives of {totals['devices']} devices,"
        f" {totals['installed']} with both versions installed, {totals['wrong']} wrong {first};"
        f" {time.monotonic() - began_s:.0f} s"
    )
    return totals["wrong"] == 0 and totals["installed"] == totals["devices"]


def kills(count: int) -> bool:
    """kill -9 some steps into an installation, `count` times; a device that has both versions is replaced."""
    script = working_copy() / "firmware_tests/life/update_cuts.py"
    rng = random.Random(1)
    killed = devices = installed = 0
    wrong: list[str] = []
    began_s = time.monotonic()
    while killed < count and not wrong:
        devices += 1
        acknowledged: set[int] = set()
        with tempfile.TemporaryDirectory() as scratch:
            for _ in range(200):
                command = [sys.executable, str(script), "victim", scratch + "/update", *map(str, acknowledged)]
                victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                assert victim.stdout is not None
                said = "".join(victim.stdout.readline() for _ in range(rng.randint(1, 8)))
                time.sleep(rng.uniform(0, 0.002))
                victim.kill()
                said += victim.communicate()[0]
                killed += victim.returncode < 0
                for line in said.splitlines():
                    word, _, rest = line.partition(" ")
                    if word == "confirm":
                        acknowledged.add(int(rest))
                    elif word == "wrong":
                        wrong.append(rest)
                if wrong or "done" in said:
                    installed += not wrong
                    break
            else:
                wrong.append("200 lives were not enough")
    print(
        f"kill -9: {killed} kills, {devices} devices, {installed} with both versions installed, {len(wrong)} wrong"
        f" {'; '.join(wrong[:3])}; {time.monotonic() - began_s:.0f} s"
    )
    return not wrong
