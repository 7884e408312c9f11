"""`stonechat doctor`: every way in which a machine can lack something gets its row, its reason and its fix."""

import argparse
import gzip
import json
from pathlib import Path

import pytest
from stonechat.linux import schemas
from stonechat_tools.device import doctor
from stonechat_tools.device.doctor import Machine

PROC_FILES = ("net/dev", "net/snmp", "net/tcp", "stat", "meminfo", "vmstat", "self/status", "self/mounts")
REFUSED = [
    ("syscalls", "", "raw tracepoint does not start: Operation not permitted (fix: start as root, or with CAP_BPF)"),
    ("connections", "cgroup_skb", "every socket's packets"),
]


@pytest.fixture
def machine(tmp_path):
    """A copy of this machine's /proc, and nothing else: the tests break what they need broken."""
    for name in PROC_FILES:
        target = tmp_path / "proc" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path("/proc", name).read_bytes())
    for name in ("sys", "boot"):
        (tmp_path / name).mkdir()
    return Machine(*(str(tmp_path / name) for name in ("proc", "sys", "boot", "")), release="6.1.0-21-arm64")


@pytest.fixture
def bpf(monkeypatch):
    """start_bpf answers what the test puts into this list."""
    rows = [("syscalls", "raw tracepoint", "exact"), ("connections", "cgroup_skb", "every socket's packets")]
    monkeypatch.setattr(doctor, "start_bpf", lambda interfaces, cgroup: ([], rows))
    return rows


def _check(machine: Machine, name: str) -> doctor.Check:
    return next(check for check in doctor.checks(machine) if check.name == name)


def _proc(machine: Machine, name: str, text: str) -> None:
    path = Path(machine.proc) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_everything_works(machine, bpf):
    found = doctor.examine(machine=machine)
    assert found["schema"] == "linux-1"
    assert [group.group for group in found["groups"]][:6] == [
        "protocols",
        "listeners",
        "bandwidth",
        "cpu",
        "memory",
        "paging",
    ]
    assert all(group.works for group in found["groups"])


def test_without_bpf_the_agent_still_runs_and_the_fix_stands_apart(machine, bpf):
    bpf[:] = REFUSED
    found = doctor.examine(machine=machine)
    assert found["schema"] == "linux-proc-1"
    row = next(group for group in found["groups"] if group.group == "syscalls")
    assert not row.works
    assert row.note == "raw tracepoint does not start: Operation not permitted"
    assert row.fix == "start as root, or with CAP_BPF"


def test_a_missing_file_is_a_row_with_its_fix_and_the_agent_cannot_run(machine, bpf):
    (Path(machine.proc) / "net/snmp").unlink()
    found = doctor.examine(machine=machine)
    assert found["schema"] is None
    row = next(group for group in found["groups"] if group.group == "protocols")
    assert not row.works
    assert "No such file" in row.note
    assert "ProcSubset" in row.fix


def test_the_weaker_source_of_the_listeners_says_what_mends_it(machine, bpf):
    row = next(group for group in doctor.examine(machine=machine)["groups"] if group.group == "listeners")
    assert row.source == "/proc/net/tcp"
    assert row.fix == "modprobe tcp_diag"


@pytest.mark.parametrize(
    ("effective", "missing"),
    [
        ("0000000000000000", ["CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF"]),
        ("000000c000001000", []),
        ("0000008000001000", ["CAP_PERFMON"]),
        ("0000000000200000", ["CAP_NET_ADMIN"]),  # CAP_SYS_ADMIN includes the other two
    ],
)
def test_missing_capabilities_are_named(machine, effective, missing):
    _proc(machine, "self/status", f"Name:\tx\nCapEff:\t{effective}\nCapBnd:\t0\n")
    check = _check(machine, "capabilities")
    assert [name for name in ("CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF") if name in check.fix] == missing


def test_an_old_kernel(machine):
    assert _check(machine, "kernel").fix == ""
    old = Machine(machine.proc, machine.sys, machine.boot, machine.root, release="4.19.0-26-amd64")
    assert "5.10" in _check(old, "kernel").fix


def test_one_cgroup_is_not_watched_without_bpf(machine, bpf, tmp_path):
    assert doctor.examine(machine=machine, cgroup=str(tmp_path))["schema"] is None  # it has no cpu.stat
    bpf[1] = ("connections", "", "cgroup_skb does not start")
    assert doctor.examine(machine=machine)["schema"] == "linux-proc-1"
    (tmp_path / "cpu.stat").write_text("usage_usec 1\n")
    assert doctor.examine(machine=machine, cgroup=str(tmp_path))["schema"] is None


