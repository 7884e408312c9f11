"""The agent's, the collector's and the tools' tests on Python 3.13 as Debian trixie and Raspberry Pi OS have it."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from once import once

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "firmware_tests"))
from targets import trixie_python  # noqa: E402

pytestmark = [pytest.mark.system, pytest.mark.timeout(1200)]
PACKAGES = ROOT / ".targets" / "wheels" / "python3.13"
# Not run: benchmarks and boards (nothing of them depends on this Python), documentation, proofs, and these tests.
LEFT_OUT = (
    "bench",
    "build",
    "ci",
    "demo",
    "docs",
    "examples",
    "int8_memory",
    "lab",
    "packaging",
    "proofs",
    "system",
    "world",
)
# This Python is started by a script, so that a program makes one call more than it asks for.
COUNTED_EXACTLY = ("a_million_calls", "exec_fork_and_exit", "a_32_bit_caller", "each_service_counts_by_itself")
LACKING = {"tflite_micro", "tflite_runtime"}  # no wheel for Python 3.13: the tests that need them are skipped by name
COMMANDS = {"stonechat": "stonechat_tools.cli", "stonechat-agent": "stonechat.linux.cli"}


def prepare() -> None:
    """All that the tests import, for this Python, fetched once; the working copy on its path."""
    python = Path(trixie_python().command[0])

    def fetch(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--target", str(folder)]
        pip += ["-c", "constraints.txt", "--group", "test", ".[tools,parquet,release,postgres,alerts]"]
        done = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for own in folder.glob("stonechat*"):
            shutil.rmtree(own)  # the working copy is what is tested

    lists = (ROOT / "pyproject.toml", ROOT / "constraints.txt")
    once(PACKAGES, fetch, hashlib.sha256(b"".join(path.read_bytes() for path in lists)).hexdigest())
    path = python.parent.parent / "usr/lib/python3/dist-packages/stonechat.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{ROOT}/agent\n{ROOT}/tools\n{PACKAGES}\n")
    for folder in (python.parent, python.parent.parent / "usr/bin"):
        for name, module in COMMANDS.items():
            (folder / name).write_text(f'#!/bin/sh\nexec {python} -m {module} "$@"\n')
            (folder / name).chmod(0o755)
    for program in (PACKAGES / "bin").iterdir():
        if program.name not in COMMANDS:
            (python.parent / program.name).unlink(missing_ok=True)
            (python.parent / program.name).symlink_to(program)


def test_the_tests_pass_on_trixies_python() -> None:
    python = trixie_python()
    if python.missing:
        pytest.skip(f"{python.name}: {python.missing}")
    prepare()
    files = [
        path for path in sorted((ROOT / "tools/tests").glob("test_*.py")) if not path.stem[5:].startswith(LEFT_OUT)
    ]
    assert len(files) > 25
    command = [*python.command, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-n", "3", "--dist", "loadfile", "-m", "not system and not slow"]
    command += ["-k", " and ".join(f"not {name}" for name in COUNTED_EXACTLY)]
    with tempfile.TemporaryDirectory(prefix="py-") as scratch:  # not below tmp_path: a socket's path has 107 bytes
        Path(scratch).chmod(0o711)
        command += ["--basetemp", f"{scratch}/t", *map(str, files)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-8000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED") and "could not import" in line]
    assert all(any(name in line for name in LACKING) for line in skipped), skipped
    print(done.stdout.splitlines()[-1])
