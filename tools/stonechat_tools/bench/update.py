"""What a device pays to verify a release: time, heap and bytes of .mpy of each algorithm, on each MicroPython target.

The signatures are those of the tests (firmware_tests/golden/signatures), the manifest the one with two signatures.
"Least heap" is the smallest heap in which the verifier, with the signature in memory, still runs.

--emulated adds an RP2040 at 125 MHz, emulated to the cycle, and a Cortex-M3 in instructions, where `make boards` has
built their firmware; their figures are of one verification, by the package's .mpy.

Examples:
  stonechat bench update
  stonechat bench update --emulated
"""

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import plain_table, working_copy
from ..device.build import build, mpy_cross
from ..proofs.interpreters import AGENT, Interpreter, interpreters

HELP = "time and heap that a device needs to verify a release"
CASES = {
    "HSS/LMS H10 W4": ("lms", "hss-h10-w4"),
    "SLH-DSA-SHA2-128s": ("slh_dsa", "slh-dsa-pqcrypto"),
}
_ARCHITECTURE = "armv6m"
_EMULATED = ("rp2040", "m3")

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

_BOARD = """
import gc, time
from stonechat import cbor_decode
for module in ("lms", "slh_dsa"):
    verify = __import__("stonechat." + module, None, None, ["verify"]).verify
    with open("/" + module, "rb") as file:
        vector = cbor_decode.loads(file.read())
    gc.collect()
    start = time.ticks_us()
    good = verify(*vector)
    print("COST", module, time.ticks_diff(time.ticks_us(), start), good)
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
    parser.add_argument(
        "--emulated", action="store_true", help="also on an emulated RP2040 and Cortex-M3 (`make boards`)"
    )


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


def on_board(name: str, folder: Path) -> dict[str, int]:
    """name: of an emulated board; folder: of the signatures -> microseconds of one verification, on qemu's boards
    instructions, by the module's name. Raises BoardError, ConfigError and what build() raises."""
    from ..proofs.boards.firmware import BUILDS
    from ..proofs.boards.machine import Machine
    from .emulated import INSTRUCTIONS

    board = next(one for one in BUILDS if one.name == name)
    if board.missing:
        raise ConfigError(f"{name}: {board.missing}")
    files = {"/" + module: (folder / (case + ".cbor")).read_bytes() for module, case in CASES.values()}
    with tempfile.TemporaryDirectory(prefix="stonechat-update-") as scratch:
        build(board.architecture, Path(scratch), ["update"], linked=False)
        for module in ("__init__", "compat", "errors", "cbor", "cbor_decode", "lms", "slh_dsa"):
            files[f"/lib/stonechat/{module}.mpy"] = (Path(scratch) / f"stonechat/{module}.mpy").read_bytes()
    with Machine(board, files=files) as machine:
        lines = [line.split() for line in machine.run(_BOARD).splitlines() if line.startswith("COST")]
    scale = 1 if board.port == "rp2" else INSTRUCTIONS
    return {words[1]: int(words[2]) * scale for words in lines if words[3] == "True"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    folder = working_copy() / "firmware_tests/golden/signatures"
    emulated = {name: on_board(name, folder) for name in _EMULATED} if args.emulated else {}  # first: may be missing
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
    for label, (module, _) in CASES.items():
        if "rp2040" in emulated:
            time_ms = emulated["rp2040"][module] / 1000
            figures[label]["rp2040"] = {"ms": time_ms}
            rows.append([label, "RP2040, emulated", f"{time_ms:.0f} ms", "", ""])
        if "m3" in emulated:
            figures[label]["m3"] = {"instructions": emulated["m3"][module]}
            millions = emulated["m3"][module] / 1e6
            rows.append([label, "Cortex-M3, emulated", f"{millions:.1f} M instructions", "", ""])
    print(plain_table(["algorithm", "target", "time", "least heap", f".mpy ({_ARCHITECTURE})"], rows), end="")
    shared = [name for name in figures[next(iter(CASES))] if name != "mpy_bytes"]
    for name in shared:
        hss, slh = (figures[label].get(name, {}).get("ms") for label in CASES)
        if hss and slh:
            print(f"{name}: SLH-DSA takes {slh / hss:.0f} times as long as HSS/LMS")
    return figures
