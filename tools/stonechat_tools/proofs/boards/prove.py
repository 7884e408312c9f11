"""Runs the product on emulated boards: the portable unit tests and the golden vectors, on .mpy files.

    make boards
    python -m stonechat_tools.proofs.boards.prove rp2040 m3      some of them
    python -m stonechat_tools.proofs.boards.prove --json FILE

Boards: rp2040 (cycles), m0, m3, m7, rv32 (instructions). Not modelled: misses of the flash cache, the time of an erase,
radio. qemu's boards have no network, no file system and no random numbers of their own: littlefs is in memory, and
PRELUDE brings what the port lacks. ESP32 has no emulator in a package.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from stonechat_tools.console import plain_table, working_copy
from stonechat_tools.device.build import build, mpy_cross
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import BoardError, LateError, Machine

APART = ("linux", "compat_cpython", "own_model")  # what only runs on CPython
PRELUDE = """
import gc
import sys
gc.threshold(8192)  # else what lives long comes to lie all over the heap, and no long gap is left
class Borrowed:
    pass
def borrow(name, more):
    try:
        module = __import__(name)
    except ImportError:
        module = Borrowed
    whole = Borrowed()
    for key in dir(module):
        if key[:2] != "__":
            setattr(whole, key, getattr(module, key))
    for key, value in more.items():
        if not hasattr(whole, key):
            setattr(whole, key, value)
    sys.modules[name] = whole
class Poll:
    def register(self, *a): pass
    modify = unregister = register
    def poll(self, *a): return []
class Socket:
    def __init__(self, *a): raise OSError("no network here")
    def connect(self, *a): pass
    bind = listen = accept = send = sendto = recv = recvfrom = read = readinto = readline = write = connect
    setblocking = settimeout = setsockopt = close = connect
def getaddrinfo(host, port, *rest): return [(2, 1, 0, "", (host, port))]
borrow("time", {"gmtime": lambda s=0: (2000, 1, 1, 0, 0, 0, 5, 1), "time": lambda: 0})
made = [0]
def urandom(n):
    made[0] += 1
    return bytes([(made[0] * 37 + i * 11) & 255 for i in range(n)])
borrow("os", {"urandom": urandom})
borrow("select", {"POLLIN": 1, "POLLOUT": 4, "poll": Poll})
def one_core(*a): raise OSError("one core here")
if sys.platform == "rp2":  # a thread is for the other core, which rp2040js does not have: it would wait for ever
    borrow("_thread", {})
    sys.modules["_thread"].start_new_thread = one_core
try:
    import socket
except ImportError:
    class module: NO_NETWORK = True
    module.AF_INET, module.SOCK_STREAM, module.SOCK_DGRAM, module.SOL_SOCKET, module.SO_REUSEADDR = 2, 1, 2, 1, 4
    module.socket, module.getaddrinfo = Socket, staticmethod(getaddrinfo)
    sys.modules["socket"] = module
"""


LACKS = {  # board -> modules that its firmware has not; a test that needs one can't run there. Nothing else is excused.
    "m0": ("socket", "asyncio", "_thread"),
    "m3": ("socket", "asyncio", "_thread"),
    "m7": ("socket", "asyncio", "_thread"),
    "rv32": ("socket", "asyncio", "_thread"),
    "rp2040": (),
    "pico": ("socket",),
}
NETWORK = ("test_mqtt", "test_hooks_odd")  # each of their tests needs a network: they get no substitute for it
NO_NETWORK = "no network here"  # what PRELUDE's substitute for `socket` raises
# lwIP answers on its loopback interface for 127.0.0.1 only: a stranger at 127.66.0.6 can't listen. trials.py has the
# guard on an RP2040 over PPP.
ONE_ADDRESS = "OSError: [Errno 107] ENOTCONN"
ONE_CORE = "one core here"  # and its start_new_thread() on a Pico
GOLDEN = """
import prelude
import gc
from binascii import hexlify, unhexlify
from stonechat.int8 import interpreter, tflite
def check(path, kernels, vectors):
    gc.collect()
    with open(path, "rb") as file:
        try:
            one = interpreter.Interpreter(tflite.read(file), kernels)
        except Exception as error:
            print("NO", error)
            return
        for x, y in vectors:
            print("SAME" if hexlify(one.run(unhexlify(x))).decode() == y else "OTHER")
