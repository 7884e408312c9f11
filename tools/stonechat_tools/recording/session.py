"""A recording session: the simulated devices of a recipe side by side, each in a box or a guest of the laboratory."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from stonechat.errors import ConfigError

from ..lab import benign, box, guest, netns, services
from ..lab.bounds import stopped
from ..traces.format import whole_lines
from .recipe import HOST, Recipe

_SHOW_EVERY_S = 10.0
_GRACE_S = 60.0
_CLOSE_S = 30.0


def record(recipe: Recipe, shown: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Record what is missing of the recipe's devices, all of them side by side -> the traces. shown(windows so far,
    windows wanted). An interrupted recording goes on at the next call. Raises ConfigError or OSError."""
    wanted = recipe.record
    if not wanted:
        raise ConfigError(f"{recipe.path}: it has no [record]: put recordings into {recipe.recordings}")
    os.makedirs(recipe.recordings, exist_ok=True)
    paths = {device["name"]: _paths(recipe, device) for device in wanted["devices"]}
    held = {name: _held(files) for name, files in paths.items()}
    missing = [device for device in wanted["devices"] if held[device["name"]] < wanted["windows"]]
    if not missing:
        return sum(paths.values(), [])
    box.need_root()
    left = max(wanted["windows"] - held[device["name"]] for device in missing)
    seconds = (left + wanted.get("warmup_windows", 0)) * wanted["window_s"] * 1.2 + _GRACE_S
    with contextlib.ExitStack() as stack:
        recorders = [_start(stack, recipe, device, seconds) for device in missing]
        for process in recorders:
            stack.callback(_end, process)
        deadline_s = time.monotonic() + seconds
        show_s = 0.0
        while any(process.poll() is None for process in recorders) and time.monotonic() < deadline_s:
            if time.monotonic() >= show_s:
                shown(sum(_held(files) for files in paths.values()), wanted["windows"] * len(paths))
                show_s = time.monotonic() + _SHOW_EVERY_S
            time.sleep(0.2)
    for device, process in zip(missing, recorders, strict=True):
        said, _ = process.communicate(timeout=30)
        if process.returncode or _held(paths[device["name"]]) < wanted["windows"]:
            raise ConfigError(
                f"recording {device['name']} ended with status {process.returncode}: {said.strip()[-400:]}"
            )
    return sum(paths.values(), [])


def _paths(recipe: Recipe, device: dict[str, Any]) -> list[str]:
    """A device's traces: one, or one for each service of a host."""
    names = [f"{device['name']}-{name}" for name in services.NAMES] if device["kind"] == HOST else [device["name"]]
    return [os.path.join(recipe.recordings, name + ".csv.gz") for name in names]


def _held(files: list[str]) -> int:
    return min(_windows(path) for path in files)


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        stopped(process, _CLOSE_S)  # the recorder closes its file and ends


def _windows(path: str) -> int:
    """How many windows a recording holds so far."""
    if not os.path.exists(path):
        return 0
    return max(0, sum(not line.startswith("#") for line in whole_lines(path)) - 1)


def _start(
    stack: contextlib.ExitStack, recipe: Recipe, device: dict[str, Any], seconds: float
) -> "subprocess.Popen[str]":
    wanted = recipe.record
    remote = wanted.get("peers", "remote") == "remote"
    bpf = wanted.get("collector", "proc") == "bpf"
    pace, seed = device.get("pace", 1), device.get("seed", 7)
    path = recipe.recordings if device["kind"] == HOST else _paths(recipe, device)[0]
    command = [sys.executable, "-m", "stonechat_tools.cli", "record", path, "--resume", "--json"]
    command += ["--window", str(wanted["window_s"]), "--windows", str(wanted["windows"]), "--device", device["name"]]
    command += ["--warm-up", str(wanted.get("warmup_windows", 0)), "--collector", "bpf" if bpf else "proc"]
    command += [] if remote else ["--interfaces", "lo"]
    if device["kind"] == HOST:
        host = stack.enter_context(services.host(seconds, pace, seed))
        return _recorder([*host.watching, *command, "--services", ",".join(host.cgroups.values())])
    if wanted.get("guests"):
        hosts = (netns.PEERS, netns.ROUTER) if remote else (None, None)
        workload = benign.command(device["kind"], seconds, *hosts, pace=pace, seed=seed)
        return stack.enter_context(guest.machine(seconds, workload, command))
    device_box = stack.enter_context(box.box(seconds, in_cgroup=bpf))
    peers = (device_box.net.peers, device_box.net.router) if remote else (None, None)
    stack.callback(
        stopped, benign.spawn(device["kind"], seconds, *peers, pace=pace, seed=seed, prefix=device_box.inside)
    )
    return _recorder([*device_box.watching, *command, *device_box.options])


def _recorder(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
