"""What the agent costs a board, on emulated boards (`make boards` builds their firmware): RP2040 in cycles at 125 MHz,
Cortex-M3, M7 and RV32 in instructions. Not modelled: misses of the flash cache, the time of an erase, radio."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from stonechat_tools.console import working_copy
from stonechat_tools.device import romfs
from stonechat_tools.device.build import build, costs

INSTRUCTIONS = 125  # of qemu's boards in a microsecond of theirs
LEAST_STEP = 1024
PROFILES = ("core", "full")
MODELS = {1024: [32, 16, 32], 5760: [32, 48, 24, 8, 24, 48, 32]}  # multiply-accumulates: widths of the layers
COST = """
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
"""
START = """
import gc
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
"""
COSTS = """
def costs(profile, model):
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
    cost("report", report, ready, 8)  # the least of them begins no segment of the outbox
    level[0] = 2
    cost("report of an alarm", report, ready, 8)
    from hashlib import sha256
    def authenticate():
        inner = sha256(bytes(96))
        inner.update(bytes(57))
        outer = sha256(bytes(64))
        outer.update(inner.digest())
        outer.digest()
    cost("HMAC-SHA-256 of it", authenticate)
"""
MACS = """
def macs(profile, models):
    load = getattr(__import__("stonechat.board." + profile).board, profile).load_model
    for name, path in models:
        with open(path, "rb") as file:
            one = load(file)
            x = bytes(one.input_size)
            cost(name, lambda: one.run(x))
"""
SENDS = """
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
"""
LEAST = """
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
# rows of the table: figure, what it is called
ROWS = {
    "tick": "idle tick, publish=",
    "window": "quiet window",
    "heap counted": "count of the free heap, in another turn",
    "inference": "inference of micropython-1",
    "report": "report",
    "report of an alarm": "report that explains an alarm",
    "HMAC-SHA-256 of it": "of it HMAC-SHA-256",
    "sendto": "hook adds to sendto",
    "send": "hook adds to send",
}
HEAPS = {
    "heap": "heap taken, from files",
    "least heap, files": "least heap, from files",
    "least heap, ROMFS": "least heap, ROMFS",
    "least heap, frozen": "least heap, frozen",
}


SOURCES = ("files", "ROMFS", "frozen")


