"""What of the BPF side needs no kernel: the assembler, the arithmetic on what was counted, the class tables."""

# ruff: noqa: F811 - fixtures

import random
from pathlib import Path

import pytest
from bpf_support import needs_bpf, root
from stonechat.errors import CollectorError
from stonechat.linux import (
    bpf,
    syscalls,
)
from stonechat.linux.connections import distinct, packed_address
from stonechat.linux.syscall_classes import CLASSES, TABLES


def test_encodes_as_the_instruction_set_says():
    p = bpf.Program()
    p.load(8, bpf.R2, bpf.R1, 8)
    p.jump("gt", bpf.R2, 511, "out")
    p.constant(bpf.R3, 0x1_8000_0001)
    p.atomic_add(bpf.R4, 16, bpf.R5)
    p.label("out")
    p.move(bpf.R0, -1)
    p.exit()
    assert p.code().hex() == (
        "7912080000000000"  # r2 = *(u64 *)(r1 + 8)
        "25020300ff010000"  # if r2 > 511 goto +3
        "18030000010000800000000001000000"  # r3 = 0x180000001 ll
        "db54100000000000"  # lock *(u64 *)(r4 + 16) += r5
        "b7000000ffffffff"  # r0 = -1
        "9500000000000000"  # exit
    )


def test_a_label_that_stands_nowhere_or_twice_is_an_error():
    p = bpf.Program()
    p.goto("nowhere")
    with pytest.raises(CollectorError, match="no label nowhere"):
        p.code()
    p.label("twice")
    with pytest.raises(CollectorError, match="twice"):
        p.label("twice")


@root
@needs_bpf
def test_the_verifiers_reason_stands_in_the_message():
    p = bpf.Program()
    p.load(8, bpf.R0, bpf.R3)
    p.exit()
    with pytest.raises(CollectorError, match="verifier refused bad: .*R3 !read_ok"):
        bpf.load_program(bpf.PROG_RAW_TRACEPOINT, p, "bad")


@pytest.mark.parametrize("items", [0, 1, 7, 300, 2_000, 10_000, 50_000, 100_000])
def test_distinct_estimates_within_five_percent(items):
    bits, chance = bytearray(2048), random.Random(items)
    for _ in range(items):
        bit = chance.randrange(16_384)
        bits[bit >> 3] |= 1 << (bit & 7)
    assert abs(distinct(bits) - items) <= max(1, items // 20)


def test_distinct_is_bounded_when_all_bits_are_set():
    assert distinct(b"\xff" * 2048) == pytest.approx(159_000, rel=0.01)


def test_entropy_share():
    assert syscalls.entropy_share_q8([0] * 16) == 0
    assert syscalls.entropy_share_q8([0] * 15 + [9]) == 0
    assert syscalls.entropy_share_q8([1000] * 16) == 25600
    assert abs(syscalls.entropy_share_q8([500, 500] + [0] * 14) - 6400) < 64


def test_addresses_pack_into_sixteen_bytes():
    assert packed_address("192.0.2.1").hex() == "00000000000000000000ffffc0000201"
    assert packed_address("2001:db8::1").hex() == "20010db8000000000000000000000001"
    with pytest.raises(OSError):
        packed_address("192.0.2")


@pytest.mark.parametrize(
    ("abi", "call", "number", "group"),
    [
        ("x86_64", "getppid", 110, "info"),
        ("i386", "getppid", 64, "info"),
        ("aarch64", "getppid", 173, "info"),
        ("armhf", "getppid", 64, "info"),
        ("aarch64", "write", 64, "write"),
        ("x86_64", "unlinkat", 263, "fmod"),
        ("armhf", "execve", 11, "proc"),
        ("aarch64", "bpf", 280, "priv"),
        ("i386", "cachestat", 451, "fmeta"),
    ],
)
def test_class_tables(abi, call, number, group):
    assert CLASSES[int(TABLES[abi][number], 16)] == group, call


def test_class_tables_are_what_the_kernels_headers_give():
    from stonechat_tools.proofs import syscall_tables

    if not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists():
        pytest.skip("no linux-libc-dev for x86_64 here")
    try:
        calls = {abi: syscall_tables.numbers(Path("/"), abi) for abi in ("x86_64", "i386")}
    except FileNotFoundError:
        pytest.skip("no gcc here")
    for abi, numbers in calls.items():
        assert syscall_tables.table(numbers) == TABLES[abi], abi
    assert syscall_tables.CLASSES == CLASSES
