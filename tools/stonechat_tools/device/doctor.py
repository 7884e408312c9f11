"""Report which feature sources work on this device, which do not, why, and the fix for each.

Every source is started as the agent would start it, and closed again. Run it as the agent will be started: as root, or
with its capabilities. Exit status: 0 the agent can run here, 1 it can't; with --require linux-1 the sources that need
BPF must work too.

Examples:
  sudo stonechat doctor
  stonechat doctor --require linux-1
  stonechat doctor --cgroup /sys/fs/cgroup/system.slice/app.service
  stonechat doctor --json
"""

import argparse
import gzip
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from stonechat.linux import proc, schemas
from stonechat.linux.collector import start_bpf

from ..console import has, plain_table

OLDEST_KERNEL = (5, 10)
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CAP_SYS_ADMIN = 21  # it includes the last two, and did all before Linux 5.8
_OPTIONS = {
    "BPF_SYSCALL": "no BPF at all",
    "BPF_EVENTS": "no system calls (BPF on tracepoints)",
    "CGROUP_BPF": "no connections and peers (BPF on cgroups)",
    "INET_DIAG": "listening ports from /proc/net/tcp, which costs up to 2 ms a window",
    "BPF_JIT": "BPF runs in the kernel's interpreter, several times slower",
    "NF_TABLES_INET": "no responses, [response] mode = on",
    "NETFILTER_EGRESS": "responses do not stop frames that go past IP, AF_PACKET",
}


@dataclass(frozen=True)
class Group:
    """One group of features: `source` is what it takes, empty where nothing works; `note` says why, or why not the
    better one; `fix` what to do about it."""

    schema: str
    group: str
    source: str
    note: str
    fix: str

    @property
    def works(self) -> bool:
        return bool(self.source)


@dataclass(frozen=True)
class Check:
    """Something about the machine that explains a group: `fix` is empty where nothing is wrong."""

    name: str
    found: str
    fix: str = ""


UNSCORED = ("dropped (late, suspended)", "at the start", "not read", "failed otherwise")  # Loop.unscored


@dataclass(frozen=True)
class Machine:
    """Where to look; tests hand in folders of their own."""

    proc: str = "/proc"
    sys: str = "/sys"
    boot: str = "/boot"
    root: str = ""
    release: str = platform.release()

    def text(self, path: str) -> str | None:
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None


def proc_groups(
    interfaces: tuple[str, ...] | None, machine: Machine, disks: tuple[str, ...] | None = None
) -> list[Group]:
    schema = schemas.LINUX_PROC_1.name
    started, failed = proc.start(interfaces, machine.proc, disks)
    rows = []
    for part, _ in started:
        rows.append(Group(schema, part.group, part.source, part.note, part.better))
        part.close()
    return rows + [Group(schema, group, "", reason, fix) for group, reason, fix in failed]


def bpf_groups(
    interfaces: tuple[str, ...] | None, cgroup: str | None = None, disks: tuple[str, ...] | None = None
) -> list[Group]:
    started, rows = start_bpf(interfaces, cgroup)
    for part in started:
        part.close()
    groups = []
    for group, source, note in rows:
        reason, _, fix = note.partition(" (fix: ")
        groups.append(Group(schemas.LINUX_1.name, group, source, reason, fix.removesuffix(")")))
    if cgroup is not None:
        groups.append(_cgroup_group(cgroup, disks))
    return groups


def _cgroup_group(cgroup: str, disks: tuple[str, ...] | None) -> Group:
    from stonechat.linux.cgroup import CgroupMemory, CgroupProcessor

    try:
        os.stat(cgroup + "/cpu.stat")
        parts = (CgroupProcessor(cgroup), CgroupMemory(cgroup))
    except OSError as error:
        fix = "name a folder of cgroup v2, which has a cpu.stat; see /proc/PID/cgroup of a process in it"
        return Group(schemas.LINUX_1.name, "cgroup", "", f"{error.filename}: {error.strerror}", fix)
    for part in parts:
        part.close()
    note = f"processor from cpu.stat, memory from {parts[1].source}"
    fixes = []
    if parts[1].source != "memory.stat":
        fixes.append("enable the memory controller, or with systemd set ProtectProc=default")
    if disks is None and not os.path.exists(cgroup + "/io.stat"):
        fixes.append("name its disks, or enable the io controller: it has no io.stat")
    return Group(schemas.LINUX_1.name, "cgroup", "v2", note, "; ".join(fixes))


