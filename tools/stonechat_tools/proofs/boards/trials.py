"""The agent on an emulated board as a product uses it: under a watchdog, from a timer, under asyncio, beside a firmware
that takes all the heap, and the five infections of a small product, without and with a response.

    python -m stonechat_tools.proofs.boards.trials rp2040 m3
    python -m stonechat_tools.proofs.boards.trials rp2040 --only watchdog,timer

What a board's port lacks is named. An RP2040's network is PPP to a network namespace with real peers (as root only);
qemu's boards have no network: the firmware's sockets are MEMORY_SOCKET there, under the agent's own hook.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stonechat_tools.console import working_copy
from stonechat_tools.lab.firmware.sensor import INFECTIONS
from stonechat_tools.proofs.boards import ppp, prove
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import BoardError, Machine, package
from stonechat_tools.proofs.boards.uart import wire

WITHIN_S = 3000.0  # of this machine
START = """
import prelude
import gc, time
from stonechat.board import hooks
hooks.install()
from stonechat.board import full
sent = []
def publish(topic, payload, qos, retain):
    sent.append(payload)
def start(**options):
    options.update(publish=publish, folder="/data", heartbeat_windows=1)
    return full.start("sensor-7", bytes(32), "/model.tflite", **options)
def facts(watch):
    agent = watch.agent
    return "windows %d sequence %d errors %d %d damaged %d %s%s" % (
        agent.windows, agent.reporter.sequence, watch.errors, agent.errors,
        bool(agent.state.damaged) + agent.reporter.outbox.damaged, watch.last_error, agent.last_error)
"""
FED = """
import machine
watchdog = machine.WDT(timeout=1000)
start_ms = time.ticks_ms()
watch = start(feed=watchdog.feed)
while watch.agent.windows < 3:
    watch.tick()
    time.sleep_ms(50)
watch.save()
print("FED", time.ticks_diff(time.ticks_ms(), start_ms), facts(watch))
"""
HUNG = """
watchdog.feed()
start_ms = time.ticks_ms()
while True:
    print("HUNG", time.ticks_diff(time.ticks_ms(), start_ms))
    time.sleep_ms(20)
"""
AGAIN = """
watch = start()
print("AGAIN", facts(watch))
"""
TIMER = """
from machine import Timer
watch = start()
timer = Timer(-1)
timer.init(period=200, callback=watch.tick)
start_ms = time.ticks_ms()
turns = 0
while watch.agent.windows < 3 and time.ticks_diff(time.ticks_ms(), start_ms) < 60000:
    time.sleep_ms(100)
    watch.save()  # a tick may come in the middle of it
    turns += 1
timer.deinit()
print("TIMER", turns, len(sent), facts(watch))
"""
ASYNCIO = """
import asyncio
watch = start()
turns = [0]
async def product():
    start_ms = time.ticks_ms()
    while watch.agent.windows < 3 and time.ticks_diff(time.ticks_ms(), start_ms) < 60000:
        turns[0] += 1
        await asyncio.sleep_ms(70)
async def main():
    task = asyncio.create_task(watch.run())
    await product()
    task.cancel()
asyncio.run(main())
print("ASYNCIO", turns[0], len(sent), facts(watch))
"""
HEAP = """
clock = [0]
def now_ms():
    return clock[0]
import sys
for name in list(sys.modules):  # the agent is linked into the entry and the parts that it has loaded
    if name.startswith("stonechat.") and hasattr(sys.modules[name], "ticks_ms"):
        setattr(sys.modules[name], "ticks_ms", now_ms)
watch = start()
agent = watch.agent
raised = [0]
def live(count):
    for _ in range(count):
        for _ in range(5):
            clock[0] += 2000
            try:
                watch.tick()
            except MemoryError:
                raised[0] += 1
held = [None]
full_free = _ = 0  # a new name would need memory
def fill(size):
    try:
        while True:
            held[0] = (held[0], bytearray(size))
    except MemoryError:
        pass
live(3)
gc.collect()
before = gc.mem_free(), len(sent), watch.errors + agent.errors
fill(1024)
fill(64)
fill(0)
full_free = gc.mem_free()
for _ in range(5):
    live(1)
    fill(0)  # the firmware takes what the agent has given back
held[0] = None
gc.collect()
full_heap = full_free, len(sent), watch.errors + agent.errors, watch.last_error or agent.last_error
live(5)
watch.save()
print("BEFORE", *before)
print("FULL", *full_heap)
print("AFTER", gc.mem_free(), len(sent), watch.errors + agent.errors, raised[0])
print("STATE", facts(watch))
"""
# What a port without a network lends its firmware: a product's peers as lab/firmware/peers.py has them, in the calls.
MEMORY_SOCKET = """
AF_INET, SOCK_STREAM, SOCK_DGRAM, SOL_SOCKET, SO_REUSEADDR = 2, 1, 2, 1, 4
HOME, STRANGER, PORT = "127.0.0.1", "127.66.0.6", 40000
def getaddrinfo(host, port, *rest):
    return [(2, 1, 0, "", (host, port))]
