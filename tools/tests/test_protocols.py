"""Every class that plays a part has what protocols.pyi says of the part."""

import ast
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stonechat.board import guard, hooks
from stonechat.custom_counters import CounterCollector, counter_schema
from stonechat.features import RATE
from stonechat.int8 import interpreter
from stonechat.lease import Nothing
from stonechat.linux.allow_list import AllowList
from stonechat.linux.collector import LinuxCollector
from stonechat.linux.disk_outbox import DiskOutbox
from stonechat.linux.netfilter import Netfilter
from stonechat.linux.own_client import OwnClient
from stonechat.linux.paho import Paho
from stonechat.linux.proc import ProcCollector
from stonechat.model import load_model
from stonechat.mqtt import Client
from stonechat.outbox import Outbox
from stonechat.outbox_memory import MemoryOutbox
from stonechat.replay import Replay
from stonechat.schema import Schema
from stonechat.state import State
from stonechat_tools.lab.spaces import Space

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/linux-proc-1/model.tflite"
DOORS = counter_schema("doors", (("openings", "1", RATE),))


def parts() -> dict[str, ast.ClassDef]:
    tree = ast.parse((ROOT / "agent/stonechat/protocols.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def members(name: str) -> tuple[set[str], dict[str, list[str]]]:
    """-> the attributes of a part, and its methods with the names of their parameters; those of its bases too."""
    node = parts()[name]
    attributes: set[str] = set()
    methods: dict[str, list[str]] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in parts():
            more = members(base.id)
            attributes |= more[0]
            methods |= more[1]
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            attributes.add(item.target.id)
        elif isinstance(item, ast.FunctionDef):
            methods[item.name] = [argument.arg for argument in item.args.args[1:]]
    return attributes, methods


def tflite_runtime(_: Path) -> Any:
    pytest.importorskip("tflite_runtime")
    from stonechat.linux.tflite_runtime import TfliteRuntime

    return load_model(MODEL.read_bytes(), TfliteRuntime)


def full_reader(_: Path) -> Any:
    data = MODEL.read_bytes()
    return load_model(data, lambda data: interpreter.read(data, "plain"))


def netfilter(_: Path) -> Any:
    """In a network namespace of its own, because its close() takes away the tables of an agent."""
    if os.geteuid():
        pytest.skip("needs root: network namespaces")
    return Space().do(Netfilter, AllowList("127.0.0.1", 1, []))


PLAYERS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("Schema", "Schema", lambda _: DOORS),
    ("Schema", "Columns", lambda _: hooks.FirmwareCollector().schema),
    ("Collector", "CounterCollector", lambda _: CounterCollector(DOORS, lambda: (1,))),
    ("Collector", "Replay", lambda _: Replay(Schema("x", ()), ())),
    ("Collector", "ProcCollector", lambda _: ProcCollector(("lo",))),
    ("PeerCollector", "LinuxCollector", lambda _: LinuxCollector(use_bpf=False)),
    ("PeerCollector", "FirmwareCollector", lambda _: hooks.FirmwareCollector()),
    ("Model", "Network", lambda _: load_model(MODEL.read_bytes())),
    ("Model", "Interpreter", full_reader),
    ("Model", "TfliteRuntime", tflite_runtime),
    ("Outbox", "Outbox", lambda folder: Outbox(str(folder / "box"))),
    ("Outbox", "MemoryOutbox", lambda _: MemoryOutbox()),
    ("Outbox", "DiskOutbox", lambda folder: DiskOutbox(str(folder / "box"))),
    ("Transport", "Client", lambda _: Client("d", "127.0.0.1", 1)),
    ("Transport", "OwnClient", lambda _: OwnClient("d", "127.0.0.1", 1)),
    ("Transport", "Paho", lambda _: Paho("d", "127.0.0.1", 1)),
    ("State", "State", lambda _: State()),
    ("Enforcer", "Nothing", lambda _: Nothing()),
    ("Enforcer", "Guard", lambda _: guard.Guard()),
    ("Enforcer", "Netfilter", netfilter),
]


@pytest.mark.parametrize(
    ("part", "make"), [(part, make) for part, _, make in PLAYERS], ids=[name for _, name, _ in PLAYERS]
)
def test_a_class_has_what_its_part_needs(part: str, make: Callable[[Path], Any], tmp_path: Path) -> None:
    player = make(tmp_path)
    attributes, methods = members(part)
    for name in attributes:
        assert hasattr(player, name), f"{type(player).__name__} has no {name}"
    for name, wanted in methods.items():
        method = getattr(player, name, None)
        assert callable(method), f"{type(player).__name__} has no {name}()"
        taken = list(inspect.signature(method).parameters.values())
        assert [parameter.name for parameter in taken][: len(wanted)] == wanted, name
        assert all(parameter.default is not parameter.empty for parameter in taken[len(wanted) :]), name
    if hasattr(player, "close"):
        player.close()


def test_every_part_is_played() -> None:
    assert {part for part, _, _ in PLAYERS} == {name for name in parts() if name != "Protocol"}
