"""A recording session: the simulated devices of a recipe side by side, each in a box or a guest of the laboratory."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from stonechat.errors import ConfigError

from ..lab import benign, box, guest, netns
from ..lab.bounds import stopped
from ..traces.format import whole_lines
from .recipe import Recipe

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
    paths = {
        device["name"]: os.path.join(recipe.recordings, device["name"] + ".csv.gz") for device in wanted["devices"]
    }
    held = {name: _windows(path) for name, path in paths.items()}
    missing = [device for device in wanted["devices"] if held[device["name"]] < wanted["windows"]]
    if not missing:
        return list(paths.values())
    box.need_root()
    left = max(wanted["windows"] - held[device["name"]] for device in missing)
    seconds = (left + wanted.get("warmup_windows", 0)) * wanted["window_s"] * 1.2 + _GRACE_S
    with contextlib.ExitStack() as stack:
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
    if process.poll() is None:
        stopped(process, _CLOSE_S)  # the recorder closes its file and ends


def _windows(path: str) -> int:
    """How many windows a recording holds so far."""
    if not os.path.exists(path):
        return 0
    return max(0, sum(not line.startswith("#") for line in whole_lines(path)) - 1)


def _start(
    stack: contextlib.ExitStack, recipe: Recipe, device: dict[str, Any], path: str, seconds: float
) -> "subprocess.Popen[str]":
    wanted = recipe.record
    remote = wanted.get("peers", "remote") == "remote"
    bpf = wanted.get("collector", "proc") == "bpf"
    pace, seed = device.get("pace", 1), device.get("seed", 7)
    command = [sys.executable, "-m", "stonechat_tools.cli", "record", path, "--resume", "--json"]
    command += ["--window", str(wanted["window_s"]), "--windows", str(wanted["windows"]), "--device", device["name"]]
    command += ["--warm-up", str(wanted.get("warmup_windows", 0)), "--collector", "bpf" if bpf else "proc"]
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
