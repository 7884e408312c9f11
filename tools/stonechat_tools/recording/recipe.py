"""A recipe: a TOML file that says how a reference model is made, from the recording to the card, so that one command
makes it again.

    name = "linux-proc-1"
    version = 1
    summary = "One sentence for the card."
    recordings = "recordings/linux-proc-1"   # folder, from the working directory; recordings are not in the repository

    [record]                        # simulated devices in the laboratory (box.py); leave it out for real recordings
    window_s = 5.0
    windows = 720
    settle_windows = 48             # that pass before them: rarely met peers become known
    collector = "proc"              # or "bpf"
    peers = "remote"                # across a veth pair; "loopback": on the device's own loopback, which is counted
    guests = true                   # each device a guest under User-mode Linux (guest.py); false: in a box (box.py)
    devices = [{name = "sensor-1", kind = "sensor", pace = 4.0, seed = 1}]

    [later]                         # what `stonechat record --recipe FILE --part later` records, for `calibrate`; and
    windows = 400                   # [test], for `evaluate`. Keys that are not here are those of [record]
    devices = [{name = "sensor-11", kind = "sensor", pace = 4.0, seed = 101}]

    [fit]                           # every key of FIT_KEYS, with its default
    learn_windows = 128
"""

import contextlib
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..traces.trace import read_trace

_TOP = {"name": str, "version": int, "summary": str, "recordings": str, "limits": list, "record": dict, "fit": dict}
PARTS = ("later", "test")  # recordings that the model is not made of
_RECORD = {
    "window_s": (int, float),
    "windows": int,
    "settle_windows": int,
    "collector": str,
    "peers": str,
    "guests": bool,
    "devices": list,
}
_DEVICE = {"name": str, "kind": str, "pace": (int, float), "seed": int}
_SHOW_EVERY_S = 10.0
_GRACE_S = 60.0
_CLOSE_S = 30.0


@dataclass
class Recipe:
    path: str
    name: str
    version: int = 1
    summary: str = ""
    recordings: str = ""
    limits: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> "Recipe":
        """The recipe with the recording of this name in place of its own, in a folder beside that. Raises
        ConfigError."""
        table: dict[str, Any] = getattr(self, name)
        if not table:
            raise ConfigError(f"{self.path}: it has no [{name}]")
        return replace(self, record=self.record | table, recordings=f"{self.recordings}-{name}")

    @property
    def folder(self) -> Path:
        """Where the model goes: beside the recipe."""
        return Path(self.path).parent

    def traces(self) -> list[str]:
        """The recordings that there are, in the order of their names."""
        folder = Path(self.recordings)
        found = [*folder.glob("*.csv.gz"), *folder.glob("*.csv"), *folder.glob("*.parquet")]
        return sorted(str(path) for path in found if not path.name.startswith("."))


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Raises ConfigError (FILE: what is wrong) or OSError."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            table = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: not TOML: {error}") from None
    _check(table, _TOP | dict.fromkeys(PARTS, dict), name)
    if not table.get("name") or not table.get("recordings"):
        raise ConfigError(f"{name}: it needs name and recordings")
    record = table.get("record", {})
    _check_record(record, name)
    for part in PARTS:
        if part in table:
            _check_record(record | table[part], name)
    return Recipe(name, **table)


def _check_record(record: Any, name: str) -> None:
    _check(record, _RECORD, f"{name}: [record]")
    for device in record.get("devices", []):
        _check(device, _DEVICE, f"{name}: devices")
        if not device.get("name") or "kind" not in device:
            raise ConfigError(f"{name}: each of devices needs name and kind")
    if record and (not record.get("devices") or record.get("windows", 0) < 1 or record.get("window_s", 0) <= 0):
        raise ConfigError(f"{name}: [record] needs devices, windows and window_s")
    if record.get("collector", "proc") not in ("proc", "bpf") or record.get("peers", "remote") not in (
        "remote",
        "loopback",
    ):
        raise ConfigError(f"{name}: [record] has collector proc or bpf, and peers remote or loopback")
    if record.get("guests") and record.get("collector") == "bpf":
        raise ConfigError(f"{name}: [record] guests have no BPF")


