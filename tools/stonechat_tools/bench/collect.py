"""What collecting costs: CPU a sample against the number of sockets, memory, and what BPF adds to the kernel's work.

psutil, and bpftrace where it is installed, do the same job beside it, turn by turn. Every subject is a process of its
own with a fresh interpreter. Figures are the best of many, because a shared machine only ever adds; ratios carry
further than times.

Examples:
  stonechat bench collect
  stonechat bench collect --sockets 10 100 --json collect.json
"""

import argparse
import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stonechat
from stonechat.errors import ConfigError

HELP = "the collectors: CPU per sample, memory, overhead in the kernel, beside psutil and bpftrace"
SOCKETS = [10, 1_000, 10_000]
ROUNDS = 8
SAMPLES_A_ROUND = 25
WINDOW_S = 5
_SPARE_FDS = 64
_ANSWER_WITHIN_S = 120
AGENT = str(Path(stonechat.__file__).resolve().parent.parent)
PROC, BPF, PSUTIL, PSUTIL_COUNTERS = "stonechat", "stonechat with BPF", "psutil", "psutil, counters only"

# Each subject defines sample(); the loop below it serves "round" requests.
_STONECHAT = """
from stonechat.linux.collector import LinuxCollector
collector = LinuxCollector(use_bpf=%s)
values = [0] * len(collector.schema)
def sample(): collector.read(values)
"""
_PSUTIL = """
import psutil
def sample():
    psutil.cpu_times(); psutil.cpu_stats(); psutil.virtual_memory(); psutil.swap_memory()
    psutil.net_io_counters(pernic=True); psutil.disk_io_counters(); psutil.getloadavg()
"""
_PSUTIL_CONNECTIONS = """
    states = [one.status for one in psutil.net_connections(kind="inet")]
    states.count("ESTABLISHED"); states.count("LISTEN")
"""
_SERVE = """
import sys, time
def serve():
    best = total = 0
    sample(); sample()
    while True:
        text = sys.stdin.readline()
        if not text:
            return
        best, total, n = 1 << 62, 0, int(text)
        for _ in range(n):
            began = time.process_time_ns()
            sample()
            spent = time.process_time_ns() - began
            best, total = min(best, spent), total + spent
        rss = int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
        print(best, total, rss, flush=True)
serve()
"""
SUBJECTS = {
    PROC: _STONECHAT % False,
    BPF: _STONECHAT % True,
    PSUTIL: _PSUTIL + _PSUTIL_CONNECTIONS,
    PSUTIL_COUNTERS: _PSUTIL,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sockets", type=int, nargs="+", default=SOCKETS, metavar="N", help="numbers of open TCP sockets (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each subject (default %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=20, help="turns with and without channels of services (default %(default)s)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    for name, given, least in (("sockets", min(args.sockets), 0), ("rounds", args.rounds, 1), ("turns", args.turns, 1)):
        if given < least:
            raise ConfigError(f"--{name} {given}: want at least {least}")
    figures: dict[str, Any] = {"sockets": {}, "left_out": {}}
    for n_sockets in args.sockets:
        with held_sockets(n_sockets) as opened:
            costs = compare(figures["left_out"], args.rounds)
        figures["sockets"][str(opened)] = costs
    figures["interpreter_rss_kib"] = interpreter_rss_kib()
    figures["kernel"] = _kernel_overhead(figures["left_out"])
    figures["services"] = _services(figures["left_out"], args.turns)
    figures["bpftrace"] = _bpftrace(figures["left_out"])
    figures["ratios"] = _ratios(figures)
    show(figures)
    return figures


class Subject:
    """One way of collecting, in a process of its own. Raises OSError with its last words when it does not start."""

    def __init__(self, code: str) -> None:
        self.best_ns = 1 << 62
        self.total_ns = self.samples = self.rss_kib = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", code + _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": AGENT},
        )
        try:
            self.round(1)
        except OSError:
            self.close()
            raise
        self.best_ns, self.total_ns, self.samples = 1 << 62, 0, 0

    def round(self, samples: int) -> None:
        process = self._process
        if process.stdin and process.stdout:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{samples}\n")
                process.stdin.flush()
            fields = process.stdout.readline().split()
            if len(fields) == 3:
                best_ns, total_ns, self.rss_kib = map(int, fields)
                self.best_ns = min(self.best_ns, best_ns)
                self.total_ns += total_ns
                self.samples += samples
                return
        errors = process.communicate(timeout=_ANSWER_WITHIN_S)[1].strip().splitlines()
        raise OSError(errors[-1] if errors else f"status {process.returncode}")

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._process.communicate(timeout=_ANSWER_WITHIN_S)


def compare(left_out: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Every subject that starts, turn by turn -> {subject: {best_us, mean_us, rss_kib}}; `left_out` learns the
    reasons of the others."""
    running: dict[str, Subject] = {}
    try:
        for name, code in SUBJECTS.items():
            try:
                running[name] = Subject(code)
            except OSError as error:
                left_out[name] = str(error)
        for _ in range(rounds):
            for subject in running.values():
                subject.round(SAMPLES_A_ROUND)
    finally:
        for subject in running.values():
            subject.close()
    return {
        name: {
            "best_us": round(one.best_ns / 1000, 1),
            "mean_us": round(one.total_ns / one.samples / 1000, 1),
            "rss_kib": one.rss_kib,
        }
        for name, one in running.items()
    }


@contextlib.contextmanager
def held_sockets(n: int) -> Iterator[int]:
    """While inside, children hold `n` connected TCP sockets on loopback, each as many as its limit on files allows
    -> how many there really are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    each = max(2, min(n, (20_000 if hard == resource.RLIM_INFINITY else hard) - _SPARE_FDS))
    holders: list[subprocess.Popen[str]] = []
    opened = 0
    try:
        while opened < n:
            command = [sys.executable, "-m", __name__, str(min(each, n - opened))]
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            holders.append(holder)
            got = int((holder.stdout.readline() if holder.stdout else "") or 0)
            if not got:
                break
            opened += got
        yield opened
    finally:
        for holder in holders:
            holder.communicate(timeout=_ANSWER_WITHIN_S)


def hold(n: int) -> None:
    """Open `n` sockets, say how many, hold them until stdin ends."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server, contextlib.suppress(OSError):
        while len(sockets) + 2 <= n:
            sockets.append(socket.create_connection(server.getsockname()))
            sockets.append(server.accept()[0])
    print(len(sockets), flush=True)
    sys.stdin.read()
    for sock in sockets:  # a reset leaves no TIME_WAIT behind for the next measurement
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        sock.close()


def interpreter_rss_kib() -> int:
    """What a bare interpreter of this kind takes, before any import."""
    code = "print(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return int(ran.stdout)


def _kernel_overhead(left_out: dict[str, str]) -> dict[str, Any] | None:
    from stonechat.errors import CollectorError

    from stonechat_tools.bench import bpf

    try:
        return bpf.measure()
    except (CollectorError, OSError) as error:
        left_out["overhead in the kernel"] = str(error)
        return None


def _services(left_out: dict[str, str], turns: int) -> dict[str, Any] | None:
    from stonechat.errors import StonechatError

    from stonechat_tools.bench import services

    try:
        return services.measure(turns)
    except (StonechatError, OSError) as error:
        left_out["services"] = str(error)
        return None


def _bpftrace(left_out: dict[str, str]) -> dict[str, float] | None:
    """bpftrace counting system calls by number: its memory, its start, and what it adds to a call."""
    from stonechat_tools.bench import bpf

    if not shutil.which("bpftrace"):
        left_out["bpftrace"] = "not installed (apt-get install bpftrace)"
        return None
    try:
        probe = _Bpftrace()
        figures: dict[str, float] = {"rss_kib": probe.rss_kib(), "start_s": round(probe.start_s, 2)}
        probe.close()
        return figures | bpf.added_ns(bpf.syscalls, bpf.SYSCALLS_A_SLICE, _Bpftrace, 3)
    except OSError as error:
        left_out["bpftrace"] = str(error)
        return None


class _Bpftrace:
    def __init__(self) -> None:
        script = 'BEGIN { printf("up\\n"); } tracepoint:raw_syscalls:sys_enter { @[args->id] = count(); }'
        began_s = time.monotonic()
        self._process = subprocess.Popen(
            ["bpftrace", "-e", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while self._process.stdout:
            line = self._process.stdout.readline()
            if line.strip() == "up":
                break
            if not line:
                errors = [text for text in self._process.communicate()[1].splitlines() if "ERROR" in text]
                raise OSError((errors or ["it ended"])[-1] + " (it needs root and tracefs on /sys/kernel/tracing)")
        self.start_s = time.monotonic() - began_s

    def rss_kib(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def close(self) -> None:
        self._process.kill()  # what it attached goes with its files
        self._process.communicate(timeout=30)


def _ratios(figures: dict[str, Any]) -> dict[str, float]:
    ratios = {}
    for n_sockets, costs in figures["sockets"].items():
        for other in (PSUTIL, PSUTIL_COUNTERS):
            for name in (PROC, BPF):
                if name in costs and other in costs:
                    key = f"CPU of {other} / {name}, {n_sockets} sockets"
                    ratios[key] = round(costs[other]["best_us"] / costs[name]["best_us"], 1)
    kernel, bpftrace = figures["kernel"], figures["bpftrace"]
    if kernel and bpftrace and kernel["syscall"]["added_ns"] > 0:
        ratios["ns added to a system call by bpftrace / stonechat"] = round(
            bpftrace["added_ns"] / kernel["syscall"]["added_ns"], 1
        )
    return ratios


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for text, ratio in figures["ratios"].items():
        console.print(f"{text}: [bold]{ratio}[/bold]")
    table = Table("sockets", "who", "CPU, best", "mean", f"of a core at {WINDOW_S} s", "RSS", title="a sample")
    table.columns[1].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for n_sockets, costs in figures["sockets"].items():
        for name, cost in costs.items():
            share = cost["mean_us"] / (WINDOW_S * 1e6)
            row = (f"{cost['best_us']:.0f} µs", f"{cost['mean_us']:.0f} µs", f"{share:.4%}")
            table.add_row(n_sockets, name, *row, f"{cost['rss_kib'] / 1024:.1f} MB")
    console.print(table)
    console.print(f"a bare interpreter: {figures['interpreter_rss_kib'] / 1024:.1f} MB")
    for what, row in (figures["kernel"] or {}).items():
        console.print(f"BPF adds {row['added_ns']:.0f} ns to a {what} of {row['base_ns']:.0f} ns")
    if services := figures["services"]:
        call, window = services["syscall"], services["window"]
        console.print(
            f"{services['services']} services add {call['added_ns']:.1f} ns to a syscall ({call['none_ns']:.1f} ns, "
            f"{call['empty_ns']:.1f} with an empty program, {call['today_ns']:.1f} without services, "
            f"{call['services_ns']:.1f} with) and {window['added_us']:.0f} µs to a window ({window['today_us']:.0f} µs "
            f"without); medians of {services['turns']} turns"
        )
    if bpftrace := figures["bpftrace"]:
        console.print(
            f"bpftrace adds {bpftrace['added_ns']:.0f} ns to a syscall, takes {bpftrace['rss_kib'] / 1024:.0f} MB "
            f"and {bpftrace['start_s']:.1f} s to start"
        )
    for name, reason in figures["left_out"].items():
        console.print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    hold(int(sys.argv[1]))