class Run:
    """One run of the benchmark: figures by "board profile when", each name -> [microseconds or instructions, bytes], of
    heap [bytes, 0]; failed: what gave no figure, and why."""

    def __init__(self, boards: list[Any], before: str, model: Path, root: Path) -> None:
        self.figures: dict[str, dict[str, list[int]]] = {}
        self.failed: dict[str, str] = {}
        self._model = model.read_bytes()
        self._models = _models()
        self._root = root
        self._began = time.monotonic()
        phases = []
        for when in ("before", "now") if before else ("now",):
            tree = _checked_out(before, root) if when == "before" else working_copy()
            for board in boards:
                for profile in PROFILES:
                    phases += self._phases(board, profile, when, tree)
        for number, (key, name, phase) in enumerate(phases, 1):
            self._measure(number, len(phases), key, name, phase)

    def _measure(
        self, number: int, phases: int, key: str, name: str, phase: Callable[[], dict[str, list[int]]]
    ) -> None:
        from stonechat_tools.proofs.boards.firmware import BuildError
        from stonechat_tools.proofs.boards.machine import BoardError

        print(f"{number}/{phases} {time.monotonic() - self._began:.0f} s: {key}: {name}", flush=True)
        try:
            self.figures.setdefault(key, {}).update(phase())
        except (BoardError, BuildError) as error:
            why = str(error).strip().splitlines()[-1]
            self.failed[f"{key}: {name}"] = why
            print(f"  no figure: {why}", flush=True)

    def _phases(self, board: Any, profile: str, when: str, tree: Path) -> list[tuple[str, str, Any]]:
        """(key, name, what to call) of one board and profile."""
        key = f"{board.name} {profile} {when}"
        out = self._root / key.replace(" ", "-")
        files: dict[str, bytes] = {}

        def package() -> dict[str, bytes]:
            if not files:
                files.update(_built(tree, out, board.architecture, profile))
            return files

        phases: list[tuple[str, str, Any]] = [(key, "time", lambda: self._times(board, profile, package()))]
        if board.port == "rp2":
            phases.append((key, "hook", lambda: self._hook(board, package())))
            phases.append((key, "least heap from files", lambda: self._least(board, profile, "files", package())))
            phases.append((key, "least heap from ROMFS", lambda: self._least(board, profile, "ROMFS", package())))
            if when == "now":
                phases.append((key, "least heap frozen", lambda: self._least(board, profile, "frozen", {})))
        return phases

    def _machine(self, board: Any, files: dict[str, bytes], **options: Any) -> Any:
        from stonechat_tools.proofs.boards.machine import Machine
        from stonechat_tools.proofs.boards.prove import PRELUDE

        lent = {} if board.port == "rp2" else {"/prelude.py": PRELUDE.encode()}
        return Machine(board, files={"/model.tflite": self._model, **files, **lent}, **options)

    def _times(self, board: Any, profile: str, files: dict[str, bytes]) -> dict[str, list[int]]:
        named = [(str(macs), f"/m{macs}.tflite") for macs in self._models]
        files = {**files, **{f"/m{macs}.tflite": data for macs, data in self._models.items()}}
        prelude = "" if board.port == "rp2" else "import prelude\n"
        with self._machine(board, files) as machine:
            printed = machine.run(f"{prelude}{COST}{START}{COSTS}\ncosts({profile!r}, '/model.tflite')")
            machine.restart()
            printed += machine.run(f"{prelude}{COST}{MACS}\nmacs({profile!r}, {named!r})")
        return _taken(printed, 1 if board.port == "rp2" else INSTRUCTIONS)

    def _hook(self, board: Any, files: dict[str, bytes]) -> dict[str, list[int]]:
        with self._machine(board, files) as machine:
            found = _taken(machine.run(f"{COST}{SENDS}\nsends()"), 1)
        return {
            name: [a - b for a, b in zip(found[f"{name} hooked"], found[f"{name} bare"], strict=True)]
            for name in ("sendto", "send")
        }

    def _least(self, board: Any, profile: str, source: str, files: dict[str, bytes]) -> dict[str, list[int]]:
        """The least free heap in which the agent with its MQTT client starts and scores, in steps of LEAST_STEP."""
        from stonechat_tools.proofs.boards.firmware import frozen

        options: dict[str, Any] = {}
        model = "/model.tflite"
        if source == "ROMFS":
            options["romfs"] = self._root / "rom"
            inside = {path.lstrip("/"): data for path, data in files.items()}
            options["romfs"].write_bytes(romfs.image({**inside, "model.tflite": self._model}))
            files, model = {}, "model.tflite"
        elif source == "frozen":
            built = build(board.architecture, self._root / f"frozen-{profile}", profile=profile)
            options["firmware"] = frozen(board, built.folder / "manifest.py", working_copy() / "agent")
        with self._machine(board, files, **options) as machine:
            if source == "ROMFS":
                machine.run("import os\nos.remove('/model.tflite')\nos.stat('/rom/model.tflite')")
            low, high = 12 * 1024 // LEAST_STEP, 96 * 1024 // LEAST_STEP
            while low < high:
                middle = (low + high) // 2
                machine.restart()
                if "LIVES" in machine.run(f"{START}{LEAST}\nleast({profile!r}, {model!r}, {middle * LEAST_STEP})"):
                    high = middle
                else:
                    low = middle + 1
        return {f"least heap, {source}": [low * LEAST_STEP, 0]}


def run(boards: list[str], before: str, model: Path) -> dict[str, Any]:
    """boards: names of proofs.boards.firmware; before: a commit to compare with, "" for none. Raises ConfigError where
    a firmware is missing."""
    from stonechat_tools.proofs.boards.firmware import BUILDS

    known = {board.name: board for board in BUILDS}
    for name in boards:
        if name not in known or not known[name].architecture:
            raise ConfigError(
                f"--emulated {name}: there are {', '.join(one.name for one in BUILDS if one.architecture)}"
            )
        if known[name].missing:
            raise ConfigError(f"{name}: {known[name].missing}")
    with tempfile.TemporaryDirectory(prefix="stonechat-emulated-") as scratch:
        done = Run([known[name] for name in boards], before, model, Path(scratch))
    print("bytes of the optional modules", flush=True)
    optional = {profile: costs("armv6m", profile) for profile in PROFILES}
    return {"figures": done.figures, "optional_bytes": optional, "failed": done.failed}


