"""What the agent costs a board, in its full and its core profile: bytes of .mpy for each module and architecture, heap,
bytes allocated and time per step on each MicroPython that is here (stonechat built for it, -O2, model micropython-1).

`heap least` is the smallest -X heapsize, in steps of 4 KB, in which the agent with its MQTT client starts and scores
ten windows. Bytecode that is frozen into the firmware takes no heap: then a board needs about `steady` less `import`.
`heap tls` is what an open, verified TLS connection takes on top, `heap tls handshake` the same with what the
handshake left; mbedTLS's own buffers are not in it: on the unix port they come from C's heap.
armhf is emulated: its times mean nothing, its bytes do. `collector read` counts the free heap, block by block, and this
heap is 4 MB; a board's is a fiftieth of that.

Examples:
  stonechat bench board
  stonechat bench board --json board.json
  stonechat bench board --emulated rp2040 --before af0f5e3   # cycles of an emulated RP2040, before and now
"""

import argparse
import contextlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from stonechat_tools.console import model_path, working_copy
from stonechat_tools.device.build import DEFAULT, PROFILES, build

HELP = "a board: .mpy sizes, heap, bytes and time per stage on every MicroPython target"
ARCHITECTURE = {"unix-x64": "x64", "unix-i386": "x86", "unix-armhf": "armv6m"}
STEP_KB = 4
RUN_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=model_path,
        default=model_path("micropython-1"),
        help="a .tflite or a shipped model (default micropython-1)",
    )
    parser.add_argument(
        "--emulated",
        metavar="BOARDS",
        nargs="?",
        const="rp2040,m3,m7,rv32",
        help="on the emulated boards of `make boards` (default rp2040,m3,m7,rv32): cycles and instructions",
    )
    parser.add_argument("--before", metavar="COMMIT", default="", help="with --emulated: measure that commit too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.emulated:
        from stonechat_tools.bench import emulated

        found = emulated.run(args.emulated.split(","), args.before, args.model)
        emulated.show(found)
        return found
    sys.path.insert(0, str(working_copy() / "firmware_tests"))
    try:
        from targets import targets
    except ImportError:
        raise ConfigError("this benchmark needs a working copy of stonechat: firmware_tests/ is not here") from None
    finally:
        sys.path.pop(0)
    figures: dict[str, Any] = {"modules": {}, "mpy_bytes": {}, "targets": {}}
    with tempfile.TemporaryDirectory(prefix="stonechat-bench-") as scratch:
        folder = Path(scratch)
        for profile in PROFILES:
            figures["modules"][profile] = build(DEFAULT[0], folder / "modules", profile=profile, linked=False).sizes
            for name in (*DEFAULT, "x86"):
                total = build(name, folder / name, profile=profile).total
                figures["mpy_bytes"].setdefault(name, {})[profile] = total
        for target in targets():
            if target.missing:
                print(f"{target.name}: left out: {target.missing}")
                continue
            for profile in PROFILES:
                built = folder / f"{profile}-for-{target.name}"
                build(ARCHITECTURE[target.name], built, ["board/tls"], profile=profile)
                measured = measure(target.command, built, args.model, profile, "all", 4096)
                if measured is None:
                    raise ConfigError(f"{target.name}: the measurement failed")
                measured |= tls_cost(target.command, built, args.model, profile)
                measured["heap_least"] = [least_heap(target.command, built, args.model, profile) * 1024]
                if profile == "full":
                    measured |= guard_cost(target.command, ARCHITECTURE[target.name], built, args.model)
                figures["targets"][f"{target.name} {profile}"] = measured
    show(figures)
    return figures


def measure(
    command: list[str], built: Path, model: Path, profile: str, mode: str, heap_kb: int, *more: str
) -> dict[str, list[float]] | None:
    """Run life/measure.py -> its figures by name ([value], or [bytes, microseconds]); None where it failed."""
    with tempfile.TemporaryDirectory(prefix="stonechat-bench-") as data:
        done = subprocess.run(
            [
                *command,
                "-X",
                f"heapsize={heap_kb}k",
                str(working_copy() / "firmware_tests/life/measure.py"),
                str(model.resolve()),
                data + "/d",
                profile,
                mode,
                *more,
            ],
            capture_output=True,
            text=True,
            timeout=RUN_S,
            env=dict(os.environ, MICROPYPATH=f"{built}:.frozen"),
            cwd=data,
        )
    if done.returncode:
        return None
    return {words[0]: [float(word) for word in words[1:]] for words in map(str.split, done.stdout.splitlines())}


def tls_cost(command: list[str], built: Path, model: Path, profile: str) -> dict[str, list[float]]:
    """Heap that a verified TLS connection takes: while it is open, and at most (with the handshake's garbage)."""
    sys.path.insert(0, str(working_copy() / "firmware_tests"))
    try:
        from life.certificates import make_certificates
    finally:
        sys.path.pop(0)
    with tempfile.TemporaryDirectory(prefix="stonechat-bench-") as folder:
        made = make_certificates(Path(folder))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.certificate, made.key)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=_echo, args=(listener, context), daemon=True).start()
            port = listener.getsockname()[1]
            measured = measure(command, built, model, profile, "tls", 4096, str(port), str(made.authority))
            listener.shutdown(socket.SHUT_RDWR)
    if measured is None:
        raise ConfigError("the measurement of TLS failed")
    return measured