"""
FILE_WITHIN_S = 3600.0  # of this machine
BATCH = 8  # vectors in one script
EVERY = {"rp2": 40, "qemu": 10}  # of a test that tries every place: one place in N (share.py), by port


@dataclass
class Result:
    """board; passed: tests by file; failed: what did not pass, with its last line; without: test -> what it needs
    and the board has not; golden: vectors that were byte-equal, by kernel; wanted: how many there are."""

    board: str
    core: str
    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    golden: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def proved(self) -> bool:
        return not self.failed and self.golden == self.wanted and sum(self.wanted.values()) + len(self.passed) > 0

    def fail(self, what: str, why: str) -> None:
        self.failed[what] = why
        print(f"{self.board}: FAILED {what}: {why}", flush=True)


def compiled(source: Path, architecture: str, folder: Path) -> bytes:
    target = folder / (source.stem + ".mpy")
    command = [mpy_cross(), "-march=" + architecture, "-s", source.name, "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BuildError(f"{source}: {done.stderr.strip()}")
    return target.read_bytes()


def files_of(board: Board, scratch: Path, tests: list[Path]) -> dict[str, bytes]:
    """What lies on the board: the agent, every module a file, and the tests with their vectors."""
    root = working_copy()
    architecture = board.architecture or "armv6m"
    agent = root / "agent/stonechat"
    modules = [path.relative_to(agent).with_suffix("") for path in sorted(agent.rglob("*.py"))]
    extra = [str(module) for module in modules if not str(module).startswith(APART)]
    files = {
        f"/lib/stonechat/{module}.mpy": (scratch / f"agent/stonechat/{module}.mpy").read_bytes()
        for module in build(architecture, scratch / "agent", extra, linked=False).sizes
    }
    files["/tmp/empty"] = b""
    files["/prelude.py"] = PRELUDE.encode()
    files["/run.mpy"] = compiled(root / "firmware_tests/run.py", architecture, scratch)
    units = root / "firmware_tests/unit"
    thinned = scratch / "share.py"
    thinned.write_text((units / "share.py").read_text().replace("EVERY = 1\n", f"EVERY = {EVERY[board.port]}\n"))
    others = [path for path in units.glob("*.py") if not path.stem.startswith("test_") and path.stem != thinned.stem]
    for file in [*tests, *others, thinned]:
        files[f"/unit/{file.stem}.mpy"] = compiled(file, architecture, scratch)
    vectors = [*(root / "firmware_tests/golden").glob("*/*"), *(root / "models").glob("*/model.tflite")]
    vectors += (root / "models").glob("*/golden.json")
    vectors += (root / "firmware_tests/corpus").glob("*/*")
    for path in vectors:
        where = path.relative_to(root / "firmware_tests" if "firmware_tests" in path.parts else root)
        files[f"/{where}"] = path.read_bytes()
    return files


def golden(machine: Machine, result: Result, names: list[str] | None = None) -> None:
    """Every golden vector of the tests' models and of the shipped ones that lies on the board (names: of those models),
    with each kernel that the board can have."""
    found = {
        path[: -len("/golden.json")]: data for path, data in machine.files.items() if path.endswith("/golden.json")
    }
    machine.restart()
    machine.run(GOLDEN)
    for kernels in ("plain", "viper") if machine.board.architecture else ("plain",):
        for folder in sorted(found):
            name = folder.rpartition("/")[2]
            if names is not None and name not in names:
                continue
            vectors = [vector[:2] for vector in json.loads(found[folder])["vectors"]]
            where = folder + "/model.tflite"
            result.wanted[kernels] = result.wanted.get(kernels, 0) + len(vectors)
            for at in range(0, len(vectors), BATCH):
                said = machine.run(f"check({where!r}, {kernels!r}, {vectors[at : at + BATCH]!r})").split()
                same = said.count("SAME")
                result.golden[kernels] = result.golden.get(kernels, 0) + same
                if same != len(vectors[at : at + BATCH]):
                    result.fail(f"{kernels} {name} from vector {at}", " ".join(said))
    print(f"{machine.board.name}: golden vectors {result.golden} of {result.wanted}", flush=True)


def lacks(machine: Machine, result: Result) -> None:
    """Holds LACKS against the board: what it is excused for must really be missing."""
    for name in LACKS[machine.board.name]:
        try:
            machine.run(f"import {name}")
        except BoardError as error:
            if not str(error).endswith(f"no module named '{name}'"):
                result.fail(f"import {name}", str(error).splitlines()[-1])
        else:
            result.fail(f"import {name}", "the firmware has it, LACKS does not know that")


def excuse(board: str, name: str, error: str) -> str:
    """What the board has not for want of which a test of the file `name` ended in `error`, else ""."""
    if board == "rp2040" and name == "test_guard" and error == ONE_ADDRESS:
        return "a second loopback address"
    if error == f"OSError: {NO_NETWORK}" and "socket" in LACKS[board]:
        return "socket"
    if error == f"OSError: {ONE_CORE}" and board in ("rp2040", "pico"):
        return "a second core"
    for name in LACKS[board]:
        if error == f"ImportError: no module named '{name}'":
            return name
    return ""


def unit(machine: Machine, file: Path, result: Result) -> None:
    """One file of portable tests. A test for which the memory is too little behind the others runs once more alone."""
    name = file.stem
    again = _file(machine, name, result, None)
    for test in again:
        _file(machine, name, result, [test])


def _file(machine: Machine, name: str, result: Result, tests: list[str] | None) -> list[str]:
    """-> the tests that want a heap of their own. Raises LateError."""
    began = time.monotonic()
    machine.restart()
    wanted: list[str] = []
    alone = "import sys\nif hasattr(sys.modules.get('socket'), 'NO_NETWORK'): del sys.modules['socket']\n"
    script = f"import prelude\n{alone if name in NETWORK else ''}import run\nrun.main('unit/{name}.py', {tests!r})\n"
    try:
        printed = machine.run(script, FILE_WITHIN_S)
    except LateError:
        raise
    except BoardError as error:
        last = str(error).splitlines()[-1]
        missing = excuse(result.board, name, last)
        if missing:
            result.without[name] = missing
        else:
            result.fail(name, last)
        return []
    blocks = printed.split("FAILED ")
    passed = int(blocks[-1].strip().splitlines()[-1].split()[0])
    result.passed[name] = result.passed.get(name, 0) + passed
    for block in blocks[1:]:
        lines = [line for line in block.strip().splitlines() if line and " passed, " not in line]
        missing = excuse(result.board, name, lines[-1])
        if missing:
            result.without[f"{name} {lines[0]}"] = missing
        elif lines[-1].startswith("MemoryError") and tests is None:
            wanted.append(lines[0])
        else:
            print(block)
            result.fail(f"{name} {lines[0]}", lines[-1])
    took = time.monotonic() - began
    more = f", {len(wanted)} once more alone" if wanted else ""
    print(f"{result.board}: {name}: {passed} passed, {len(blocks) - 1} not{more}, {took:.0f} s", flush=True)
    return wanted


def lean(content: dict[str, bytes], file: Path) -> dict[str, bytes]:
    """content without the vectors that a test file and those that it imports do not name: with all of them a Pico's
    flash is full."""
    text = file.read_text()
    for name in set(re.findall(r"^from (test_\w+) import", text, re.MULTILINE)):
        text += file.with_name(name + ".py").read_text()
    unnamed = [
        folder
        for folder, word in (
            ("/corpus", "corpus"),
            ("/golden/releases", "releases"),
            ("/golden/signatures", "signatures"),
            ("/golden", "golden"),
            ("/models", "models"),
        )
        if word not in text
    ]
    return {path: data for path, data in content.items() if not path.startswith(tuple(unnamed))}


def prove(board: Board, names: list[str]) -> Result:
    """Raises BoardError where the board does not start."""
    result = Result(board.name, board.core)
    began = time.monotonic()
    files = sorted((working_copy() / "firmware_tests/unit").glob("test_*.py"))  # some use others
    waiting = [file for file in files if not names or file.stem in names]
    with tempfile.TemporaryDirectory(prefix="stonechat-board-") as scratch:
        content = files_of(board, Path(scratch), files)
        while waiting:
            some = lean(content, waiting[0]) if board.port == "rp2" else content
            with Machine(board, files=some) as machine:
                if not result.passed:
                    lacks(machine, result)
                while waiting:
                    file = waiting.pop(0)
                    try:
                        unit(machine, file, result)
                    except LateError:
                        result.fail(file.stem, f"not done within {FILE_WITHIN_S:g} s of this machine")
                        break  # it does not listen any more: another one
                    if board.port == "rp2":
                        break
        if not names or "golden" in names:
            with Machine(board, files=content) as machine:
                golden(machine, result)
    result.seconds = time.monotonic() - began
    return result


def table(results: list[Result]) -> str:
    """What was seen, a row for each board, and under it what was left out, by what the board has not."""
    rows = [
        [
            f"{one.board} ({one.core})",
            str(len(one.passed)),
            str(sum(one.passed.values())),
            str(len(one.failed)),
            str(len(one.without)),
            " ".join(f"{one.golden[name]}/{wanted} {name}" for name, wanted in one.wanted.items()) or "-",
            f"{one.seconds:.0f}",
        ]
        for one in results
    ]
    text = plain_table(["board", "files", "tests passed", "failed", "left out", "golden vectors", "s"], rows)
    for one in results:
        for reason in sorted(set(one.without.values())):
            tests = [test for test, why in one.without.items() if why == reason]
            text += f"{one.board} can't run without {reason}: {', '.join(tests)}\n"
    return text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", nargs="*", help="rp2040, m0, m3, m7, rv32 (default all)")
    parser.add_argument("--tests", default="", help="of files, or golden, with commas (default all)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(arguments)
    try:
        results = [prove(board, [name for name in args.tests.split(",") if name]) for board in build_all(args.boards)]
    except (BuildError, BoardError) as error:
        print(f"boards: {error}", file=sys.stderr)
        return 1
    print(table(results), end="")
    print(", ".join(f"{port}: one place in {n}" for port, n in EVERY.items()), "of tests that try every place")
    if args.json:
        args.json.write_text(json.dumps([vars(one) for one in results], indent=1) + "\n")
    return 0 if all(one.proved for one in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
