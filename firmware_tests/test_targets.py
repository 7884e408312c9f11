"""Runs every portable test file of unit/ on every MicroPython target. (pytest itself runs them on CPython.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from targets import Target, targets  # noqa: E402

EVERY = 4  # of a test that tries every place: emulated, one in four; on the two others all
FILES = sorted(path.name for path in (HERE / "unit").glob("test_*.py"))


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
@pytest.mark.parametrize("name", FILES)
def test_unit_on_target(name: str, target: Target) -> None:
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")
    done = target.run("run.py", "unit/" + name, timeout_s=200, every=EVERY if target.name == "unix-armhf" else 1)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", [target for target in targets() if target.name == "unix-x64"], ids=["unix-x64"])
def test_the_runner_finds_the_agent_by_itself(target: Target, tmp_path: Path) -> None:
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")
    environment = {name: value for name, value in os.environ.items() if name != "MICROPYPATH"}
    for folder, path in ((tmp_path, "unit/test_cbor.py"), (HERE.parent, "firmware_tests/unit/test_cbor.py")):
        command = [*target.command, str(HERE / "run.py"), path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)
        assert done.returncode == 0 and ", 0 failed" in done.stdout, done.stdout + done.stderr
