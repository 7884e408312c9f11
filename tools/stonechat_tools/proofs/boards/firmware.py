"""Builds MicroPython for emulated boards from Debian's sources into .targets/boards: RP2040 with a network and without
one (a plain Pico), Cortex-M0, M3, M7, RV32.

Sources and tools are Debian packages: trixie's `micropython`, `mbedtls`, `lwip`, `pico-sdk-source` and
`tinyusb-source`; the compilers of this machine's own Debian. Debian's source has an empty lib/, which is linked to
those packages. What is patched is in `patch()`: the ports' own behaviour stays. A firmware that was built by another
recipe (its board here, or what `patch()` does) counts as missing.
"""

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stonechat_tools.console import working_copy

ROOT = working_copy()
BOARDS = ROOT / ".targets/boards"
SUITE = "trixie"
SOURCES = ("micropython", "mbedtls", "lwip")
PACKAGES = ("pico-sdk-source", "tinyusb-source")
COMMANDS = {  # command -> Debian package
    "arm-none-eabi-gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi libstdc++-arm-none-eabi-newlib",
    "riscv64-unknown-elf-gcc": "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf",
    "qemu-system-arm": "qemu-system-arm",
    "qemu-system-riscv32": "qemu-system-misc",
    "cmake": "cmake",
    "dpkg-source": "dpkg-dev",
}
BUILD_WITHIN_S = 1800.0
LOG = BOARDS / "build.log"


class BuildError(Exception):
    """A board's firmware could not be made: one line."""


@dataclass(frozen=True)
class Board:
    """One firmware. name: ours; core: the processor; make: arguments of the port's `make`; image: what it makes, below
    the port's folder; architecture: what its .mpy files are made for, "" where it loads no machine code."""

    name: str
    core: str
    port: str
    make: tuple[str, ...]
    image: str
    architecture: str

    @property
    def path(self) -> Path:
        return BOARDS / self.name / Path(self.image).name

    @property
    def folder(self) -> str:
        """The port's folder for it."""
        return self.make[0].partition("=")[2]

    @property
    def missing(self) -> str | None:
        note = self.path.parent / "recipe"
        built = self.path.exists() and note.exists() and note.read_text() == self.recipe
        return None if built else "not built; run `make boards`"

    @property
    def recipe(self) -> str:
        """Changes with whatever this firmware is made by."""
        what = (self.make, recipe(self.port))
        return hashlib.sha256(repr(what).encode()).hexdigest()


def _qemu(board: str, *more: str) -> tuple[str, ...]:
    heap = f"MICROPY_HEAP_SIZE={192 * 1024}"  # about what a Pico has
    return (f"BOARD={board}", f"FROZEN_MANIFEST=boards/{board}/manifest.py", "MICROPY_VFS_LFS2=1", heap, *more)


def _rp2(board: str) -> tuple[str, ...]:
    folder = "{port}/boards/" + board
    return (
        f"BOARD={board}",
        f"CMAKE_ARGS=-DMICROPY_BOARD={board} -DMICROPY_BOARD_DIR={folder} -DPICO_NO_PICOTOOL=1",
    )


RV32 = "RV32_ARCH=rv32imc -misa-spec=2.2"
BUILDS = (
    Board("m0", "Cortex-M0", "qemu", _qemu("MICROBIT"), "build-MICROBIT/firmware.elf", ""),
    Board("m3", "Cortex-M3", "qemu", _qemu("MPS2_AN385"), "build-MPS2_AN385/firmware.elf", "armv7m"),
    Board("m7", "Cortex-M7", "qemu", _qemu("MPS2_AN500"), "build-MPS2_AN500/firmware.elf", "armv7m"),
    Board("rv32", "RV32IMC", "qemu", _qemu("VIRT_RV32", RV32), "build-VIRT_RV32/firmware.elf", "rv32imc"),
    Board("rp2040", "Cortex-M0+", "rp2", _rp2("SIM"), "build-SIM/firmware.bin", "armv6m"),
    Board("pico", "Cortex-M0+, no network", "rp2", _rp2("PLAIN"), "build-PLAIN/firmware.bin", "armv6m"),
)