class socket:
    def __init__(self, *a):
        self.peer, self.waiting, self.part = None, b"", b""
    def settimeout(self, seconds): pass
    def setblocking(self, flag): pass
    def setsockopt(self, *a): pass
    def bind(self, address): pass
    def listen(self, backlog=1): pass
    def close(self): self.peer = None
    def connect(self, address):
        self.peer = address
        if address not in ((HOME, PORT), (HOME, PORT + 1), (STRANGER, PORT + 4)):
            raise OSError(111)
    def send(self, data):
        if self.peer == (HOME, PORT):
            self.part += data
            while self.part and len(self.part) > self.part[0]:
                self.part = self.part[1 + self.part[0]:]
                self.waiting += b"\\x40\\x02\\x00\\x01"
        elif self.peer == (HOME, PORT + 1):
            self.waiting = b"HTTP/1.0 200 OK\\r\\n\\r\\n" + b"c" * int(data.split(b"n=")[1].split()[0])
        elif bytes(data[:5]) == b"hello":
            self.waiting += b"sleep\\n"
        return len(data)
    write = send
    def sendto(self, data, address):
        if address == (HOME, PORT + 2):
            self.waiting = bytes(data)
        return len(data)
    def recv(self, size):
        got, self.waiting = self.waiting[:size], self.waiting[size:]
        return got
"""
BORROWED = """
import prelude
import sys
import memory_socket
sys.modules["socket"] = memory_socket
PORT = memory_socket.PORT
"""
REAL = """
import prelude
from stonechat_tools.lab.firmware import sensor
sensor.HOME, sensor.STRANGER, PORT = {home!r}, {stranger!r}, {port}
sensor.FLOOD = 10  # a turn is a second, in which a line of 115,200 baud carries 11 KB
"""
DETECT = """
import detect
detect.main(["/model.tflite", PORT, {windows}, 77])
"""
RESPOND = """
import respond
respond.WINDOWS, respond.SETTLED = {windows}, {settled}
respond.main(["/model.tflite", PORT, 77, {action!r}])
"""
GUARD = """
import errno, json, socket, time
from stonechat.board import guard, hooks
counter = hooks.install()
import socket
from stonechat.policy import QUARANTINE
from stonechat_tools.lab.firmware import sensor
def address(port, host):
    return socket.getaddrinfo(host, port)[0][-1]
def tried(call, *words):
    try:
        call(*words)
        return "passed"
    except OSError as error:
        return errno.errorcode.get(error.errno, error.errno)
def fresh(target):
    stream = socket.socket()
    stream.settimeout(20)
    said = tried(stream.connect, target)
    stream.close()
    return said
home, strange = address(PORT, sensor.HOME), address(PORT + 4, sensor.STRANGER)
counter.known[counter.meet(home)[0]] = 0
streams = [socket.socket(), socket.socket()]
for stream, target in zip(streams, (home, strange)):
    stream.connect(target)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one = guard.Guard()
before = fresh(strange)
one.apply(QUARANTINE, 4)
print("GUARD before", before, "connect", fresh(strange), "sendto", tried(datagrams.sendto, b"x", strange),
    "send", tried(streams[1].send, b"hello"), "json", tried(json.dump, [1], streams[1]),
    "learned", fresh(home), tried(streams[0].send, b"\\x01a"), end=" ")
counter.quiet = hooks.get_ident()
print("own", fresh(strange), end=" ")
counter.quiet = None
time.sleep(4)
print("afterwards", fresh(strange), tried(streams[1].send, b"hello"), "stopped", one.counts()[1])
"""
GUARDED = (
    "before passed connect EHOSTUNREACH sendto EHOSTUNREACH send ECONNRESET json ECONNRESET learned passed passed "
    "own passed afterwards passed passed stopped 4"
)
BENIGN = {"rp2": 40, "qemu": 200}  # windows, by port
LACKS = {  # trial -> modules or names without which a port can't have it
    "watchdog": "machine.WDT",
    "timer": "machine.Timer",
    "asyncio": "asyncio.run",
}


def facts(printed: str, word: str) -> list[str]:
    """What a script printed behind `word`. Raises BoardError where it did not."""
    for line in printed.splitlines():
        if line.startswith(word + " "):
            return line.split(" ")[1:]
    raise BoardError(f"no {word}: {printed.strip()[-300:]}")


def well(found: list[str]) -> bool:
    """facts() of a board's START: no errors, nothing damaged."""
    at = found.index("errors")
    return found[at + 1 : at + 3] == ["0", "0"] and found[found.index("damaged") + 1] == "0"


