"""Privileges after attaching, and what a killed collector leaves: nothing."""

import ctypes
import os
import signal
import struct
import subprocess

import netns
import pytest
from bpf_support import ROOT, facts, links, needs_bpf, root
from stonechat.errors import ConfigError
from stonechat.linux import (
    bpf,
    privileges,
)

DROPS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from stonechat.linux import privileges
from stonechat.linux.collector import LinuxCollector
collector = LinuxCollector(use_bpf=True)
values = [0] * len(collector.schema)
privileges.drop("nobody", keep_net_admin=sys.argv[2] == "keep")
collector.read(values)
before = values[:]
print("dropped", flush=True)
sys.stdin.readline()
collector.read(values)
calls = [column[0] for column in collector.schema.columns].index("sys_rate")
print(values[calls] > before[calls], flush=True)
try: os.setuid(0)
except PermissionError: print("no way back", flush=True)
sys.stdin.readline()
"""


@root
@needs_bpf
@pytest.mark.parametrize(("how", "kept"), [("all", 0), ("keep", 1 << 12)])
def test_after_attaching_every_privilege_is_gone_and_counting_goes_on(how, kept):
    process = netns.start(DROPS, str(ROOT / "agent"), how)
    try:
        assert process.stdout.readline() == b"dropped\n"
        status = facts(process.pid)
        assert status["Uid"] == "65534 65534 65534 65534"
        assert status["Gid"] == "65534 65534 65534 65534"
        assert status["Groups"] == ""
        assert status["NoNewPrivs"] == "1"
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[name], 16) == kept, name
        for name in ("CapInh", "CapAmb"):
            assert int(status[name], 16) == 0, name
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"True\n"
        assert process.stdout.readline() == b"no way back\n"
    finally:
        process.kill()
        process.communicate()


def test_root_and_unknown_users_are_refused():
    with pytest.raises(ConfigError, match="root"):
        privileges.user_ids("root")
    with pytest.raises(ConfigError, match="useradd --system"):
        privileges.user_ids("no-such-user-here")
    assert privileges.user_ids("nobody")[0] > 0


PROG_GET_FD_BY_ID, MAP_GET_FD_BY_ID, GET_INFO_BY_FD = 13, 14, 15


def maps_of(program_id: int) -> list[int]:
    """The ids of the maps that a program uses (struct bpf_prog_info, linux/bpf.h)."""
    fd = bpf._bpf(PROG_GET_FD_BY_ID, struct.pack("=3I", program_id, 0, 0))
    ids = (ctypes.c_uint32 * 8)()
    info = ctypes.create_string_buffer(bytes(52) + struct.pack("=IQ", 8, ctypes.addressof(ids)) + bytes(160))
    try:
        bpf._bpf(GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))
    finally:
        os.close(fd)
    return list(ids[: struct.unpack_from("=I", info.raw, 52)[0]])


def exists(command: int, identity: int) -> bool:
    try:
        os.close(bpf._bpf(command, struct.pack("=3I", identity, 0, 0)))
    except FileNotFoundError:
        return False
    return True


@root
@needs_bpf
def test_sigkill_leaves_no_program_and_no_map():
    process = netns.start(DROPS, str(ROOT / "agent"), "all")
    try:
        assert process.stdout.readline() == b"dropped\n"
        programs = links(process.pid)
        maps = {identity for program in programs for identity in maps_of(program)}
        assert len(programs) == 6  # sys_enter, exec, fork, exit, both directions
        assert len(maps) == 2
        assert all(exists(PROG_GET_FD_BY_ID, program) for program in programs)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    # The kernel frees what nobody holds once its readers are through (RCU), shortly after the process is gone.
    subprocess.run(["sync"], check=True, timeout=60)
    for _ in range(200):
        left = [p for p in programs if exists(PROG_GET_FD_BY_ID, p)] + [m for m in maps if exists(MAP_GET_FD_BY_ID, m)]
        if not left:
            break
        signal.sigtimedwait([], 0.05)
    assert left == []