# Where qemu's boards have their disks, in memory: of ROMFS (where the machine is given an image), and of littlefs with
# its blocks of 512 bytes.
DISKS = {  # port's board: (ROMFS at, littlefs at, blocks)
    "MICROBIT": (0x80000, 0x20100000, 2048),
    "MPS2_AN385": (0x21000000, 0x21400000, 2048),
    "MPS2_AN500": (0x60000000, 0x60400000, 2048),
    "VIRT_RV32": (0x84000000, 0x86000000, 2048),
}
# Where a Pico's flash has them: ROMFS (0 without one), and littlefs with its blocks of 4,096 bytes. SIM's firmware with
# the agent frozen into it takes 600 KB.
FLASH = {"SIM": (0xC0000, 0xE0000, 288), "PLAIN": (0, 0xA0000, 352)}
ROMFS_MOST = 256 * 1024
BOOT = """import os, sys, uctypes, vfs
class Disk:
    def __init__(self, at, blocks):
        self.bytes = memoryview(uctypes.bytearray_at(at, 512 * blocks))
        self.blocks = blocks
    def readblocks(self, block, buffer, offset=0):
        at = 512 * block + offset
        buffer[:] = self.bytes[at:at + len(buffer)]
    def writeblocks(self, block, buffer, offset=0):
        at = 512 * block + offset
        self.bytes[at:at + len(buffer)] = buffer
    def ioctl(self, request, argument):
        return {4: self.blocks, 5: 512}.get(request, 0)
disk = Disk(DISK, BLOCKS)
try:
    vfs.mount(vfs.VfsLfs2(disk), "/")
except OSError:
    vfs.VfsLfs2.mkfs(disk)
    vfs.mount(vfs.VfsLfs2(disk), "/")
os.chdir("/")
sys.path.append("/lib")
try:
    vfs.mount(vfs.VfsRom(uctypes.bytearray_at(ROM, ROMFS_MOST)), "/rom")
    sys.path.extend(["/rom", "/rom/lib"])
except (OSError, ValueError):
    pass
"""
CLOCK = """
// A microsecond clock from a timer of the emulated machine; with qemu's -icount it counts instructions.
#if defined(QEMU_SOC_NRF51)
#define TIMER(offset) (*(volatile uint32_t *)(0x40008000 + (offset)))
mp_uint_t mp_hal_ticks_us(void) {
    static bool started;
    if (!started) {
        TIMER(0x508) = 3;  // BITMODE: 32
        TIMER(0x510) = 4;  // PRESCALER: 16 MHz / 16
        TIMER(0x000) = 1;  // START
        started = true;
    }
    TIMER(0x040) = 1;  // CAPTURE[0]
    return TIMER(0x540);
}
#elif defined(QEMU_SOC_MPS2)
#define TIMER(offset) (*(volatile uint32_t *)(0x40000000 + (offset)))
mp_uint_t mp_hal_ticks_us(void) {
    static uint64_t total;
    static uint32_t last = 0xffffffff;
    if (!(TIMER(0) & 1)) {
        TIMER(8) = 0xffffffff;  // RELOAD
        TIMER(4) = 0xffffffff;  // VALUE, counts down at 25 MHz
        TIMER(0) = 1;
    }
    uint32_t now = TIMER(4);
    total += (uint32_t)(last - now);
    last = now;
    return total / 25;
}
#elif defined(QEMU_SOC_VIRT)
mp_uint_t mp_hal_ticks_us(void) {
    volatile uint32_t *mtime = (volatile uint32_t *)0x0200bff8;  // 10 MHz
    uint32_t high, low;
    do {
        high = mtime[1];
        low = mtime[0];
    } while (high != mtime[1]);
    return (((uint64_t)high << 32) | low) / 10;
}
#else
mp_uint_t mp_hal_ticks_us(void) {
    return 0;
}
#endif
mp_uint_t mp_hal_ticks_ms(void) {
    return mp_hal_ticks_us() / 1000;
}
mp_uint_t mp_hal_ticks_cpu(void) {
    return mp_hal_ticks_us();
}
void mp_hal_delay_us(mp_uint_t us) {
    for (mp_uint_t start = mp_hal_ticks_us(); mp_hal_ticks_us() - start < us;) {
    }
}
void mp_hal_delay_ms(mp_uint_t ms) {
    mp_hal_delay_us(1000 * ms);
}
uint64_t mp_hal_time_ns(void) {
    return 0;
}
"""
TIME = """MICROPY_PY_TIME (1)
#define MICROPY_PY_TIME_GMTIME_LOCALTIME_MKTIME (1)
#define MICROPY_PY_TIME_TIME_TIME_NS (1)
#define MICROPY_PY_TIME_INCLUDEFILE "ports/qemu/modtime.c"
"""
LOOPBACK = """
#define LWIP_NETIF_LOOPBACK 1
#define LWIP_IPV4 """
CALENDAR = """// These machines have no clock that is set: the time is the first of the epoch.
#include "py/obj.h"
#include "shared/timeutils/timeutils.h"
static mp_obj_t mp_time_localtime_get(void) {
    static const int first[8] = {2000, 1, 1, 0, 0, 0, 5, 1};
    mp_obj_t tuple[8];
    for (int i = 0; i < 8; ++i) {
        tuple[i] = MP_OBJ_NEW_SMALL_INT(first[i]);
    }
    return mp_obj_new_tuple(8, tuple);
}
static mp_obj_t mp_time_time_get(void) {
    return MP_OBJ_NEW_SMALL_INT(0);
}
"""