def product(board: Board) -> dict[str, bytes]:
    files = package(board.architecture or "armv6m")
    files["/prelude.py"] = prove.PRELUDE.encode()
    files["/model.tflite"] = (working_copy() / "models/micropython-1/model.tflite").read_bytes()
    return files


def watchdog(board: Board) -> str:
    """machine.WDT of a second is fed by tick(); a firmware that hangs is reset; what was learned is there again."""
    with tempfile.TemporaryDirectory(prefix="stonechat-flash-") as scratch:
        kept = Path(scratch) / "littlefs"
        with Machine(board, files=product(board), kept=kept) as machine:
            machine.run(START)
            try:  # one script: the board's clock goes on while it waits for the next
                machine.run(FED + HUNG)
                raise BoardError("a firmware that hangs is not reset")
            except BoardError as error:
                if "the emulator ended" not in str(error):
                    raise
            fed, hung = facts(machine.unread, "FED"), machine.unread.rpartition("\n")[0].split("HUNG ")[-1]
        with Machine(board, disk=kept.read_bytes()) as machine:
            again = facts(machine.run(START + AGAIN), "AGAIN")
    sequence = [int(found[found.index("sequence") + 1]) for found in (fed, again)]
    if not (well(fed) and well(again) and sequence[1] >= sequence[0] >= 3 and 960 <= int(hung) <= 1000):
        raise BoardError(f"fed {fed}, hung for {hung} ms, again {again}")
    return f"fed for {fed[0]} ms, 3 windows; reset {hung} ms after the last feed; report numbers go on at {sequence[1]}"


def timer(board: Board) -> str:
    with Machine(board, files=product(board)) as machine:
        found = facts(machine.run(START + TIMER), "TIMER")
    if not well(found) or int(found[1]) < 3:
        raise BoardError(" ".join(found))
    return f"3 windows by Timer(-1) in the middle of {found[0]} calls of save(): {found[1]} messages, no errors"


def asyncio(board: Board) -> str:
    with Machine(board, files=product(board)) as machine:
        found = facts(machine.run(START + ASYNCIO), "ASYNCIO")
    if not well(found) or int(found[1]) < 3 or int(found[0]) < 100:
        raise BoardError(" ".join(found))
    return f"3 windows by run() beside a task of {found[0]} turns: {found[1]} messages, no errors"


def heap(board: Board) -> str:
    """The firmware takes all the heap: the agent's errors are counted, nothing is raised, and it goes on afterwards."""
    with Machine(board, files=product(board)) as machine:
        printed = machine.run(START + HEAP)
    before, full, after = (facts(printed, word) for word in ("BEFORE", "FULL", "AFTER"))
    sent = [int(found[1]) for found in (before, full, after)]
    errors = [int(found[2]) for found in (before, full, after)]
    state = facts(printed, "STATE")
    if errors[0] or errors[2] != errors[1] or sent[2] < sent[1] + 5 or after[3] != "0":
        raise BoardError(printed)
    if state[state.index("damaged") + 1] != "0":
        raise BoardError(printed)
    return (
        f"{before[0]} bytes free, then {full[0]}: 5 windows with {errors[1]} counted errors "
        f"({' '.join(full[3:]) or 'none'}), {sent[1] - sent[0]} messages, nothing raised; "
        f"memory again: 5 windows, {sent[2] - sent[1]} messages, no error"
    )


def product_files(board: Board, scratch: Path) -> dict[str, bytes]:
    """The agent, every module a file, the small product and a model."""
    root = working_copy()
    everything = prove.files_of(board, scratch, [])
    files = {path: data for path, data in everything.items() if path.startswith(("/lib", "/p"))}
    files["/model.tflite"] = (root / "models/micropython-1/model.tflite").read_bytes()
    sensor = root / "tools/stonechat_tools/lab/firmware/sensor.py"
    compiled = prove.compiled(sensor, board.architecture or "armv6m", scratch)
    files["/lib/stonechat_tools/lab/firmware/sensor.mpy"] = compiled
    return files


