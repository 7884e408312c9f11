"""What the agent costs a board, on emulated boards (`make boards` builds their firmware): RP2040 in cycles at 125 MHz,
Cortex-M3, M7 and RV32 in instructions. Not modelled: misses of the flash cache, the time of an erase, radio."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from stonechat_tools.console import working_copy
from stonechat_tools.device import romfs

INSTRUCTIONS = 125  # of qemu's boards in a microsecond of theirs
LEAST_STEP = 2048
MODELS = {"1,024 MACs": [32, 16, 32], "5,760 MACs": [32, 48, 24, 8, 24, 48, 32]}
SCRIPT = """
import gc, sys, time
us, past = time.ticks_us, time.ticks_diff
def cost(name, call, first=None, turns=4):
    least = 1 << 29
    call()
    taken = 0
    for _ in range(turns):
        if first:
            first()
        gc.collect()
        gc.disable()
        held = gc.mem_alloc()
        start = us()
        call()
        least = min(least, past(us(), start))
        taken = gc.mem_alloc() - held
        gc.enable()
    print("COST", name, least, taken)
def publish(topic, payload, qos, retain):
    pass
def begin(profile, model, **options):
    from stonechat.board import hooks
    hooks.install()
    entry = getattr(__import__("stonechat.board." + profile).board, profile)
    watch = entry.start("sensor-7", bytes(32), model, folder="/d", **options)
    watch.agent.publish = publish
    return entry, watch, [0]
def turn(watch, clock):
    clock[0] += watch.agent.window_ms
    watch.counter.beat(clock[0])
def costs(profile, model, models):
    gc.collect()
    bare = gc.mem_alloc()
    entry, watch, clock = begin(profile, model, publish=publish, heartbeat_windows=1000)
    gc.collect()
    print("COST heap", gc.mem_alloc() - bare, 0)
    agent, counter = watch.agent, watch.counter
    channel = agent.channels[0]
    scorer, reporter = channel.scorer, agent.reporter
    if hasattr(reporter, "budget"):
        reporter.budget.limited = False
    def window():
        agent.end_window(clock[0])
    for _ in range(140):
        turn(watch, clock)
        window()
    for _ in range(3):
        watch.tick()
    cost("tick", watch.tick)
    cost("window", window, lambda: turn(watch, clock))
    cost("heap counted", lambda: counter.beat(clock[0]), lambda: channel.collector.read(channel.values))
    x = bytearray(23)
    cost("inference", lambda: scorer.model.run(x))
    level = [0]
    reporter.heartbeat_windows = 1
    def report():
        reporter.observe(scorer.verdict, clock[0])
        reporter.pump(publish, clock[0])
    def ready():
        scorer.verdict.level = level[0]
        clock[0] += agent.window_ms
        if profile == "full":
            reporter.outbox.ack(0, reporter.sequence, reporter.stream)
    cost("report", report, ready)
    level[0] = 2
    cost("report of an alarm", report, ready)
    from hashlib import sha256
    def authenticate():
        inner = sha256(bytes(96))
        inner.update(bytes(57))
        outer = sha256(bytes(64))
        outer.update(inner.digest())
        outer.digest()
    cost("of it HMAC-SHA-256", authenticate)
    load = getattr(entry, "load_model", None)
    for name, path in models if load else ():
        with open(path, "rb") as file:
            one = load(file)
            x = bytes(one.input_size)
            cost(name, lambda: one.run(x))
def sends():
    import socket
    from stonechat.board import hooks
    address = socket.getaddrinfo("127.0.0.1", 9999)[0][-1]
    heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    heard.bind(address)
    for kind in ("bare", "hooked"):
        if kind == "hooked":
            hooks.install()
        import socket
        stream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        cost("sendto " + kind, lambda: stream.sendto(b"x", address), lambda: time.sleep_ms(30))
        stream.connect(address)
        cost("send " + kind, lambda: stream.send(b"x"), lambda: time.sleep_ms(30))
def least(profile, model, leave):
    gc.collect()
    ballast = bytearray(gc.mem_free() - leave - 64)
    try:
        _, watch, clock = begin(profile, model, host="127.0.0.1", port=9, heartbeat_windows=5)
        for _ in range(10):
            turn(watch, clock)
            watch.agent.end_window(clock[0])
            watch.tick()
        print("LIVES" if watch.agent.windows > 7 and not watch.agent.errors else "ILL")
    except Exception as error:  # out of memory, in one of several words
        print("SMALL", len(ballast), repr(error))
