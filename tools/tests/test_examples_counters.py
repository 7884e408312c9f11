"""The worked examples of vendors' own counters: every command in their pages works, misuse alarms, a benign day does
not."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stonechat.custom_counters import counter_schema
from stonechat_tools.recording.counters_file import load_counters
from stonechat_tools.traces.files import read_trace

pytestmark = pytest.mark.slow(3)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/product.py"))
OTHER_SEEDS = (8, 9)


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_" + path.parent.name.replace("-", "_"), path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def product(name: str) -> Any:
    loaded = module(EXAMPLES / name / "product.py")
    kinds = [kind for kind in vars(loaded).values() if isinstance(kind, type) and hasattr(kind, "SCENARIOS")]
    return next(kind for kind in kinds if kind.SCHEMA)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(command, the lines that the page shows for it) of every console block, in order."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def run(command: str, folder: Path) -> str:
    """Run it as the page says, from a folder of its own, with this environment's programs."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command.replace("examples/", f"{EXAMPLES}/")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        env=dict(os.environ, PATH=path, PYTHONDONTWRITEBYTECODE="1"),
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", params=NAMES)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """(name, the folder in which every command of its page has run, what each printed)."""
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    page = (EXAMPLES / name / "README.md").read_text()
    return name, folder, [(command, shown, run(command, folder)) for command, shown in commands(page)]


def test_there_are_four() -> None:
    assert NAMES == ["camera", "door-lock", "voice-assistant", "wearable"]


def test_its_page_shows_what_its_commands_print(example: tuple[str, Path, Any]) -> None:
    """Recordings to the letter; of what depends on the training, whether there was an alarm."""
    _, _, ran = example
    assert len(ran) >= 9
    for command, shown, printed in ran:
        if " record " in command and "product.py" in command:
            assert printed.splitlines() == shown
        if " watch " in command:
            assert ("ALARM" in printed) == any("ALARM" in line for line in shown), printed


def test_a_benign_day_is_quiet_and_misuse_alarms(example: tuple[str, Path, Any]) -> None:
    name, folder, ran = example
    scenarios = product(name).SCENARIOS
    watched = {
        command.split("--what ")[1].split()[0]: (command, out) for command, _, out in ran if " watch " in command
    }
    assert set(watched) == set(scenarios)
    for what, (command, out) in watched.items():
        first_hour, hours, misuse, _ = scenarios[what]
        others = [run(re.sub(r"--seed \d+", f"--seed {seed}", command), folder) for seed in OTHER_SEEDS]
        for printed in [out, *others]:
            alarms = [line.split() for line in printed.splitlines() if "ALARM" in line]
            assert bool(alarms) == misuse, f"{command}\n{printed}"
            for line in alarms:
                assert line[1] == "5" and first_hour <= int(line[2][:2]) < first_hour + hours, printed


def test_two_ordinary_weeks_are_quiet(example: tuple[str, Path, Any]) -> None:
    _, folder, ran = example
    command = next(command for command, _, _ in ran if " watch " in command)
    printed = run(re.sub(r"--what \S+ --seed \d+", "--days 14 --seed 5", command), folder)
    assert printed.splitlines()[-1].endswith(" 0 alarms"), printed


def test_a_recording_of_misuse_is_evaluated(example: tuple[str, Path, Any]) -> None:
    _, folder, ran = example
    command = next(command for command, _, _ in ran if "stonechat evaluate" in command)
    got = json.loads(run(command + " --json", folder))
    assert got["false_alarms"] == 0
    (device,) = got["devices"].values()
    (attack,) = device["attacks"].values()
    assert json.dumps(attack).count("null") == 0, attack


def test_its_counters_file_names_its_schema(example: tuple[str, Path, Any]) -> None:
    name, folder, _ = example
    kind = product(name)
    file = EXAMPLES / name / "counters.toml"
    collector = load_counters(file)
    schema = counter_schema(kind.SCHEMA, kind.COUNTERS)
    assert (collector.schema.id, collector.schema.name) == (schema.id, schema.name)
    assert [row["path"] for row in tomllib.loads(file.read_text())["counters"]] == [
        f"counters/{column}" for column, _, _ in kind.COUNTERS
    ]
    recorded = read_trace(folder / "live.csv.gz")
    assert recorded.schema.id == schema.id and len(recorded) == 6
    assert recorded.deltas.sum() > 0
