"""How the agent is installed and started: the systemd unit, ambient capabilities, and the job for other kernels."""

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import stonechat.linux
from agent_process import readable_agent
from bpf_support import facts, needs_bpf
from stonechat_tools.proofs import kernels, syscall_tables

UNIT = Path(stonechat.linux.__file__).parent / "stonechat-agent.service"
SYSTEM_PYTHON = "/usr/bin/python3"  # readable by every user, as a venv below a home folder is not


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_well_formed_and_hardened():
    verify = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, timeout=60)
    complaints = [line for line in verify.stderr.splitlines() if "is not executable" not in line]  # not installed here
    assert complaints == []
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", UNIT]  # 2.0 of 10, 10 the worst
    security = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert security.returncode == 0, security.stdout[-2000:]


STARTS = """
import sys
sys.path.insert(0, sys.argv[1])
if len(sys.argv) > 2:
    import ctypes
    code = bytes.fromhex(sys.argv[2])
    class Program(ctypes.Structure):
        _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_char_p)]
    program = Program(len(code) // 8, code)
    assert ctypes.CDLL(None).prctl(22, 2, ctypes.byref(program), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    try: __import__("os").chroot("/")
    except PermissionError: print("filtered", flush=True)
from stonechat.linux import privileges
from stonechat.linux.collector import LinuxCollector
collector = LinuxCollector(use_bpf=True)
print(collector.schema.name, flush=True)
sys.stdin.readline()
privileges.drop()
collector.read([0] * len(collector.schema))
print("dropped", flush=True)
sys.stdin.readline()
"""


def as_the_unit(*arguments: str) -> "subprocess.Popen[bytes]":
    """STARTS with what User=, AmbientCapabilities= and NoNewPrivileges= of the unit make."""
    capabilities = "+bpf,+perfmon,+net_admin"
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    command += [f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}", f"--bounding-set=-all,{capabilities}"]
    return subprocess.Popen(
        [*command, SYSTEM_PYTHON, "-B", "-c", STARTS, str(readable_agent()), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    )


needs_setpriv = pytest.mark.skipif(
    shutil.which("setpriv") is None or not os.path.exists(SYSTEM_PYTHON), reason="setpriv or python3 is missing"
)


@pytest.mark.root
@needs_bpf
@needs_setpriv
def test_it_attaches_with_the_units_ambient_capabilities_and_drops_them():
    """It is never root at all."""
    process = as_the_unit()
    try:
        assert process.stdout.readline() == b"linux-1\n"
        before = facts(process.pid)
        assert before["Uid"].split() == ["65534"] * 4
        assert int(before["CapEff"], 16) == 1 << 39 | 1 << 38 | 1 << 12
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"dropped\n"
        after = facts(process.pid)
        assert [int(after[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == [0, 0, 0, 0]
        assert after["NoNewPrivs"] == "1"
    finally:
        process.kill()
        process.communicate()


def filtered_calls() -> set[str]:
    """The names that the unit's SystemCallFilter= lines allow, as systemd puts them together."""

    def members(word: str) -> set[str]:
        if not word.startswith("@"):
            return {word}
        listed = subprocess.run(["systemd-analyze", "syscall-filter", word], capture_output=True, text=True, timeout=60)
        names = [line.split()[0] for line in listed.stdout.splitlines()[1:] if line.strip() and "#" not in line]
        return set().union(*(members(name) for name in names))

    allowed = members("@default")
    for line in UNIT.read_text().splitlines():
        key, _, words = line.partition("=")
        if key == "SystemCallFilter":
            names = set().union(*(members(word) for word in words.lstrip("~").split()))
            allowed = allowed - names if words.startswith("~") else allowed | names
    return allowed


def seccomp(numbers: set[int]) -> bytes:
    """A classic BPF program: these calls go through, any other gives EPERM (linux/seccomp.h, linux/filter.h)."""
    load, equals, answer = 0x20, 0x15, 0x06
    code = struct.pack("=HBBI", load, 0, 0, 0)
    for number in sorted(numbers):
        code += struct.pack("=HBBI", equals, 0, 1, number) + struct.pack("=HBBI", answer, 0, 0, 0x7FFF0000)
    return code + struct.pack("=HBBI", answer, 0, 0, 0x00050000 | 1)


@pytest.mark.root
@needs_bpf
@needs_setpriv
@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or shutil.which("gcc") is None or os.uname().machine != "x86_64",
    reason="needs systemd-analyze, gcc and an x86_64 machine",
)
def test_the_units_system_call_filter_lets_the_agent_attach_and_drop():
    numbers = syscall_tables.numbers(Path("/"), "x86_64")
    allowed = {numbers[name] for name in filtered_calls() if name in numbers}
    assert numbers["bpf"] in allowed and numbers["setuid"] not in allowed
    process = as_the_unit(seccomp(allowed).hex())
    try:
        assert process.stdout.readline() == b"filtered\n"
        assert process.stdout.readline() == b"linux-1\n"
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"dropped\n"
    finally:
        process.kill()
        process.communicate()


BUSY, IDLE = ({"sys_file": calls, "syn_out": syn, "cpu_time": cpu} for calls, syn, cpu in ((50_100, 40, 9), (0, 0, 0)))
COUNTED = {"calls": 50_200, "write": 3, "syn_out": 40, "rst_in": 40, "peers": 40, "services": [BUSY, IDLE]}
RESPONSE = {
    "free": True,
    "quarantine": [False, True, True],
    "trouble": "",
    "ended_after_s": 2.01,
    "throttled": 123,
    "counts": [123, 378],
    "opened": True,
    "status": [65534, 1 << 12, 1 << 12, 0, 0],
}
RESULT = {"schema": "linux-1", "status": [65534, 0, 0, 0, 0], "root": COUNTED, "dropped": COUNTED, "response": RESPONSE}


def test_the_kernel_job_sees_a_kernel_that_counts_wrong():
    assert kernels.faults(RESULT) == []
    assert len(kernels.faults({**RESULT, "status": [0, 4096, 4096, 0, 0]})) == 1
    assert kernels.faults({"error": "OSError"}) == ["OSError"]
    assert kernels.faults({**RESULT, "schema": "linux-proc-1"}) == ["schema linux-proc-1"]
    assert kernels.faults({**RESULT, "dropped": {**RESULT["dropped"], "syn_out": 39}}) == ["dropped: syn_out 39"]
    assert len(kernels.faults({**RESULT, "root": {**RESULT["root"], "write": 50_003}})) == 1
    assert len(kernels.faults({**RESULT, "root": {**RESULT["root"], "calls": 49_999}})) == 1
    for services in ([IDLE, IDLE], [BUSY, BUSY], [{**BUSY, "syn_out": 39}, IDLE], [{**BUSY, "cpu_time": 0}, IDLE]):
        assert len(kernels.faults({**RESULT, "root": {**COUNTED, "services": services}})) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"quarantine": [True, True, True]},
        {"quarantine": [False, False, True]},
        {"ended_after_s": 60.0},
        {"throttled": 500},
        {"opened": False},
        {"status": [0, 1 << 12, 1 << 12, 0, 0]},
        {"trouble": "gone"},
        {"error": "OSError"},
    ],
)
def test_the_kernel_job_sees_a_response_that_fails(wrong):
    assert len(kernels.faults({**RESULT, "response": {**RESPONSE, **wrong}})) == 1