"""


def run(boards: list[str], before: str, model: Path) -> dict[str, Any]:
    """boards: names of proofs.boards.firmware; before: a commit to compare with, "" for none. Raises ConfigError where
    a firmware is missing."""
    from stonechat_tools.proofs.boards.firmware import BUILDS

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="stonechat-emulated-") as scratch:
        root = Path(scratch)
        models = _models(root)
        for when, source in (("before", before), ("now", "")):
            if when == "before" and not before:
                continue
            tree = _checked_out(before, root) if source else working_copy()
            for board in BUILDS:
                if board.name not in boards:
                    continue
                if board.missing:
                    raise ConfigError(f"{board.name}: {board.missing}")
                for profile in ("core", "full"):
                    files = _built(tree, root / f"{when}-{board.name}", board.architecture, profile)
                    key = f"{board.name} {profile} {when}"
                    figures[key] = _measured(board, profile, files, model, models, root)
                    print(f"{key}: {len(figures[key])} figures", flush=True)
    return figures


def _models(folder: Path) -> dict[str, bytes]:
    import numpy as np

    from stonechat_tools.proofs import generated

    return {
        name: generated.planned(generated.autoencoder(np.random.default_rng(1), widths), widths[0])
        for name, widths in MODELS.items()
    }


def _checked_out(commit: str, root: Path) -> Path:
    tree = root / "before"
    done = subprocess.run(
        ["git", "-C", str(working_copy()), "archive", commit, "agent", "tools"], capture_output=True, timeout=60
    )
    if done.returncode:
        raise ConfigError(f"--before {commit}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tree, filter="data")
    return tree


def _built(tree: Path, out: Path, architecture: str, profile: str) -> dict[str, bytes]:
    """What `stonechat build` of that tree makes: contents by path on the board."""
    command = [sys.executable, "-m", "stonechat_tools.cli", "build", "--arch", architecture, "--profile", profile]
    environment = {**os.environ, "PYTHONPATH": f"{tree}/agent:{tree}/tools"}
    done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise ConfigError(f"{tree}: {done.stderr.strip()}")
    package = out / architecture / "stonechat"
    return {f"/lib/stonechat/{path.relative_to(package)}": path.read_bytes() for path in package.rglob("*.mpy")}


def _measured(
    board: Any, profile: str, files: dict[str, bytes], model: Path, models: dict[str, bytes], root: Path
) -> dict[str, list[int]]:
    """name -> [microseconds or instructions, bytes allocated]; of heap, [bytes, 0]."""
    from stonechat_tools.proofs.boards.machine import Machine
    from stonechat_tools.proofs.boards.prove import PRELUDE

    rp2040 = board.port == "rp2"
    prelude = "" if rp2040 else "import prelude\n"
    extra = {"/model.tflite": model.read_bytes()}
    named = [(name.replace(" ", "_"), f"/m{number}.tflite") for number, name in enumerate(models)]
    extra |= {path: data for (_, path), data in zip(named, models.values(), strict=True)}
    if not rp2040:
        extra["/prelude.py"] = PRELUDE.encode()
    rom = root / "rom"
    rom.write_bytes(
        romfs.image({**{path.lstrip("/"): data for path, data in files.items()}, "model.tflite": model.read_bytes()})
    )
    found: dict[str, list[int]] = {}

    def take(printed: str) -> None:
        for line in printed.splitlines():
            if line.startswith("COST "):
                *words, spent, taken = line[5:].split(" ")
                name = " ".join(words).replace("_", " ")
                scale = 1 if rp2040 or name == "heap" else INSTRUCTIONS
                found[name] = [int(spent) * scale, int(taken)]

    with Machine(board, files={**files, **extra}) as machine:
        take(machine.run(f"{prelude}{SCRIPT}\ncosts({profile!r}, '/model.tflite', {named!r})"))
        if rp2040:
            machine.restart()
            take(machine.run(f"{SCRIPT}\nsends()"))
            found["least heap, files"] = [_least(machine, profile, "/model.tflite"), 0]
    if rp2040:
        with Machine(board, romfs=rom, files={"/empty": b"x"}) as machine:
            found["least heap, ROMFS"] = [_least(machine, profile, "model.tflite"), 0]
    return found


def _least(machine: Any, profile: str, model: str) -> int:
    """-> bytes: the least free heap in which the agent with its MQTT client starts and scores, in steps of 2 KB."""
    low, high = 10, 40
    while low < high:
        middle = (low + high) // 2
        machine.restart()
        printed = machine.run(f"{SCRIPT}\nleast({profile!r}, {model!r}, {middle * LEAST_STEP})")
        if "LIVES" in printed:
            high = middle
        else:
            low = middle + 1
    return low * LEAST_STEP


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="emulated boards: RP2040 microseconds at 125 MHz, others instructions; bytes allocated")
    for column in ("", *figures):
        table.add_column(column, justify="right" if column else "left")
    for name in dict.fromkeys(name for one in figures.values() for name in one):
        table.add_row(name, *[_cell(name, one.get(name)) for one in figures.values()])
    console.print(table)


def _cell(name: str, value: list[int] | None) -> str:
    if value is None:
        return ""
    return f"{value[0]:,} B" if "heap" in name and "counted" not in name else f"{value[0]:,}, {value[1]:,} B"