def run(command: list[str], folder: Path, **environment: str) -> None:
    """command, its output to LOG. Raises BuildError with its last line."""
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                timeout=BUILD_WITHIN_S,
            )
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]}: not done after {BUILD_WITHIN_S:g} s; see {LOG}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command[:3])}: exit {done.returncode}; see {LOG}")


def tools() -> None:
    """Installs the compilers and emulators that are missing, as root only, like tools/setup.sh. Raises BuildError."""
    wanted = sorted({word for name, text in COMMANDS.items() if not shutil.which(name) for word in text.split()})
    if not wanted:
        return
    if os.geteuid():
        raise BuildError(f"missing: {' '.join(wanted)}; as root: apt-get install {' '.join(wanted)}")
    print(f"boards: installing {' '.join(wanted)}", flush=True)
    run(["apt-get", "-q", "update"], BOARDS)
    run(
        ["apt-get", "-q", "-y", "install", "--no-install-recommends", *wanted], BOARDS, DEBIAN_FRONTEND="noninteractive"
    )


def recipe(port: str = "") -> str:
    """What `patch()` does and whatever it writes, for one port or for all."""
    parts: tuple[object, ...] = (patch,)
    if port != "rp2":
        parts += (_patch_qemu, DISKS, ROMFS_MOST, BOOT, CLOCK, TIME, CALENDAR)
    if port != "qemu":
        parts += (_patch_rp2, FLASH, LOOPBACK)
    return "".join(inspect.getsource(part) if callable(part) else repr(part) for part in parts)


def fetch() -> Path:
    """Downloads and unpacks the sources -> the folder of MicroPython's. Raises BuildError."""
    sys.path.insert(0, str(ROOT / "firmware_tests"))
    from targets import apt_source

    source = BOARDS / "source"
    done = source / "complete"
    if not done.exists() or done.read_text() != recipe():
        shutil.rmtree(source, ignore_errors=True)
        apt = BOARDS / "apt"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        (apt / "state/status").touch()
        line = apt_source(SUITE)
        (apt / "sources.list").write_text(f"{line}\n{line.replace('deb ', 'deb-src ', 1)}\n")
        options = {
            "Dir::State": apt / "state",
            "Dir::State::status": apt / "state/status",
            "Dir::Cache": apt / "cache",
            "Dir::Etc::SourceList": apt / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
        }
        command = ["apt-get", "-q", *[f"-o{key}={value}" for key, value in options.items()]]
        source.mkdir(parents=True)
        print(f"boards: fetching {', '.join(SOURCES + PACKAGES)} of Debian {SUITE}", flush=True)
        run([*command, "update"], source)
        for name in SOURCES:
            run([*command, "source", "--download-only", name], source)
            run(
                ["dpkg-source", "-x", "--no-check", *[path.name for path in source.glob(f"{name}_*.dsc")], name], source
            )
        run([*command, "download", *PACKAGES], source)
        for package in source.glob("*.deb"):
            run(["dpkg-deb", "-x", package.name, "packages"], source)
        patch(source / "micropython", source)
        done.write_text(recipe())
    return source / "micropython"


