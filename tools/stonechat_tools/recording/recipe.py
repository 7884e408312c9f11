"""A recipe: a TOML file that says how a reference model is made, from the recording to the card, so that one command
makes it again.

    name = "linux-proc-1"
    version = 1
    summary = "One sentence for the card."
    recordings = "recordings/linux-proc-1"   # folder, from the working directory; recordings are not in the repository

    [record]                        # simulated devices in the laboratory (box.py); leave it out for real recordings
    window_s = 5.0
    windows = 720
    warmup_windows = 48             # that pass before them: rarely met peers become known
    collector = "proc"              # or "bpf"
    peers = "remote"                # across a veth pair; "loopback": on the device's own loopback, which is counted
    guests = true                   # each device a guest under User-mode Linux (guest.py); false: in a box (box.py)
    devices = [{name = "sensor-1", kind = "sensor", pace = 4.0, seed = 1}]   # kind "services": a host of eight

    [later]                         # what `stonechat record --recipe FILE --part later` records, for `calibrate`; and
    windows = 400                   # [test], for `evaluate`. Keys that are not here are those of [record]
    devices = [{name = "sensor-11", kind = "sensor", pace = 4.0, seed = 101}]

    [fit]                           # every key of FIT_KEYS, with its default
    learn_windows = 128
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stonechat.errors import ConfigError

from ..console import clipped, read_toml

_TOP = {"name": str, "version": int, "summary": str, "recordings": str, "limits": list, "record": dict, "fit": dict}
HOST = "services"  # the kind of a device that is a host of eight services, recorded a trace each
PARTS = ("later", "test")  # recordings that the model is not made of
_RECORD = {
    "window_s": (int, float),
    "windows": int,
    "warmup_windows": int,
    "collector": str,
    "peers": str,
    "guests": bool,
    "devices": list,
}
_DEVICE = {"name": str, "kind": str, "pace": (int, float), "seed": int}


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
        return sorted(str(path) for path in found if self.names(path.name))

    def names(self, file: str) -> bool:
        """Whether a file of the folder is a recording of this recipe: of one of its devices, where it has some."""
        devices = self.record.get("devices", [])
        stem = file.split(".")[0]
        return not file.startswith(".") and (
            not devices
            or any(
                stem.startswith(device["name"] + "-") if device["kind"] == HOST else stem == device["name"]
                for device in devices
            )
        )


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Raises ConfigError (FILE: what is wrong) or OSError."""
    name = os.fspath(path)
    table = read_toml(name)
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
    if any(device["kind"] == HOST for device in record.get("devices", [])) and record.get("collector") != "bpf":
        raise ConfigError(f'{name}: [record] devices of kind {HOST} need collector = "bpf"')
    if record.get("guests") and record.get("collector") == "bpf":
        raise ConfigError(f"{name}: [record] guests have no BPF")


def _check(table: Any, known: dict[str, Any], where: str) -> None:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: want a table, got {clipped(table)}")
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {clipped(key)} (there are {', '.join(known)})")
        if not isinstance(value, known[key]) or isinstance(value, bool) != (known[key] is bool):
            raise ConfigError(f"{where}: {key} is {clipped(value)}")
