"""Runs the Linux collector on other kernels: Debian's, 5.10 to 6.12, booted in qemu with only Python and the agent.

Each machine loads and attaches the BPF programs, counts exactly known numbers of calls and connections, gives up its
privileges and counts again; then another process, an ordinary user that has kept CAP_NET_ADMIN alone, puts a quarantine
in force, prolongs it, waits for its end, throttles and opens. Downloads go to .targets/kernels once; afterwards no
network is needed. Software emulation: one to five minutes a machine. Needs qemu-system-x86, qemu-system-arm, apt-get,
dpkg-deb.

    make kernels
    python -m stonechat_tools.proofs.kernels amd64-6.1        one machine
    python -m stonechat_tools.proofs.kernels --json FILE
"""

import argparse
import gzip
import json
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..console import working_copy

PYTHON_SUITE = "bookworm"
BOOT_WITHIN_S = 900
STORE = Path(".targets/kernels")  # in the working copy


@dataclass(frozen=True)
class Machine:
    """suite: the Debian release whose kernel it is; kernel: that kernel's meta package; qemu: the command but for
    kernel, initial RAM disk and their line. python: the userland's architecture, "" for the kernel's."""

    architecture: str
    suite: str
    kernel: str
    qemu: tuple[str, ...]
    console: str
    python: str = ""


_PC = ("qemu-system-x86_64", "-machine", "pc", "-cpu", "max")
_ARM64 = ("qemu-system-aarch64", "-machine", "virt", "-cpu", "cortex-a57")
_ARM = ("qemu-system-arm", "-machine", "virt", "-cpu", "cortex-a15")
MACHINES = {
    "amd64-5.10": Machine("amd64", "bullseye", "linux-image-amd64", _PC, "ttyS0"),
    "amd64-6.1": Machine("amd64", "bookworm", "linux-image-amd64", _PC, "ttyS0"),
    "amd64-6.12": Machine("amd64", "trixie", "linux-image-amd64", _PC, "ttyS0"),
    "arm64-6.1": Machine("arm64", "bookworm", "linux-image-arm64", _ARM64, "ttyAMA0"),
    "amd64-6.1 with i386 Python": Machine("amd64", "bookworm", "linux-image-amd64", _PC, "ttyS0", "i386"),
    "arm64-6.1 with armhf Python": Machine("arm64", "bookworm", "linux-image-arm64", _ARM64, "ttyAMA0", "armhf"),
    "armhf-6.1": Machine("armhf", "bookworm", "linux-image-armmp", _ARM, "ttyAMA0"),
}

# What a response needs of the kernel, in the order of loading; what is not there is built in.
MODULES = ("crc32c_generic", "libcrc32c", "nfnetlink", "nf_tables", "nft_counter", "nft_limit", "nft_objref", "veth")