def _edit(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    changed = change(text)
    if changed == text:
        raise BuildError(f"{path}: nothing to change there; is this another release of MicroPython?")
    path.write_text(changed)


def patch(tree: Path, source: Path) -> None:
    """Links lib/ to the packages and makes the few changes that the emulated boards need."""
    packages = source / "packages/usr/src"
    for name, where in (
        ("pico-sdk", packages / "pico-sdk"),
        ("tinyusb", packages / "tinyusb"),
        ("mbedtls", source / "mbedtls"),
        ("lwip", source / "lwip"),
    ):
        shutil.rmtree(tree / "lib" / name, ignore_errors=True)
        (tree / "lib" / name).symlink_to(where)
    (packages / "pico-sdk/README.md").touch()
    (tree / "lib/micropython-lib").mkdir(exist_ok=True)
    (tree / "lib/micropython-lib/README.md").touch()
    _patch_qemu(tree / "ports/qemu")
    _patch_rp2(tree / "ports/rp2")


def _patch_qemu(port: Path) -> None:
    _edit(port / "mphalport.c", lambda text: text + CLOCK)
    _edit(port / "mpconfigport.h", lambda text: text.replace("MICROPY_PY_TIME             (0)", TIME))
    (port / "modtime.c").write_text(CALENDAR)
    _edit(
        port / "Makefile",
        lambda text: text.replace("SRC_C += \\\n\tmain.c", "SRC_C += shared/timeutils/timeutils.c main.c", 1),
    )
    _edit(
        port / "main.c",
        lambda text: text.replace("mp_init();\n", 'mp_init();\n        pyexec_frozen_module("_boot.py", false);\n', 1),
    )
    for script in (port / "mcu/arm").glob("*.ld"):  # unwinding tables overlap the data where a library brings them
        _edit(script, lambda text: text.replace("SECTIONS\n{", "SECTIONS\n{\n    /DISCARD/ : { *(.ARM.exidx*) }\n", 1))
    # a Cortex-M7: the M3's board with another processor
    shutil.copytree(port / "boards/MPS2_AN385", port / "boards/MPS2_AN500")
    _edit(
        port / "boards/MPS2_AN500/mpconfigboard.mk",
        lambda text: text.replace("mps2-an385", "mps2-an500").replace("cortex-m3", "cortex-m7").replace("-M3", "-M7"),
    )
    for name, (rom, disk, blocks) in DISKS.items():
        boot = f"ROM = {rom:#x}\nROMFS_MOST = {ROMFS_MOST}\nDISK = {disk:#x}\nBLOCKS = {blocks}\n{BOOT}"
        (port / "boards" / name / "_boot.py").write_text(boot)
        (port / "boards" / name / "manifest.py").write_text('freeze(".", "_boot.py")\n')


def _patch_rp2(port: Path) -> None:
    """SIM: a Pico with sockets over lwIP's loopback interface and over PPP on a UART, and a ROM partition. PLAIN: a
    Pico as MicroPython builds it, but for frozen drivers that Debian's source lacks."""
    for name in ("SIM", "PLAIN"):
        board = port / "boards" / name
        shutil.copytree(port / "boards/RPI_PICO", board)
        lwip = "set(MICROPY_PY_LWIP ON)\n" if name == "SIM" else ""
        manifest = "set(MICROPY_FROZEN_MANIFEST ${MICROPY_BOARD_DIR}/manifest.py)\n"
        _edit(board / "mpconfigboard.cmake", lambda text, more=lwip + manifest: text + more)  # type: ignore[misc]
        (board / "manifest.py").write_text('freeze("$(PORT_DIR)/modules")\ninclude("$(MPY_DIR)/extmod/asyncio")\n')
    sim = port / "boards/SIM"
    with (sim / "manifest.py").open("a") as file:
        file.write('require("mip")\n')
    _edit(
        sim / "mpconfigboard.h",
        lambda text: (
            text.replace("(1408 * 1024)", f"(2048 * 1024 - {FLASH['SIM'][1]})")
            + "\n#define MICROPY_PY_NETWORK 1\n"
            + "#define MICROPY_PY_NETWORK_PPP_LWIP 1\n"
            + '#define MICROPY_PY_NETWORK_HOSTNAME_DEFAULT "sim"\n'
            + f"#define MICROPY_HW_ROMFS_BYTES {FLASH['SIM'][1] - FLASH['SIM'][0]}\n"
        ),
    )
    # lwIP asks for its loopback interface to be polled; it is looked at each 8 ms in place of 64
    _edit(port / "lwip_inc/lwipopts.h", lambda text: text.replace("\n#define LWIP_IPV4 ", LOOPBACK, 1))
    _edit(
        port / "mpnetworkport.c",
        lambda text: (
            text.replace("LWIP_TICK_RATE_MS 64", "LWIP_TICK_RATE_MS 8", 1)
            .replace('#include "lwip/timeouts.h"', '#include "lwip/timeouts.h"\n#include "lwip/netif.h"', 1)
            .replace("    sys_check_timeouts();\n", "    sys_check_timeouts();\n    netif_poll_all();\n", 1)
        ),
    )
    # MicroPython 1.25 calls lwIP here without the lock that keeps its timer away: a busy connection over PPP hangs
    call = "        pppos_input(self->pcb, (u8_t *)buf, len);\n"
    locked = f"        MICROPY_PY_LWIP_ENTER\n{call}        MICROPY_PY_LWIP_EXIT\n"
    _edit(port.parent.parent / "extmod/network_ppp_lwip.c", lambda text: text.replace(call, locked, 1))


def build(board: Board, jobs: int = 1) -> None:
    """Makes the firmware of `board` where it is missing. Raises BuildError."""
    if board.missing is None:
        return
    tree = fetch()
    port = tree / "ports" / board.port
    print(f"boards: building {board.name} ({board.core}); some minutes", flush=True)
    nice = ["nice", "-n", "10", "make", f"-j{jobs}"]
    run([*nice, "-C", str(tree / "mpy-cross")], tree)
    release = {"MICROPY_GIT_TAG": "v1.25.0", "MICROPY_GIT_HASH": "debian"}  # not those of this working copy
    run([*nice, "-C", str(port), *[word.format(port=port) for word in board.make]], tree, **release)
    board.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(port / board.image, board.path)
    (board.path.parent / "recipe").write_text(board.recipe)


def frozen(board: Board, manifest: Path, agent: Path) -> Path:
    """The firmware of `board` with the package that `manifest` names frozen into it, from the sources in `agent` -> its
    image, made where it is not there yet. Raises BuildError."""
    tree = fetch()
    port = tree / "ports" / board.port
    sources = b"".join(path.read_bytes() for path in sorted(agent.rglob("*.py")))
    recipe = hashlib.sha256(board.recipe.encode() + manifest.read_bytes() + sources).hexdigest()
    image = board.path.with_stem("frozen")
    note = image.parent / "frozen-recipe"
    if image.exists() and note.exists() and note.read_text() == recipe:
        return image
    print(f"boards: building {board.name} with the agent frozen into it; some minutes", flush=True)
    place = port / "boards" / board.folder / "manifest.py"
    kept = place.read_text()
    place.write_text(f"{kept}include({str(manifest)!r}, STONECHAT={str(agent)!r})\n")
    release = {"MICROPY_GIT_TAG": "v1.25.0", "MICROPY_GIT_HASH": "debian"}
    try:
        run(
            ["nice", "-n", "10", "make", "-C", str(port), *[word.format(port=port) for word in board.make]],
            tree,
            **release,
        )
        shutil.copyfile(port / board.image, image)
    finally:
        place.write_text(kept)
    note.write_text(recipe)
    return image


def build_all(names: list[str]) -> list[Board]:
    """The boards of `names` (all where it is empty), built. Raises BuildError, also for a name that there is not."""
    known = {board.name: board for board in BUILDS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BuildError(f"no board {unknown[0]}: there are {', '.join(known)}")
    wanted = [known[name] for name in names or known]
    BOARDS.mkdir(parents=True, exist_ok=True)
    tools()
    for board in wanted:
        build(board)
    return wanted