@contextlib.contextmanager
def lab(board: Board) -> Iterator[tuple[Machine, str]]:
    """The board with the agent, every module a file, and the small product -> (the board, the script that gives it a
    network)."""
    root = working_copy()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stonechat-trial-")))
        files = product_files(board, scratch)
        for name in ("detect", "respond"):
            life = root / f"firmware_tests/life/{name}.py"
            files[f"/{name}.mpy"] = prove.compiled(life, board.architecture or "armv6m", scratch)
        if board.port == "qemu":
            files["/memory_socket.py"] = MEMORY_SOCKET.encode()
            yield stack.enter_context(Machine(board, files=files)), BORROWED
            return
        line, terminal = stack.enter_context(wire())
        name = stack.enter_context(ppp.namespace(terminal))
        port = stack.enter_context(ppp.peers(name))
        machine = stack.enter_context(Machine(board, files=files, uart=line, paced=True))
        ppp.connect(machine)
        yield machine, REAL.format(home=ppp.HOST, stranger=ppp.STRANGER, port=port)


def infections(board: Board) -> str:
    """A fresh board learns, lives benign windows in silence, and alarms for each infection."""
    benign = BENIGN[board.port]
    with lab(board) as (machine, network):
        printed = machine.run(network + DETECT.format(windows=benign), WITHIN_S)
    lines = [line.split() for line in printed.splitlines()]
    if lines[0] != ["learned", "128"] or lines[1][:4] != ["benign", str(benign), "alarms", "0"]:
        raise BoardError(printed)
    after = {line[1]: int(line[3]) for line in lines[2:-1]}
    if list(after) != list(INFECTIONS) or not all(1 <= number <= 3 for number in after.values()):
        raise BoardError(printed)
    alarms = ", ".join(f"{number} ({name})" for name, number in after.items())
    return f"{benign} benign windows silent; alarm in window {alarms}; {lines[-1][1]} publishes lost"


def response(board: Board) -> str:
    """Quarantine by board/guard.py in the hook: strangers are refused, the product itself goes on."""
    with lab(board) as (machine, network):
        printed = machine.run(network + RESPOND.format(windows=12, settled=140, action="quarantine"), WITHIN_S)
    lines = [line.split() for line in printed.splitlines()]
    if [line[1] for line in lines[:-1]] != list(INFECTIONS) or lines[-1] != ["product", "errors", "0"]:
        raise BoardError(printed)
    words = []
    for line in lines[:-1]:
        found = dict(zip(line[2::2], map(int, line[3::2]), strict=True))
        quiet = found["passed"] == found["during"] == 0
        if not (1 <= found["alarm"] <= 4 and found["hook"] == 1 and quiet):
            raise BoardError(printed)
        if (found["stopped"] > 0) == (line[1] == "web_shell"):  # who came in by himself and opens files: the hook
            raise BoardError(printed)
        words.append(f"{line[1]} {found['stopped']}")
    return "calls to strangers that were refused, none passed: " + ", ".join(words) + "; the product had no error"


def guard(board: Board) -> str:
    """board/guard.py in the hook, call by call: connect, sendto, send, a write by C, the learned, the agent itself,
    and the end by the clock."""
    with lab(board) as (machine, network):
        printed = " ".join(facts(machine.run(network + GUARD, WITHIN_S), "GUARD"))
    if printed != GUARDED:
        raise BoardError(f"{printed}, not {GUARDED}")
    return printed


TRIALS: dict[str, Callable[[Board], str]] = {
    one.__name__: one for one in (watchdog, timer, asyncio, heap, guard, infections, response)
}


def without(board: Board, name: str) -> str:
    """Why the board can't have this trial, asked of its firmware; "" where it can."""
    if name in ("guard", "infections", "response") and board.name == "pico":
        return "its firmware has no socket"
    if name not in LACKS:
        return ""
    module, _, attribute = LACKS[name].partition(".")
    with Machine(board) as machine:
        said = machine.run(
            f"try:\n import {module}\n print(hasattr({module}, {attribute!r}))\nexcept ImportError:\n print(False)"
        )
    return "" if said.strip() == "True" else f"its port has no {LACKS[name]}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", nargs="*", help="rp2040, pico, m0, m3, m7, rv32 (default all)")
    parser.add_argument("--only", default=",".join(TRIALS), help="with commas (default %(default)s)")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in TRIALS]:
        print(f"trials: no {unknown[0]}: there are {', '.join(TRIALS)}", file=sys.stderr)
        return 1
    failed = 0
    try:
        for board in build_all(args.boards):
            for name in names:
                began = time.monotonic()
                if reason := without(board, name):
                    print(f"{board.name} {name}: left out, {reason}", flush=True)
                    continue
                try:
                    print(f"{board.name} {name}: {TRIALS[name](board)} ({time.monotonic() - began:.0f} s)", flush=True)
                except BoardError as error:
                    failed += 1
                    print(f"{board.name} {name}: FAILED: {error}", flush=True)
    except BuildError as error:
        print(f"trials: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