# Process 1 of the machine. What it prints after RESULT is what the job looks at.
GUEST = (
    f"#!/usr/bin/python3 -B\nMODULES = {MODULES!r}"
    + """
import ctypes, fcntl, json, os, socket, struct, sys, time, traceback
libc = ctypes.CDLL(None, use_errno=True)
def mount(what, where, kind):
    os.makedirs(where, exist_ok=True)
    if libc.mount(what, where.encode(), kind, 0, None): raise OSError(ctypes.get_errno(), where)
def count():
    mount(b"proc", "/proc", b"proc"); mount(b"sys", "/sys", b"sysfs"); mount(b"cg", "/sys/fs/cgroup", b"cgroup2")
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS: up
    sys.path.insert(0, "/agent")
    load()
    go, answer = prepare()
    from stonechat.linux import privileges
    from stonechat.linux.collector import LinuxCollector
    groups = ["/sys/fs/cgroup/busy.service", "/sys/fs/cgroup/deep/idle.service"]
    for group in groups: os.makedirs(group)
    for group in ("/sys/fs/cgroup", groups[0]): os.chmod(group + "/cgroup.procs", 0o666)
    collector = LinuxCollector(interfaces=["lo"], use_bpf=True, services=groups)
    rows = [[[0] * len(each.schema) for _ in range(2)] for each in collector.services]
    columns = [column[0] for column in collector.services[0].schema.columns]
    names = [column[0] for column in collector.schema.columns]
    values, before = [0] * len(names), [0] * len(names)
    result = {"kernel": os.uname().release, "machine": os.uname().machine, "schema": collector.schema.name}
    result["sources"] = collector.sources
    def work():
        if os.fork() == 0:
            with open(groups[0] + "/cgroup.procs", "w") as procs: procs.write(str(os.getpid()))
            for _ in range(50_000): os.getppid()
            for i in range(40):
                s = socket.socket()
                try: s.connect(("127.0.%d.1" % i, 1))
                except OSError: pass
            os._exit(0)
        os.wait()
    for phase in ("root", "dropped"):
        collector.read(before)
        for each, (old, _) in zip(collector.services, rows): each.read(old)
        work(); collector.read(values)
        for each, (_, new) in zip(collector.services, rows): each.read(new)
        grown = dict(zip(names, [new - old for new, old in zip(values, before)]))
        result[phase] = {name: grown[name] for name in ("syn_out", "rst_in")}
        result[phase].update(calls=grown["sys_rate"], write=grown["sys_write"])
        result[phase]["peers"] = values[names.index("peers")]
        result[phase]["services"] = [dict(zip(columns, [b - a for a, b in zip(old, new)])) for old, new in rows]
        if phase == "root": privileges.drop("nobody")
    result["status"] = privileges.status()
    os.write(go, b"x")
    result["response"] = json.loads(os.read(answer, 65536))
    return result
def prepare():
    (wait, go), (answer, out) = os.pipe(), os.pipe()
    if os.fork():
        os.close(out)
        return go, answer
    os.read(wait, 1)
    from stonechat.linux import privileges
    privileges.drop("nobody", keep_net_admin=True)
    try: found = respond() | {"status": privileges.status()}
    except BaseException: found = {"error": traceback.format_exc()}
    os.write(out, json.dumps(found).encode())
    os._exit(0)
def load():
    numbers = {("x86_64", 8): 313, ("x86_64", 4): 350, ("aarch64", 8): 273, ("aarch64", 4): 379, ("armv7l", 4): 379}
    number = numbers[os.uname().machine, struct.calcsize("P")]  # finit_module
    for name in MODULES:
        if os.path.exists("/modules/" + name):
            fd = os.open("/modules/" + name, os.O_RDONLY)
            if libc.syscall(number, fd, b"", 0): raise OSError(ctypes.get_errno(), "module " + name)
            os.close(fd)
def interface():
    from stonechat.linux import nfnetlink as nf
    info = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    pair = nf.nested(2, nf.attribute(1, info + nf.attribute(3, b"far0\\0")))
    body = info + nf.attribute(3, b"out0\\0") + nf.nested(18, nf.attribute(1, b"veth\\0"), pair)
    route = socket.socket(16, 3, 0)
    route.send(struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)  # RTM_NEWLINK
    code = struct.unpack_from("=i", route.recv(4096), 16)[0]
    if code: raise OSError(-code, "veth")
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    address = struct.pack("16sHH4s8x", b"out0", 2, 0, socket.inet_aton("10.77.0.2"))
    fcntl.ioctl(control, 0x8916, address)  # SIOCSIFADDR
    for name in (b"far0", b"out0"): fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", name, 1))
def sent(host):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try: s.sendto(b"x", (host, 9))
        except PermissionError: return False
    return True
def respond():
    from stonechat.linux import allow_list, netfilter
    interface()
    rows = [{"address": "10.77.0.5", "reason": "operator"}]
    response = netfilter.Netfilter(allow_list.AllowList("10.77.0.1", 1883, rows))
    found = {"source": response.source, "free": sent("10.77.0.9")}
    response.apply(3, 30)
    found["quarantine"] = [sent("10.77.0.9"), sent("10.77.0.5"), sent("127.0.0.1")]
    found["trouble"] = response.turn()
    response.extend(2)
    began = time.monotonic()
    while not sent("10.77.0.9") and time.monotonic() < began + 60: time.sleep(0.005)
    found["ended_after_s"] = time.monotonic() - began
    response.apply(2, 60)
    found["throttled"] = sum(sent("10.77.0.9") for _ in range(500))
    found["counts"] = response.counts()
    response.close()
    found["opened"] = sent("10.77.0.9")
    return found
def main():
    try: result = count()
    except BaseException as error: result = {"error": traceback.format_exc()}
    print("RESULT", json.dumps(result), flush=True)
if os.fork() == 0:
    main(); os._exit(0)
os.wait()
libc.reboot(0x4321FEDC)  # RB_POWER_OFF
"""
)
NOBODY = b"root:x:0:0::/:\nnobody:x:65534:65534::/:\n"


