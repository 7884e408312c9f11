"""Who may import whom: modules import only from below, in the agent and in the tools, and no circle is anywhere."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "agent" / "stonechat"
TOOLS = ROOT / "tools" / "stonechat_tools"

# Height of each module of the agent's core; a new module must be given one.
LEVELS = [
    ["compat", "compat_cpython", "errors"],
    ["cbor", "cbor_decode", "int8/requantize", "int8/operator_names", "int8/viper", "int8/plain", "lms", "slh_dsa"],
    ["features", "state", "int8/network", "metadata", "policy"],
    ["window", "schema", "int8/tflite", "cose", "adaptation", "own_model_fit", "lease"],
    ["int8/operators", "detection", "cose_open", "budget"],
    ["int8/interpreter", "custom_counters", "lasting_peers", "commands", "manifest", "slots"],
    ["model", "update", "response"],
    ["model_file", "scorer", "updater", "outbox", "outbox_memory", "mqtt"],
    ["report", "replay", "own_model_file"],
    ["delivery", "loop", "own_model_training"],
    ["steady"],
    ["fusion", "own_model"],
    ["agent"],
]
LEVEL = {module: height for height, modules in enumerate(LEVELS) for module in modules}
DRIVERS = len(LEVELS) - 3  # linux/* and board/* are at the height of report and outbox, below the agent
ABOVE_THE_AGENT = {"linux/daemon", "linux/channels", "linux/cli", "board/full", "board/core", "board/device"}
# what a module may take from pip
PIP = {"linux/paho": {"paho"}, "linux/tflite_runtime": {"tflite_runtime", "numpy", "ai_edge_litert"}}
FOREIGN = {"numpy", "paho", "tflite_runtime", "ai_edge_litert", "stonechat_tools", "cbor2", "rich", "flatbuffers"}

# Height of each wing of the tools; of the modules beside the wings, those that are not named are at the top.
WINGS = [
    ["schemas", "console"],
    ["screen"],
    ["board_files"],
    ["traces", "lab", "fleet", "device"],
    ["recording", "release"],
    ["modeling", "dashboard"],
    ["evaluation", "proofs"],
    ["bench"],
    ["cli", "demo", "simulate"],
]
WING_HEIGHT = {wing: height for height, wings in enumerate(WINGS) for wing in wings}
# what must run where nothing from pip is installed: no import of pip's at the top, in it or in what it imports
WITHOUT_PIP = ["traces/format", "device/doctor", "device/top", "recording/record", "recording/recipe", "cli"]


@cache
def modules(package: Path) -> list[str]:
    return sorted(str(path.relative_to(package).with_suffix("")) for path in package.rglob("*.py"))


@cache
def imports(package: Path, module: str) -> frozenset[str]:
    """What `module` imports, also within functions: modules of its package as `wing/name`, others by their top name."""
    own = set(modules(package))
    tree = ast.parse((package / (module + ".py")).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            words = node.module.split(".") if node.module else []
            if node.level:
                parts = module.split("/")
                words = [*parts[: len(parts) - node.level], *words]
            elif words[0] == package.name:
                words = words[1:]
            else:
                found.add(words[0])
                continue
            for alias in node.names:
                below = "/".join([*words, alias.name])
                found.add(below if below in own else "/".join(words))
    return frozenset(found)


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import one another (Tarjan's strongly connected components)."""
    own = set(modules(package))
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports(package, module) & own - {module}):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(group)

    for module in sorted(own):
        if module not in index:
            visit(module)
    return found


def level(module: str) -> int:
    if module in ABOVE_THE_AGENT:
        return len(LEVELS)
    return LEVEL.get(module, DRIVERS)


def named(package: Path) -> list[str]:
    return [module for module in modules(package) if not module.endswith("__init__")]


@pytest.mark.parametrize("module", named(AGENT))
def test_the_agent_imports_from_below(module: str) -> None:
    own = set(modules(AGENT))
    for other in imports(AGENT, module):
        if other in own:
            same_wing = module not in LEVEL and "/" in module and Path(other).parent == Path(module).parent
            assert level(other) < level(module) or same_wing or (module == "compat" and other == "compat_cpython"), (
                f"{module} imports {other}"
            )
            assert other in LEVEL or same_wing, f"{module} imports from another wing: {other}"
        else:
            assert other not in FOREIGN - PIP.get(module, set()), f"{module} imports {other}"


def test_every_level_names_modules_that_exist() -> None:
    assert not set(LEVEL) - set(modules(AGENT))


@pytest.mark.parametrize("module", named(TOOLS))
def test_the_tools_import_from_below(module: str) -> None:
    own = set(modules(TOOLS))
    wing = module.split("/")[0]
    assert wing in WING_HEIGHT, f"{wing} has no height in WINGS"
    for other in imports(TOOLS, module) & own:
        target = other.split("/")[0]
        assert target == wing or WING_HEIGHT[target] < WING_HEIGHT[wing], f"{module} imports {other}"


def test_no_circle() -> None:
    assert circles(AGENT) == []
    assert circles(TOOLS) == []


@pytest.mark.parametrize("module", WITHOUT_PIP)
def test_runs_without_anything_from_pip(module: str) -> None:
    """In a Python that finds nothing but the standard library, the agent and the tools."""
    code = (
        "import sys\n"
        "sys.path[:] = [path for path in sys.path if 'site-packages' not in path]\n"
        f"sys.path += {[str(AGENT.parent), str(TOOLS.parent)]!r}\n"
        f"import stonechat_tools.{module.replace('/', '.')}\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_any_tool_prints_nothing() -> None:
    for path in TOOLS.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            call = node.value if isinstance(node, ast.Expr) else None
            assert not isinstance(call, ast.Call), f"{path.name}:{node.lineno} runs at import"


def test_the_tools_start_where_there_is_no_boot_clock() -> None:
    code = "import time; del time.CLOCK_BOOTTIME; from stonechat.compat import ticks_ms; print(ticks_ms() > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True\n", done.stderr