def guard_cost(command: list[str], architecture: str, built: Path, model: Path) -> dict[str, list[float]]:
    """What a call costs without the guard of a response, with it while nothing is in force, and in a quarantine. built:
    a folder that is filled anew."""
    build(architecture, built, ["board/guard"])
    measured = measure(command, built, model, "full", "guard", 4096)
    if measured is None:
        raise ConfigError("the measurement of the guard failed")
    return {name.replace("hooked", "without_guard"): figure for name, figure in measured.items()}


def _echo(listener: socket.socket, context: ssl.SSLContext) -> None:
    with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as stream:
        stream.sendall(stream.recv(5))


def least_heap(command: list[str], built: Path, model: Path, profile: str) -> int:
    """-> KB: the least heap, in steps of STEP_KB, in which the agent lives."""
    low, high = 16 // STEP_KB, 512 // STEP_KB
    while low < high:
        middle = (low + high) // 2
        if measure(command, built, model, profile, "live", middle * STEP_KB) is None:
            low = middle + 1
        else:
            high = middle
    return low * STEP_KB


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    modules = figures["modules"]
    table = Table(title=f"bytes of .mpy, {DEFAULT[0]}, a file for every module")
    for column in ("module", *modules):
        table.add_column(column, justify="left" if column == "module" else "right")
    for module in sorted({module for sizes in modules.values() for module in sizes}):
        table.add_row(module, *[f"{sizes[module]:,}" if module in sizes else "" for sizes in modules.values()])
    console.print(table)
    table = Table(title="bytes of .mpy as a board gets them, linked")
    for column in ("", *modules):
        table.add_column(column, justify="left" if not column else "right")
    for name, totals in figures["mpy_bytes"].items():
        table.add_row(name, *[f"{total:,}" for total in totals.values()])
    console.print(table)
    targets = figures["targets"]
    if not targets:
        return
    table = Table(title="on each target: bytes, and microseconds per call")
    for column in ("", *targets):
        table.add_column(column, justify="left" if not column else "right")
    for name in dict.fromkeys(name for measured in targets.values() for name in measured):
        cells = [_cell(measured[name]) if name in measured else "" for measured in targets.values()]
        table.add_row(name.replace("_", " "), *cells)
    console.print(table)


def _cell(values: list[float]) -> str:
    return f"{values[0]:,.0f} B" + (f", {values[1]:,.2f} µs" if len(values) > 1 else "")