def agent_check(machine: Machine, state_file: str) -> Check | None:
    """The agent that runs with this state file, or ran last: what it could not score, and what it lacks. None where it
    has never run, or only root may look."""
    try:
        with open(state_file + ".health", "rb") as file:
            lines = file.read(4096).decode(errors="replace").splitlines()
    except OSError:
        return None
    facts = dict(line.split(" ", 1) for line in lines if " " in line)
    comm = (machine.text(f"{machine.proc}/{facts.get('pid', '')}/comm") or "").strip()
    running = f"running, process {facts['pid']}" if comm == "stonechat-agent" else "not running; when it ran last"
    counts = [int(word) if word.isdecimal() else 0 for word in facts.get("unscored", "").split()[:4]]
    lost = [f"{count} {cause}" for count, cause in zip(counts, UNSCORED, strict=False) if count]
    found = f"{running}: windows not scored: {', '.join(lost) or 'none'}"
    fixes = []
    if counts and counts[0]:
        fixes.append("the process did not get the processor in time, or the device was suspended")
    if sum(counts[2:]):
        fixes.append("see its log: journalctl -u stonechat-agent -p warning")
    if facts.get("lacks", "").strip():
        found += f"; lacking {facts['lacks']}"
        fixes.append("correct [collector] or [counters] in its configuration, or wait until it appears")
    return Check("agent", found, "; ".join(fixes))


def checks(machine: Machine) -> list[Check]:
    found = [
        _kernel(machine),
        _capabilities(machine),
        _cgroup(machine),
        _lockdown(machine),
        _jit(machine),
        _options(machine),
        _container(machine),
        _responses(),
    ]
    return [check for check in found if check]


def _kernel(machine: Machine) -> Check:
    numbers = machine.release.split("-")[0].split(".")
    version = tuple(int(number) for number in numbers[:2] if number.isdigit())
    fix = "" if version >= OLDEST_KERNEL else "the BPF sources are made for Linux 5.10 and later"
    return Check("kernel", machine.release, fix)


def _capabilities(machine: Machine) -> Check:
    status = machine.text(machine.proc + "/self/status") or ""
    effective = int(status.partition("CapEff:")[2].split("\n")[0].strip() or "0", 16)
    held = [name for name, bit in _CAPABILITIES.items() if effective >> bit & 1]
    if effective >> _CAP_SYS_ADMIN & 1:
        held.append("CAP_SYS_ADMIN")
    missing = [name for name in _CAPABILITIES if name not in held]
    if "CAP_SYS_ADMIN" in held:
        missing = [name for name in missing if name == "CAP_NET_ADMIN"]
    fix = ""
    if missing:
        fix = f"start as root, or give {' '.join(missing)} (systemd: AmbientCapabilities=; docker: --cap-add)"
    return Check("capabilities", " ".join(held) or "none of those that BPF needs", fix)


def _cgroup(machine: Machine) -> Check:
    mounts = [line.split() for line in (machine.text(machine.proc + "/self/mounts") or "").splitlines()]
    folders = [fields[1] for fields in mounts if len(fields) > 2 and fields[2] == "cgroup2"]
    if folders:
        return Check("cgroup v2", folders[0])
    only_v1 = any(len(fields) > 2 and fields[2] == "cgroup" for fields in mounts)
    fix = "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified"
    without = ": no single services can be watched"
    return Check("cgroup v2", ("only version 1 is mounted" if only_v1 else "not mounted") + without, fix)


def _lockdown(machine: Machine) -> Check | None:
    text = machine.text(machine.sys + "/kernel/security/lockdown")
    if text is None or "[" not in text:
        return None
    mode = text.partition("[")[2].partition("]")[0]
    if mode != "confidentiality":
        return Check("lockdown", mode)
    return Check("lockdown", mode, "lockdown=integrity; until then calls of 32-bit programs are put into wrong classes")


def _jit(machine: Machine) -> Check | None:
    text = machine.text(machine.proc + "/sys/net/core/bpf_jit_enable")
    if text is None:
        return None
    if text.strip() == "0":
        return Check("BPF compiler", "off: the kernel interprets BPF", "sysctl -w net.core.bpf_jit_enable=1")
    return Check("BPF compiler", "on")


def _options(machine: Machine) -> Check | None:
    text = _kernel_config(machine)
    if text is None:
        return None
    lines = set(text.splitlines())
    lacks = [name for name in _OPTIONS if not {f"CONFIG_{name}=y", f"CONFIG_{name}=m"} & lines]
    if not lacks:
        return Check("kernel options", "all that stonechat uses")
    fix = "; ".join(f"CONFIG_{name} (without: {_OPTIONS[name]})" for name in lacks)
    return Check("kernel options", "lacks " + ", ".join(lacks), "a kernel with " + fix)


def _kernel_config(machine: Machine) -> str | None:
    try:
        return gzip.decompress(Path(machine.proc + "/config.gz").read_bytes()).decode(errors="replace")
    except (OSError, EOFError, gzip.BadGzipFile):
        return machine.text(f"{machine.boot}/config-{machine.release}")


