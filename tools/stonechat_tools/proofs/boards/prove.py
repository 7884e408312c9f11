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
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from stonechat_tools.console import working_copy
from stonechat_tools.device.build import build, mpy_cross
from stonechat_tools.proofs.boards.firmware import Board, BuildError, build_all
from stonechat_tools.proofs.boards.machine import BoardError, LateError, Machine

APART = ("linux", "compat_cpython")  # what only runs on CPython
PRELUDE = """
import sys
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
try:
    import socket
except ImportError:
    class module: pass
    module.AF_INET, module.SOCK_STREAM, module.SOCK_DGRAM, module.SOL_SOCKET, module.SO_REUSEADDR = 2, 1, 2, 1, 4
    module.socket, module.getaddrinfo = Socket, staticmethod(getaddrinfo)
    sys.modules["socket"] = module
"""


NETWORK = ("test_mqtt", "test_hooks_odd")  # each of their tests needs a network
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
FILE_WITHIN_S = 120.0  # of this machine
BATCH = 8  # vectors in one script


@dataclass
class Result:
    """board; passed: tests by file; failed: tests by file; without: test -> why this board can't run it, or a file;
    golden: vectors that were byte-equal, by kernel; other: vectors that were not."""

    board: str
    core: str
    passed: dict[str, int] = field(default_factory=dict)
    failed: dict[str, list[str]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    golden: dict[str, int] = field(default_factory=dict)
    other: int = 0
    seconds: float = 0.0


def compiled(source: Path, architecture: str, folder: Path) -> bytes:
    target = folder / (source.stem + ".mpy")
    command = [mpy_cross(), "-march=" + architecture, "-s", source.name, "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise BuildError(f"{source}: {done.stderr.strip()}")
    return target.read_bytes()


def load(machine: Machine, scratch: Path, files: list[Path]) -> None:
    """Puts the agent, every module a file, and the tests' vectors on the board."""
    root = working_copy()
    architecture = machine.board.architecture or "armv6m"
    agent = root / "agent/stonechat"
    modules = [path.relative_to(agent).with_suffix("") for path in sorted(agent.rglob("*.py"))]
    extra = [str(module) for module in modules if not str(module).startswith(APART)]
    for module in build(architecture, scratch / "agent", extra, linked=False).sizes:
        machine.put(f"/lib/stonechat/{module}.mpy", (scratch / f"agent/stonechat/{module}.mpy").read_bytes())
    machine.put("/prelude.py", PRELUDE.encode())
    machine.put("/run.mpy", compiled(root / "firmware_tests/run.py", architecture, scratch))
    units = root / "firmware_tests/unit"
    for file in [*files, *[path for path in units.glob("*.py") if not path.stem.startswith("test_")]]:
        machine.put(f"/unit/{file.stem}.mpy", compiled(file, architecture, scratch))
    vectors = [*(root / "firmware_tests/golden").glob("*/*"), *(root / "models").glob("*/model.tflite")]
    vectors += (root / "models").glob("*/golden.json")
    vectors += (root / "firmware_tests/corpus").glob("*/*")
    for path in vectors:
        where = path.relative_to(root / "firmware_tests" if "firmware_tests" in path.parts else root)
        machine.put(f"/{where}", path.read_bytes())


def golden(machine: Machine, result: Result, names: list[str] | None = None) -> None:
    """Every golden vector of the tests' models and of the shipped ones (names: of those models), with each kernel that
    the board has."""
    root = working_copy()
    paths = [*(root / "firmware_tests/golden").glob("*/golden.json"), *(root / "models").glob("*/golden.json")]
    machine.restart()
    machine.run(GOLDEN)
    for kernels in ("plain", "viper"):
        for path in sorted(path for path in paths if names is None or path.parent.name in names):
            vectors = [vector[:2] for vector in json.loads(path.read_text())["vectors"]]
            where = f"/{'golden' if 'firmware_tests' in path.parts else 'models'}/{path.parent.name}/model.tflite"
            for at in range(0, len(vectors), BATCH):
                said = machine.run(f"check({where!r}, {kernels!r}, {vectors[at : at + BATCH]!r})").split()
                if said[:1] == ["NO"]:
                    result.without[f"{kernels} {path.parent.name}"] = " ".join(said[1:])
                    break
                result.golden[kernels] = result.golden.get(kernels, 0) + said.count("SAME")
                result.other += said.count("OTHER")
    print(f"{machine.board.name}: golden vectors {result.golden}, {result.other} other", flush=True)


def unit(machine: Machine, file: Path, result: Result) -> None:
    """One file of portable tests. What fails for want of memory, network or threads is counted apart."""
    name = file.stem
    if name in NETWORK:
        result.without[name] = "needs a network"
        return
    machine.restart()
    try:
        printed = machine.run(f"import prelude, run\nrun.main('unit/{name}.py')\n", FILE_WITHIN_S)
    except LateError:
        raise
    except BoardError as error:
        lines = str(error).splitlines()
        result.without[name] = f"{lines[0]}: {lines[-1]}"
        print(f"{result.board}: {name}: {result.without[name]}", flush=True)
        return
    blocks = printed.split("FAILED ")
    result.passed[name] = int(blocks[-1].strip().splitlines()[-1].split()[0])
    for block in blocks[1:]:
        lines = [line for line in block.strip().splitlines() if line and " passed, " not in line]
        if lines[-1].startswith(("MemoryError", "ImportError", "OSError")):
            result.without[f"{name} {lines[0]}"] = lines[-1]
        else:
            result.failed.setdefault(name, []).append(lines[0])
            print(block)
    print(f"{result.board}: {name}: {result.passed[name]} passed, {len(blocks) - 1} not", flush=True)


def prove(board: Board, names: list[str]) -> Result:
    """Raises BoardError where the board does not start."""
    result = Result(board.name, board.core)
    began = time.monotonic()
    files = sorted((working_copy() / "firmware_tests/unit").glob("test_*.py"))
    files = [file for file in files if not names or file.stem in names]
    waiting = list(files)
    with tempfile.TemporaryDirectory(prefix="stonechat-board-") as scratch:
        while not result.golden or waiting:
            with Machine(board) as machine:
                load(machine, Path(scratch), files)
                if not result.golden:
                    golden(machine, result)
                while waiting:
                    file = waiting.pop(0)
                    try:
                        unit(machine, file, result)
                    except LateError:
                        result.without[file.stem] = f"not done within {FILE_WITHIN_S:g} s of this machine"
                        print(f"{board.name}: {file.stem}: {result.without[file.stem]}", flush=True)
                        break  # it does not listen any more: another one
    result.seconds = time.monotonic() - began
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("boards", nargs="*", help="rp2040, m0, m3, m7, rv32 (default all)")
    parser.add_argument("--tests", default="", help="names of test files, with commas (default all)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(arguments)
    try:
        results = [prove(board, [name for name in args.tests.split(",") if name]) for board in build_all(args.boards)]
    except (BuildError, BoardError) as error:
        print(f"boards: {error}", file=sys.stderr)
        return 1
    for one in results:
        print(
            f"{one.board} ({one.core}): {sum(one.passed.values())} passed, {one.failed or 'none'} failed, {one.without}"
        )
    if args.json:
        args.json.write_text(json.dumps([vars(one) for one in results], indent=1) + "\n")
    return 1 if any(one.failed or one.other or not one.golden for one in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
