"""Runs every portable test file of unit/ on every MicroPython target. (pytest itself runs them on CPython.)"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from targets import Target, targets  # noqa: E402

FILES = sorted(path.name for path in (HERE / "unit").glob("test_*.py"))


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
@pytest.mark.parametrize("name", FILES)
def test_unit_on_target(name: str, target: Target) -> None:
    if target.missing:
        pytest.skip(f"{target.name}: {target.missing}")
    done = target.run("run.py", "unit/" + name)
    assert done.returncode == 0, done.stdout + done.stderr