def fetch(name: str) -> Path:
    """-> the folder with `vmlinuz` and the RAM disk's `root`, downloaded and unpacked once."""
    home = working_copy() / STORE / name.replace(" ", "-")
    machine = MACHINES[name]
    if (home / "modules").exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        base = Path(scratch)
        apt = _private_apt(base / "kernels", machine.architecture, machine.suite)
        depends = _lines([*apt("apt-cache"), "depends", machine.kernel])
        kernel = next(line.split()[1] for line in depends if "Depends: linux-image-" in line)
        _lines([*apt("apt-get"), "download", kernel], base / "kernels")
        apt = _private_apt(base / "python", machine.python or machine.architecture, PYTHON_SUITE)
        plan = _lines([*apt("apt-get"), "install", "--no-install-recommends", "--simulate", "python3"])
        packages = [line.split()[1] for line in plan if line.startswith("Inst ")]
        _lines([*apt("apt-get"), "download", *packages], base / "python")
        for package in [*base.glob("*/*.deb")]:
            into = base / ("kernel" if package.name.startswith("linux-image") else "home/root")
            into.mkdir(parents=True, exist_ok=True)
            subprocess.run(["dpkg-deb", "-x", package, into], check=True)
        shutil.move(next((base / "kernel/boot").glob("vmlinuz-*")), base / "home/vmlinuz")
        _keep_modules(base / "kernel", base / "home/modules")
        _thin(base / "home/root")
        (base / "home").rename(home)
    return home


def ram_disk(home: Path) -> Path:
    """-> an initial RAM disk of the root folder, the agent of this working copy, and GUEST as process 1."""
    path = home / "initrd.gz"
    archive = bytearray()
    # Not made under `home`: the agent changes from run to run. Owner and device numbers: root, 5:1 the console.
    archive += _entry("dev", stat.S_IFDIR | 0o755) + _entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive += _entry("init", stat.S_IFREG | 0o755, GUEST.encode())
    archive += (
        _tree(home / "root", "")
        + _entry("etc/passwd", stat.S_IFREG | 0o644, NOBODY)
        + _entry("agent", stat.S_IFDIR | 0o755)
    )
    archive += _tree(working_copy() / "agent", "agent/") + _entry("modules", stat.S_IFDIR | 0o755)
    archive += _tree(home / "modules", "modules/") + _entry("TRAILER!!!", 0)
    path.write_bytes(gzip.compress(bytes(archive), 1))
    return path


def boot(name: str) -> dict[str, Any]:
    """-> what the machine's process 1 found. Raises OSError where qemu is missing or the machine says nothing."""
    machine = MACHINES[name]
    if shutil.which(machine.qemu[0]) is None:
        package = "qemu-system-x86" if machine.architecture == "amd64" else "qemu-system-arm"
        raise OSError(f"{machine.qemu[0]} is not installed: apt-get install {package}")
    home = fetch(name)
    line = f"console={machine.console} quiet panic=-1 rdinit=/init no_timer_check PYTHONHASHSEED=0"
    command = [*machine.qemu, "-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot", "-m", "1024"]
    command += ["-kernel", str(home / "vmlinuz"), "-initrd", str(ram_disk(home)), "-append", line]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_WITHIN_S)
    for text in said.stdout.splitlines():
        _, found, answer = text.partition("RESULT ")  # the firmware's escape codes may precede it
        if found:
            result: dict[str, Any] = json.loads(answer)
            return result
    raise OSError("no result; it said: " + (said.stdout + said.stderr)[-2000:])


def faults(result: dict[str, Any]) -> list[str]:
    """-> what is wrong in a machine's result; empty when all of it holds."""
    if "error" in result:
        return [result["error"]]
    found = [] if result["schema"] == "linux-1" else [f"schema {result['schema']}"]
    if result["status"] != [65534, 0, 0, 0, 0]:
        found.append(f"user and capabilities left: {result['status']}")
    for phase in ("root", "dropped"):
        counted = result[phase]
        found += [f"{phase}: {key} {counted[key]}" for key in ("syn_out", "rst_in", "peers") if counted[key] != 40]
        if not 50_000 <= counted["calls"] < 52_000:
            found.append(f"{phase}: {counted['calls']} calls, made 50,000 and a few hundred")
        busy, idle = counted["services"]
        calls = sum(busy[key] for key in busy if key.startswith("sys_"))
        if not 50_000 <= calls < 52_000 or busy["syn_out"] != 40 or not busy["cpu_time"] or any(idle.values()):
            found.append(f"{phase}: of the services, the busy one {busy}, the idle one {idle}")
        if counted["write"] > 1000:  # getppid of armhf has the number that write has on arm64
            found.append(f"{phase}: {counted['write']} writes, made a few; the callers' ABI is mistaken")
    return found + _faults_of_response(result["response"])