def _responses() -> Check:
    """What [response] mode = "on" could do; nothing is changed."""
    from stonechat.linux.netfilter import what_works

    try:
        return Check("responses", what_works())
    except OSError as error:
        return Check("responses", "recorded only", f"for mode = on: {error.strerror or error}")


def _container(machine: Machine) -> Check | None:
    for path, name in (("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")):
        if os.path.exists(machine.root + path):
            return Check("container", name + ": sees the host's traffic only with the host's network namespace")
    return None


def examine(
    interfaces: tuple[str, ...] | None = None,
    machine: Machine | None = None,
    cgroup: str | None = None,
    disks: tuple[str, ...] | None = None,
) -> dict[str, object]:
    """-> {"schema": the best that works here or None, "groups": [Group], "checks": [Check]}. With a cgroup the agent
    starts only where everything works."""
    machine = machine or Machine()
    unprivileged = proc_groups(interfaces, machine, disks)
    with_bpf = bpf_groups(interfaces, cgroup, disks)
    schema = None
    if all(group.works for group in unprivileged):
        if all(group.works for group in with_bpf):
            schema = schemas.LINUX_1.name
        elif cgroup is None:
            schema = schemas.LINUX_PROC_1.name
    return {"schema": schema, "groups": unprivileged + with_bpf, "checks": checks(machine)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [schemas.LINUX_PROC_1.name, schemas.LINUX_1.name]
    parser.add_argument("--require", choices=names, default=names[0], help="what must work (default %(default)s)")
    parser.add_argument(
        "--interface", action="append", metavar="NAME", help="count this interface only (again for more)"
    )
    parser.add_argument("--cgroup", metavar="DIR", help="the cgroup v2 folder that the agent is to watch")
    parser.add_argument("--disks", metavar="A,B", help="block devices whose reads and writes count (default: all)")
    parser.add_argument(
        "--state",
        default="/var/lib/stonechat/state",
        metavar="FILE",
        help="the agent's state_file: shows which windows it could not score (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print it for machines")


def run(args: argparse.Namespace) -> int:
    disks = tuple(word for word in args.disks.split(",") if word) if args.disks else None
    found = examine(tuple(args.interface) if args.interface else None, None, args.cgroup, disks)
    schema = found["schema"]
    ok = schema == schemas.LINUX_1.name or schema == args.require
    groups: list[Group] = found["groups"]  # type: ignore[assignment]
    about: list[Check] = found["checks"]  # type: ignore[assignment]
    agent = agent_check(Machine(), args.state)
    if agent is not None:
        about.append(agent)
    if args.json:
        rows = [asdict(group) | {"works": group.works} for group in groups]
        print(json.dumps({"ok": ok, "schema": schema, "groups": rows, "checks": [asdict(c) for c in about]}, indent=2))
    else:
        _show(groups, about, schema if isinstance(schema, str) else None, args.require, ok)
        if args.cgroup and not ok:
            print("Watching one cgroup needs the rows of linux-1, too.")
    return 0 if ok else 1


def _show(groups: list[Group], about: list[Check], schema: str | None, required: str, ok: bool) -> None:
    if not has("rich"):
        _show_plain(groups, about, schema, required, ok)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("features", "for", "source", "note and fix")
    for group in groups:
        works = Text(group.source, "green") if group.works else Text("does not work", "red")
        table.add_row(group.group, group.schema, works, _with_fix(group.note, group.fix))
    console.print(table)
    facts = Table("machine", "found")
    for check in about:
        facts.add_row(check.name, _with_fix(check.found, check.fix))
    console.print(facts)
    if schema:
        console.print(f"The agent runs here with a [bold]{schema}[/bold] model.")
    else:
        console.print("The agent can't run here until every row of linux-proc-1 works.")
    if schema and not ok:
        console.print(f"{required} was required.")


def _with_fix(text: str, fix: str) -> str:
    from rich.markup import escape

    return escape(text) + (f"\n[yellow]fix:[/yellow] {escape(fix)}" if fix else "")


def _show_plain(groups: list[Group], about: list[Check], schema: str | None, required: str, ok: bool) -> None:
    """The same without colours and lines: a device has no rich."""

    def cell(text: str, fix: str) -> str:
        return text + (f"\nfix: {fix}" if fix else "")

    rows = [[one.group, one.schema, one.source or "does not work", cell(one.note, one.fix)] for one in groups]
    print(plain_table(["features", "for", "source", "what is known, and the fix"], rows))
    print(plain_table(["machine", "found"], [[one.name, cell(one.found, one.fix)] for one in about]))
    if schema:
        print(f"The agent runs here with a {schema} model." + ("" if ok else f" {required} was required."))
    else:
        print("The agent can't run here until every row of linux-proc-1 works.")