def _models() -> dict[int, bytes]:
    import numpy as np

    from stonechat_tools.proofs import generated

    return {
        macs: generated.planned(generated.autoencoder(np.random.default_rng(1), widths), widths[0])
        for macs, widths in MODELS.items()
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


def _taken(printed: str, scale: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line in printed.splitlines():
        if line.startswith("COST "):
            *words, spent, taken = line[5:].split(" ")
            name = " ".join(words)
            found[name] = [int(spent) * (1 if name == "heap" else scale), int(taken)]
    return found


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    figures = found["figures"]
    console = Console(width=max(100, 30 + 18 * len(figures)))
    table = Table(title="emulated boards: RP2040 in time at 125 MHz, the others in instructions; bytes allocated")
    table.add_column("")
    for column in figures:
        table.add_column(column, justify="right")
    for name, label in ROWS.items():
        table.add_row(label, *[_cell(key, one.get(name)) for key, one in figures.items()])
    for macs in MODELS:
        table.add_row(f"a MAC, of {macs:,}", *[_a_mac(key, one.get(str(macs)), macs) for key, one in figures.items()])
    for name, label in HEAPS.items():
        table.add_row(label, *[f"{one[name][0]:,} B" if name in one else "" for one in figures.values()])
    table.add_section()
    for name in next(iter(found["optional_bytes"].values())):
        bytes_of = {profile: sizes[name] for profile, sizes in found["optional_bytes"].items()}
        cells = [f"{bytes_of[key.split()[1]]:,} B" if bytes_of[key.split()[1]] else "in it" for key in figures]
        table.add_row(f"--with {name} (armv6m)", *cells)
    console.print(table)
    for what, why in found["failed"].items():
        console.print(f"no figure: {what}: {why}")


def readme(found: dict[str, Any]) -> list[str]:
    """The rows of README's table that these figures make; a test holds the two together."""
    core, full = (found["figures"][f"rp2040 {profile} now"] for profile in PROFILES)

    def both(name: str, place: int = 0, scale: float = 1000.0, form: str = ".1f") -> str:
        return f"{core[name][place] / scale:{form}} / {full[name][place] / scale:{form}}"

    def nanoseconds(macs: int) -> str:
        return f"{1000 * full[str(macs)][0] / macs:.0f}"

    command = "`stonechat bench board --emulated`"
    least = ", ".join(f"{name} {both(f'least heap, {name}', scale=1024, form='.0f')}" for name in SOURCES)
    return [
        "| an emulated RP2040 at 125 MHz (cycles; flash cache misses not modelled), core / full: idle tick with "
        f"`publish=`; quiet window; count of the free heap, in another turn | {both('tick', scale=1, form='.0f')} µs; "
        f"{both('window')} ms; {both('heap counted')} ms | {command} |",
        f"| the same: a report; one that explains an alarm; of these the HMAC | {both('report')}; "
        f"{both('report of an alarm')}; {full['HMAC-SHA-256 of it'][0] / 1000:.2f} ms | {command} |",
        f"| the same: inference of 5,760 / 1,024 MACs, a MAC | {nanoseconds(5760)} / {nanoseconds(1024)} ns, "
        f"{full['inference'][1]} B | {command} |",
        f"| the same: what the hook adds to `sendto` / `send` over lwIP's loopback | {full['sendto'][0]} / "
        f"{full['send'][0]} µs, {full['sendto'][1]} / {full['send'][1]} B | {command} |",
        f"| the same: least free heap in which it starts and scores with its MQTT client, core / full | KB: {least} | "
        f"{command} |",
    ]


def _cell(key: str, value: list[int] | None) -> str:
    if value is None:
        return ""
    if not key.startswith("rp2040"):
        return f"{value[0]:,}, {value[1]:,} B"
    return f"{value[0] / 1000:.2f} ms, {value[1]:,} B" if value[0] >= 1000 else f"{value[0]} µs, {value[1]:,} B"


def _a_mac(key: str, value: list[int] | None, macs: int) -> str:
    if value is None:
        return ""
    if key.startswith("rp2040"):
        return f"{1000 * value[0] / macs:.0f} ns, {value[1]:,} B"
    return f"{value[0] / macs:.1f}, {value[1]:,} B"