def _check(table: Any, known: dict[str, Any], where: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: want a table, got {table!r}")
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r} (there are {', '.join(known)})")
        if not isinstance(value, known[key]) or isinstance(value, bool) != (known[key] is bool):
            raise ConfigError(f"{where}: {key} is {value!r}")


def record(recipe: Recipe, shown: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Record what is missing of the recipe's devices, all of them side by side -> the traces. shown(windows so far,
    windows wanted). An interrupted recording goes on at the next call. Raises ConfigError or OSError."""
    from ..lab import box
    from .record import terminated_as_interrupt

    wanted = recipe.record
    if not wanted:
        raise ConfigError(f"{recipe.path}: it has no [record]: put recordings into {recipe.recordings}")
    os.makedirs(recipe.recordings, exist_ok=True)
    paths = {
        device["name"]: os.path.join(recipe.recordings, device["name"] + ".csv.gz") for device in wanted["devices"]
    }
    held = {name: _windows(path) for name, path in paths.items()}
    missing = [device for device in wanted["devices"] if held[device["name"]] < wanted["windows"]]
    if not missing:
        return list(paths.values())
    box.need_root()
    left = max(wanted["windows"] - held[device["name"]] for device in missing)
    seconds = (left + wanted.get("settle_windows", 0)) * wanted["window_s"] * 1.2 + _GRACE_S
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminated_as_interrupt())  # so that what is left behind is nothing, either way
        recorders = [_start(stack, recipe, device, paths[device["name"]], seconds) for device in missing]
        for process in recorders:
            stack.callback(_end, process)
        deadline_s = time.monotonic() + seconds
        show_s = 0.0
        while any(process.poll() is None for process in recorders) and time.monotonic() < deadline_s:
            if time.monotonic() >= show_s:
                shown(sum(_windows(path) for path in paths.values()), wanted["windows"] * len(paths))
                show_s = time.monotonic() + _SHOW_EVERY_S
            time.sleep(0.2)
    for device, process in zip(missing, recorders, strict=True):
        said, _ = process.communicate(timeout=30)
        if process.returncode or _windows(paths[device["name"]]) < wanted["windows"]:
            raise ConfigError(
                f"recording {device['name']} ended with status {process.returncode}: {said.strip()[-400:]}"
            )
    return list(paths.values())


def _end(process: "subprocess.Popen[str]") -> None:
    from stonechat_tools.lab.bounds import stopped

    if process.poll() is None:
        stopped(process, _CLOSE_S)  # the recorder closes its file and ends


def _windows(path: str) -> int:
    return len(read_trace(path)) if os.path.exists(path) and os.path.getsize(path) else 0


def _start(
    stack: contextlib.ExitStack, recipe: Recipe, device: dict[str, Any], path: str, seconds: float
) -> "subprocess.Popen[str]":
    from stonechat_tools.lab import benign, netns
    from stonechat_tools.lab.bounds import stopped

    from ..lab import box, guest

    wanted = recipe.record
    remote = wanted.get("peers", "remote") == "remote"
    bpf = wanted.get("collector", "proc") == "bpf"
    pace, seed = device.get("pace", 1), device.get("seed", 7)
    command = [sys.executable, "-m", "stonechat_tools.cli", "record", path, "--resume", "--json"]
    command += ["--window", str(wanted["window_s"]), "--windows", str(wanted["windows"]), "--device", device["name"]]
    command += ["--settle", str(wanted.get("settle_windows", 0)), "--collector", "bpf" if bpf else "proc"]
    command += [] if remote else ["--interfaces", "lo"]
    if wanted.get("guests"):
        hosts = (netns.PEERS, netns.ROUTER) if remote else (None, None)
        workload = benign.command(device["kind"], seconds, *hosts, pace=pace, seed=seed)
        return stack.enter_context(guest.machine(seconds, workload, command))
    device_box = stack.enter_context(box.box(seconds, in_cgroup=bpf))
    peers = (device_box.net.peers, device_box.net.router) if remote else (None, None)
    stack.callback(
        stopped, benign.spawn(device["kind"], seconds, *peers, pace=pace, seed=seed, prefix=device_box.inside)
    )
    return subprocess.Popen(
        [*device_box.watching, *command, *device_box.options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