def _faults_of_response(answer: dict[str, Any]) -> list[str]:
    if "error" in answer:
        return [answer["error"]]
    found = [] if answer["free"] and answer["opened"] else ["response: stops while nothing is in force"]
    if answer["status"] != [65534, 1 << 12, 1 << 12, 0, 0]:
        found.append(f"response: user and capabilities left: {answer['status']}")
    if answer["quarantine"] != [False, True, True] or answer["trouble"]:
        found.append(f"response: quarantine {answer['quarantine']} {answer['trouble']}")
    if not 1.5 < answer["ended_after_s"] < 3:
        found.append(f"response: of 2 s, ended after {answer['ended_after_s']:.3f}")
    if not 50 < answer["throttled"] < 450 or sum(answer["counts"]) < 500:
        found.append(f"response: of 500 packets {answer['throttled']} passed a throttle, counted {answer['counts']}")
    return found


def _keep_modules(kernel: Path, into: Path) -> None:
    """Those of MODULES that the kernel's package has, unpacked."""
    into.mkdir(parents=True)
    for path in kernel.rglob("*.ko*"):
        name = path.name.partition(".")[0]
        if name in MODULES:
            data = path.read_bytes()
            (into / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)


def _private_apt(base: Path, architecture: str, suite: str) -> Any:
    """apt with lists and a cache of its own, so that the machine's stay as they are -> a maker of commands."""
    sys.path.insert(0, str(working_copy() / "firmware_tests"))
    from targets import apt_source

    for folder in ("state/lists/partial", "cache/archives/partial"):
        (base / folder).mkdir(parents=True)
    (base / "state/status").touch()
    words = apt_source().split()
    words[2] = suite
    (base / "sources.list").write_text(" ".join(words) + "\n")
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
    settings = [f"-o{key}={value}" for key, value in options.items()]
    _lines(["apt-get", "-q", *settings, "update"])
    return lambda program: [program, "-q", *settings]


def _lines(command: list[str], folder: Path | None = None) -> list[str]:
    """What a command prints. Raises OSError with its last words."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise OSError(f"{command[0]}: " + " ".join(done.stderr.split())[-300:])
    return done.stdout.splitlines()


def _thin(root: Path) -> None:
    """Leave out what Python does not need to run."""
    for folder in ("usr/share", "usr/sbin", "sbin", "var", "usr/lib/python3.11/test", "usr/lib/python3.11/lib2to3"):
        shutil.rmtree(root / folder, ignore_errors=True)
    for path in root.rglob("gconv"):
        shutil.rmtree(path, ignore_errors=True)


def _tree(folder: Path, prefix: str) -> bytes:
    out = bytearray()
    for path in sorted(folder.rglob("*")):
        if "__pycache__" in path.parts:
            continue
        name = prefix + str(path.relative_to(folder))
        if path.is_symlink():
            out += _entry(name, stat.S_IFLNK | 0o777, os.readlink(path).encode())
        elif path.is_dir():
            out += _entry(name, stat.S_IFDIR | 0o755)
        else:
            out += _entry(name, stat.S_IFREG | 0o755, path.read_bytes())
    return bytes(out)


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One entry of a cpio archive, format newc (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + "".join(f"{field:08x}" for field in fields).encode()
    return _padded(header + encoded) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", nargs="*", choices=[*MACHINES, []], help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write what each machine found to FILE")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {}
    failed = False
    for name in args.machine or MACHINES:
        try:
            results[name] = boot(name)
            wrong = faults(results[name])
        except (OSError, StopIteration, subprocess.SubprocessError) as error:
            wrong = [str(error)]
        failed = failed or bool(wrong)
        kernel = results.get(name, {}).get("kernel", "?")
        source = results.get(name, {}).get("response", {}).get("source", "")
        frames = "without AF_PACKET" if "without" in source else "AF_PACKET too"
        good = f"loads, counts exactly, also unprivileged; responds, {frames}"
        print(f"{name} ({kernel}): " + ("; ".join(wrong) if wrong else good))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