def test_cgroup_version_1_only(machine):
    _proc(machine, "self/mounts", "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n")
    check = _check(machine, "cgroup v2")
    assert check.found == "only version 1 is mounted: no single services can be watched"
    assert "systemd.unified_cgroup_hierarchy=1" in check.fix
    _proc(machine, "self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    assert _check(machine, "cgroup v2") == doctor.Check("cgroup v2", "/sys/fs/cgroup")


@pytest.mark.parametrize(("mode", "needs_fix"), [("none", False), ("integrity", False), ("confidentiality", True)])
def test_lockdown(machine, mode, needs_fix):
    path = Path(machine.sys) / "kernel/security/lockdown"
    path.parent.mkdir(parents=True)
    modes = " ".join(f"[{one}]" if one == mode else one for one in ("none", "integrity", "confidentiality"))
    path.write_text(modes + "\n")
    check = _check(machine, "lockdown")
    assert check.found == mode
    assert bool(check.fix) == needs_fix


def test_bpf_that_is_interpreted(machine):
    _proc(machine, "sys/net/core/bpf_jit_enable", "0\n")
    assert _check(machine, "BPF compiler").fix == "sysctl -w net.core.bpf_jit_enable=1"
    _proc(machine, "sys/net/core/bpf_jit_enable", "1\n")
    assert _check(machine, "BPF compiler").fix == ""


def test_kernel_options_from_either_place(machine):
    assert not [check for check in doctor.checks(machine) if check.name == "kernel options"]
    options = "".join(f"CONFIG_{name}=y\n" for name in doctor._OPTIONS)
    config = Path(machine.boot) / f"config-{machine.release}"
    config.write_text(options.replace("CONFIG_INET_DIAG=y", "CONFIG_INET_DIAG=m"))
    assert _check(machine, "kernel options").fix == ""
    lacking = options.replace("CONFIG_BPF_EVENTS=y", "# CONFIG_BPF_EVENTS is not set")
    (Path(machine.proc) / "config.gz").write_bytes(gzip.compress(lacking.encode()))
    check = _check(machine, "kernel options")
    assert check.found == "lacks BPF_EVENTS"
    assert "no system calls" in check.fix
    (Path(machine.proc) / "config.gz").write_bytes(b"\x1f\x8bbroken")
    assert _check(machine, "kernel options").fix == ""


def test_a_container_is_told(machine):
    assert not [check for check in doctor.checks(machine) if check.name == "container"]
    Path(machine.root, ".dockerenv").write_text("")
    assert _check(machine, "container").found.startswith("Docker: ")


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return doctor.run(parser.parse_args(arguments))


def test_exit_status_and_json_on_this_machine(bpf, capsys):
    assert _run("--require", "linux-1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["schema"]) == (True, "linux-1")
    assert {row["group"] for row in told["groups"] if row["works"]} >= {"protocols", "cpu", "syscalls"}
    bpf[:] = REFUSED
    assert _run("--json") == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "linux-proc-1"
    assert _run("--require", "linux-1") == 1
    assert "fix:" in capsys.readouterr().out


def test_the_table_can_be_read_without_colours(bpf, capsys):
    bpf[:] = REFUSED
    assert _run("--interface", "lo", "--interface", "ppp7") == 0
    text = capsys.readouterr().out
    for word in ("protocols", "counts lo", "does not work", "CAP_BPF", "linux-proc-1 model"):
        assert word in text


def test_the_real_sources_are_started_and_let_go():
    groups = doctor.bpf_groups(None)
    assert {"syscalls", "connections"} <= {group.group for group in groups}
    for group in groups:
        assert group.schema == schemas.LINUX_1.name
        assert group.works or group.note, group


def test_the_agents_unscored_windows_and_what_it_lacks(machine, tmp_path):
    assert doctor.agent_check(machine, str(tmp_path / "state")) is None
    health = tmp_path / "state.health"
    health.write_text("pid 77\nversion 1\nwindows 9\nunscored 3 1 0 2\nlacks interface eth9\n")
    found = doctor.agent_check(machine, str(tmp_path / "state"))
    assert found is not None and found.found.startswith("not running")
    for text in ("3 dropped", "1 at the start", "2 failed otherwise", "lacking interface eth9"):
        assert text in found.found
    assert "in time" in found.fix and "[collector]" in found.fix
    (tmp_path / "proc" / "77").mkdir()
    (tmp_path / "proc" / "77" / "comm").write_text("stonechat-agent\n")
    running = doctor.agent_check(machine, str(tmp_path / "state"))
    assert running is not None and running.found.startswith("running, process 77")
    for garbage in (b"", b"\xff\x00" * 4000, b"pid\nunscored x y\n", b"pid ../../x\nunscored 1\n"):
        health.write_bytes(garbage)
        assert doctor.agent_check(machine, str(tmp_path / "state")) is not None


def test_responses_that_can_not_work_say_what_to_do(machine, monkeypatch):
    from stonechat.linux import netfilter

    def refused() -> str:
        raise OSError(1, "netfilter: not permitted: it needs CAP_NET_ADMIN")

    monkeypatch.setattr(netfilter, "what_works", refused)
    check = _check(machine, "responses")
    assert check.found == "recorded only"
    assert "CAP_NET_ADMIN" in check.fix
