"""Who may import whom. The order is the design's: a room imports rooms of lower storeys, drivers not one another."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

AGENT = Path(__file__).resolve().parents[2] / "agent" / "stonechat"
TOOLS = Path(__file__).resolve().parents[2] / "tools" / "stonechat_tools"

# storey of each room of the core; a new room must be given one
STOREYS = [
    ["compat", "compat_cpython", "errors"],
    ["cbor", "cbor_decode", "int8/requantize", "int8/operator_names", "int8/viper", "int8/plain"],
    ["cbor_maps", "features", "state", "int8/network", "metadata"],
    ["window", "schema", "int8/tflite", "cose", "adaptation"],
    ["int8/operators", "detection"],
    ["int8/interpreter", "custom_counters"],
    ["model"],
    ["model_file", "scorer", "outbox", "outbox_memory", "mqtt"],
    ["report", "replay"],
    ["delivery", "loop"],
    ["agent"],
]
STOREY = {room: height for height, rooms in enumerate(STOREYS) for room in rooms}
DRIVERS = len(STOREYS) - 2  # linux/* and board/* stand beside report and outbox, below the agent
ABOVE_THE_AGENT = {"linux/daemon", "linux/cli", "board/full", "board/core", "board/device"}
# what a wing may take from pip, and where
PIP = {"linux/paho": {"paho"}, "linux/tflite_runtime": {"tflite_runtime", "numpy", "ai_edge_litert"}}
FOREIGN = {"numpy", "paho", "tflite_runtime", "ai_edge_litert", "stonechat_tools", "cbor2", "rich", "flatbuffers"}


def rooms() -> list[str]:
    return sorted(str(path.relative_to(AGENT).with_suffix("")) for path in AGENT.rglob("*.py"))


def imports(room: str) -> set[str]:
    """Modules that `room` imports: rooms of the agent as `wing/name`, others by their top name."""
    found = set()
    wing = Path(room).parent
    for node in ast.walk(ast.parse((AGENT / (room + ".py")).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = wing if node.level == 1 else wing.parent
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {str(base / name.replace(".", "/")) for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def storey(room: str) -> int:
    if room in ABOVE_THE_AGENT:
        return len(STOREYS)
    return STOREY.get(room, DRIVERS)


@pytest.mark.parametrize("room", [room for room in rooms() if not room.endswith("__init__")])
def test_imports_go_down(room: str) -> None:
    own = set(rooms())
    for other in imports(room):
        if other in own:
            same_wing = room not in STOREY and "/" in room and Path(other).parent == Path(room).parent
            assert storey(other) < storey(room) or same_wing or (room == "compat" and other == "compat_cpython"), (
                f"{room} imports {other}"
            )
            assert other in STOREY or same_wing, f"{room} reaches into another wing: {other}"
        else:
            assert other not in FOREIGN - PIP.get(room, set()), f"{room} imports {other}"


def test_importing_any_tool_prints_nothing() -> None:
    for path in TOOLS.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            call = node.value if isinstance(node, ast.Expr) else None
            assert not isinstance(call, ast.Call), f"{path.name}:{node.lineno} runs at import"


def test_the_tools_start_where_there_is_no_boot_clock() -> None:
    code = "import time; del time.CLOCK_BOOTTIME; from stonechat.compat import ticks_ms; print(ticks_ms() > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\n", done.stderr
